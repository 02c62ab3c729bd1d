"""Plans a Wan run's memory before it begins: does it fit this Mac, or another one, and what would?

    python scripts/plan_memory.py --model FILE [--model-low FILE] [--text-encoder FILE] [--vae FILE] [--lora FILE]
        --width 832 --height 480 --frames 81 [--ram 16] [--torch 2.14] [--json]

Only headers of files are read; without ComfyUI. Exit status 0 if it fits, 1 with swap risk, 2 if not, 3 for what
cannot be planned.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from _pack import load_pack

STATUS = {"fits": 0, "swap risk": 1, "does not fit": 2}
REFUSED = 3


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, help="diffusion model; for A14B the high-noise expert")
    parser.add_argument("--model-low", type=Path, help="A14B's low-noise expert")
    parser.add_argument("--text-encoder", type=Path)
    parser.add_argument("--vae", type=Path)
    parser.add_argument("--lora", type=Path, action="append", default=[], help="may be given several times")
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--frames", type=int, default=81, help="4n + 1")
    parser.add_argument("--cfg", type=float, default=5.0, help="1 means one evaluation per step")
    parser.add_argument("--batched", action=argparse.BooleanOptionalAction, help="both prompts at once, or never")
    parser.add_argument("--ram", type=float, help="GB of the Mac to plan for; this machine's without it")
    parser.add_argument("--torch", default="2.14", metavar="VERSION", help="the torch it will run with")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="everything in bytes, for scripts")
    form.add_argument("--macs", action="store_true", help="the verdict for every Mac from 8 to 512 GB")
    form.add_argument("--picture", type=Path, metavar="PNG", help="also draw the chart to a file")
    options = parser.parse_args(arguments)

    load_pack()
    from apple_silicon_video.memory import plan as planner
    from apple_silicon_video.memory import plan_search, plan_views

    try:
        machine = planner.Machine.here() if options.ram is None else planner.Machine.with_ram(options.ram)
        model = planner.read_table(options.model)
        settings = {
            "width": options.width,
            "height": options.height,
            "frames": options.frames,
            "machine": machine,
            "model_low": options.model_low and planner.read_table(options.model_low),
            "text_encoder": options.text_encoder and planner.read_table(options.text_encoder),
            "vae": options.vae and planner.read_table(options.vae),
            "loras": [planner.read_table(path) for path in options.lora],
            "guidance": options.cfg != 1,
            "batched": options.batched,
            "compute": planner.Compute(torch_version=_version(options.torch)),
        }
        made = planner.plan(model, **settings)
        if options.macs:
            print(plan_views.macs_table(model, settings))
            return STATUS[made.verdict]
        proposals = []
        if made.verdict != "fits":
            beside = plan_search.tables_beside(model, settings["model_low"])
            proposals = plan_search.nearest(model, beside, **settings)
        if options.json:
            found = [{"changes": dict(one.changes), "plan": one.plan.as_dict()} for one in proposals]
            print(json.dumps(made.as_dict() | {"proposals": found}, indent=2))
        else:
            print(plan_views.to_text(made, proposals))
        if options.picture:
            plan_views.save_picture(made, options.picture)
    except (planner.PlanError, OSError) as error:
        print(error, file=sys.stderr)
        return REFUSED
    return STATUS[made.verdict]


def _version(text: str) -> str:
    from apple_silicon_video.memory.plan import PlanError
    from apple_silicon_video.mps_patches.attention_plan import parse_version

    try:
        parse_version(text)
    except ValueError:
        raise PlanError(f"{text!r} is no version of torch: enter one like 2.14.") from None
    return text


if __name__ == "__main__":
    sys.exit(main())
