"""Nodes that make longer clips: joined segments with a cross-fade, videos put together, and parts cut out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from comfy_api.latest import InputImpl, io, ui

from ..video.video_formats import load_formats
from .progress import show_count, show_part
from .video_inputs import containers, format_input, fps_input, quality_input, time_input
from .video_paths import VideoFromPath, find

CATEGORY = "Apple Silicon Video/video"
MOST_CLIPS = 50
TRANSITIONS = ["smooth", "linear", "cut"]
JOIN_MODES = ["auto", "copy", "encode"]
TRIM_MODES = ["exact", "fast", "encode"]
UNITS = ["seconds", "frames"]


class ExtendVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        clip = io.Image.Input("clip", tooltip="A segment's frames; all segments have the same size.")
        sound = io.Audio.Input("audio", tooltip="The sound of the segment of the same number.")
        return io.Schema(
            node_id="MPSExtendVideo",
            display_name="Extend Video (MPS)",
            category=CATEGORY,
            description=(
                "Joins segments of one scene into a longer clip: the last frames of each overlap the first frames of "
                "the next and fade into them. Start each segment with the Last Frames (MPS) of the one before."
            ),
            search_aliases=["extend video", "join clips", "cross-fade", "crossfade", "batch images", "longer video"],
            inputs=[
                io.Autogrow.Input(
                    "clips",
                    template=io.Autogrow.TemplatePrefix(clip, prefix="clip", min=2, max=MOST_CLIPS),
                    tooltip="The segments in order; a new slot appears when the last one is connected.",
                ),
                io.Autogrow.Input(
                    "sounds",
                    template=io.Autogrow.TemplatePrefix(sound, prefix="audio", min=0, max=MOST_CLIPS),
                    optional=True,
                    tooltip="The segments' sound, if any, in the same order; it is faded like the frames.",
                ),
                io.Int.Input(
                    "overlap",
                    default=1,
                    min=0,
                    max=256,
                    tooltip=(
                        "How many of the last frames of a segment the next one shows again: as many as it was "
                        "started with, 1 for image to video. 0 puts the segments side by side."
                    ),
                ),
                io.Combo.Input(
                    "transition",
                    options=TRANSITIONS,
                    default="smooth",
                    tooltip=(
                        "How the overlap fades: smooth starts and ends slowly, linear is even, cut changes in the "
                        "middle. Light is mixed, as by a projector, not code values."
                    ),
                ),
                io.Boolean.Input(
                    "match_color",
                    default=False,
                    tooltip=(
                        "Give every segment the brightness, contrast and tint that the one before has where they "
                        "overlap; against the drift of long videos."
                    ),
                ),
                fps_input("Frames a second of the segments; used for the length of their sound only."),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The joined clip."),
                io.Audio.Output(display_name="audio", tooltip="The joined sound; nothing if no sound is connected."),
                io.Int.Output(display_name="frame_count", tooltip="Frames of the joined clip."),
            ],
        )

    @classmethod
    def execute(
        cls,
        clips: dict[str, Any],
        overlap: int,
        transition: str,
        match_color: bool,
        fps: float,
        sounds: dict[str, Any] | None = None,
    ) -> io.NodeOutput:
        from ..video.extend import join_audio, join_images

        numbers = [_number(name) for name in clips if clips[name] is not None]
        segments = [clip for clip in clips.values() if clip is not None]
        images = join_images(segments, overlap, transition, match_color, show_count(len(segments)))
        heard = {_number(name): sound for name, sound in (sounds or {}).items() if sound is not None}
        audio = None
        if heard:
            first = next(iter(heard.values()))
            silence = {"waveform": first["waveform"][..., :0], "sample_rate": first["sample_rate"]}
            tracks = [heard.get(number, silence) for number in numbers]
            audio = join_audio(tracks, [len(segment) for segment in segments], overlap, fps, transition)
        return io.NodeOutput(images, audio, len(images))


class LastFrames(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MPSLastFrames",
            display_name="Last Frames (MPS)",
            category=CATEGORY,
            description=(
                "Splits off the last frames of a clip: the start of the next segment of a longer video. Join the "
                "segments with Extend Video (MPS)."
            ),
            search_aliases=["last frame", "end frames", "split images", "continue video", "image from batch"],
            inputs=[
                io.Image.Input("images", tooltip="The clip."),
                io.Int.Input(
                    "count",
                    default=1,
                    min=1,
                    max=4096,
                    tooltip="How many frames: 1 for image-to-video models, more for models that continue a clip.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="last_frames", tooltip="The last frames, in order."),
                io.Image.Output(display_name="frames_before", tooltip="All frames before them; may be none."),
            ],
        )

    @classmethod
    def execute(cls, images: Any, count: int) -> io.NodeOutput:
        from ..video.extend import last_frames

        return io.NodeOutput(*last_frames(images, count))


def _encoding_inputs() -> list[Any]:
    """The two inputs that say how to encode what cannot be copied."""
    return [
        format_input(
            containers(load_formats()),
            "What to encode to, where encoding is needed; a copy keeps the first video's kind of file.",
        ),
        quality_input("Of the encoding, where it is needed: small, standard, high, or best.", default="high"),
    ]


class ConcatenateVideos(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        video = io.Video.Input("video", tooltip="A video; a copy needs the same size, codec and settings in all.")
        return io.Schema(
            node_id="MPSConcatenateVideos",
            display_name="Concatenate Videos (MPS)",
            category=CATEGORY,
            description=(
                "Puts videos one after another in one file, without encoding where their streams allow it: nothing "
                "is lost and it takes a moment. Sound stays with its pictures."
            ),
            search_aliases=["concatenate", "join videos", "merge videos", "append video", "concat"],
            inputs=[
                io.Autogrow.Input(
                    "videos",
                    template=io.Autogrow.TemplatePrefix(video, prefix="video", min=1, max=MOST_CLIPS),
                    tooltip="The videos in order; a new slot appears when the last one is connected.",
                ),
                io.Combo.Input(
                    "mode",
                    options=JOIN_MODES,
                    default="auto",
                    tooltip="auto copies where that is exact and encodes otherwise; copy refuses instead of encoding.",
                ),
                *_encoding_inputs(),
            ],
            outputs=[
                io.Video.Output(display_name="video", tooltip="The joined video, a file in the temporary folder."),
                io.String.Output(display_name="report", tooltip="Whether it was copied or encoded, and why."),
            ],
        )

    @classmethod
    def execute(cls, videos: dict[str, Any], mode: str, format: str, quality: str) -> io.NodeOutput:
        from ..video.comfy_video import video_file
        from ..video.concatenate import Encoding, concatenate

        encoding = Encoding(load_formats()[format], quality)
        files = [video_file(video, _names("joined"), encoding) for video in videos.values() if video is not None]
        edited = concatenate(files, _names("joined"), encoding, mode=mode, on_progress=show_part())
        return _video_output(edited)


class TrimVideo(VideoFromPath):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MPSTrimVideo",
            display_name="Trim Video (MPS)",
            category=CATEGORY,
            description=(
                "Cuts a part out of a video, by seconds or by frames, with its sound. It is copied without encoding "
                "where the range begins and ends at clean places, or always if you choose fast."
            ),
            search_aliases=["trim", "cut video", "video range", "shorten", "split video"],
            inputs=[
                io.Combo.Input(
                    "unit",
                    options=UNITS,
                    default="seconds",
                    tooltip="What start and end count: seconds, or frames, the first of which is 0.",
                ),
                time_input("start", "Where the part begins; a negative number counts from the end of the video."),
                time_input(
                    "end",
                    "Where it ends: this moment or frame is not included. 0 is the end of the video, a negative "
                    "number counts from there.",
                ),
                io.Combo.Input(
                    "mode",
                    options=TRIM_MODES,
                    default="exact",
                    tooltip=(
                        "exact gives exactly these frames, encoding them if need be; fast never encodes and may begin "
                        "earlier, with a key frame, and end later; encode always encodes."
                    ),
                ),
                *_encoding_inputs(),
                io.Video.Input("video", optional=True, tooltip="The video to cut."),
                io.String.Input(
                    "path",
                    default="",
                    optional=True,
                    tooltip="A video file instead; used if no video is connected.",
                ),
            ],
            outputs=[
                io.Video.Output(display_name="video", tooltip="The part, a file in the temporary folder."),
                io.String.Output(display_name="report", tooltip="Whether it was copied or encoded, and why."),
            ],
        )

    @classmethod
    def execute(
        cls,
        unit: str,
        start: float,
        end: float,
        mode: str,
        format: str,
        quality: str,
        video: Any = None,
        path: str = "",
    ) -> io.NodeOutput:
        from ..video.comfy_video import video_file
        from ..video.concatenate import Encoding
        from ..video.errors import VideoError
        from ..video.reader import FrameSelection
        from ..video.trim import trim

        encoding = Encoding(load_formats()[format], quality)
        if video is None and not path.strip():
            raise VideoError("Trim Video (MPS) has no video; connect one or enter a path.")
        source = find(path) if video is None else video_file(video, _names("trimmed"), encoding)
        if unit == "frames":
            selection = FrameSelection(start_frame=round(start), end_frame=round(end) or None)
        else:
            selection = FrameSelection(start_time=start, end_time=end or None)
        return _video_output(trim(source, _names("trimmed"), encoding, selection, mode=mode, on_progress=show_part()))


def _number(name: str) -> int:
    """The number behind the name of a slot that grew: "clip12" is 12."""
    return int("".join(filter(str.isdigit, name)) or 0)


def _names(stem: str) -> Callable[[str], Iterable[Path]]:
    """Numbered names in ComfyUI's temporary folder, by ending."""
    import folder_paths

    from ..video.output_file import numbered_names

    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    return lambda suffix: numbered_names(folder, f"mps_{stem}", 1, suffix)


def _video_output(edited: Any) -> io.NodeOutput:
    preview = ui.PreviewVideo([ui.SavedResult(edited.path.name, "", io.FolderType.temp)])
    return io.NodeOutput(InputImpl.VideoFromFile(str(edited.path)), edited.report, ui=preview)


NODES: list[type[io.ComfyNode]] = [ExtendVideo, LastFrames, ConcatenateVideos, TrimVideo]
