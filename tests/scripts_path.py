"""Makes the modules of scripts/ importable by name.

At the end of the search path: scripts/gguf.py must not hide the PyPI package of that name.
"""

import sys
from pathlib import Path

SCRIPTS = str(Path(__file__).resolve().parents[1] / "scripts")

if SCRIPTS not in sys.path:
    sys.path.append(SCRIPTS)
