"""Command ``sgfast``, with a subcommand for each job. Wrong input gives one line and exit code 2.

Errors that an input or a machine can cause become one line: ValueError (with UnicodeError), OSError, a requested
implementation that cannot run, a package that is not installed, and a lack of memory. Any other exception is a fault of
this library and keeps its traceback for a bug report.
"""

import io
import os
import sys
from collections.abc import Sequence

# Most characters of an error message. Messages quote the input, which may be long.
_LONGEST_LINE = 1000
_IN_DEMO = ("accelerate", "gguf", "matplotlib", "rich", "safetensors", "tokenizers", "transformers", "typer", "yaml")
_EXTRAS = {**dict.fromkeys(_IN_DEMO, "demo"), "peft": "peft"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line with these arguments, or with the process's own."""
    from sgfast.ops.dispatch import ImplementationError

    given = sys.argv[1:] if arguments is None else arguments
    # Names of files may have bytes that are not UTF-8. Printing such a name must not fail after an hour of work.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if zero := next((argument for argument in given if "\0" in argument), None):
            raise ValueError(f"an argument holds a zero byte: {zero[:100]!r}")
        from sgfast.cli.app import app

        try:
            app(arguments)
        finally:
            sys.stdout.flush()  # inside the try statement, so that an error becomes one line
    except (ValueError, OSError, ImplementationError) as error:
        _fail(" ".join(str(error).split()) or type(error).__name__)
    except (MemoryError, RuntimeError) as error:
        if not _is_lack_of_memory(error):
            raise
        _fail(f"there is not enough memory for this: {' '.join(str(error).split())[:200] or 'MemoryError'}")
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        _fail(f"this command needs {error.name}: pip install 'sgfast[{_EXTRAS[error.name]}]'")


def _is_lack_of_memory(error: Exception) -> bool:
    """Return whether Python or torch refused memory. torch has an exception class for GPU memory, but none for CPUs."""
    is_torch_on_cpu = "can't allocate memory" in str(error) or "not enough memory" in str(error)
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or is_torch_on_cpu


def _fail(message: str) -> None:
    print(f"sgfast: {message[:_LONGEST_LINE]}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:  # the disk is full; without this, the interpreter would flush again and print a second error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(2)


if __name__ == "__main__":
    main()
