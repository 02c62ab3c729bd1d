"""Searches for the scales (and minimums) with which groups of weights lose least when they become small integers.

The method is the published one of ggml's quantisers: try several scales around "largest weight on largest code",
round, fit scale and minimum to the codes by least squares, keep the best. The error minimised is the plain squared
one, or the one weighted by importance. Arrays are float32 [weights of a group, groups], so that sums run over axis 0
in a fixed order and results do not depend on the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
SMALLEST = 1e-30  # below it a divisor counts as zero
_NO_SPREAD = 1e-5  # of a group's codes, relative to their squares: below it they count as all equal
HALF_MAX = 65504.0


def half(values: Array) -> Array:
    """float16 nearest to ``values``, never infinite."""
    return np.clip(values, -HALF_MAX, HALF_MAX).astype(np.float16)


def half_below(values: Array) -> Array:
    """The largest float16 that is not above ``values``."""
    rounded = half(values)
    below = np.nextafter(rounded, np.float16(-HALF_MAX))
    return np.where(rounded.astype(np.float32) > values, below, rounded)


def inverse(values: Array) -> Array:
    """1 / values, and 0 where the value is as good as zero."""
    result = np.zeros_like(values)
    np.divide(1, values, out=result, where=np.abs(values) > SMALLEST)
    return result


@dataclass
class Sums:
    """Weighted sums over each group: of codes, their squares, and codes times weights."""

    codes: Array
    squares: Array
    products: Array

    def spread(self, total: Array | np.float32) -> Array:
        """Determinant of the fit of scale and minimum; 0 where the codes are as good as equal."""
        squares = total * self.squares
        determinant = squares - self.codes * self.codes
        return np.where(determinant > _NO_SPREAD * squares, determinant, 0)


class Best:
    """Keeps, of several solutions, the parts with the smallest error."""

    def __init__(self) -> None:
        self._error: Array | None = None
        self.parts: tuple[Array, ...] = ()

    def offer(self, error: Array, *parts: Array) -> None:
        """Take over the parts where ``error`` [n] is smaller; each is [..., n] and may be kept or written to."""
        if self._error is None:
            self._error, self.parts = error, tuple(part.copy() for part in parts)
            return
        better = error < self._error
        np.copyto(self._error, error, where=better)
        for kept, part in zip(self.parts, parts):
            np.copyto(kept, part, where=better)


class Groups:
    """Groups of weights with their importance, and buffers for the sums over them.

    Args:
        values: float32 [size, ...groups].
        importance: the same shape, not negative, or None for one.
    """

    def __init__(self, values: Array, importance: Array | None) -> None:
        self.values = values
        self.importance = importance
        self._buffer = np.empty_like(values)
        self._weighted = values if importance is None else np.empty_like(values)

    def total(self) -> Array | np.float32:
        """Sum of the importance in each group."""
        if self.importance is None:
            return np.float32(self.values.shape[0])
        return np.add.reduce(self.importance, axis=0)

    def sum(self) -> Array:
        """Weighted sum of the values in each group."""
        if self.importance is None:
            return np.add.reduce(self.values, axis=0)
        return self._reduced(self.importance, self.values)

    def sums(self, codes: Array, with_codes: bool = True) -> Sums:
        """The sums for the given codes, float32 of the values' shape."""
        weighted = codes
        if self.importance is not None:
            weighted = np.multiply(codes, self.importance, out=self._weighted)
        total = np.add.reduce(weighted, axis=0) if with_codes else codes[0]
        return Sums(total, self._reduced(weighted, codes), self._reduced(weighted, self.values))

    def squared_error(self, decoded: Array) -> Array:
        """Weighted squared error of each group; overwrites ``decoded``, float32 of the values' shape."""
        decoded -= self.values
        weighted = decoded if self.importance is None else np.multiply(decoded, self.importance, out=self._weighted)
        return self._reduced(weighted, decoded)

    def _reduced(self, left: Array, right: Array) -> Array:
        return np.add.reduce(np.multiply(left, right, out=self._buffer), axis=0)


def affine_codes(values: Array, scale: Array, minimum: Array, largest: int, out: Array) -> Array:
    """Codes 0 .. largest of values = scale * code + minimum."""
    inverted = inverse(scale)
    np.multiply(values, inverted, out=out)
    out -= minimum * inverted
    np.rint(out, out=out)
    np.maximum(out, 0, out=out)
    return np.minimum(out, largest, out=out)


def affine_search(
    values: Array, importance: Array | None, largest: int, steps: Sequence[float], below_zero: bool
) -> tuple[Array, Array]:
    """Scale and minimum of each group for codes 0 .. largest.

    Args:
        values, importance: as for ``Groups``, two-dimensional.
        steps: scales to try: those that put the largest weight on ``largest`` + step.
        below_zero: whether the format can only hold minimums of zero and below.
    """
    low = values.min(axis=0)
    if below_zero:
        np.minimum(low, 0, out=low)
    inverted = inverse(values.max(axis=0) - low)
    groups = Groups(values - low, importance)
    codes = np.empty_like(values)
    total, value_sum = groups.total(), groups.sum()
    best = largest * inverted
    best_score = np.full_like(best, -1)
    for step in steps:
        inverse_scale = np.float32(largest + step) * inverted
        np.multiply(groups.values, inverse_scale, out=codes)
        np.rint(codes, out=codes)
        np.minimum(codes, largest, out=codes)
        sums = groups.sums(codes)
        gain = total * sums.products - value_sum * sums.codes
        gain *= gain
        gain *= inverse(sums.spread(total))
        better = gain > best_score
        np.copyto(best, inverse_scale, where=better)
        np.copyto(best_score, gain, where=better)
    scale, offset = inverse(best), np.zeros_like(low)
    for _ in range(2):
        sums = groups.sums(affine_codes(groups.values, scale, offset, largest, codes))
        inverted = inverse(sums.spread(total))
        fitted = (total * sums.products - value_sum * sums.codes) * inverted
        fitted_offset = (sums.squares * value_sum - sums.codes * sums.products) * inverted
        if below_zero:
            through_zero = (fitted_offset + low > 0) | (inverted == 0)
            at_zero = (sums.products + low * sums.codes) * inverse(sums.squares)
            fitted = np.where(through_zero, at_zero, fitted)
            fitted_offset = np.where(through_zero, -low, fitted_offset)
        usable = fitted > 0
        np.copyto(scale, fitted, where=usable)
        np.copyto(offset, fitted_offset, where=usable)
    return scale, low + offset


Rounding = Callable[[Array], Array]


@dataclass(frozen=True)
class Codebook:
    """Values that codes stand for, about symmetric: the largest weight goes to ``lowest`` or else to ``alternative``.

    ``round`` replaces scaled weights by the nearest values, in place; ``codes`` gives the values' codes as uint8.
    """

    lowest: float
    alternative: float
    round: Rounding
    codes: Rounding


def integers(lowest: int, highest: int) -> Codebook:
    """The codebook of the integers lowest .. highest."""

    def rounded(scaled: Array) -> Array:
        np.rint(scaled, out=scaled)
        np.maximum(scaled, lowest, out=scaled)
        return np.minimum(scaled, highest, out=scaled)

    return Codebook(lowest, lowest + 1, rounded, lambda found: (found - np.float32(lowest)).astype(np.uint8))


def table_codebook(table: Sequence[int]) -> Codebook:
    """The codebook of the ascending values of ``table``, whose midpoints must be multiples of a half."""
    points = np.asarray(table, np.float32)
    ends = 4 * int(np.abs(points).max())
    halves = (np.arange(-ends, ends) + 0.5) / 2
    index = np.abs(halves[:, None] - points).argmin(axis=1)
    nearest, code = points[index], index.astype(np.uint8)

    def position(scaled: Array) -> Array:
        doubled = np.multiply(scaled, 2)
        np.maximum(doubled, -ends, out=doubled)
        np.minimum(doubled, ends - 1, out=doubled)
        return np.floor(doubled, out=doubled).astype(np.int32) + ends

    def rounded(scaled: Array) -> Array:
        return np.take(nearest, position(scaled), out=scaled)

    return Codebook(float(points[0]), float(points[-1]), rounded, lambda found: code[position(found)])


def symmetric_search(values: Array, importance: Array | None, codebook: Codebook, steps: Sequence[float]) -> Array:
    """Scale of each group, of either sign, for values = scale * code.

    ``steps``: scales to try: those that put the largest weight on ``codebook.lowest`` - step.
    """
    inverted = inverse(largest_magnitude(values))
    groups = Groups(values, importance)
    codes = np.empty_like(values)
    best = np.zeros_like(inverted)
    best_score = np.zeros_like(inverted)
    for step in steps:
        np.multiply(values, np.float32(codebook.lowest - step) * inverted, out=codes)
        sums = groups.sums(codebook.round(codes), with_codes=False)
        scale = sums.products * inverse(sums.squares)
        gain = scale * sums.products
        better = gain > best_score
        np.copyto(best, scale, where=better)
        np.copyto(best_score, gain, where=better)
    np.multiply(values, inverse(best), out=codes)
    sums = groups.sums(codebook.round(codes), with_codes=False)
    np.divide(sums.products, sums.squares, out=best, where=sums.squares > SMALLEST)
    return best


def largest_magnitude(values: Array) -> Array:
    """Along axis 0, the value of the largest magnitude, with its sign."""
    high, low = values.max(axis=0), values.min(axis=0)
    return np.where(high > -low, high, low)
