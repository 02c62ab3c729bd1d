"""Video nodes: frames and sound to a file that plays everywhere and carries its workflow."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..video.comfy_formats import formats
from .video_inputs import encoder_inputs, format_input, fps_input, prefix_input, quality_input, settings

CATEGORY = "Apple Silicon Video/video"
ALIASES = ["save video", "export video", "video combine", "images to video", "png sequence"]
ALIASES += ["mp4", "mov", "webm", "gif", "webp", "h264", "hevc", "h265", "prores", "av1", "vp9"]


class SaveVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MPSSaveVideo",
            display_name="Save Video (MPS)",
            category=CATEGORY,
            description=(
                "Saves frames as a video in the output folder, with sound and with the workflow inside: drop the file "
                "onto ComfyUI to get the graph back. Uses the Mac's hardware encoder where there is one."
            ),
            search_aliases=ALIASES,
            inputs=[
                io.Image.Input(
                    "images",
                    optional=True,
                    tooltip="The frames, in order. A fourth channel is stored as alpha where the format has one.",
                ),
                io.Video.Input(
                    "video",
                    optional=True,
                    tooltip=(
                        "A video instead of images: copied without loss where the format fits, else encoded frame by "
                        "frame at its own rate."
                    ),
                ),
                io.Audio.Input(
                    "audio",
                    optional=True,
                    tooltip="Sound for the video, instead of its own; what is longer than the video is cut off.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White parts become transparent, for formats with alpha: one mask, or one for each frame.",
                ),
                fps_input(
                    "Frames a second: 16 for Wan 2.1 and the Wan 2.2 A14B models, 24 for Wan 2.2 5B. 23.976, 29.97 "
                    "and 59.94 mean the exact rates 24000/1001, 30000/1001 and 60000/1001. A connected video keeps "
                    "its own."
                ),
                prefix_input(
                    "Folder and name inside the output folder; a number is appended and no file is ever replaced. "
                    "May hold %date:yyyy-MM-dd%, %width%, %height% or a value such as %KSampler.seed%."
                ),
                format_input(
                    formats(),
                    "h264-mp4 plays everywhere; hevc is smaller; prores is for editing, prores4444 with alpha; "
                    "vp9-webm has alpha in browsers; gif, webp and png make pictures.",
                ),
                quality_input(
                    "small for sending, standard for watching (no visible loss in most clips), high for editing, "
                    "best when the file is to be encoded again."
                ),
                io.Int.Input(
                    "loop",
                    default=0,
                    min=0,
                    max=1000,
                    optional=True,
                    tooltip=(
                        "How many more times the clip is played: a video holds it so often again, a GIF or WebP stops "
                        "after that (0: it loops for ever)."
                    ),
                ),
                io.Boolean.Input(
                    "ping_pong",
                    default=False,
                    optional=True,
                    tooltip="Play the frames forward and then backward, so that a loop has no jump.",
                ),
                io.Boolean.Input(
                    "first_frame",
                    default=False,
                    optional=True,
                    tooltip="Also save the first frame as a PNG beside the video, with the workflow inside.",
                ),
                *encoder_inputs(),
                io.Boolean.Input(
                    "copy_streams",
                    default=True,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Copy a connected video without encoding it again where it already is what the format makes; "
                        "quality then has no effect."
                    ),
                ),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
            outputs=[
                io.Video.Output(display_name="video", tooltip="The saved file, for other video nodes."),
                io.String.Output(display_name="path", tooltip="Where the file was saved; the folder of PNG files."),
            ],
        )

    @classmethod
    def execute(
        cls,
        fps: float,
        filename_prefix: str,
        format: str,
        quality: str,
        images: Any = None,
        video: Any = None,
        audio: Any = None,
        mask: Any = None,
        **options: Any,
    ) -> io.NodeOutput:
        from ..video.comfy_saving import save

        wanted = settings(filename_prefix, format, quality, **options)
        return save(images, video, mask, audio, fps, wanted, cls.hidden)


NODES: list[type[io.ComfyNode]] = [SaveVideo]
