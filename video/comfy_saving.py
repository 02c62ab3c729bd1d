"""Save Video's side that touches ComfyUI: where files go, what a VIDEO holds, progress, previews and interruption."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy.cli_args import args
from comfy.model_management import throw_exception_if_processing_interrupted
from comfy.utils import ProgressBar
from comfy_api.latest import InputImpl, Types, io, ui
from PIL import Image
from torch import Tensor

from .comfy_formats import formats
from .comfy_video import trim_window
from .encoding import EncodedVideo, encode_video, frame_rate, picture_size, save_picture
from .errors import VideoError
from .frame_stream import ImageFrames, TappedFrames, VideoFrames, playing_order
from .metadata import workflow_tags
from .output_file import numbered_names
from .preview_copy import LONG_SIDE, PreviewCopy, small_picture
from .reader import FrameSelection, open_video
from .stream_copy import copy_streams, fits
from .video_formats import VideoFormat

PREVIEW_SECONDS = 0.5
PREVIEW_PREFIX = "apple_silicon_video/preview"


@dataclass(frozen=True)
class Settings:
    """What the node asks for; see its tooltips. encoder_options is text, "name=value name=value"."""

    filename_prefix: str
    format: str
    quality: str
    loop: int = 0
    ping_pong: bool = False
    first_frame: bool = False
    copy_streams: bool = True
    software_only: bool = False
    audio_codec: str | None = None
    encoder_options: str = ""


@dataclass(frozen=True)
class _Clip:
    """What is saved: frames in any order, their number, rate, size and sound, and the file if it is a whole one."""

    frames: Callable[[list[range]], Iterable[Tensor]]
    count: int
    fps: Fraction
    size: tuple[int, int]
    audio: Mapping[str, Any] | None
    images: Tensor | None = None
    file: str | BytesIO | None = None


def save(
    images: Tensor | None,
    video: Any,
    mask: Tensor | None,
    audio: Mapping[str, Any] | None,
    fps: float,
    settings: Settings,
    hidden: Any,
) -> io.NodeOutput:
    """Write the file and show it. Returns the node's VIDEO and path with what the front end displays.

    Raises VideoError, one sentence, for input that cannot be saved.
    """
    if (images is None) == (video is None):
        raise VideoError("Connect either images or a video to Save Video.")
    video_format = formats()[settings.format]
    tags = {} if args.disable_metadata else workflow_tags(hidden.prompt, hidden.extra_pnginfo)
    with ExitStack() as stack:
        clip = _clip_of_images(images, mask, audio, fps) if images is not None else _clip_of(video, mask, audio, stack)
        folder, stem, counter, subfolder = output_name(settings.filename_prefix, *clip.size)
        names = numbered_names(folder, stem, counter, video_format.suffix)
        run = _Run(clip, video_format, settings, tags)
        copied = clip.file is not None and _may_copy(settings, mask, audio) and fits(clip.file, video_format)
        saved = run.copy(names, stack) if copied else run.encode(names, stack)
        if settings.first_frame and run.first is not None:
            stems = (saved.path.with_name(f"{saved.path.stem}{more}.png") for more in _suffixes())
            save_picture(stems, run.first, tags)
        preview = run.finish_preview()
    shown = shown_result(video_format, ui.SavedResult(saved.path.name, subfolder, io.FolderType.output), preview)
    return io.NodeOutput(_video_output(saved, video_format, clip, video), str(saved.path), ui=shown)


def _clip_of_images(
    images: Tensor, mask: Tensor | None, audio: Mapping[str, Any] | None, fps: float | Fraction
) -> _Clip:
    size = picture_size(images)
    return _Clip(
        lambda order: ImageFrames(images, mask, order), images.shape[0], frame_rate(fps), size, audio, images=images
    )


def _clip_of(video: Any, mask: Tensor | None, audio: Mapping[str, Any] | None, stack: ExitStack) -> _Clip:
    """A VIDEO: of a file frame by frame, of anything else with the frames that it gives."""
    if not isinstance(video, InputImpl.VideoFromFile):
        parts = video.get_components()
        sound = audio if audio is not None else parts.audio
        return _clip_of_images(parts.images, mask, sound, Fraction(parts.frame_rate))
    source = video.get_stream_source()
    reader = stack.enter_context(open_video(source))
    start, length = trim_window(video, reader)
    selection = FrameSelection(
        start_time=start or None,
        length=length or None,
        fps=reader.info.fps if reader.info.variable_frame_rate else None,
    )
    indices = reader.indices(selection)
    sound = audio if audio is not None else reader.audio(*reader.section(selection))
    return _Clip(
        lambda order: VideoFrames(reader, indices, mask, order),
        len(indices),
        frame_rate(reader.info.fps),
        (reader.info.width, reader.info.height),
        sound,
        file=source if not start and not length else None,
    )


def _may_copy(settings: Settings, mask: Tensor | None, audio: Mapping[str, Any] | None) -> bool:
    plain = not (settings.loop or settings.ping_pong or settings.encoder_options or settings.audio_codec)
    return settings.copy_streams and plain and mask is None and audio is None


class _Run:
    """One save: passes frames on, remembers what previews need, reports progress, obeys an interruption."""

    def __init__(self, clip: _Clip, video_format: VideoFormat, settings: Settings, tags: Mapping[str, str]) -> None:
        self._clip, self._format, self._settings, self._tags = clip, video_format, settings, tags
        animated = video_format.writer in ("gif", "webp")
        self._loops = (settings.loop or None) if animated else None
        order = playing_order(clip.count, 0 if animated else settings.loop, settings.ping_pong)
        self._frames = clip.frames(order)
        self._bar = ProgressBar(sum(map(len, order)))
        self._copy: PreviewCopy | None = None
        self._last: Tensor | None = None
        self._shown_at = 0.0
        # The front end keeps a preview in front of a node's pictures, but not of its videos and animations.
        self._live = video_format.preview != "image" or _is_animation(video_format)
        self.first: Tensor | None = None

    def encode(self, names: Iterable[Path], stack: ExitStack) -> EncodedVideo:
        """Encode every frame."""
        self._begin_preview(stack)
        settings = self._settings
        return encode_video(
            names,
            TappedFrames(self._frames, self._begin, self._tap),
            fps=self._clip.fps,
            video_format=self._format,
            quality=settings.quality,
            audio=self._clip.audio,
            audio_codec=settings.audio_codec,
            metadata=self._tags,
            encoder_options=parsed_options(settings.encoder_options),
            software_only=settings.software_only,
            loops=self._loops,
            on_frame=self._on_frame,
        )

    def copy(self, names: Iterable[Path], stack: ExitStack) -> EncodedVideo:
        """Take the file's streams as they are; frames are decoded only for the pictures that were asked for."""
        assert self._clip.file is not None
        saved = copy_streams(names, self._clip.file, self._format, self._tags, self._on_frame)
        self._begin_preview(stack)
        if self._copy is not None:
            self._begin()
            for frame in self._frames:
                throw_exception_if_processing_interrupted()
                self._tap(frame)
        elif self._settings.first_frame:
            self.first = next(iter(self._frames))
        return saved

    def finish_preview(self) -> Path | None:
        """The small copy's file, None where there is none."""
        return self._copy.finish() if self._copy is not None else None

    def _begin_preview(self, stack: ExitStack) -> None:
        if self._format.preview != "copy":
            return
        folder, stem, counter, _, _ = folder_paths.get_save_image_path(
            PREVIEW_PREFIX, folder_paths.get_temp_directory(), *self._clip.size
        )
        names = numbered_names(Path(folder), stem, counter, ".mp4")
        self._copy = stack.enter_context(PreviewCopy(names, self._clip.fps, self._clip.audio))

    def _begin(self) -> None:
        if self._copy is not None:
            self._copy.begin()

    def _tap(self, frame: Tensor) -> None:
        self.first = frame if self.first is None else self.first
        self._last = frame
        if self._copy is not None:
            self._copy.add(frame)

    def _on_frame(self, done: int) -> None:
        throw_exception_if_processing_interrupted()
        preview, now = None, time.monotonic()
        if self._live and done and self._last is not None and now - self._shown_at >= PREVIEW_SECONDS:
            preview, self._shown_at = ("JPEG", preview_picture(self._last), LONG_SIDE), now
        self._bar.update_absolute(done, preview=preview)


def preview_picture(frame: Tensor) -> Image.Image:
    small = small_picture(frame, LONG_SIDE).nan_to_num(nan=0.0).clamp(0, 1)
    return Image.fromarray((small * 255).round().to("cpu", torch.uint8).numpy())


def shown_result(video_format: VideoFormat, saved: ui.SavedResult, preview: Path | None) -> Any:
    """What the front end displays: the file, or the small copy of it."""
    if video_format.preview == "image":
        return ui.SavedImages(
            [saved], is_animated=video_format.suffix == ".webp"
        )  # it takes an "animated" GIF for a video
    if video_format.preview == "file":
        return ui.PreviewVideo([saved])
    if preview is None:
        return None
    subfolder = str(preview.parent.relative_to(folder_paths.get_temp_directory()))
    return ui.PreviewVideo([ui.SavedResult(preview.name, subfolder, io.FolderType.temp)])


def _is_animation(video_format: VideoFormat) -> bool:
    """Whether the front end shows it as an animated picture; it takes any other animation for a video."""
    return video_format.suffix == ".webp"


def _video_output(saved: EncodedVideo, video_format: VideoFormat, clip: _Clip, video: Any) -> Any:
    """The saved file as VIDEO; of pictures, which core does not read as one, what was saved."""
    if video_format.writer == "container":
        return InputImpl.VideoFromFile(str(saved.path))
    if clip.images is None:
        return video
    parts: Any = Types.VideoComponents(images=clip.images[..., :3], audio=clip.audio, frame_rate=clip.fps)  # type: ignore
    return InputImpl.VideoFromComponents(parts)


def parsed_options(options: str) -> dict[str, str]:
    """ "preset=slow tune=film" as a dict."""
    pairs = [part.partition("=") for part in options.replace(",", " ").split()]
    for name, equals, value in pairs:
        if not (name and equals and value):
            raise VideoError(
                f"The encoder options hold {name + equals + value!r}; write name=value, separated by spaces."
            )
    return {name: value for name, _, value in pairs}


def _suffixes() -> Iterable[str]:
    yield ""
    number = 1
    while True:
        yield f"first_{number}_"
        number += 1


def output_name(prefix: str, width: int, height: int) -> tuple[Path, str, int, str]:
    """Folder, name, first free number and subfolder that ComfyUI gives to a prefix."""
    try:
        folder, stem, counter, subfolder, _ = folder_paths.get_save_image_path(
            prefix, folder_paths.get_output_directory(), width, height
        )
    except Exception as error:  # core raises a bare Exception for a folder outside of output
        reason = error.strerror if isinstance(error, OSError) else "it leads outside of the output folder"
        raise VideoError(f"The filename prefix {prefix!r} cannot be used: {reason}; choose another one.") from error
    return Path(folder), stem, counter, subfolder
