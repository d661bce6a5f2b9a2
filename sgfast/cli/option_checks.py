"""Checks of what a user typed that a type alone does not say; they run before anything heavy is imported."""

import math

import typer

# Beyond any run; what is counted up to a number of 400 digits would never end.
MOST = 2**31 - 1


def finite(value: float | None) -> float | None:
    """A number that is neither infinite nor NaN, which no comparison with a bound would refuse."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter("it must be a finite number")
    return value


def text(value: str | None) -> str | None:
    """Text with something in it, in characters that a file may hold."""
    if value is None:
        return None
    if not value.strip():
        raise typer.BadParameter("it is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # a terminal's bytes that are not UTF-8, or half a surrogate pair
        raise typer.BadParameter(f"it is not Unicode text ({error.reason})") from error
    return value
