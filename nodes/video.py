"""Video nodes: frames and sound to a file that plays everywhere and carries its workflow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from comfy_api.latest import InputImpl, io, ui

from ..video.video_formats import QUALITIES, load_formats

CATEGORY = "Apple Silicon Video/video"


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
            search_aliases=["save video", "export video", "video combine", "mp4", "h264", "images to video"],
            inputs=[
                io.Image.Input("images", tooltip="The frames, in order. One frame makes a video of one frame."),
                io.Audio.Input(
                    "audio",
                    optional=True,
                    tooltip="Sound for the video; what is longer than the video is cut off.",
                ),
                io.Float.Input(
                    "fps",
                    default=16.0,
                    min=0.01,
                    max=240.0,
                    step=0.001,
                    round=0.001,
                    tooltip=(
                        "Frames a second: 16 for Wan 2.1 and the Wan 2.2 A14B models, 24 for Wan 2.2 5B. 23.976, 29.97 "
                        "and 59.94 mean the exact rates 24000/1001, 30000/1001 and 60000/1001."
                    ),
                ),
                io.String.Input(
                    "filename_prefix",
                    default="video/ComfyUI",
                    tooltip=(
                        "Folder and name inside the output folder; a number is appended and no file is ever replaced. "
                        "May hold %date:yyyy-MM-dd%, %width%, %height% or a value such as %KSampler.seed%."
                    ),
                ),
                io.Combo.Input(
                    "format",
                    options=list(load_formats()),
                    default="h264-mp4",
                    tooltip="h264-mp4 plays in QuickTime, browsers, phones and editors.",
                ),
                io.Combo.Input(
                    "quality",
                    options=list(QUALITIES),
                    default="standard",
                    tooltip=(
                        "small for sending, standard for watching (no visible loss in most clips), high for editing, "
                        "best when the file is to be encoded again."
                    ),
                ),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
            outputs=[
                io.Video.Output(display_name="video", tooltip="The saved file, for other video nodes."),
                io.String.Output(display_name="path", tooltip="Where the file was saved."),
            ],
        )

    @classmethod
    def execute(
        cls,
        images: Any,
        fps: float,
        filename_prefix: str,
        format: str,
        quality: str,
        audio: Any = None,
    ) -> io.NodeOutput:
        from comfy.model_management import throw_exception_if_processing_interrupted
        from comfy.utils import ProgressBar

        from ..video.encoding import encode_video, picture_size
        from ..video.output_file import numbered_names

        folder, stem, counter, subfolder = _output_name(filename_prefix, *picture_size(images))
        video_format = load_formats()[format]
        progress = ProgressBar(images.shape[0])

        def on_frame(done: int) -> None:
            throw_exception_if_processing_interrupted()
            progress.update_absolute(done)

        video = encode_video(
            numbered_names(folder, stem, counter, video_format.suffix),
            images,
            fps=fps,
            video_format=video_format,
            quality=quality,
            audio=audio,
            metadata=_metadata(cls.hidden),
            on_frame=on_frame,
        )
        result = ui.SavedResult(video.path.name, subfolder, io.FolderType.output)
        return io.NodeOutput(InputImpl.VideoFromFile(str(video.path)), str(video.path), ui=ui.PreviewVideo([result]))


def _output_name(prefix: str, width: int, height: int) -> tuple[Path, str, int, str]:
    """Folder, name, first free number and subfolder that ComfyUI gives to a prefix."""
    import folder_paths

    from ..video.errors import VideoError

    try:
        folder, stem, counter, subfolder, _ = folder_paths.get_save_image_path(
            prefix, folder_paths.get_output_directory(), width, height
        )
    except Exception as error:  # core raises a bare Exception for a folder outside of output
        reason = error.strerror if isinstance(error, OSError) else "it leads outside of the output folder"
        raise VideoError(f"The filename prefix {prefix!r} cannot be used: {reason}; choose another one.") from error
    return Path(folder), stem, counter, subfolder


def _metadata(hidden: Any) -> dict[str, str]:
    """The prompt and the workflow as JSON, under the keys that the front end looks for."""
    from comfy.cli_args import args

    if args.disable_metadata:
        return {}
    values = {**(hidden.extra_pnginfo or {}), "prompt": hidden.prompt}
    return {key: json.dumps(value) for key, value in values.items() if value is not None}


NODES: list[type[io.ComfyNode]] = [SaveVideo]
