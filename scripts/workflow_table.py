"""Which workflows there are: a row for each kind of video and memory size, and the function that draws it.

A row names files and sizes; the plan of memory (scripts/plan_memory.py) must show it inside the working set of its
tier, which a test checks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import workflow_parts as parts
from workflow_files import SPEED_LORAS
from workflow_graph import Graph, Node

ENCODER = {16: "umt5-xxl-encoder-Q5_K_M.gguf", 64: "umt5-xxl-encoder-Q8_0.gguf"}
EXPERTS = ("High", "Low")
VAE_21, VAE_22 = "wan_2.1_vae.safetensors", "wan2.2_vae.safetensors"
FOX = "A red fox walks through fresh snow at sunrise, low camera, soft light, film grain"
ALIVE = "The scene comes alive: gentle wind, slow camera push-in, natural motion"
BETWEEN = "A smooth, natural transition from the first picture to the last one"
RESTYLE = "The same scene as a watercolour painting, visible paper texture, soft edges"


@dataclass(frozen=True)
class Row:
    """One workflow. memory: GB of the Mac it is for; width, height in pixels; fast: with the 4-step LoRAs."""

    title: str
    draw: Callable[[Row], Graph]
    memory: int
    quantisation: str
    width: int
    height: int
    frames: int
    fast: bool = False

    @property
    def encoder(self) -> str:
        return ENCODER[64 if self.memory >= 64 else 16]

    @property
    def size(self) -> dict[str, int]:
        return {"width": self.width, "height": self.height, "length": self.frames, "batch_size": 1}

    def advice(self, fps: int) -> str:
        """What the note says below its table."""
        return (
            f"Made for Macs with {self.memory} GB: {self.width}x{self.height}, {self.frames} frames, "
            f"{self.frames / fps:.1f} seconds. If memory is tight, lower *length* first (4n + 1 frames), then the "
            "size, then take a smaller quantisation. Keep the sampler on *euler*: its steps are saved, so a run that "
            "is stopped goes on when it is queued again."
        )


def _finish(latent: Node, decoder: Node, prefix: str, fps: float, number: int = 4) -> tuple[str, list[Node]]:
    decode = parts.decode(latent, decoder)
    return f"{number}. Decode and save", [decode, parts.save((decode, 0), prefix, fps)]


def text_to_video_1_3b(row: Row) -> Graph:
    """Wan 2.1 1.3B."""
    unet = f"Wan2.1-T2V-1.3B-{row.quantisation}.gguf"
    model, decoder, text = parts.diffusion_model(unet), parts.vae(VAE_21), parts.prompts(row.encoder, FOX)
    latent = Node("EmptyHunyuanLatentVideo", {}, row.size, parts.LATENT, "Size and length")
    watched = parts.governor(shifted := parts.shift(model, 8.0))
    sampler = parts.sampler(watched, (text, 0), (text, 1), (latent, 0), steps=25, cfg=6.0)
    return parts.build(
        [
            ("Read me", [parts.note(row.title, [unet, row.encoder, VAE_21], row.advice(16))]),
            ("1. Load", [model, decoder]),
            ("2. Prompt and size", [text, latent]),
            ("3. Sample", [shifted, watched, sampler]),
            _finish(sampler, decoder, "video/wan2.1_t2v", 16.0),
        ]
    )


def video_to_video_1_3b(row: Row) -> Graph:
    """Wan 2.1 1.3B on a clip of one's own."""
    unet = f"Wan2.1-T2V-1.3B-{row.quantisation}.gguf"
    model, decoder, text = parts.diffusion_model(unet), parts.vae(VAE_21), parts.prompts(row.encoder, RESTYLE)
    clip = parts.load_video(row.width, row.height, row.frames, 16.0)
    latent = Node("VAEEncode", {"pixels": (clip, 0), "vae": (decoder, 0)}, {}, parts.LATENT)
    watched = parts.governor(shifted := parts.shift(model, 8.0))
    sampler = parts.sampler(watched, (text, 0), (text, 1), (latent, 0), steps=25, cfg=6.0, denoise=0.7)
    advice = f"{row.advice(16)} *denoise* says how far the result may leave the clip: 0.5 keeps its shapes, 0.9 hardly."
    return parts.build(
        [
            ("Read me", [parts.note(row.title, [unet, row.encoder, VAE_21], advice)]),
            ("1. Load", [model, decoder, clip]),
            ("2. Prompt", [text, latent]),
            ("3. Sample", [shifted, watched, sampler]),
            _finish(sampler, decoder, "video/wan2.1_v2v", 16.0),
        ]
    )


def video_5b(row: Row, with_picture: bool) -> Graph:
    """Wan 2.2 TI2V 5B, which makes its latent from nothing or from a picture."""
    unet = f"Wan2.2-TI2V-5B-{row.quantisation}.gguf"
    model, decoder = parts.diffusion_model(unet), parts.vae(VAE_22)
    text = parts.prompts(row.encoder, ALIVE if with_picture else FOX)
    first = [parts.picture("First frame")] if with_picture else []
    links = {"vae": (decoder, 0)} | ({"start_image": (first[0], 0)} if with_picture else {})
    latent = Node("Wan22ImageToVideoLatent", links, row.size, parts.LATENT, "Size and length")
    watched = parts.governor(shifted := parts.shift(model, 8.0))
    sampler = parts.sampler(watched, (text, 0), (text, 1), (latent, 0), steps=20, cfg=5.0)
    return parts.build(
        [
            ("Read me", [parts.note(row.title, [unet, row.encoder, VAE_22], row.advice(24))]),
            ("1. Load", [model, decoder, *first]),
            ("2. Prompt and size", [text, latent]),
            ("3. Sample", [shifted, watched, sampler]),
            _finish(sampler, decoder, f"video/wan2.2_5b_{'i2v' if with_picture else 't2v'}", 24.0),
        ]
    )


def text_to_video_5b(row: Row) -> Graph:
    """Wan 2.2 5B from text."""
    return video_5b(row, with_picture=False)


def image_to_video_5b(row: Row) -> Graph:
    """Wan 2.2 5B from a picture."""
    return video_5b(row, with_picture=True)


@dataclass(frozen=True)
class Pair:
    """The two experts of A14B, ready to sample with, and what they are made of."""

    files: list[str]
    loaders: list[Node]
    shifts: list[Node]
    watched: list[Node]
    steps: int
    cfg: float
    change: int

    def sample(self, positive: parts.Link, negative: parts.Link, latent: parts.Link) -> list[Node]:
        """The two samplers, one after the other."""

        def expert(index: int, start: parts.Link) -> Node:
            return parts.expert(
                self.watched[index],
                positive,
                negative,
                start,
                steps=self.steps,
                cfg=self.cfg,
                change=self.change,
                first=index == 0,
            )

        high = expert(0, latent)
        return [high, expert(1, (high, 0))]

    def columns(self, samplers: list[Node]) -> list[tuple[str, list[Node]]]:
        """Everything of the sampling stage: a column for each expert."""
        return [
            (f"{number}. Sample: {noise.lower()} noise", list(nodes))
            for number, noise, *nodes in zip((3, 4), EXPERTS, self.shifts, self.watched, samplers, strict=True)
        ]


def experts(row: Row, task: str) -> Pair:
    """Loaders, LoRAs, shift and governor of both experts; ``task``: "t2v" or "i2v"."""
    files, loaders, shifts, watched = [], [], [], []
    for noise in EXPERTS:
        file = f"Wan2.2-{task.upper()}-A14B-{noise}Noise-{row.quantisation}.gguf"
        model = parts.diffusion_model(file, f"{noise} noise: model")
        files.append(file)
        loaders.append(model)
        if row.fast:
            speed = f"{SPEED_LORAS[task]}_{noise.lower()}_noise.safetensors"
            model = parts.lora(model, speed, f"{noise} noise: 4-step LoRA")
            files.append(speed)
            loaders.append(model)
        shifts.append(parts.shift(model, 5.0 if row.fast else 8.0, f"{noise} noise: shift"))
        watched.append(parts.governor(shifts[-1], f"{noise} noise: memory governor"))
    steps, cfg, change = (4, 1.0, 2) if row.fast else (20, 3.5, 10)
    return Pair(files, loaders, shifts, watched, steps, cfg, change)


def _a14b(
    row: Row, pair: Pair, decoder: Node, text: Node, inputs: list[Node], start: Node, prompts: bool, prefix: str
) -> Graph:
    """start: the node that makes the latent; prompts: whether it also passes the prompts on."""
    positive, negative, latent = ((start, 0), (start, 1), (start, 2)) if prompts else ((text, 0), (text, 1), (start, 0))
    samplers = pair.sample(positive, negative, latent)
    return parts.build(
        [
            ("Read me", [parts.note(row.title, [*pair.files, row.encoder, VAE_21], row.advice(16))]),
            ("1. Load", [*pair.loaders, decoder]),
            ("2. Prompt and size", [*inputs, text, start]),
            *pair.columns(samplers),
            _finish(samplers[1], decoder, prefix, 16.0, number=5),
        ]
    )


def text_to_video_a14b(row: Row) -> Graph:
    """Wan 2.2 A14B from text."""
    pair, decoder, text = experts(row, "t2v"), parts.vae(VAE_21), parts.prompts(row.encoder, FOX)
    latent = Node("EmptyHunyuanLatentVideo", {}, row.size, parts.LATENT, "Size and length")
    return _a14b(row, pair, decoder, text, [], latent, False, "video/wan2.2_t2v")


def image_to_video_a14b(row: Row) -> Graph:
    """Wan 2.2 A14B from a picture."""
    pair, decoder, text = experts(row, "i2v"), parts.vae(VAE_21), parts.prompts(row.encoder, ALIVE)
    first = parts.picture("First frame")
    links = {"positive": (text, 0), "negative": (text, 1), "vae": (decoder, 0), "start_image": (first, 0)}
    start = Node("WanImageToVideo", links, row.size, parts.CONDITIONED, "Size and length")
    return _a14b(row, pair, decoder, text, [first], start, True, "video/wan2.2_i2v")


def first_last_frame_a14b(row: Row) -> Graph:
    """Wan 2.2 A14B between two pictures."""
    pair, decoder, text = experts(row, "i2v"), parts.vae(VAE_21), parts.prompts(row.encoder, BETWEEN)
    pictures = [parts.picture("First frame"), parts.picture("Last frame")]
    links = {"positive": (text, 0), "negative": (text, 1), "vae": (decoder, 0)}
    links |= {"start_image": (pictures[0], 0), "end_image": (pictures[1], 0)}
    start = Node("WanFirstLastFrameToVideo", links, row.size, parts.CONDITIONED, "Size and length")
    return _a14b(row, pair, decoder, text, pictures, start, True, "video/wan2.2_flf2v")


def extension_a14b(row: Row) -> Graph:
    """Two segments of Wan 2.2 A14B: the second begins with the last frame of the first."""
    pair, decoder, text = experts(row, "i2v"), parts.vae(VAE_21), parts.prompts(row.encoder, ALIVE)
    picture = parts.picture("First frame")
    conditions = {"positive": (text, 0), "negative": (text, 1), "vae": (decoder, 0)}
    columns: list[tuple[str, list[Node]]] = []
    clips: list[Node] = []
    image = picture
    for number, name in enumerate(("First", "Second"), 1):
        links = conditions | {"start_image": (image, 0)}
        title = f"{name} segment: size and length"
        start = Node("WanImageToVideo", links, row.size, parts.CONDITIONED, title)
        samplers = pair.sample((start, 0), (start, 1), (start, 2))
        clip = parts.decode(samplers[1], decoder)
        clips.append(clip)
        columns.append((f"{2 + number}. {name} segment", [start, *samplers, clip]))
        image = parts.last_frames(clip)
        if number == 1:
            columns[-1][1].append(image)
    joined = parts.extend(clips, 16.0)
    advice = (
        f"{row.advice(16)} Two segments of {row.frames} frames are joined here: "
        f"{(2 * row.frames - 1) / 16:.1f} seconds. For a third one copy the group *Second segment*."
    )
    return parts.build(
        [
            ("Read me", [parts.note(row.title, [*pair.files, row.encoder, VAE_21], advice)]),
            ("1. Load", [*pair.loaders, decoder]),
            ("2. Prompt and models", [picture, text, *pair.shifts, *pair.watched]),
            *columns,
            ("5. Join and save", [joined, parts.save((joined, 0), "video/wan2.2_long", 16.0)]),
        ]
    )


SMALL, LARGE = (832, 480), (1280, 720)
T2V_13 = "Wan 2.1 text to video 1.3B"
T2V_5, I2V_5 = "Wan 2.2 text to video 5B", "Wan 2.2 image to video 5B"
T2V_14, I2V_14 = "Wan 2.2 text to video A14B", "Wan 2.2 image to video A14B"
FAST = ", 4 steps"

TABLE: dict[str, Row] = {
    "wan2.1_t2v_1.3b_16gb": Row(T2V_13, text_to_video_1_3b, 16, "Q5_K_M", *SMALL, 81),
    "wan2.1_t2v_1.3b_24gb": Row(T2V_13, text_to_video_1_3b, 24, "Q8_0", *SMALL, 81),
    "wan2.1_v2v_1.3b_16gb": Row("Wan 2.1 video to video 1.3B", video_to_video_1_3b, 16, "Q5_K_M", *SMALL, 81),
    "wan2.2_t2v_5b_16gb": Row(T2V_5, text_to_video_5b, 16, "Q4_K_M", 1280, 704, 81),
    "wan2.2_t2v_5b_24gb": Row(T2V_5, text_to_video_5b, 24, "Q8_0", 1280, 704, 121),
    "wan2.2_i2v_5b_16gb": Row(I2V_5, image_to_video_5b, 16, "Q4_K_M", 1280, 704, 81),
    "wan2.2_i2v_5b_24gb": Row(I2V_5, image_to_video_5b, 24, "Q8_0", 1280, 704, 121),
    "wan2.2_t2v_a14b_16gb": Row(T2V_14, text_to_video_a14b, 16, "Q3_K_M", *SMALL, 81),
    "wan2.2_t2v_a14b_fast_16gb": Row(T2V_14 + FAST, text_to_video_a14b, 16, "Q3_K_M", *SMALL, 81, fast=True),
    "wan2.2_t2v_a14b_fast_36gb": Row(T2V_14 + FAST, text_to_video_a14b, 36, "Q5_K_M", *LARGE, 81, fast=True),
    "wan2.2_t2v_a14b_64gb": Row(T2V_14, text_to_video_a14b, 64, "Q8_0", *LARGE, 81),
    "wan2.2_i2v_a14b_16gb": Row(I2V_14, image_to_video_a14b, 16, "Q3_K_M", *SMALL, 81),
    "wan2.2_i2v_a14b_fast_16gb": Row(I2V_14 + FAST, image_to_video_a14b, 16, "Q3_K_M", *SMALL, 81, fast=True),
    "wan2.2_i2v_a14b_fast_24gb": Row(I2V_14 + FAST, image_to_video_a14b, 24, "Q4_K_M", *SMALL, 81, fast=True),
    "wan2.2_i2v_a14b_fast_36gb": Row(I2V_14 + FAST, image_to_video_a14b, 36, "Q5_K_M", *LARGE, 81, fast=True),
    "wan2.2_i2v_a14b_64gb": Row(I2V_14, image_to_video_a14b, 64, "Q5_K_M", *SMALL, 81),
    "wan2.2_i2v_a14b_128gb": Row(I2V_14, image_to_video_a14b, 128, "Q8_0", *LARGE, 121),
    "wan2.2_flf2v_a14b_fast_24gb": Row(
        "Wan 2.2 first and last frame A14B" + FAST, first_last_frame_a14b, 24, "Q4_K_M", *SMALL, 81, fast=True
    ),
    "wan2.2_extend_a14b_fast_36gb": Row(
        "Wan 2.2 long video A14B" + FAST, extension_a14b, 36, "Q5_K_M", *SMALL, 81, fast=True
    ),
}
"""File name without suffix -> the workflow."""
