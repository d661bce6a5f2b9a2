"""Measurements of time, memory and accuracy, for ``sgfast bench`` and the repository's benchmarks."""
