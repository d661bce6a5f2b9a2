"""The client's half of a text transform: the file that a client gets, and what it does with it."""

from sgfast.client.text_transform import StainedGlassTransformForText

__all__ = ["StainedGlassTransformForText"]
