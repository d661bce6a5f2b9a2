"""Runnable examples: ``python -m sgfast.examples.vision``."""
