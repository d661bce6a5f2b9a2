"""Utility and privacy of a transform over a file of any size, in bounded memory: what ``sgfast evaluate`` runs."""
