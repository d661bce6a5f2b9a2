"""Tests of sgfast. They share the strict interpreter with the tests of the kernels."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
