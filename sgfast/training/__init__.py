"""What ``sgfast train`` is made of: settings, data, models, and the record of a run."""
