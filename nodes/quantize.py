"""The quantiser as a node: makes a GGUF file beside a model in ComfyUI's folders."""

from __future__ import annotations

from pathlib import Path

from comfy_api.latest import io, ui

from .folders import model_files, model_path
from .progress_text import show_text

CATEGORY = "Apple Silicon Video/loaders"
RECIPES = [
    "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS",
    "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K", "BF16", "F16",
]  # fmt: skip


class QuantizeModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MPSQuantizeModel",
            display_name="Quantize Model to GGUF (MPS)",
            category=CATEGORY,
            description=(
                "Makes a smaller GGUF file of a Wan model: reads safetensors or GGUF, writes the new file beside it "
                "and reports size and errors. Runs on the CPU, in little memory."
            ),
            search_aliases=["gguf", "quantize", "quantise", "convert", "compress", "smaller model"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=model_files("diffusion_models"),
                    tooltip="A Wan model in models/diffusion_models: safetensors in fp32, fp16, bf16 or fp8, or GGUF.",
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
    def execute(cls, model_name: str, type: str, overwrite: bool = False) -> io.NodeOutput:
        import comfy.model_management
        import comfy.utils

        from ..quantization.quantizer_files import quantize_file

        source = model_path("diffusion_models", model_name)
        destination = source.with_name(f"{source.stem}-{type}.gguf")
        file_name = Path(model_name).with_name(destination.name).as_posix()
        if destination.exists() and not overwrite:
            return cls._result(file_name, f"{destination.name} is there already; switch overwrite on to make it again.")
        bar = comfy.utils.ProgressBar(1000)

        def progress(done: int, total: int, name: str) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update_absolute(int(1000 * done / total))

        return cls._result(file_name, quantize_file(source, destination, type, progress=progress).text())

    @classmethod
    def _result(cls, file_name: str, report: str) -> io.NodeOutput:
        show_text(report, cls.hidden.unique_id)
        return io.NodeOutput(file_name, report, ui=ui.PreviewText(report))


NODES: list[type[io.ComfyNode]] = [QuantizeModel]
