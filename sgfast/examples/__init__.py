"""Small programs as examples: ``python -m sgfast.examples.NAME``."""
