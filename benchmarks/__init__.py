"""Measurements of operations beside their peers. kernels/kernel_proofs has the proofs and the times of the kernels."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
