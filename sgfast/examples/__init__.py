"""Examples that run: python -m sgfast.examples.<name>."""
