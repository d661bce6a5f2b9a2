"""Checks of command-line values beyond their types. The checks run before heavy imports."""

import math
from typing import Annotated, Any, get_args

import typer

from sgfast.ops.validation import did_you_mean

# No run needs a larger count. Without a bound, a count of 400 digits would never end.
MOST = 2**31 - 1


def finite(value: float | None) -> float | None:
    """Check that a number is finite, and return the number. Comparisons with bounds do not refuse NaN."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter("it must be a finite number")
    return value


def text(value: str | None) -> str | None:
    """Check that a text is not blank and can be encoded in UTF-8, and return the text."""
    if value is None:
        return None
    if not value.strip():
        raise typer.BadParameter("it is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # the terminal sent bytes that are not UTF-8, or half a surrogate pair
        raise typer.BadParameter(f"it is not Unicode text ({error.reason})") from error
    return value


def choice(literal: Any, help: str) -> Any:
    """Make an option of the names in a ``Literal``. The error for a misspelt name suggests a close one."""
    names = get_args(literal)

    def parse(value: str) -> str:
        if value not in names:
            raise typer.BadParameter(f"it must be one of {', '.join(names)}; got {value!r}{did_you_mean(value, names)}")
        return value

    return typer.Option(parser=parse, metavar=f"[{'|'.join(names)}]", help=help)


# The command checks the name: a wrong one is one line, without the usage.
Device = Annotated[
    str,
    typer.Option(metavar="DEVICE", help="auto (a GPU if there is one), cpu, cuda, cuda:1 or mps."),
]
