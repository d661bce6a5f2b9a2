"""The parts of ``sgfast demo``: its text, its held-out figures and its picture."""
