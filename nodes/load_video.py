"""Nodes that read: videos and image sequences as frames, sound and masks, single frames, and what a file is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from comfy_api.latest import io, ui

from ..video.geometry import LARGEST_SIDE, MODES, MULTIPLES
from .progress import show_count
from .rerun import always, file_fingerprint
from .video_inputs import time_input
from .video_paths import VideoFromPath, find, input_videos, sequence_path

CATEGORY = "Apple Silicon Video/video"
MOST_FRAMES = 1_000_000


def _range_inputs() -> list[Any]:
    """Which frames."""
    return [
        time_input("start_time", "Seconds at which to begin; a negative number counts from the end of the video."),
        time_input("length", "How many seconds to load; 0 loads up to the end.", least=0.0),
        io.Float.Input(
            "fps",
            default=0.0,
            min=0.0,
            max=1000.0,
            step=0.001,
            round=0.000001,
            tooltip=(
                "Frames a second to resample to, by the time at which each frame is shown: 16 for Wan 2.1 and the "
                "Wan 2.2 A14B models, 24 for Wan 2.2 5B. 0 takes every frame of the video."
            ),
        ),
    ]


def _count_inputs() -> list[Any]:
    """How many frames."""
    return [
        io.Int.Input("every_nth", default=1, min=1, max=10_000, tooltip="Take every n-th frame only; 1 takes all."),
        io.Int.Input(
            "frame_limit",
            default=0,
            min=0,
            max=MOST_FRAMES,
            tooltip="The largest number of frames; 0 is no limit. 832x480 takes 4.8 MB a frame.",
        ),
        io.Boolean.Input(
            "frames_4n1",
            default=False,
            tooltip="Leave frames out at the end until 4 n + 1 are left (5, 9, ... 81), the numbers that Wan takes.",
        ),
    ]


def _size_inputs() -> list[Any]:
    """How large."""
    return [
        io.Int.Input(
            "width",
            default=0,
            min=0,
            max=LARGEST_SIDE,
            tooltip="Width of the frames in pixels; 0 follows from the height, or keeps the source's size.",
        ),
        io.Int.Input(
            "height",
            default=0,
            min=0,
            max=LARGEST_SIDE,
            tooltip="Height of the frames in pixels; 0 follows from the width, or keeps the source's size.",
        ),
        io.Combo.Input(
            "fit",
            options=list(MODES),
            default="crop",
            tooltip=(
                "If the shape differs: crop cuts off the edges, pad adds black around, fit makes it smaller than "
                "asked, stretch distorts."
            ),
        ),
        io.Combo.Input(
            "multiple_of",
            options=[str(multiple) for multiple in MULTIPLES],
            default="1",
            tooltip="Make both sides a multiple of this: 16 for Wan 2.1 and 2.2 A14B, 32 for Wan 2.2 5B.",
        ),
    ]


def _frame_outputs() -> list[Any]:
    return [
        io.Image.Output(display_name="images", tooltip="The frames."),
        io.Mask.Output(display_name="mask", tooltip="Where the frames are transparent; all 0 without transparency."),
    ]


def _video_outputs() -> list[Any]:
    return [
        *_frame_outputs(),
        io.Audio.Output(display_name="audio", tooltip="The sound of exactly these frames; none for a silent video."),
        io.Float.Output(display_name="fps", tooltip="Frames a second of the loaded frames."),
        io.Int.Output(display_name="frame_count", tooltip="How many frames were loaded."),
        io.Video.Output(
            display_name="video",
            tooltip="The same part of the file as VIDEO, at its own rate and size, read only when used.",
        ),
    ]


class LoadVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MPSLoadVideo",
            display_name="Load Video (MPS)",
            category=CATEGORY,
            description=(
                "Loads frames and sound of a video in the input folder: any part, every n-th frame or another frame "
                "rate, in any size. Exact for variable frame rates, rotated phone videos, 10-bit, HDR and transparency."
            ),
            search_aliases=["load video", "import video", "video to images", "vhs load video", "upload video", "gif"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=input_videos(),
                    upload=io.UploadType.video,
                    tooltip="A video in ComfyUI's input folder; the button uploads one.",
                ),
                *_range_inputs(),
                *_count_inputs(),
                *_size_inputs(),
            ],
            outputs=_video_outputs(),
        )

    @classmethod
    def execute(cls, file: str, **options: Any) -> io.NodeOutput:
        import folder_paths

        return _load(folder_paths.get_annotated_filepath(file), options)

    @classmethod
    def fingerprint_inputs(cls, file: str | None, **options: Any) -> Any:
        import folder_paths

        if file is None:
            return always()
        return file_fingerprint(Path(folder_paths.get_annotated_filepath(file)))

    @classmethod
    def validate_inputs(cls, file: str | None) -> bool | str:
        import folder_paths

        if file is None or folder_paths.exists_annotated_filepath(file):
            return True
        return f"{file} is not in the input folder; upload it, or choose another file."


class LoadVideoPath(VideoFromPath):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MPSLoadVideoPath",
            display_name="Load Video from Path (MPS)",
            category=CATEGORY,
            description=(
                "Like Load Video (MPS), for a file anywhere on this computer, for a file that was just saved, or for "
                "the VIDEO of another node."
            ),
            search_aliases=[
                "load video path",
                "open video file",
                "vhs load video path",
                "video to images",
                "get frames",
            ],
            inputs=[
                _path_input(),
                *_range_inputs(),
                *_count_inputs(),
                *_size_inputs(),
                _video_input(),
            ],
            outputs=_video_outputs(),
        )

    @classmethod
    def execute(cls, path: str, video: Any = None, **options: Any) -> io.NodeOutput:
        return _load(_chosen(path, video), options)


class LoadImageSequence(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MPSLoadImageSequence",
            display_name="Load Image Sequence (MPS)",
            category=CATEGORY,
            description=(
                "Loads the images of a folder, or those that match a pattern, as frames, in counting order. PNG of "
                "16 bits keeps its precision, EXIF orientation is obeyed, transparency becomes the mask."
            ),
            search_aliases=["load images", "image sequence", "png sequence", "load image batch", "folder of images"],
            inputs=[
                io.String.Input(
                    "path",
                    default="",
                    tooltip=(
                        "A folder, or a name with * or %04d for the number: frames/img_%04d.png. Absolute, or inside "
                        "the input or output folder."
                    ),
                ),
                io.Int.Input(
                    "start_image",
                    default=0,
                    min=-MOST_FRAMES,
                    max=MOST_FRAMES,
                    tooltip="The first image, 0 being the first of the sequence; negative counts from the end.",
                ),
                *_count_inputs(),
                *_size_inputs(),
            ],
            outputs=[
                *_frame_outputs(),
                io.Int.Output(display_name="frame_count", tooltip="How many images were loaded."),
            ],
        )

    @classmethod
    def execute(cls, path: str, start_image: int, **options: Any) -> io.NodeOutput:
        from ..video.errors import VideoError
        from ..video.image_sequence import find_images, read_images

        found = find_images(sequence_path(path)).files
        files = found[start_image:] if start_image >= -len(found) else found
        files = files[:: options["every_nth"]][: options["frame_limit"] or None]
        if not files:
            raise VideoError(
                f"{path} has {len(found)} images, none from {start_image} on; enter a smaller start_image."
            )
        if options["frames_4n1"]:
            files = files[: (len(files) - 1) // 4 * 4 + 1]
        size = _frame_size(options)
        images, alpha = read_images(files, size=size, on_frame=show_count(len(files)))
        return io.NodeOutput(images, _mask(images, alpha), len(files))

    @classmethod
    def fingerprint_inputs(cls, path: str | None = "", **options: Any) -> Any:
        from ..video.errors import VideoError
        from ..video.image_sequence import find_images, fingerprint

        if path is None:
            return always()
        try:
            return json.dumps(fingerprint(find_images(sequence_path(path)).files))
        except (VideoError, OSError):
            return ""

    @classmethod
    def validate_inputs(cls, path: str | None = "") -> bool | str:
        from ..video.errors import VideoError
        from ..video.image_sequence import find_images

        if path is None:
            return True
        if not path.strip():
            return "The path is empty; enter a folder or a name with * or %04d for the number."
        try:
            find_images(sequence_path(path))
        except VideoError as error:
            return str(error)
        return True


class VideoInfo(VideoFromPath):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MPSVideoInfo",
            display_name="Video Info (MPS)",
            category=CATEGORY,
            description="Says what a video is: size, exact number of frames, rate, length, codec, colours, sound.",
            search_aliases=["video info", "frame count", "get fps", "video size", "ffprobe", "duration"],
            inputs=[_path_input(), _video_input()],
            outputs=[
                io.Int.Output(display_name="width", tooltip="Width in pixels, as shown."),
                io.Int.Output(display_name="height", tooltip="Height in pixels, as shown."),
                io.Int.Output(display_name="frame_count", tooltip="The exact number of frames."),
                io.Float.Output(display_name="fps", tooltip="Mean frames a second."),
                io.Float.Output(display_name="duration", tooltip="Length in seconds."),
                io.Boolean.Output(display_name="has_audio", tooltip="Whether it has sound."),
                io.String.Output(display_name="report", tooltip="All of it as text."),
            ],
        )

    @classmethod
    def execute(cls, path: str, video: Any = None) -> io.NodeOutput:
        from ..video.comfy_video import open_input
        from ..video.info_text import info_text

        with open_input(_chosen(path, video)) as reader:
            info = reader.info
        text = info_text(info)
        return io.NodeOutput(
            info.width,
            info.height,
            info.frames,
            float(info.fps),
            float(info.duration),
            info.audio is not None,
            text,
            ui=ui.PreviewText(text),
        )


class GetFrame(VideoFromPath):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MPSGetFrame",
            display_name="Get Frame (MPS)",
            category=CATEGORY,
            description=(
                "One frame of a video, by its number, without loading the others: -1 is the last frame, to start the "
                "next segment of image to video."
            ),
            search_aliases=["get frame", "last frame", "first frame", "extract frame", "frame by index", "thumbnail"],
            inputs=[
                _path_input(),
                io.Int.Input(
                    "index",
                    default=-1,
                    min=-MOST_FRAMES,
                    max=MOST_FRAMES,
                    tooltip="Number of the frame: 0 is the first, 1 the second, -1 the last, -2 the one before it.",
                ),
                _video_input(),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The frame."),
                io.Mask.Output(display_name="mask", tooltip="Where it is transparent; all 0 without transparency."),
                io.Float.Output(display_name="time", tooltip="When it is shown, in seconds."),
            ],
        )

    @classmethod
    def execute(cls, path: str, index: int, video: Any = None) -> io.NodeOutput:
        from ..video.comfy_video import open_input

        with open_input(_chosen(path, video)) as reader:
            chosen = reader.indices([index])
            image, alpha = reader.read_images(chosen)
            time = float(reader.timestamps()[chosen[0]])
        return io.NodeOutput(image, _mask(image, alpha), time)


def _path_input() -> Any:
    return io.String.Input(
        "path",
        default="",
        tooltip=(
            "A video file: an absolute path, or a name inside the input or output folder. Not used if a video is "
            "connected."
        ),
    )


def _video_input() -> Any:
    return io.Video.Input("video", optional=True, tooltip="The VIDEO of another node, instead of a path.")


def _chosen(path: str, video: Any) -> Any:
    from ..video.errors import VideoError

    if video is not None:
        return video
    if not path.strip():
        raise VideoError("There is no video; connect one or enter a path.")
    return find(path)


def _frame_size(options: dict[str, Any]) -> Any:
    from ..video.geometry import FrameSize

    size = FrameSize(options["width"], options["height"], options["fit"], int(options["multiple_of"]))
    return None if (size.width, size.height, size.multiple) == (0, 0, 1) else size


def _mask(images: Any, alpha: Any) -> Any:
    """ComfyUI's MASK of an alpha: 1 is transparent. Without one, zeros that take no memory."""
    return 1 - alpha if alpha is not None else images.new_zeros(1, 1, 1).expand(images.shape[:3])


def _load(source: Any, options: dict[str, Any]) -> io.NodeOutput:
    from ..video.comfy_video import open_input, video_of
    from ..video.selection import FrameSelection

    selection = FrameSelection(
        start_time=options["start_time"] or None,
        length=options["length"] or None,
        fps=options["fps"] or None,
        stride=options["every_nth"],
        limit=options["frame_limit"],
        round_to_4n1=options["frames_4n1"],
    )
    with open_input(source) as reader:
        count = len(reader.indices(selection))
        images, alpha = reader.read_images(selection, size=_frame_size(options), on_frame=show_count(count))
        audio = reader.audio(*reader.section(selection))
        rate = float(selection.rate(reader.info.fps))
        video = video_of(reader, source, selection)
    return io.NodeOutput(images, _mask(images, alpha), audio, rate, count, video)


NODES: list[type[io.ComfyNode]] = [LoadVideo, LoadVideoPath, LoadImageSequence, VideoInfo, GetFrame]
