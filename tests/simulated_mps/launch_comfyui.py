"""Runs a script, ComfyUI's main.py, on the simulated device: `python launch_comfyui.py main.py [arguments]`.

For ComfyServer(launcher=...). environment.py names the variables that choose the device; SIMULATED_STATS is a file
that gets the counters as JSON when the process ends. stats_node.py reads them inside a graph.
"""

import atexit
import os
import runpy
import sys
from pathlib import Path

TESTS = str(Path(__file__).resolve().parents[1])


def main() -> None:
    """Install the device, then become the script that the first argument names."""
    sys.argv = sys.argv[1:]
    script = sys.argv[0]
    sys.path[0] = str(Path(script).resolve().parent)
    sys.path.append(TESTS)

    from simulated_mps.counters import stats
    from simulated_mps.environment import install_from_environment

    install_from_environment()
    target = os.environ.get("SIMULATED_STATS")
    if target:
        atexit.register(lambda: Path(target).write_text(stats().json()))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
