"""Examines this Mac: which known MPS defects it has, which are cured, and what to do.

    python scripts/doctor.py [--quick] [--json | --markdown]

Runs anywhere; without MPS it says what can still be checked. Exit status 1 if a defect is there and not cured.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict

from _pack import load_pack


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small tensors only, about 10 s")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="everything, for scripts")
    form.add_argument("--markdown", action="store_true", help="a table for a bug report")
    options = parser.parse_args(arguments)

    load_pack()
    from apple_silicon_video.memory.telemetry import take_snapshot
    from apple_silicon_video.mps_patches import doctor, doctor_views, install

    install.apply()
    memory = {name: value for name, value in asdict(take_snapshot()).items() if value is not None}
    diagnosis = doctor.diagnose(quick=options.quick, memory=memory)
    if options.json:
        text = json.dumps(diagnosis.as_dict(), indent=2)
    else:
        text = doctor_views.to_markdown(diagnosis) if options.markdown else doctor_views.to_table(diagnosis)
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1 if diagnosis.count(doctor.DEFECT) else 0


if __name__ == "__main__":
    sys.exit(main())
