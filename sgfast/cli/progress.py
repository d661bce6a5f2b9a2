"""Progress of long work: a bar on a terminal; elsewhere (a file, a pipe, a log) plain lines now and then."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

OnStep = Callable[[int, dict[str, float]], None]
_Result = TypeVar("_Result")

# A plain line follows the last one after this part of the work, or after this time.
_PART, _SECONDS = 0.1, 30.0


class Follower:
    """Shows how far work has come, one stage after the other, with its rate.

    On a terminal, each stage has a bar with the remaining time. Elsewhere, a plain line without control characters
    appears after every tenth of a stage, and after 30 seconds. The line names the minutes that remain, from one on.

    Args:
        console: shows the progress.
        bar_width: in characters; None fills the line.
    """

    def __init__(self, console: Console, *, bar_width: int | None = 20) -> None:
        self._console = console
        self._bar: Progress | None = None
        if is_watched(console):
            columns = (
                TextColumn("{task.fields[stage]}", markup=False),
                BarColumn(bar_width=bar_width),
                TextColumn("{task.description}", markup=False),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=console)
        self._task: TaskID | None = None
        self._stage, self._unit = "", ""
        self._total = self._done = self._first = 0
        self._begun = self._shown_at = time.monotonic()
        self._shown = 0

    def __enter__(self) -> "Follower":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, stage: str, total: int, unit: str = "") -> None:
        """Begin a stage of this many units; 0 if the number is not known."""
        self._stage, self._unit, self._total = stage, unit, total
        self._done = self._first = self._shown = 0
        self._begun = self._shown_at = time.monotonic()
        if self._bar is not None:
            if self._task is not None:
                self._bar.stop_task(self._task)
            self._task = self._bar.add_task("", total=total or None, stage=stage)

    def advance(self, amount: int) -> None:
        """Count units that are done."""
        self.reach(self._done + amount)

    def reach(self, done: int, note: str = "", *, total: int | None = None) -> None:
        """Show how many units are done, and a note about them.

        Args:
            done: units since the stage began.
            note: is shown beside the units.
            total: changes the number of all units.
        """
        self._total = self._total if total is None else total
        self._done = done
        if self._bar is not None and self._task is not None:
            text = ", ".join(filter(None, (self._amount(), self._rate(), note)))
            self._bar.update(self._task, completed=done, total=self._total or None, description=text)
        elif self._is_due():
            part = f" ({done / self._total:.0%})" if self._total else ""
            text = ", ".join(filter(None, (self._amount() + part, self._rate(), self._remaining(), note)))
            line = f"{self._stage}: {text}" if self._stage else text
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)
            self._shown, self._shown_at = done, time.monotonic()

    def resume(self, done: int) -> None:
        """Count units that an earlier run has done; they are not part of the rate."""
        self._first = self._shown = self._done = done
        if self._bar is not None and self._task is not None:
            self._bar.reset(self._task, completed=done)

    def _is_due(self) -> bool:
        if self._done <= self._shown:
            return False
        tenth = self._total and (self._done >= self._total or self._done - self._shown >= _PART * self._total)
        return bool(tenth) or time.monotonic() - self._shown_at >= _SECONDS

    def _amount(self) -> str:
        of_all = f"/{self._total}" if self._total else ""
        return f"{self._done}{of_all} {self._unit}".rstrip()

    def _units_a_second(self) -> float:
        seconds = time.monotonic() - self._begun
        return (self._done - self._first) / seconds if seconds > 1 else 0.0

    def _rate(self) -> str:
        rate = self._units_a_second()
        return f"{rate:.0f} a second" if rate >= 10 else f"{rate:.2g} a second" if rate else ""

    def _remaining(self) -> str:
        rate, units = self._units_a_second(), self._total - self._done
        minutes = units / rate / 60 if rate and units > 0 else 0.0
        return f"{minutes:.0f} min left" if minutes >= 1 else ""


def is_watched(console: Console) -> bool:
    """Return whether a person sees the console on a terminal that can redraw its lines."""
    return console.is_terminal and not console.is_dumb_terminal


@contextlib.contextmanager
def working(console: Console, what: str) -> Iterator[None]:
    """Tell that work without stages goes on while the block runs."""
    if is_watched(console):
        with console.status(what):
            yield
    else:
        console.print(what, highlight=False, markup=False, soft_wrap=True)
        yield


def show_training(
    console: Console,
    steps: int,
    description: Callable[[dict[str, float]], str],
    training: Callable[[OnStep], _Result],
    *,
    bar_width: int = 20,
) -> _Result:
    """Run a training, show its progress, and return its result.

    Args:
        console: shows the progress.
        steps: number of steps of the whole training.
        description: turns the values of a step into the text beside the number of steps.
        training: is called with the function that it calls after every step.
        bar_width: in characters.
    """
    with Follower(console, bar_width=bar_width) as follower:
        follower.begin("", steps, "steps")
        is_first = True

        def on_step(step: int, values: dict[str, float]) -> None:
            nonlocal is_first
            if is_first and step > 1:  # a resumed training starts at a later step, and its rate counts from there
                follower.resume(step - 1)
            is_first = False
            follower.reach(step, description(values))

        return training(on_step)
