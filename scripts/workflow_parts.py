"""The nodes that workflows are put together from, each with its links and all widgets in the node's own order."""

from __future__ import annotations

from workflow_files import FILES
from workflow_graph import Graph, Node

NEGATIVE = (
    "overexposed, static, blurry details, subtitles, painting, still picture, overall grey, worst quality, "
    "low quality, JPEG artifacts, ugly, deformed, extra fingers, poorly drawn hands, poorly drawn face"
)
MODEL, VAE = [("MODEL", "MODEL")], [("VAE", "VAE")]
LATENT, IMAGE = [("LATENT", "LATENT")], [("IMAGE", "IMAGE")]
PROMPTS = [("positive", "CONDITIONING"), ("negative", "CONDITIONING")]
CONDITIONED = [*PROMPTS, ("latent", "LATENT")]
GOES_ON = "fixed"
GET_FILES = (
    "**First the files:** click a name to download it, move it into its folder inside ComfyUI, "
    "and press *R* when all are there."
)
RUN = (
    "**Then** choose your picture or clip where there is one, write the prompt and press *Run*: "
    "the video goes to *output/video*."
)
NOTE_COLORS = ("#2a3b4d", "#1f2a36")
LOADER = 140
"""Height that leaves room for the Download button of web/js/missing_files.js."""

Link = tuple[Node, int]


def downloads(*names: str) -> list[dict[str, str]]:
    """What the front end offers to download for a loader."""
    return [{"name": name, "url": FILES[name].url, "directory": FILES[name].directory} for name in names]


def note(title: str, files: list[str], advice: str) -> Node:
    """The note that a workflow opens with: title, files with size and folder, advice."""
    rows = "\n".join(
        f"| [{name}]({FILES[name].url}) | {FILES[name].gigabytes:g} GB | models/{FILES[name].directory} |"
        for name in files
    )
    text = f"## {title}\n\n{GET_FILES}\n\n| file | size | folder |\n|---|---|---|\n{rows}\n\n{RUN}\n\n{advice}"
    return Node("MarkdownNote", widgets={"~text": text}, title="Read me", width=520, height=780, colors=NOTE_COLORS)


def diffusion_model(name: str, title: str | None = None) -> Node:
    widgets = {"unet_name": name, "dtype": "auto"}
    return Node("MPSLoadDiffusionModel", {}, widgets, MODEL, title, downloads(name), height=LOADER)


def lora(model: Node, name: str, title: str) -> Node:
    widgets = {"lora_name": name, "strength_model": 1.0}
    return Node("LoraLoaderModelOnly", {"model": (model, 0)}, widgets, MODEL, title, downloads(name))


def vae(name: str) -> Node:
    widgets = {"vae_name": name, "dtype": "auto"}
    return Node("MPSLoadVAE", {}, widgets, VAE, models=downloads(name), height=LOADER)


def prompts(encoder: str, positive: str) -> Node:
    widgets = {
        "clip_name": encoder,
        "type": "wan",
        "positive": positive,
        "negative": NEGATIVE,
        "device": "auto",
        "keep_on_disk": True,
    }
    return Node("MPSEncodePrompts", {}, widgets, PROMPTS, models=downloads(encoder), width=400, height=400)


def shift(model: Node, value: float, title: str = "Shift") -> Node:
    return Node("ModelSamplingSD3", {"model": (model, 0)}, {"shift": value}, MODEL, title)


def governor(model: Node, title: str | None = None) -> Node:
    return Node("MPSMemoryGovernor", {"model": (model, 0)}, {"setting": "careful"}, MODEL, title)


def picture(title: str) -> Node:
    widgets = {"image": "example.png", "~upload": "image"}
    return Node("LoadImage", {}, widgets, [*IMAGE, ("MASK", "MASK")], title, height=330)


def sampler(model: Node, positive: Link, negative: Link, latent: Link, *, steps: int, cfg: float, denoise: float = 1.0):
    """KSampler over all steps."""
    links = {"model": (model, 0), "positive": positive, "negative": negative, "latent_image": latent}
    widgets = {
        "seed": 42,
        "~control_after_generate": GOES_ON,
        "steps": steps,
        "cfg": cfg,
        "sampler_name": "euler",
        "scheduler": "simple",
        "denoise": denoise,
    }
    return Node("KSampler", links, widgets, LATENT, height=290)


def expert(
    model: Node, positive: Link, negative: Link, latent: Link, *, steps: int, cfg: float, change: int, first: bool
):
    """KSamplerAdvanced over the high-noise steps (first) or the low-noise ones of Wan 2.2 A14B."""
    links = {"model": (model, 0), "positive": positive, "negative": negative, "latent_image": latent}
    widgets = {
        "add_noise": "enable" if first else "disable",
        "noise_seed": 42 if first else 0,
        "~control_after_generate": GOES_ON,
        "steps": steps,
        "cfg": cfg,
        "sampler_name": "euler",
        "scheduler": "simple",
        "start_at_step": 0 if first else change,
        "end_at_step": change if first else 10000,
        "return_with_leftover_noise": "enable" if first else "disable",
    }
    title = f"High noise: steps 0-{change}" if first else f"Low noise: steps {change}-{steps}"
    return Node("KSamplerAdvanced", links, widgets, LATENT, title, height=350)


def decode(latent: Node, decoder: Node) -> Node:
    return Node("VAEDecode", {"samples": (latent, 0), "vae": (decoder, 0)}, {}, IMAGE)


def save(images: Link, prefix: str, fps: float) -> Node:
    widgets = {
        "fps": fps,
        "filename_prefix": prefix,
        "format": "h264-mp4",
        "quality": "standard",
        "loop": 0,
        "ping_pong": False,
        "first_frame": False,
        "encoder": "automatic",
        "audio_codec": "automatic",
        "encoder_options": "",
        "copy_streams": True,
    }
    outputs = [("video", "VIDEO"), ("path", "STRING")]
    return Node("MPSSaveVideo", {"images": images}, widgets, outputs, width=400, height=640)


def load_video(width: int, height: int, frames: int, fps: float) -> Node:
    """A clip from the input folder, cut and resampled to what the model takes."""
    widgets = {
        "file": "example.mp4",
        "start_time": 0.0,
        "length": 0.0,
        "fps": fps,
        "every_nth": 1,
        "frame_limit": frames,
        "frames_4n1": True,
        "width": width,
        "height": height,
        "fit": "crop",
        "multiple_of": "16",
        "~upload": "image",
    }
    outputs = [*IMAGE, ("mask", "MASK"), ("audio", "AUDIO"), ("fps", "FLOAT"), ("frame_count", "INT")]
    return Node("MPSLoadVideo", {}, widgets, [*outputs, ("video", "VIDEO")], width=400, height=720)


def last_frames(images: Node) -> Node:
    outputs = [("last_frames", "IMAGE"), ("frames_before", "IMAGE")]
    return Node("MPSLastFrames", {"images": (images, 0)}, {"count": 1}, outputs)


def extend(clips: list[Node], fps: float) -> Node:
    links = {f"clips.clip{number}": (clip, 0) for number, clip in enumerate(clips)}
    widgets = {"overlap": 1, "transition": "smooth", "match_color": False, "fps": fps}
    outputs = [("images", "IMAGE"), ("audio", "AUDIO"), ("frame_count", "INT")]
    return Node("MPSExtendVideo", links, widgets, outputs, height=240)


def build(columns: list[tuple[str, list[Node]]]) -> Graph:
    graph = Graph()
    for title, nodes in columns:
        graph.column(title, *nodes)
    return graph
