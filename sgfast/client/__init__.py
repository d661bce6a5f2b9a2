"""The client's half of a text transform: the format of the client file, and the transform that a client loads."""

from sgfast.client.text_transform import StainedGlassTransformForText

__all__ = ["StainedGlassTransformForText"]
