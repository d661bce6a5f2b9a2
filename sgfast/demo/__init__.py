"""The main job end to end on a real model: train a transform, measure it, save it, use it as a client."""
