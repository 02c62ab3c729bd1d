"""ComfyUI's AUDIO values as frames for an audio encoder, cut wherever the caller asks.

AUDIO is a mapping with `waveform`, floating [batch, channels, samples] in -1..1, and `sample_rate` in Hz; channels
lie in the order of FFmpeg's layouts of the same count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

from .errors import VideoError

# The layouts that AAC's header can name (ISO/IEC 14496-3, table 1.19), by their number of channels.
CHANNEL_LAYOUTS = {1: "mono", 2: "stereo", 3: "3.0", 4: "4.0", 5: "5.0", 6: "5.1"}


@dataclass(frozen=True)
class AudioClip:
    """samples: floating [channels, samples] in -1..1; sample_rate in Hz; layout: FFmpeg's name."""

    samples: Tensor
    sample_rate: int
    layout: str

    def frame(self, start: int, stop: int) -> av.AudioFrame | None:
        """Samples start..stop (exclusive, cut at the clip's end) as one frame; None if there are none."""
        part = self.samples[:, start:stop]
        if part.shape[1] == 0:
            return None
        part = part.detach().to("cpu", torch.float32).nan_to_num(nan=0.0).clamp(-1, 1)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(part.numpy()), format="fltp", layout=self.layout)
        frame.sample_rate = self.sample_rate
        frame.pts = start
        return frame


def audio_clip(audio: Mapping[str, Any] | None) -> AudioClip | None:
    """The first clip of an AUDIO value; None where there is no sound. Raises VideoError for another shape."""
    if audio is None:
        return None
    waveform, sample_rate = audio["waveform"], int(audio["sample_rate"])
    if waveform.ndim != 3 or sample_rate < 1:
        raise VideoError(
            f"The audio has shape {list(waveform.shape)} at {sample_rate} Hz, not [batch, channels, samples] at a "
            "positive rate; connect an AUDIO output."
        )
    if waveform.numel() == 0:
        return None
    channels = waveform.shape[1]
    if channels not in CHANNEL_LAYOUTS:
        supported = ", ".join(map(str, CHANNEL_LAYOUTS))
        raise VideoError(f"The audio has {channels} channels; mix it to one of {supported} first.")
    return AudioClip(waveform[0], sample_rate, CHANNEL_LAYOUTS[channels])
