"""VAE nodes: decode and encode a video in the memory that there is, and decode straight into a file."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..video.comfy_formats import formats
from .video_inputs import containers, encoder_inputs, format_input, fps_input, prefix_input, quality_input, settings

CATEGORY = "Apple Silicon Video/vae"
BUDGET = (
    "GiB that the work may take over the VAE's weights: the picture is cut into overlapping tiles where it would take "
    "more. 0: by the memory that is free."
)


def _budget() -> io.Float.Input:
    return io.Float.Input(
        "budget_gib", default=0.0, min=0.0, max=512.0, step=0.1, round=0.01, optional=True, tooltip=BUDGET
    )


class VAEDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MPSVAEDecode",
            display_name="VAE Decode (MPS)",
            category=CATEGORY,
            description=(
                "Decodes a latent to images in bounded memory. Wan's VAEs hand over each few frames as they are done, "
                "bit for bit as ComfyUI decodes them, and take blended tiles where memory asks for it; other VAEs "
                "decode as in VAE Decode."
            ),
            search_aliases=["vae decode", "tiled decode", "low memory", "wan", "latent to video", "apple", "mac"],
            inputs=[
                io.Latent.Input("samples", tooltip="The latent, from a sampler."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the model, from any loader."),
                _budget(),
            ],
            outputs=[io.Image.Output(tooltip="The frames, in order.")],
        )

    @classmethod
    def execute(cls, samples: dict[str, Any], vae: Any, budget_gib: float = 0.0) -> io.NodeOutput:
        from ..memory.comfy_vae_stages import decode

        return io.NodeOutput(decode(vae, samples["samples"], budget_gib))


class VAEEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MPSVAEEncode",
            display_name="VAE Encode (MPS)",
            category=CATEGORY,
            description=(
                "Encodes images to a latent in bounded memory. Wan's VAEs take the frames one few after the other, bit "
                "for bit as ComfyUI encodes them, and in blended tiles where memory asks for it; other VAEs encode as "
                "in VAE Encode."
            ),
            search_aliases=["vae encode", "tiled encode", "low memory", "wan", "video to latent", "apple", "mac"],
            inputs=[
                io.Image.Input(
                    "pixels",
                    tooltip=(
                        "The frames, in order. Wan takes 1, 5, 9, 13 and so on; what is more is left out, as by core."
                    ),
                ),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the model, from any loader."),
                _budget(),
            ],
            outputs=[io.Latent.Output(tooltip="The latent, for a sampler.")],
        )

    @classmethod
    def execute(cls, pixels: Any, vae: Any, budget_gib: float = 0.0) -> io.NodeOutput:
        from ..memory.comfy_vae_stages import encode

        return io.NodeOutput({"samples": encode(vae, pixels, budget_gib)})


class VAEDecodeToVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MPSVAEDecodeToVideo",
            display_name="VAE Decode to Video (MPS)",
            category=CATEGORY,
            description=(
                "Decodes a latent straight into a video file: frames go to the encoder as they are decoded, so that "
                "memory does not grow with the length of the video. The file carries the workflow."
            ),
            search_aliases=["vae decode", "save video", "low memory", "long video", "stream", "wan", "apple", "mac"],
            inputs=[
                io.Latent.Input("samples", tooltip="The latent, from a sampler."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the model, from any loader."),
                io.Audio.Input(
                    "audio", optional=True, tooltip="Sound for the video; what is longer than the video is cut off."
                ),
                fps_input("Frames a second: 16 for Wan 2.1 and the Wan 2.2 A14B models, 24 for Wan 2.2 5B."),
                prefix_input(
                    "Folder and name inside the output folder; a number is appended, no file is ever replaced."
                ),
                format_input(
                    containers(formats()), "h264-mp4 plays everywhere; hevc is smaller; prores is for editing."
                ),
                quality_input("small for sending, standard for watching, high for editing, best to be encoded again."),
                _budget(),
                *encoder_inputs(),
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
        samples: dict[str, Any],
        vae: Any,
        fps: float,
        filename_prefix: str,
        format: str,
        quality: str,
        audio: Any = None,
        budget_gib: float = 0.0,
        **options: str,
    ) -> io.NodeOutput:
        import folder_paths

        from ..memory.comfy_vae_stages import decode_to
        from ..video.comfy_stream_saving import StreamedSave

        wanted = settings(filename_prefix, format, quality, **options)
        with StreamedSave(audio, fps, wanted, cls.hidden) as saving:
            decode_to(
                vae,
                samples["samples"],
                budget_gib,
                lambda first, frames: saving.write(frames),
                folder_paths.get_temp_directory(),
                saving.preview,
            )
            return saving.finish()


NODES: list[type[io.ComfyNode]] = [VAEDecode, VAEEncode, VAEDecodeToVideo]
