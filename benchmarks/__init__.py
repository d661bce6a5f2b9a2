"""Measurements: what the kernels compile to, what they move, how fast they run."""
