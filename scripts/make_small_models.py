"""Makes small models in the real file formats, in the folders of ComfyUI's models.

    python scripts/make_small_models.py --output DIR --set demo

"demo" (under 60 MB) is enough for the workflows, "test" holds every variant, type, layout and adapter, "full-size"
sparse files of the published sizes. A second call with the same set does nothing.
"""

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Make small models in the real file formats, and a manifest.json that names them."
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to make them in, such as ComfyUI/models")
    parser.add_argument("--set", default="demo", choices=("demo", "test", "full-size"), help="which files to make")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    options = parser.parse_args(arguments)

    from small_models import make_set

    report = (lambda line: None) if options.quiet else print
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        make_set(options.set, options.output, report)
    except OSError as error:
        print(f"The models cannot be written to {options.output}: {error.strerror or error}.", file=sys.stderr)
        return 1
    report(f"The {options.set} set is in {options.output}.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
