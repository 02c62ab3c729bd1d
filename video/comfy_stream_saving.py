"""Saving frames that come one few after the other, such as from a VAE: Save Video's file, names, metadata, previews.

The frames are not kept and cannot be asked for again, so only formats of video containers are written, once each frame.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import folder_paths
from comfy.cli_args import args
from comfy.model_management import throw_exception_if_processing_interrupted
from comfy_api.latest import InputImpl, io, ui
from torch import Tensor

from .comfy_formats import formats
from .comfy_saving import (
    PREVIEW_PREFIX,
    PREVIEW_SECONDS,
    Settings,
    output_name,
    parsed_options,
    preview_picture,
    shown_result,
)
from .encoding import VideoWriter, frame_rate, picture_size
from .errors import VideoError
from .metadata import workflow_tags
from .output_file import numbered_names
from .preview_copy import LONG_SIDE, PreviewCopy


class StreamedSave:
    """Context manager: any number of ``write(frames)``, then ``finish()``; without that nothing is left behind.

    audio: an AUDIO, cut to the video's length. fps: frames a second. settings: as for Save Video, but that frames are
    neither repeated nor copied. hidden: the node's prompt and workflow.
    Raises VideoError, one sentence, for input that cannot be saved.
    """

    def __init__(self, audio: Mapping[str, Any] | None, fps: float, settings: Settings, hidden: Any) -> None:
        self._format = formats()[settings.format]
        if self._format.writer != "container":
            raise VideoError(f"{settings.format} takes all frames at once; decode to images and use Save Video for it.")
        self._audio, self._fps, self._settings = audio, frame_rate(fps), settings
        self._options = parsed_options(settings.encoder_options)
        self._tags = {} if args.disable_metadata else workflow_tags(hidden.prompt, hidden.extra_pnginfo)
        self._stack = ExitStack()
        self._writer: VideoWriter | None = None
        self._copy: PreviewCopy | None = None
        self._subfolder = ""
        self._last: Tensor | None = None
        self._shown_at = 0.0

    def __enter__(self) -> StreamedSave:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)

    def write(self, frames: Tensor) -> None:
        """Add frames, floating [t, H, W, C >= 3]."""
        writer = self._writer or self._begin(frames)
        for frame in frames:
            throw_exception_if_processing_interrupted()
            writer.write(frame)
            self._last = frame
            if self._copy is not None:
                self._copy.add(frame)

    def preview(self) -> tuple[str, Any, int] | None:
        """What ComfyUI's progress bar shows: the last frame, now and then."""
        now = time.monotonic()
        if self._last is None or now - self._shown_at < PREVIEW_SECONDS:
            return None
        self._shown_at = now
        return "JPEG", preview_picture(self._last), LONG_SIDE

    def finish(self) -> io.NodeOutput:
        """Complete the file: the node's VIDEO and path with what the front end displays."""
        if self._writer is None:
            raise VideoError("There are no frames to save; check the nodes before this one.")
        saved = self._writer.finish()
        preview = self._copy.finish() if self._copy is not None else None
        result = ui.SavedResult(saved.path.name, self._subfolder, io.FolderType.output)
        shown = shown_result(self._format, result, preview)
        return io.NodeOutput(InputImpl.VideoFromFile(str(saved.path)), str(saved.path), ui=shown)

    def _begin(self, frames: Tensor) -> VideoWriter:
        """Open the file, and the small copy where a browser cannot play it, when the frames' size is known."""
        size = picture_size(frames)
        folder, stem, counter, self._subfolder = output_name(self._settings.filename_prefix, *size)
        self._writer = self._stack.enter_context(
            VideoWriter(
                numbered_names(folder, stem, counter, self._format.suffix),
                fps=self._fps,
                video_format=self._format,
                quality=self._settings.quality,
                audio=self._audio,
                audio_codec=self._settings.audio_codec,
                metadata=self._tags,
                encoder_options=self._options,
                software_only=self._settings.software_only,
            )
        )
        if self._format.preview == "copy":
            place, stem, counter, _, _ = folder_paths.get_save_image_path(
                PREVIEW_PREFIX, folder_paths.get_temp_directory(), *size
            )
            names = numbered_names(Path(place), stem, counter, ".mp4")
            self._copy = self._stack.enter_context(PreviewCopy(names, self._fps, self._audio))
            self._copy.begin()
        return self._writer
