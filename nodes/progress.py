"""Progress bars of nodes. Whoever moves one gives the user's interrupt a chance: it ends the work from there."""

from __future__ import annotations

from collections.abc import Callable

STEPS = 1000


def show_part() -> Callable[[float], None]:
    """A progress bar; the function returned moves it to the part that is done, 0 to 1, and never back."""
    from comfy.model_management import throw_exception_if_processing_interrupted
    from comfy.utils import ProgressBar

    bar = ProgressBar(STEPS)
    shown = -1

    def show(part: float) -> None:
        nonlocal shown
        throw_exception_if_processing_interrupted()
        if int(part * STEPS) > shown:
            shown = int(part * STEPS)
            bar.update_absolute(shown)

    return show


def show_count(total: int) -> Callable[[int], None]:
    """The same; the function takes how many of ``total`` are done."""
    show = show_part()
    return lambda done: show(done / total)
