"""The quantiser as a node: makes a GGUF file beside a model or text encoder in ComfyUI's folders."""

from __future__ import annotations

from pathlib import Path

from comfy_api.latest import io, ui

from ..memory.comfy_server import show_text
from .folders import model_files, model_path
from .progress import show_part

CATEGORY = "Apple Silicon Video/loaders"
RECIPES = [
    "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS",
    "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K", "BF16", "F16",
]  # fmt: skip
NO_LORA = "none"


class QuantizeModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MPSQuantizeModel",
            display_name="Quantize Model to GGUF (MPS)",
            category=CATEGORY,
            description=(
                "Makes a smaller GGUF file of a Wan model or a UMT5 text encoder: reads safetensors (also fp8) or "
                "GGUF, merges a LoRA in if you like, writes the new file beside the old one and reports size and "
                "errors. Runs on the CPU, in little memory."
            ),
            search_aliases=["gguf", "quantize", "quantise", "convert", "compress", "smaller model"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=sorted({*model_files("diffusion_models"), *model_files("text_encoders")}),
                    tooltip=(
                        "A Wan model in models/diffusion_models or a UMT5 encoder in models/text_encoders: safetensors "
                        "in fp32, fp16, bf16, fp8 or int8, or GGUF."
                    ),
                ),
                io.Combo.Input(
                    "type",
                    options=RECIPES,
                    default="Q5_K_M",
                    tooltip="More bits mean less error and a larger file. Q5_K_M and Q4_K_M suit most machines.",
                ),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    tooltip="Make the file again when it is there already; otherwise the node only reports its name.",
                ),
                io.Combo.Input(
                    "lora_name",
                    options=[NO_LORA, *model_files("loras")],
                    default=NO_LORA,
                    optional=True,
                    advanced=True,
                    tooltip="A LoRA in models/loras to merge into the weights before they are quantised.",
                ),
                io.Float.Input(
                    "lora_strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    optional=True,
                    advanced=True,
                    tooltip="How strongly the LoRA is merged in.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            not_idempotent=True,
            outputs=[
                io.String.Output(
                    display_name="file_name", tooltip="Name of the new file, as Load Diffusion Model (MPS) lists it."
                ),
                io.String.Output(display_name="report", tooltip="Size, bits per weight and the largest errors."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model_name: str,
        type: str,
        overwrite: bool = False,
        lora_name: str = NO_LORA,
        lora_strength: float = 1.0,
    ) -> io.NodeOutput:
        from ..quantization.quantizer_files import quantize_file

        source = _source_path(model_name)
        loras = [] if lora_name == NO_LORA else [(model_path("loras", lora_name), lora_strength)]
        merged = "".join(f"-{path.stem}-{strength:g}" for path, strength in loras)
        destination = source.with_name(f"{source.stem}{merged}-{type}.gguf")
        file_name = Path(model_name).with_name(destination.name).as_posix()
        if destination.exists() and not overwrite:
            return cls._result(file_name, f"{destination.name} is there already; switch overwrite on to make it again.")
        show = show_part()
        report = quantize_file(
            source, destination, type, loras=loras, progress=lambda done, total, name: show(done / total)
        )
        return cls._result(file_name, report.text())

    @classmethod
    def _result(cls, file_name: str, report: str) -> io.NodeOutput:
        show_text(report, cls.hidden.unique_id)
        return io.NodeOutput(file_name, report, ui=ui.PreviewText(report))


def _source_path(name: str) -> Path:
    """A diffusion model's file or, where none has the name, a text encoder's."""
    for folder in ("diffusion_models", "text_encoders"):
        try:
            return model_path(folder, name)
        except FileNotFoundError:
            continue
    raise FileNotFoundError(f"{name} is not in models/diffusion_models or models/text_encoders: put it there.")


NODES: list[type[io.ComfyNode]] = [QuantizeModel]
