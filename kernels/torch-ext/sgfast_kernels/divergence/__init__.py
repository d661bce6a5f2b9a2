"""Divergences between two sets of logits, over the whole vocabulary or over a top-k support."""
