"""Small programs to copy from: ``python -m sgfast.examples.NAME``."""
