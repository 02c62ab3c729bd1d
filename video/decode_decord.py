"""Frames of a video through eva-decord, where it can be trusted with them.

eva-decord (FFmpeg 4) decodes to 8-bit R'G'B' with FFmpeg's fast converter, which repeats chroma instead of
interpolating it, and has its own idea of a file's frames. It is used on request only, for local files whose frames
and times it sees as the index does, in closed groups of pictures (after a seek it gives other frames than were asked
for in open ones, as x265 makes them by default), 8 bits deep, opaque, not HDR and not turned. Gray and R'G'B' pictures
then agree with PyAV's to within one level of 255; others differ at coloured edges. On Linux eva-decord also loads its
libraries for the whole process, after which PyAV's libvpx encoder fails: another reason never to load it unasked.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np

from .decode_index import FrameIndex, Source, name_of
from .errors import VideoError
from .media_info import VideoInfo

log = logging.getLogger(__name__)

BATCH_BYTES = 48 << 20  # of frames that eva-decord hands over at once
TIME_TOLERANCE = 0.002  # seconds; eva-decord's times are single precision


def refusal(source: Source, info: VideoInfo, index: FrameIndex) -> str | None:
    """Why eva-decord is not used for a file, as a part of a sentence; None where it may be."""
    reasons = {
        "it reads files on disk only": not isinstance(source, Path),
        "it has no more than 8 bits": info.bit_depth > 8,
        "it has no alpha": info.has_alpha,
        "it has no HDR": info.hdr is not None,
        "it does not turn pictures": bool(info.rotation or info.mirrored),
        "it jumps to wrong frames in open groups of pictures": index.has_open_groups,
        "it takes every picture for limited range": info.color.range == "pc" and info.color.matrix != "rgb",
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


class DecordFrames:
    """Gives frames by index like PyAVDecoder. Raises VideoError where eva-decord is missing or would be wrong."""

    backend = "decord"

    def __init__(self, source: Source, info: VideoInfo, index: FrameIndex) -> None:
        reason = refusal(source, info, index)
        if reason is not None:
            raise VideoError(f"{name_of(source)} cannot be read with eva-decord: {reason}; choose pyav or auto.")
        try:
            import decord
        except (ImportError, OSError) as error:
            raise VideoError("eva-decord is not installed; choose the backend pyav or auto.") from error
        if getattr(decord, "REPLACEMENT", False):
            raise VideoError("eva-decord is not installed; choose the backend pyav or auto.")
        try:
            self._reader = decord.VideoReader(str(source), num_threads=0)
        except Exception as error:  # decord raises its own kinds, and RuntimeError
            raise VideoError(f"{name_of(source)} cannot be opened by eva-decord; choose pyav or auto.") from error
        if not _same_frames(self._reader, info, index):
            raise VideoError(
                f"{name_of(source)} has other frames for eva-decord than for FFmpeg's timestamps; choose pyav or auto."
            )
        self._info = info
        log.info("%s is read with eva-decord, which repeats chroma where PyAV interpolates it.", name_of(source))

    def decode(self, wanted: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """Each wanted frame (ascending, no repeats) with its index."""
        batch = max(1, BATCH_BYTES // (self._info.width * self._info.height * 3))
        remaining = iter(wanted)
        while indices := list(islice(remaining, batch)):
            values = self._reader.get_batch(indices)
            array = values.asnumpy() if hasattr(values, "asnumpy") else np.asarray(values)
            for index, pixels in zip(indices, array):
                yield index, av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")


def _same_frames(reader: Any, info: VideoInfo, index: FrameIndex) -> bool:
    """Whether eva-decord sees the same number of frames at the same times, in the same size."""
    if len(reader) != len(index) or tuple(reader[0].shape[:2]) != (info.height, info.width):
        return False
    times = np.asarray(reader.get_frame_timestamp(list(range(len(reader)))))[:, 0]
    expected = np.array([float(stamp) for stamp in index.timestamps])
    return bool(np.abs(times - expected).max() <= TIME_TOLERANCE + 1e-5 * float(expected.max()))
