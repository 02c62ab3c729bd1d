"""Turns float32 weights into ggml's blocks: one encoder for each type, layouts as in ggml-common.h.

An encoder finds codes and scales with ``quantizer_search`` and packs them. Types with super-blocks (K-quants, IQ4_XS)
store their scales as small integers times a float16; codes, scales and that factor are fitted to each other in turn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .codebook_quants import IQ4_VALUES
from .quantizer_search import (
    Array,
    Best,
    Codebook,
    Groups,
    Sums,
    affine_codes,
    affine_search,
    half,
    half_below,
    integers,
    inverse,
    largest_magnitude,
    symmetric_search,
    table_codebook,
)

Encoder = Callable[[Array, Array | None], Array]

IQ4 = table_codebook(IQ4_VALUES)


def _steps(first: float, last: float, count: int) -> tuple[float, ...]:
    return tuple(np.linspace(first, last, count).tolist())


def _bytes(halves: Array) -> Array:
    """float16 [n] -> uint8 [n, 2]."""
    return halves.astype("<f2").view(np.uint8).reshape(-1, 2)


def _grouped(blocks: Array | None, size: int) -> Array | None:
    """[n, block] -> contiguous [size, groups in a block, n]."""
    return None if blocks is None else np.ascontiguousarray(blocks.reshape(blocks.shape[0], -1, size).T)


def _rows(codes: Array) -> Array:
    """uint8 [size, groups, n] -> [n, groups * size]."""
    return np.ascontiguousarray(codes.T).reshape(codes.shape[2], -1)


def _nibbles(codes: Array, group: int) -> Array:
    """uint8 [n, k] of four bits -> [n, k / 2]: in each ``group``, the second half goes into the high nibbles."""
    halves = codes.reshape(codes.shape[0], -1, 2, group // 2)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(codes.shape[0], -1)


def _stacked(codes: Array, bits: int, group: int) -> Array:
    """uint8 [n, k]: in each ``group``, 8 / ``bits`` runs of codes are laid over each other, the first lowest."""
    runs = codes.reshape(codes.shape[0], -1, 8 // bits, group * bits // 8)
    packed = runs[:, :, 0].copy()
    for index in range(1, runs.shape[2]):
        packed |= runs[:, :, index] << bits * index
    return packed.reshape(codes.shape[0], -1)


def _joined(*parts: Array) -> Array:
    return np.concatenate(parts, axis=1)


@dataclass(frozen=True)
class Plain:
    """Blocks of 32 with one scale: Q8_0, Q4_0, Q5_0, IQ4_NL. ``pack`` takes codes as uint8 [n, 32]."""

    codebook: Codebook
    steps: tuple[float, ...]
    pack: Callable[[Array], Array]

    def __call__(self, blocks: Array, importance: Array | None) -> Array:
        values = np.ascontiguousarray(blocks.T)
        importance = None if importance is None else np.ascontiguousarray(importance.T)
        groups, best = Groups(values, importance), Best()
        largest = largest_magnitude(values)
        searched = symmetric_search(values, importance, self.codebook, self.steps)
        simple = (largest / np.float32(end) for end in (self.codebook.lowest, self.codebook.alternative))
        for scale in (searched, *simple):
            halves = half(scale)
            rounded = halves.astype(np.float32)
            found = self.codebook.round(values * inverse(rounded))
            codes = self.codebook.codes(found)
            best.offer(groups.squared_error(np.multiply(found, rounded, out=found)), halves, codes)
        halves, codes = best.parts
        return _joined(_bytes(halves), self.pack(np.ascontiguousarray(codes.T)))


@dataclass(frozen=True)
class PlainAffine:
    """Blocks of 32 with scale and offset: Q4_1, Q5_1."""

    largest: int
    steps: tuple[float, ...]
    pack: Callable[[Array], Array]

    def __call__(self, blocks: Array, importance: Array | None) -> Array:
        values = np.ascontiguousarray(blocks.T)
        importance = None if importance is None else np.ascontiguousarray(importance.T)
        groups, best = Groups(values, importance), Best()
        searched = affine_search(values, importance, self.largest, self.steps, below_zero=False)
        low = half_below(values.min(axis=0)).astype(np.float32)
        simple = ((values.max(axis=0) - low) / np.float32(self.largest), low)
        found = np.empty_like(values)
        for pair in (searched, simple):
            halves = [half(part) for part in pair]
            scale, minimum = (part.astype(np.float32) for part in halves)
            codes = affine_codes(values, scale, minimum, self.largest, found).astype(np.uint8)
            found *= scale
            found += minimum
            best.offer(groups.squared_error(found), *halves, codes)
        scale_halves, minimum_halves, codes = best.parts
        return _joined(_bytes(scale_halves), _bytes(minimum_halves), self.pack(np.ascontiguousarray(codes.T)))


@dataclass(frozen=True)
class Symmetric:
    """Super-blocks with signed scales: Q3_K, Q6_K, IQ4_XS.

    ``pack(codes [n, 256], scales [n, groups], d [n, 2])`` makes the blocks; scales are signed integers from
    ``lowest_scale`` up.
    """

    size: int
    codebook: Codebook
    lowest_scale: int
    steps: tuple[float, ...]
    pack: Callable[[Array, Array, Array], Array]
    rounds: int = 1
    starts: tuple[float, ...] = (0, 1)

    def __call__(self, blocks: Array, importance: Array | None) -> Array:
        values, importance = _grouped(blocks, self.size), _grouped(importance, self.size)
        assert values is not None
        flat = (self.size, -1)
        scale = symmetric_search(
            values.reshape(flat), None if importance is None else importance.reshape(flat), self.codebook, self.steps
        ).reshape(values.shape[1:])
        groups, best = Groups(values, importance), Best()
        found = np.empty_like(values)
        largest = largest_magnitude(scale)
        for start in self.starts:
            d = largest / np.float32(self.lowest_scale + start)
            scales = self._codes(scale, d)
            for _ in range(self.rounds):
                np.multiply(values, inverse(d * scales), out=found)
                sums = groups.sums(self.codebook.round(found), with_codes=False)
                scales = self._codes(sums.products * inverse(sums.squares), d)
                weight = np.add.reduce(scales * scales * sums.squares, axis=0)
                fitted = np.add.reduce(scales * sums.products, axis=0) * inverse(weight)
                d = np.where(fitted * d > 0, fitted, d)
            halves = half(d)
            step = halves.astype(np.float32) * scales
            np.multiply(values, inverse(step), out=found)
            codes = self.codebook.codes(self.codebook.round(found))
            found *= step
            best.offer(np.add.reduce(groups.squared_error(found), axis=0), halves, scales, codes)
        halves, scales, codes = best.parts
        return self.pack(_rows(codes), np.ascontiguousarray(scales.T).astype(np.int8), _bytes(halves))

    def _codes(self, scale: Array, d: Array) -> Array:
        codes = np.rint(scale * inverse(d))
        return np.clip(codes, self.lowest_scale, -self.lowest_scale - 1)


@dataclass(frozen=True)
class Affine:
    """Super-blocks with scales and minimums: Q2_K, Q4_K, Q5_K.

    ``pack(codes [n, 256], scales [n, groups], minimums [n, groups], d [n, 2], dmin [n, 2])`` makes the blocks.
    """

    size: int
    largest: int
    largest_scale: int
    steps: tuple[float, ...]
    pack: Callable[[Array, Array, Array, Array, Array], Array]
    rounds: int = 1
    starts: tuple[float, ...] = (0, 1)

    def __call__(self, blocks: Array, importance: Array | None) -> Array:
        values, importance = _grouped(blocks, self.size), _grouped(importance, self.size)
        assert values is not None
        flat = (self.size, -1)
        scale, minimum = affine_search(
            values.reshape(flat),
            None if importance is None else importance.reshape(flat),
            self.largest,
            self.steps,
            below_zero=True,
        )
        scale, minimum = scale.reshape(values.shape[1:]), minimum.reshape(values.shape[1:])
        groups, best = Groups(values, importance), Best()
        found = np.empty_like(values)
        total, value_sum = groups.total(), groups.sum()
        for start in self.starts:
            d = scale.max(axis=0) / np.float32(self.largest_scale - start)
            dmin = -minimum.min(axis=0) / np.float32(self.largest_scale - start)
            scales, minimums = self._codes(scale, d), self._codes(-minimum, dmin)
            for _ in range(self.rounds):
                sums = groups.sums(affine_codes(values, d * scales, -dmin * minimums, self.largest, found))
                scales = self._codes((sums.products + dmin * minimums * sums.codes) * inverse(sums.squares), d)
                minimums = self._codes((d * scales * sums.codes - value_sum) * inverse(np.asarray(total)), dmin)
                d, dmin = _fitted(d, dmin, scales, minimums, sums, total, value_sum)
            halves = half(d), half(dmin)
            step, low = halves[0].astype(np.float32) * scales, -halves[1].astype(np.float32) * minimums
            codes = affine_codes(values, step, low, self.largest, found).astype(np.uint8)
            found *= step
            found += low
            best.offer(np.add.reduce(groups.squared_error(found), axis=0), *halves, scales, minimums, codes)
        d_halves, dmin_halves, scales, minimums, codes = best.parts
        return self.pack(
            _rows(codes),
            np.ascontiguousarray(scales.T).astype(np.uint8),
            np.ascontiguousarray(minimums.T).astype(np.uint8),
            _bytes(d_halves),
            _bytes(dmin_halves),
        )

    def _codes(self, scale: Array, d: Array) -> Array:
        return np.clip(np.rint(scale * inverse(d)), 0, self.largest_scale)


def _fitted(
    d: Array, dmin: Array, scales: Array, minimums: Array, sums: Sums, total: Array | np.float32, value_sum: Array
) -> tuple[Array, Array]:
    """Least squares of the two factors of a super-block for given codes, scales and minimums; else as they were."""
    aa = np.add.reduce(scales * scales * sums.squares, axis=0)
    ab = np.add.reduce(scales * minimums * sums.codes, axis=0)
    bb = np.add.reduce(minimums * minimums * total, axis=0)
    xa = np.add.reduce(scales * sums.products, axis=0)
    xb = np.add.reduce(minimums * value_sum, axis=0)
    determinant = aa * bb - ab * ab
    inverted = inverse(determinant)
    both = (xa * bb - xb * ab) * inverted, (xa * ab - xb * aa) * inverted
    usable = (determinant > 1e-4 * aa * bb) & (both[0] > 0) & (both[1] > 0)
    alone = (xa + dmin * ab) * inverse(aa)
    return np.where(usable, both[0], np.where(alone > 0, alone, d)), np.where(usable, both[1], dmin)


def _five_bits(codes: Array) -> Array:
    high = np.packbits(codes >> 4, axis=1, bitorder="little")
    return _joined(high, _nibbles(codes & 15, 32))


def _pack_q2_k(codes: Array, scales: Array, minimums: Array, d: Array, dmin: Array) -> Array:
    return _joined(scales | minimums << 4, _stacked(codes, 2, 128), d, dmin)


def _pack_q3_k(codes: Array, scales: Array, d: Array) -> Array:
    shifted = (scales + np.int8(32)).view(np.uint8)
    packed = _joined(_nibbles(shifted & 15, 16), _stacked(shifted >> 4, 2, 16))
    return _joined(_stacked(codes >> 2, 1, 256), _stacked(codes & 3, 2, 128), packed, d)


def _pack_six_bits(scales: Array, minimums: Array) -> Array:
    """Eight scales and eight minimums of six bits -> the twelve bytes of Q4_K and Q5_K."""
    low = [part[:, :4] | part[:, 4:] >> 4 << 6 for part in (scales, minimums)]
    return _joined(*low, scales[:, 4:] & 15 | minimums[:, 4:] << 4)


def _pack_q4_k(codes: Array, scales: Array, minimums: Array, d: Array, dmin: Array) -> Array:
    return _joined(d, dmin, _pack_six_bits(scales, minimums), _nibbles(codes, 64))


def _pack_q5_k(codes: Array, scales: Array, minimums: Array, d: Array, dmin: Array) -> Array:
    high, low = _stacked(codes >> 4, 1, 256), _nibbles(codes & 15, 64)
    return _joined(d, dmin, _pack_six_bits(scales, minimums), high, low)


def _pack_q6_k(codes: Array, scales: Array, d: Array) -> Array:
    return _joined(_nibbles(codes & 15, 128), _stacked(codes >> 4, 2, 128), scales.view(np.uint8), d)


def _pack_iq4_xs(codes: Array, scales: Array, d: Array) -> Array:
    shifted = (scales + np.int8(32)).view(np.uint8)
    return _joined(d, _stacked(shifted >> 4, 2, 4), _stacked(shifted & 15, 4, 2), _nibbles(codes, 32))


_WIDE = _steps(-1.2, 1.2, 13)
_COARSE = _steps(-0.9, 0.9, 13)

_IQ4_STEPS = (*_steps(-9, 9, 13), *_steps(-244, -236, 3))

ENCODERS: dict[str, Encoder] = {
    "Q8_0": Plain(integers(-127, 127), (0.0,), lambda codes: codes - np.uint8(127)),
    "Q4_0": Plain(integers(-8, 7), _COARSE, lambda codes: _nibbles(codes, 32)),
    "Q5_0": Plain(integers(-16, 15), _COARSE, _five_bits),
    "IQ4_NL": Plain(IQ4, _IQ4_STEPS, lambda codes: _nibbles(codes, 32)),
    "Q4_1": PlainAffine(15, _WIDE, lambda codes: _nibbles(codes, 32)),
    "Q5_1": PlainAffine(31, _COARSE, _five_bits),
    "Q2_K": Affine(16, 3, 15, _steps(-0.6, 1.0, 9), _pack_q2_k),
    "Q3_K": Symmetric(16, integers(-4, 3), -32, _steps(-1.4, 1.4, 19), _pack_q3_k, starts=(-3, 0, 2, 4)),
    "Q4_K": Affine(32, 15, 63, _steps(-1.4, 1.0, 13), _pack_q4_k),
    "Q5_K": Affine(32, 31, 63, _steps(-0.6, 0.8, 7), _pack_q5_k),
    "Q6_K": Symmetric(16, integers(-32, 31), -128, _WIDE, _pack_q6_k),
    "IQ4_XS": Symmetric(32, IQ4, -32, _IQ4_STEPS, _pack_iq4_xs),
}
