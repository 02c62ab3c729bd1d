"""Makes the pack importable as ``apple_silicon_video``, and what lies in scripts/ by its own name, in every test.

scripts/ goes to the end of the path: at its front, ``import gguf`` would find scripts/gguf.py instead of the PyPI
package that tests compare with.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))

from _pack import load_pack

load_pack()
