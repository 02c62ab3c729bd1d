"""The tests that every wrapper makes first: is this an mps tensor, and is it beyond the size where the defect begins.

The sizes are a table, so that a test on a simulated device can scale them down to what fits there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

# Trigger of each defect that begins at a size, in the unit of its key in the table of defects.
LIMITS: dict[str, int] = {
    "pad-rank-5": 1 << 16,  # inner extent H*W, from here on
    "rms-norm-rows": 1 << 21,  # rows, above
    "matmul-large-k": 32767,  # summed extent K, from here on
    "bmm-2-32": 1 << 32,  # elements of an operand or of the result, above
    "linear-large-batch": 1 << 16,  # first dimension of a 3-D input, above
    "cat-2-31": (1 << 31) - 1,  # elements of the result, above
    "index-select-2-31": (1 << 31) - 1,  # elements of the source, above
    "conv-output-channels": 1 << 16,  # output channels, above
    "int-max-dims": (1 << 31) - 1,  # extent of one dimension, above
}


def acts_on(value: Any) -> bool:
    """Whether the cures act on this argument: a tensor on an MPS device."""
    return isinstance(value, torch.Tensor) and value.is_mps


def plain(*values: Any) -> bool:
    """Whether all are ordinary tensors or None; subclasses (quantised weights, say) have rules of their own."""
    return all(value is None or type(value) in _PLAIN_TYPES for value in values)


_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)


@contextmanager
def scaled(**limits: int) -> Iterator[None]:
    """Other trigger sizes for a while; ``cat_2_31=1 << 16`` stands for "cat-2-31"."""
    before = dict(LIMITS)
    LIMITS.update({name.replace("_", "-"): value for name, value in limits.items()})
    try:
        yield
    finally:
        LIMITS.update(before)


def torch_before(major: int, minor: int) -> bool:
    """Whether this torch is older than a release, by its public version number."""
    return tuple(int(part) for part in torch.__version__.split(".")[:2]) < (major, minor)


def ranges(total: int, size: int) -> Iterator[tuple[int, int]]:
    """Cut 0..total into (start, length) pieces of at most ``size``, all of nearly the same length."""
    count = max(1, -(-total // size))
    bounds = [total * index // count for index in range(count + 1)]
    return ((start, end - start) for start, end in pairwise(bounds))


def operands(args: tuple[Any, ...], kwargs: dict[str, Any], *names: str) -> tuple[Any, ...]:
    """The tensor arguments of a call in order, whether given by position or by one of ``names``; () if there are more.

    names: every keyword that the functions concerned use for them, in the order of the positions.
    """
    if not kwargs:
        return args
    given = tuple(kwargs[name] for name in names if name in kwargs)
    return (*args, *given) if len(given) == len(kwargs) else ()


def extent(tensor: torch.Tensor) -> int:
    """Elements that a graph kernel addresses: the tensor's own, or its whole buffer's if it is a part of one."""
    if tensor.is_contiguous() and not tensor.storage_offset():
        return tensor.numel()
    return max(tensor.numel(), tensor.untyped_storage().nbytes() // tensor.element_size())
