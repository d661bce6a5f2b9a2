"""Measurements of operations beside their peers. What proves and times the kernels lies in kernels/kernel_proofs."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
