"""Sound that tells the time: a rising tone in each channel, from whose pitch the moment can be read back."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

PITCH_AT_0 = 400.0
PITCH_A_SECOND = 400.0
PITCH_OF_CHANNEL = 60.0
AMPLITUDE = 0.4


@dataclass(frozen=True)
class Sound:
    """A clip's sound: channels, samples a second, seconds, where it begins on the clip's clock, and its encoder."""

    channels: int = 2
    rate: int = 48000
    seconds: Fraction = Fraction(1)
    start: Fraction = Fraction(0)
    encoder: str = "aac"

    @property
    def layout(self) -> str:
        return {1: "mono", 2: "stereo", 6: "5.1"}[self.channels]

    @property
    def samples(self) -> int:
        return int(self.seconds * self.rate)


def wave(sound: Sound) -> NDArray[np.float32]:
    """float32 [channels, samples]: at second t of the clip channel c has 400 + 400 t + 60 c hertz."""
    time = np.arange(sound.samples) / sound.rate + float(sound.start)
    phases = [(PITCH_AT_0 + PITCH_OF_CHANNEL * c) * time + PITCH_A_SECOND / 2 * time**2 for c in range(sound.channels)]
    return (AMPLITUDE * np.sin(2 * np.pi * np.stack(phases))).astype(np.float32)


def read_time(samples: Any, rate: int, channel: int = 0) -> float:
    """The second of the clip that the middle of some samples of one channel comes from.

    samples: [n], a tensor or an array, about 20 to 100 ms of the rising tone. Exact to about 3 ms; raises ValueError
    for silence.
    """
    values = np.asarray(samples.detach().cpu() if hasattr(samples, "detach") else samples, np.float64)
    if np.sqrt(np.mean(values**2)) < AMPLITUDE / 20:
        raise ValueError("silence")
    spectrum = np.abs(np.fft.rfft(values * np.hanning(len(values)), 1 << 16))
    peak = int(spectrum[8:].argmax()) + 8
    left, middle, right = np.log(spectrum[peak - 1 : peak + 2] + 1e-12)
    bins = peak + (left - right) / (2 * (left - 2 * middle + right) + 1e-12)
    pitch = bins * rate / (1 << 16)
    return float((pitch - PITCH_AT_0 - PITCH_OF_CHANNEL * channel) / PITCH_A_SECOND)
