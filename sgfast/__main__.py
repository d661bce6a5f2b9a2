"""``python -m sgfast`` is the command ``sgfast``."""

from sgfast.cli.main import main

main()
