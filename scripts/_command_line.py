"""What gguf.py and video.py share as commands: subcommands, argument types, messages, and the exit status.

Messages go to stderr, one sentence each; the exit status is 0, or 1 when the work is refused or interrupted.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

SHOWN_CHARACTERS = 100


def add_command(commands: Any, name: str, run: Callable[[argparse.Namespace], None], text: str) -> Any:
    """A parser for the subcommand ``name``, which calls ``run``; ``text`` describes it, in small letters."""
    command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    command.set_defaults(run=run)
    return command


def run(parser: argparse.ArgumentParser, arguments: list[str] | None, *refusals: type[Exception]) -> int:
    """Run the subcommand that the arguments name; returns the exit status. The text of ``refusals`` is for the user."""
    options = parser.parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except refusals as error:
        print(printable(str(error)), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted: nothing was written.", file=sys.stderr)
        return 1
    return 0


def stop_on_signals() -> None:
    """Let signals to stop raise KeyboardInterrupt, so that what is half-written goes."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


def positive(text: str) -> int:
    """The type of arguments that are 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def printable(text: str) -> str:
    """Text with control characters and line breaks escaped, so that a file cannot steer the terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def shortened(text: str) -> str:
    """Text of SHOWN_CHARACTERS at most."""
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 3]}..."
