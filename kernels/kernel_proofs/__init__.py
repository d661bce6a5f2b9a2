"""The proofs of the kernels: cases and budgets, strict interpreter, compile report, traffic, GPU programme.

The package lies in the repository alone; no wheel contains it. See docs/adding_a_kernel.md.
"""
