"""Utility and privacy of a transform over a file of any size, in bounded memory: the engine of ``sgfast evaluate``."""
