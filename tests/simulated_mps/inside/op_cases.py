"""Computations that the rules of the simulated device spoil, with their tolerances, for the tests of the cures.

Rules begin at their true sizes where the tensors are small; the triggers of 2^31 and 2^32 elements are scaled down.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from apple_silicon_video.mps_patches import install, probing
from apple_silicon_video.mps_patches.registry import DEFECTS

MPS = torch.device("mps")
SMALL = 1 << 16
SCALED = {
    "cat_2_31": SMALL,
    "index_select_2_31": SMALL,
    "bmm_2_32": SMALL,
    "int_max_dims": SMALL,
    "rms_norm_rows": 4096,
}
# The rules' thresholds to match.
THRESHOLDS = {
    "cat-2-31": {"elements": SMALL},
    "index-select-2-31": {"elements": SMALL},
    "bmm-2-32": {"elements": SMALL},
    "int-max-dims": {"dim": SMALL},
    "rms-norm-rows": {"rows": 4096},
}
# What a right result may be off by, relative to the largest value; 0 where the cure only moves numbers.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}
MOVES = ("pad-rank-5", "interpolate-half-5d", "nearest-exact-rounding", "cat-2-31", "index-select-2-31")


@dataclass
class Case:
    """A computation that the rule of the same name spoils: ``run`` on noise of ``shapes``."""

    defect: str
    name: str
    run: Callable[..., torch.Tensor]
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype = torch.float32

    @property
    def tolerance(self):
        return 0.0 if self.defect in MOVES else TOLERANCES[self.dtype]

    @property
    def thresholds(self):
        return THRESHOLDS.get(self.defect, {})

    def inputs(self):
        return [probing.noise(shape, self.dtype, seed) for seed, shape in enumerate(self.shapes)]

    def expected(self):
        """On the CPU; in float64 where the operation rounds."""
        inputs = self.inputs()
        return self.run(*(value.double() for value in inputs) if self.tolerance else inputs)

    def error(self):
        """The device's error, relative to the largest value; inf where it raises."""
        try:
            actual = self.run(*(value.to(MPS) for value in self.inputs()))
        except (RuntimeError, NotImplementedError):
            return float("inf")
        assert actual.dtype == self.dtype
        return probing.relative_error(actual, self.expected())


def pad(*amounts, **options):
    return lambda x: F.pad(x, amounts, **options)


def interpolate(*args, **options):
    return lambda x: F.interpolate(x, *args, **options)


def call(name, home=torch):
    """The function of this name, looked up when it is called."""
    return lambda *inputs: getattr(home, name)(*inputs)


def table_entry(operation):
    """``operation`` of an mps tensor and an entry of a table on the CPU (or of two CPU tensors)."""
    return lambda x: operation(x, probing.noise((8,)).to(x.cpu().dtype)[3])


def in_buffer(operation):
    """``operation`` on a slice of its input."""
    return lambda x: operation(x[-1])


def added(x, y):
    nan = torch.full((1, 1, 1), float("nan"), dtype=x.dtype, device=x.device)
    return torch.baddbmm(nan, x, y, beta=0, alpha=0.5)


def empty_added(x, y):
    return torch.baddbmm(torch.empty(1, 1, 1, dtype=x.dtype, device=x.device), x, y, beta=0)


def rows(x):
    return F.rms_norm(x, (4,), eps=1e-6)


HALF, BF16 = torch.float16, torch.bfloat16
K = 32767
WIDE = (65536 + 3, 2, 3)
CASES = [
    Case("pad-rank-5", "time", pad(0, 0, 0, 0, 2, 0), ((1, 2, 3, 256, 256),)),
    Case("pad-rank-5", "all sides, bfloat16", pad(1, 1, 1, 1, 2, 0, value=0.5), ((1, 2, 2, 256, 257),), BF16),
    Case("pad-rank-5", "nn.ConstantPad3d", torch.nn.ConstantPad3d((0, 0, 0, 0, 1, 1), 0.0), ((1, 1, 2, 256, 256),)),
    Case(
        "pad-rank-5", "constant_pad_nd", lambda x: torch.constant_pad_nd(x, [0, 0, 0, 0, 1, 0]), ((1, 1, 2, 256, 256),)
    ),
    Case("pad-rank-5", "replicate", pad(1, 1, 1, 1, 2, 0, mode="replicate"), ((1, 2, 2, 256, 256),)),
    Case("pad-rank-5", "reflect", pad(1, 2, 0, 0, 1, 1, mode="reflect"), ((1, 2, 3, 256, 257),), HALF),
    Case("interpolate-half-5d", "factors", interpolate(scale_factor=[1.0, 2.0, 2.0]), ((1, 2, 3, 4, 5),), HALF),
    Case("interpolate-half-5d", "size", interpolate((3, 9, 8), None, "nearest"), ((1, 2, 3, 4, 5),), BF16),
    Case("interpolate-half-5d", "nn.Upsample", torch.nn.Upsample(scale_factor=2), ((1, 2, 3, 4, 5),), HALF),
    Case("nearest-exact-rounding", "2-D", interpolate((3, 11), mode="nearest-exact"), ((1, 2, 6, 20),)),
    Case("nearest-exact-rounding", "3-D", interpolate((2, 3, 11), mode="nearest-exact"), ((1, 2, 2, 6, 20),)),
    Case("nearest-exact-rounding", "factor", interpolate(scale_factor=0.5, mode="nearest-exact"), ((1, 2, 10, 25),)),
    Case("rms-norm-rows", "float32", rows, ((8200, 4),)),
    Case("rms-norm-rows", "bfloat16, heads", rows, ((2, 3000, 2, 4),), BF16),
    Case("rms-norm-rows", "nn.RMSNorm", torch.nn.RMSNorm(4, 1e-6, False), ((8200, 4),), HALF),
    Case("matmul-large-k", "bmm", call("bmm"), ((2, 16, K), (2, K, 16))),
    Case("matmul-large-k", "linear", call("linear", F), ((2, 16, 2 * K), (16, 2 * K), (16,)), BF16),
    Case("matmul-large-k", "@", lambda x, y: x @ y.mT, ((2, 2, 16, K), (2, 2, 16, K)), HALF),
    Case("matmul-large-k", "einsum", lambda x, y: torch.einsum("bik,bjk->bij", x, y), ((2, 16, K), (2, 16, K)), HALF),
    Case("matmul-large-k", "addmm", call("addmm"), ((16, 16), (16, K), (K, 16))),
    Case("matmul-large-k", "Tensor.mm", call("mm", torch.Tensor), ((16, K), (K, 16))),
    Case("bmm-2-32", "bmm", lambda x, y: torch.bmm(x, y.mT), ((4, 150, 128), (4, 150, 128)), HALF),
    Case("bmm-2-32", "matmul", lambda x, y: x @ y.mT, ((2, 2, 150, 128), (2, 2, 150, 128))),
    Case("bmm-2-32", "size of the result", lambda x, y: torch.bmm(x, y.mT), ((4, 150, 8), (4, 150, 8))),
    Case("bmm-2-32", "contiguous operand", call("bmm"), ((4, 150, 128), (4, 128, 3)), HALF),
    Case("linear-large-batch", "3-D", call("linear", F), (WIDE, (4, 3), (4,))),
    Case("linear-large-batch", "half", call("linear", F), (WIDE, (4, 3), (4,)), HALF),
    Case(
        "conv-sliced-weight", "slice", lambda x, w: F.conv2d(x, w[:, :, 1], padding=1), ((1, 4, 9, 9), (5, 4, 3, 3, 3))
    ),
    Case("conv-sliced-weight", "half", lambda x, w: torch.conv2d(x, w[:, 1:4]), ((1, 3, 9, 9), (5, 6, 3, 3)), HALF),
    Case("cat-2-31", "columns", lambda x, y: torch.cat([x, y], 1), ((300, 150), (300, 170))),
    Case("cat-2-31", "rows", lambda x, y: torch.concat([x, y]), ((300, 150), (200, 150)), BF16),
    Case("cat-2-31", "stack", lambda x, y: torch.stack([x, y], -1), ((300, 150), (300, 150))),
    Case(
        "index-select-2-31",
        "rows",
        lambda x: x.index_select(0, torch.tensor([999, 0, 500], device=x.device)),
        ((1000, 70),),
    ),
    Case(
        "index-select-2-31",
        "columns",
        lambda x: torch.index_select(x, 1, torch.tensor([69, 0], device=x.device)),
        ((1000, 70),),
    ),
    Case(
        "index-select-2-31",
        "embedding",
        lambda x: F.embedding(torch.tensor([[999, 1]], device=x.device), x),
        ((1000, 70),),
        HALF,
    ),
    Case("baddbmm-uninitialised", "NaN", added, ((2, 5, 7), (2, 7, 3))),
    Case("baddbmm-uninitialised", "empty, half", empty_added, ((2, 5, 7), (2, 7, 3)), HALF),
    Case("cpu-scalar-view", "x * table[3]", table_entry(lambda x, s: x * s), ((4, 5),)),
    Case("cpu-scalar-view", "table[3] - x", table_entry(lambda x, s: s - x), ((4, 5),)),
    Case("cpu-scalar-view", "x.div_", table_entry(lambda x, s: x.clone().div_(s)), ((4, 5),)),
    Case("cpu-scalar-view", "torch.add", table_entry(call("add")), ((4, 5),)),
    Case("conv-output-channels", "conv1d", call("conv1d", F), ((1, 2, 3), (WIDE[0], 2, 1))),
    Case("conv-output-channels", "length", lambda x, w: F.conv1d(x, w, padding=1), ((1, 2, 70000), (3, 2, 3))),
    Case("conv-output-channels", "transposed", call("conv_transpose1d", F), ((1, 2, 3), (2, WIDE[0], 1))),
    Case(
        "conv-output-channels",
        "transposed length",
        lambda x, w: F.conv_transpose1d(x, w, stride=4, padding=1),
        ((1, 2, 20000), (2, 3, 8)),
    ),
    Case("int-max-dims", "pow", lambda x: x**2, ((300, 300),)),
    Case("int-max-dims", "pow of a slice", in_buffer(lambda x: x.pow(2)), ((300, 300),)),
    Case("int-max-dims", "bmm", call("bmm"), ((3, 200, 150), (3, 150, 4))),
    Case("int-max-dims", "baddbmm", call("baddbmm"), ((3, 200, 4), (3, 200, 150), (3, 150, 4))),
    Case("int-max-dims", "cat of slices", in_buffer(lambda x: torch.cat([x, x])), ((3, 300, 300),)),
    Case("int-max-dims", "repeat", in_buffer(lambda x: x.repeat(2, 1)), ((3, 300, 300),)),
]
MINE = tuple(dict.fromkeys(case.defect for case in CASES))


def owners():
    """Every function of torch that a cure may replace, and whether its owner has it in its own right."""
    return {
        (path, name): (owner, getattr(owner, name), name in vars(owner))
        for defect in DEFECTS.values()
        for path, name in (defect.cure.targets if defect.cure else ())
        if path.startswith("torch") and (owner := install._owner(path, name)) is not None
    }


def only(defect_id, choice="auto"):
    """One patch by its probe, all others off."""
    return install.apply(MPS, {name: choice if name == defect_id else "off" for name in DEFECTS})
