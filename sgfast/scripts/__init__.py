"""Programs to run with ``python -m``."""
