"""Small helpers that several parts of the library use."""
