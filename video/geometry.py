"""Sizes of frames: what to scale a picture to, and what to cut off or add, so that it has the size that was asked for.

Video models take sides that are multiples of 8, 16 or 32; every mode here rounds to such a multiple.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import VideoError

MODES = ("stretch", "fit", "crop", "pad")
MULTIPLES = (1, 8, 16, 32)
LARGEST_SIDE = 16384


@dataclass(frozen=True)
class Placement:
    """How a picture becomes a frame; all in pixels of the frame's orientation.

    width, height: of the frame. scaled_width, scaled_height: of the whole picture after scaling. left, top: where its
    corner lies in the frame, negative where it is cut off.
    """

    width: int
    height: int
    scaled_width: int
    scaled_height: int
    left: int = 0
    top: int = 0


@dataclass(frozen=True)
class FrameSize:
    """A wanted size.

    width, height: pixels; 0 follows from the other one by the picture's aspect, both 0 keep the picture's size.
    mode: "stretch" to exactly this size, "fit" inside it with the aspect kept, "crop" to fill it and cut the edges
    off evenly, "pad" inside it with black around. multiple: of which both sides are made a multiple: "crop" rounds a
    side that was not given down, "pad" up, the others to the nearest.
    """

    width: int = 0
    height: int = 0
    mode: str = "stretch"
    multiple: int = 1

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise VideoError(f"The size mode {self.mode!r} is none of {', '.join(MODES)}; choose one of them.")
        if self.multiple < 1 or not 0 <= self.width <= LARGEST_SIDE or not 0 <= self.height <= LARGEST_SIDE:
            raise VideoError(
                f"The size {self.width}x{self.height} in multiples of {self.multiple} cannot be made; enter sides "
                f"between 0 and {LARGEST_SIDE} and a multiple of 1 or more."
            )

    def place(self, width: int, height: int) -> Placement:
        """How a picture of width x height becomes a frame of this size."""
        box_width, box_height = self._box(width, height)
        if self.mode == "stretch":
            box_width, box_height = self._nearest(box_width), self._nearest(box_height)
            return Placement(box_width, box_height, box_width, box_height)
        if self.mode == "fit":
            scale = min(box_width / width, box_height / height)
            fitted = self._nearest(width * scale), self._nearest(height * scale)
            return Placement(*fitted, *fitted)
        chosen = [self._down, self._up][self.mode == "pad"]
        out_width = self._nearest(self.width) if self.width else chosen(box_width)
        out_height = self._nearest(self.height) if self.height else chosen(box_height)
        scale = [max, min][self.mode == "pad"](out_width / width, out_height / height)
        if (self.width, self.height) == (0, 0):
            scale = min(scale, 1.0) if self.mode == "pad" else scale
            if self.mode == "crop" and out_width <= width and out_height <= height:
                scale = 1.0
        scaled_width, scaled_height = max(1, round(width * scale)), max(1, round(height * scale))
        left, top = (out_width - scaled_width) // 2, (out_height - scaled_height) // 2
        return Placement(out_width, out_height, scaled_width, scaled_height, left, top)

    def _box(self, width: int, height: int) -> tuple[float, float]:
        """The size before rounding."""
        if self.width and self.height:
            return self.width, self.height
        if self.width:
            return self.width, self.width * height / width
        if self.height:
            return self.height * width / height, self.height
        return width, height

    def _nearest(self, side: float) -> int:
        return max(1, round(side / self.multiple)) * self.multiple

    def _down(self, side: float) -> int:
        return max(1, int(side + 1e-6) // self.multiple) * self.multiple

    def _up(self, side: float) -> int:
        return -(-int(side + 1 - 1e-6) // self.multiple) * self.multiple
