"""A clip whose frames can be told apart, tones, and independent ways to read a video back, for the video tests."""

from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import torch
from apple_silicon_video.video.encoding import encode_video
from apple_silicon_video.video.video_formats import load_formats

FORMAT = load_formats()["h264-mp4"]
SOFTWARE = replace(FORMAT, video_encoders=tuple(e for e in FORMAT.video_encoders if e.platform is None))
DEVICES = ["cpu"] + ["mps"] * torch.backends.mps.is_available()
AAC_FRAME = 1024
MARKS = 8


def clip(frames: int, height: int = 96, width: int = 160) -> torch.Tensor:
    """A moving gradient with the frame's number as eight black or white squares along the upper edge."""
    x = torch.linspace(0, 1, width)[None, None, :].expand(frames, height, width)
    y = torch.linspace(0, 1, height)[None, :, None].expand(frames, height, width)
    t = torch.linspace(0, 1, max(frames, 2))[:frames, None, None].expand(frames, height, width)
    images = torch.stack((x, y, (x + t) / 2), -1).contiguous()
    side = width // MARKS
    for index in range(frames):
        for bit in range(MARKS):
            images[index, :16, bit * side : (bit + 1) * side] = float(index >> bit & 1)
    return images


def number_in(picture: np.ndarray) -> int:
    side = picture.shape[1] // MARKS
    return sum(int(picture[4:12, b * side + 4 : (b + 1) * side - 4].mean() > 0.5) << b for b in range(MARKS))


def decode(path: Path) -> list[np.ndarray]:
    """Frames as R'G'B' in 0..1 through the BT.709 formulas in float64, chroma repeated."""
    pictures = []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            planes = frame.to_ndarray(format="yuv420p").astype(np.float64)
            luma = (planes[: frame.height] - 16) / 219
            blue, red = (planes[frame.height :].reshape(2, frame.height // 2, frame.width // 2) - 128) / 224
            blue, red = (np.kron(plane, np.ones((2, 2))) for plane in (blue, red))
            r, b = luma + 2 * (1 - 0.2126) * red, luma + 2 * (1 - 0.0722) * blue
            pictures.append(np.stack((r, (luma - 0.2126 * r - 0.0722 * b) / 0.7152, b), -1))
    return pictures


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(-10 * np.log10(np.mean((a - b) ** 2) + 1e-12))


def tone(seconds: float, rate: int, channels: int = 2, start: float = 0.0) -> dict:
    """A different tone in each channel, silent before `start` seconds."""
    time = torch.arange(int(seconds * rate)) / rate
    waves = [0.5 * torch.sin(2 * torch.pi * (200 + 100 * c) * time) * (time >= start) for c in range(channels)]
    return {"waveform": torch.stack(waves)[None], "sample_rate": rate}


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def save(path: Path, frames=None, **options):
    frames = clip(6) if frames is None else frames
    return encode_video(path, frames, **{"fps": 24, "video_format": FORMAT} | options)
