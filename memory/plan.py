"""Plans a video run's memory before it begins: ``plan(model, width=..., height=..., frames=..., machine=...)``.

Tables of the files' tensors (plan_models.read_table, or made from shapes and a recipe) go in; what is on the device
and in the process in each stage comes out, with a verdict for a Mac: fits, fits with swap risk, does not fit. Nothing
of ComfyUI is needed. The stages' arithmetic is in plan_stages.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from . import plan_stages
from .plan_models import (
    PlanError,
    Quantities,
    WanModel,
    WeightTable,
    lora_sizes,
    read_table,
    require_kind,
    rounded,
    vae_channels,
    wan_model,
)
from .plan_stages import Cfg, Compute, Video
from .telemetry import take_snapshot

GIB = 1 << 30

Verdict = Literal["fits", "swap risk", "does not fit"]
VERDICTS: dict[Verdict, str] = {
    "fits": "fits",
    "swap risk": "fits with swap risk",
    "does not fit": "does not fit",
}

PROCESS = int(1.2 * GIB)
"""ComfyUI, Python and torch without any model."""
SYSTEM = 3 * GIB
"""What macOS and a browser want to keep; less, and the Mac begins to swap."""
LEAST_SYSTEM = 2 * GIB
"""What macOS cannot do without."""
ENCODER_FRAMES = 48
"""Frames that a video encoder holds at once, one and a half bytes a pixel: x264's lookahead and threads."""

MAC_GB = (8, 16, 18, 24, 32, 36, 48, 64, 96, 128, 192, 256, 512)
SMALL_MAC_GB = 36


@dataclass(frozen=True)
class Machine:
    """A Mac's memory in bytes, and the working set that Metal recommends."""

    ram: int
    recommended: int

    @classmethod
    def with_ram(cls, gigabytes: float) -> Machine:
        """A Mac with this memory in GiB: two thirds of it are recommended up to 36 GiB, three quarters above."""
        if not 4 <= gigabytes <= 4096:
            raise PlanError(f"{gigabytes:g} GB is no Mac's memory: enter 8 to 512.")
        ram = int(gigabytes * GIB)
        return cls(ram, ram * 2 // 3 if gigabytes <= SMALL_MAC_GB else ram * 3 // 4)

    @classmethod
    def here(cls) -> Machine:
        """This machine: its own figures on a Mac, those of a Mac of the same memory elsewhere."""
        found = take_snapshot()
        if found.total is None:
            raise PlanError("This machine's memory cannot be found out: say how many GB to plan for.")
        own = cls.with_ram(max(4, round(found.total / GIB)))
        return cls(found.total, found.recommended or own.recommended)

    @property
    def title(self) -> str:
        """With its article."""
        gigabytes = round(self.ram / GIB)
        return f"{'an' if gigabytes in (8, 11, 18) or 80 <= gigabytes < 90 else 'a'} {gigabytes} GB Mac"


MACS = {gigabytes: Machine.with_ram(gigabytes) for gigabytes in MAC_GB}


@dataclass(frozen=True)
class Stage:
    """One stage's fullest moment, in bytes.

    weights: on the device. needed: parts on the device beyond them. host: parts in the process's own memory. rounding:
    what the allocator adds to the weights. note: in words.
    """

    name: str
    weights: int
    needed: Quantities
    host: Quantities
    rounding: int = 0
    note: str = ""

    @property
    def live(self) -> int:
        """Tensors on the device, as the allocator counts them."""
        return self.weights + self.needed.total

    @property
    def device(self) -> int:
        return self.live + self.rounding

    @property
    def total(self) -> int:
        """Of the Mac's one memory: device and process."""
        return self.device + self.host.total

    def verdict(self, machine: Machine) -> Verdict:
        if self.total > machine.ram - LEAST_SYSTEM or self.device > 1.15 * machine.recommended:
            return "does not fit"
        over = self.device > machine.recommended or self.total > machine.ram - SYSTEM
        return "swap risk" if over else "fits"


@dataclass(frozen=True)
class Plan:
    """Stages in the order in which they run, each alone in memory: what came before it has been released."""

    title: str
    machine: Machine
    video: Video
    cfg: Cfg
    stages: tuple[Stage, ...]

    @property
    def peak(self) -> Stage:
        """The stage that takes most of the device."""
        return max(self.stages, key=lambda stage: stage.device)

    @property
    def verdict(self) -> Verdict:
        return max((stage.verdict(self.machine) for stage in self.stages), key=list(VERDICTS).index)

    @property
    def worst(self) -> Stage:
        """The stage that decides the verdict."""
        order = list(VERDICTS)
        return max(self.stages, key=lambda stage: (order.index(stage.verdict(self.machine)), stage.total))

    def stage(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)

    def sentence(self) -> str:
        """The verdict in one sentence."""
        size = f"{self.title} at {self.video.width}x{self.video.height}, {self.video.frames} frames"
        worst = self.worst
        return (
            f"{size}, {VERDICTS[self.verdict]} on {self.machine.title}: {worst.name} takes {worst.device / GIB:.1f} "
            f"GiB on the device and {worst.total / GIB:.1f} GiB in all, {self.machine.recommended / GIB:.1f} GiB are "
            "recommended."
        )

    def as_dict(self) -> dict[str, Any]:
        """Everything for JSON, in bytes."""
        return {
            "title": self.title,
            "verdict": self.verdict,
            "sentence": self.sentence(),
            "machine": {"ram": self.machine.ram, "recommended": self.machine.recommended},
            "video": vars(self.video),
            "cfg": self.cfg,
            "stages": [
                {
                    "name": stage.name,
                    "verdict": stage.verdict(self.machine),
                    "device": stage.device,
                    "total": stage.total,
                    "weights": stage.weights,
                    "rounding": stage.rounding,
                    "needed": stage.needed.parts,
                    "host": stage.host.parts,
                    "note": stage.note,
                }
                for stage in self.stages
            ],
        }


def plan(
    model: WeightTable,
    *,
    width: int,
    height: int,
    frames: int,
    machine: Machine | None = None,
    model_low: WeightTable | None = None,
    text_encoder: WeightTable | None = None,
    vae: WeightTable | None = None,
    loras: Sequence[WeightTable] = (),
    guidance: bool = True,
    batched: bool | None = None,
    compute: Compute | None = None,
    clip: bool = False,
) -> Plan:
    """The plan of one run.

    Args:
        model: the diffusion model, for A14B the high-noise expert; ``model_low`` its low-noise one.
        width, height: in pixels; frames: 4n + 1.
        machine: None is this machine.
        loras: of each expert alike, as long as it runs.
        guidance: two evaluations per step (cfg other than 1).
        batched: both at once; None is core's own choice, by what is free.
        compute: torch's version and the budgets; None is the newest torch and the defaults.
        clip: whether frames are encoded although the model takes no picture (video to video).

    Raises PlanError, one sentence, for files of another kind and sizes that the model does not take.
    """
    machine, compute = machine or Machine.here(), compute or Compute()
    wan, video = wan_model(model), Video(width, height, frames)
    video.check(wan.latent_stride)
    for lora in loras:
        require_kind(lora, "lora")
    experts = [("sampling", model)] if model_low is None else [("sampling high", model), ("sampling low", model_low)]
    frames_held = {"frames": video.frame_bytes}
    stages: list[Stage] = []
    if text_encoder is not None:
        stages.append(_stage("text encoding", require_kind(text_encoder, "encoder"), plan_stages.text_encoding()))
    if vae is not None and (clip or wan.takes_image):
        stages.append(_vae_stage("image encoding", vae, wan, video, machine, frames_held))
    cfg: Cfg = "none"
    for name, table in experts:
        one = wan_model(table)
        if (one.dim, one.layers, one.in_dim) != (wan.dim, wan.layers, wan.in_dim):
            raise PlanError(f"{table.name} is {one.title} and {model.name} {wan.title}: choose two files of one model.")
        cfg = _cfg(one, video, guidance, batched, machine, table)
        needed = plan_stages.sampling(one, video, cfg, compute, bool(loras))
        stages.append(_stage(name, table, needed, loras=loras))
    if vae is not None:
        stages.append(_vae_stage("decoding", vae, wan, video, machine, frames_held))
    writer = {"video encoder": int(video.pixels * 1.5 * min(frames, ENCODER_FRAMES))}
    stages.append(Stage("saving", 0, Quantities(), _host(frames_held | writer)))
    return Plan(wan.title, machine, video, cfg, tuple(stages))


def _cfg(
    wan: WanModel, video: Video, guidance: bool, batched: bool | None, machine: Machine, table: WeightTable
) -> Cfg:
    if not guidance:
        return "none"
    if batched is None:
        batched = plan_stages.batches_guidance(wan, video, machine.ram - SYSTEM - PROCESS - table.nbytes)
    return "batched" if batched else "apart"


def _host(parts: dict[str, int] | None = None) -> Quantities:
    return Quantities({"ComfyUI": PROCESS} | (parts or {}))


def _stage(
    name: str,
    table: WeightTable,
    needed: Quantities,
    host: dict[str, int] | None = None,
    note: str = "",
    loras: Sequence[WeightTable] = (),
) -> Stage:
    sizes = table.device_sizes + [size for lora in loras for size in lora_sizes(lora, table)]
    rounding = sum(map(rounded, sizes)) - sum(sizes)
    return Stage(name, sum(sizes), needed, _host(host), rounding, note)


def _vae_stage(
    name: str, table: WeightTable, wan: WanModel, video: Video, machine: Machine, host: dict[str, int]
) -> Stage:
    """The VAE in tiles where the whole picture is not within what its automatic budget would be on this machine."""
    channels = vae_channels(table)
    if channels != wan.out_dim:
        raise PlanError(
            f"{table.name} has {channels} latent channels, {wan.title} needs {wan.out_dim}: choose its VAE."
        )
    room = min(machine.recommended, machine.ram - SYSTEM - PROCESS - sum(host.values())) - table.nbytes
    operation = plan_stages.decoding if name == "decoding" else plan_stages.encoding
    needed, tiles = operation(channels, video, int(room * plan_stages.VAE_SHARE))
    return _stage(name, table, needed, host, f"{tiles} tiles" if tiles > 1 else "")


__all__ = [
    "GIB",
    "MACS",
    "Compute",
    "Machine",
    "Plan",
    "PlanError",
    "Stage",
    "Verdict",
    "Video",
    "plan",
    "read_table",
]
