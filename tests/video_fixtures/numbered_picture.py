"""A frame's number as light and dark cells over the whole picture, and the way to read it back.

Six columns and four rows: a light cell for reference, 15 bits of the number, 7 bits of check, a dark cell for
reference. The cells survive scaling, chroma subsampling, palettes, tone mapping and lossy codecs; a picture that is
turned, mirrored, blended or broken does not check, so it never passes for another frame. Cells are tinted, differently
for each number and place, so that colours can be compared too.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

COLUMNS, ROWS = 6, 4
NUMBER_BITS, CHECK_BITS = 15, 7
LARGEST = 2**NUMBER_BITS - 1
LEAST_CONTRAST = 0.2
LUMA = np.array([0.2126, 0.7152, 0.0722])


class UnreadableNumber(ValueError):
    """The picture shows no number, or a damaged one."""


def bits_of(number: int) -> list[bool]:
    """The cells of a number, row by row; its check is 41 n + 85 modulo 127, which no single wrong bit keeps."""
    if not 0 <= number <= LARGEST:
        raise ValueError(f"{number} does not fit into {NUMBER_BITS} bits")
    check = (41 * number + 85) % 127
    number_bits = [bool(number >> bit & 1) for bit in range(NUMBER_BITS)]
    return [True, *number_bits, *(bool(check >> bit & 1) for bit in range(CHECK_BITS)), False]


def picture(number: int, width: int, height: int) -> NDArray[np.float32]:
    """R'G'B' float32 [height, width, 3] in 0.05..0.95 that shows a number."""
    cells, light_tint, light_turn, dark_tint, dark_turn = _tints(width, height)
    light = np.array(bits_of(number))[cells][..., None]
    turn = np.float32(number % 16 / 15)
    return np.where(light, light_tint - light_turn * turn, dark_tint + dark_turn * turn)


@lru_cache(4)
def _tints(width: int, height: int) -> tuple[NDArray[Any], ...]:
    """The cell of each pixel, and the colours of light and dark cells: for turn 0, and what turn 1 changes."""
    cells = (np.arange(height) * ROWS // height)[:, None] * COLUMNS + np.arange(width) * COLUMNS // width
    y, x = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    zero = np.zeros_like(x)
    tints = (
        (0.95 + zero, 0.75 + 0.2 * x, 0.65 + 0.3 * y),
        (0.2 * x, zero, zero),
        (0.05 + zero, 0.05 + 0.1 * x, 0.1 + 0.3 * x),
        (0.3 * y, zero, zero),
    )
    return cells, *(np.stack(tint, -1).astype(np.float32) for tint in tints)


def read_number(frame: Any) -> int:
    """The number that a picture shows.

    frame: [H, W, C >= 3] or [1, H, W, C], a tensor or an array, floating or of whole numbers, of any scale. Raises
    UnreadableNumber where the cells do not check.
    """
    pixels = np.asarray(frame.detach().cpu() if hasattr(frame, "detach") else frame)
    pixels = pixels[0] if pixels.ndim == 4 else pixels
    height, width = pixels.shape[:2]
    means = np.empty(ROWS * COLUMNS)
    for cell in range(ROWS * COLUMNS):
        row, column = divmod(cell, COLUMNS)
        top, bottom = _middle(row, ROWS, height)
        left, right = _middle(column, COLUMNS, width)
        means[cell] = pixels[top:bottom, left:right, :3].astype(np.float64).mean((0, 1)) @ LUMA
    light, dark = means[0], means[-1]
    if not light - dark > LEAST_CONTRAST * max(abs(light), abs(dark)):
        raise UnreadableNumber(f"the reference cells are {light:.3g} and {dark:.3g}: no number, or turned")
    bits = means > (light + dark) / 2
    number = sum(int(bits[1 + bit]) << bit for bit in range(NUMBER_BITS))
    if bits.tolist() != bits_of(number):
        raise UnreadableNumber(f"the cells of {number} do not check: damaged, blended or turned")
    return number


def _middle(index: int, count: int, length: int) -> tuple[int, int]:
    """The middle half of a cell, one pixel at least."""
    begin, end = index * length / count, (index + 1) * length / count
    first = int(np.floor(begin + (end - begin) / 4))
    return first, max(first + 1, int(np.ceil(end - (end - begin) / 4)))
