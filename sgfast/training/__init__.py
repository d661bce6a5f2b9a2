"""The parts of ``sgfast train``: settings, data, models, the training itself, and the record of a run."""
