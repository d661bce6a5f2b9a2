"""Activation checkpointing of a frozen base model's decoder layers."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from sgfast.model.adapters import adapter_states, in_states
from sgfast.model.decoder import decoder_layers

_SWITCHES = ("training", "gradient_checkpointing", "_gradient_checkpointing_func")


@contextmanager
def checkpointed_layers(base_model: nn.Module) -> Iterator[None]:
    """Let every decoder layer keep its input only, and compute the rest again in backward, inside the block.

    transformers checkpoints layers in training mode alone; here only the layer's own flag is set, and everything in
    it, dropout above all, stays in eval mode. The recomputation finds the adapters as the forward found them.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), in_states(adapter_states(base_model))

    layers = decoder_layers(base_model)
    before = [{name: getattr(layer, name, None) for name in _SWITCHES} for layer in layers]
    function = partial(checkpoint, use_reentrant=False, context_fn=contexts)
    for layer in layers:
        for name, value in zip(_SWITCHES, (True, True, function), strict=True):
            setattr(layer, name, value)
    try:
        yield
    finally:
        for layer, values in zip(layers, before, strict=True):
            for name, value in values.items():
                setattr(layer, name, value)


def check_checkpointable(base_model: nn.Module) -> None:
    """Check that transformers can checkpoint the decoder layers.

    Raises:
        ValueError: they do not look at the switch that `checkpointed_layers` sets.
    """
    for layer in decoder_layers(base_model):
        if not hasattr(layer, "gradient_checkpointing"):
            raise ValueError(f"{type(layer).__name__} does not support activation checkpointing")
