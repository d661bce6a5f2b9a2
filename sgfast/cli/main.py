"""``sgfast``: one command, a subcommand for each job. Wrong input gives one line and exit code 2."""

import os
import sys
from collections.abc import Sequence

_IN_DEMO = ("accelerate", "gguf", "matplotlib", "rich", "safetensors", "tokenizers", "transformers", "typer", "yaml")
_EXTRAS = {**dict.fromkeys(_IN_DEMO, "demo"), "peft": "peft"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line with these arguments, or with the process's own."""
    from sgfast.ops.dispatch import ImplementationError

    try:
        from sgfast.cli.app import app

        try:
            app(arguments)
        finally:
            sys.stdout.flush()  # here, where an error is one line
    except (ValueError, OSError, ImplementationError) as error:
        _fail(" ".join(str(error).split()))
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        _fail(f"this command needs {error.name}: pip install 'sgfast[{_EXTRAS[error.name]}]'")


def _fail(message: str) -> None:
    print(f"sgfast: {message}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:  # a full disk: the interpreter would try, and complain, once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(2)


if __name__ == "__main__":
    main()
