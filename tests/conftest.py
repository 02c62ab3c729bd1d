"""Makes the pack importable as ``apple_silicon_video`` in every test."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from _pack import load_pack  # noqa: E402

load_pack()
