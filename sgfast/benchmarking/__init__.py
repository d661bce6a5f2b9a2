"""Measurements of time, memory and accuracy: what ``sgfast bench`` and the repository's benchmarks are made of."""
