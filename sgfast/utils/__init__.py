"""Small helpers that belong to no single part of the library."""
