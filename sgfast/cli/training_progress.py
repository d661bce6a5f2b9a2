"""The progress bar that ``sgfast train`` and ``sgfast demo`` show while they train."""

from collections.abc import Callable
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

OnStep = Callable[[int, dict[str, float]], None]
_Result = TypeVar("_Result")


def show_training(
    console: Console,
    steps: int,
    description: Callable[[dict[str, float]], str],
    training: Callable[[OnStep], _Result],
    *,
    bar_width: int = 20,
) -> _Result:
    """Run a training under a progress bar and return its result.

    Args:
        console: shows the bar.
        steps: number of steps of the whole training.
        description: turns the values of a step into the text beside the bar.
        training: is called with the function that it calls after every step.
        bar_width: in characters.
    """
    columns = (
        BarColumn(bar_width=bar_width),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=steps)

        def on_step(step: int, values: dict[str, float]) -> None:
            bar = progress.tasks[task]
            if not bar.completed:  # a resumed training starts at a later step, and its rate counts from there
                progress.reset(task, completed=step)
            rate = f" {bar.speed:.2f} steps/s" if bar.speed else ""
            progress.update(task, completed=step, description=description(values) + rate)

        return training(on_step)
