"""Activation checkpointing of a frozen base model's decoder layers."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from sgfast.model.adapters import adapter_states, in_states
from sgfast.model.decoder import causal_lm_of, decoder_layers, layer_index_of

_SWITCHES = ("training", "gradient_checkpointing", "_gradient_checkpointing_func")


@contextmanager
def checkpointed_layers(base_model: nn.Module) -> Iterator[None]:
    """Let every decoder layer keep only its input inside the block, and recompute the rest in the backward pass.

    transformers checkpoints layers only in training mode. This function therefore sets the ``training`` flag of the
    layer itself; the modules inside the layer, such as dropout, stay in eval mode. The recomputation runs with the same
    state of the adapters as the forward pass.
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


def check_checkpointing(base_model: nn.Module, target_layer: str, asked: Mapping[str, Any] | None) -> None:
    """Check that `checkpointed_layers` supports a model and the requested options.

    Args:
        base_model: the model whose decoder layers are to be checkpointed.
        target_layer: path of the module whose output is transformed.
        asked: ``gradient_checkpointing_kwargs`` of transformers.

    Raises:
        ValueError: ``asked`` has another option than ``use_reentrant=False``, a decoder layer does not support
            checkpointing, or the target layer lies inside a decoder layer: the recomputation would draw new noise.
    """
    given = {name: value for name, value in (asked or {}).items() if value is not None}
    if given not in ({}, {"use_reentrant": False}):
        raise ValueError(f"gradient_checkpointing_kwargs may only be {{'use_reentrant': False}}; got {given}")
    for layer in decoder_layers(base_model):
        if not hasattr(layer, "gradient_checkpointing"):
            raise ValueError(f"{type(layer).__name__} does not support activation checkpointing")
    if layer_index_of(base_model, causal_lm_of(base_model).get_submodule(target_layer)) is not None:
        raise ValueError(
            f"the decoder layer with target_layer {target_layer!r} cannot be checkpointed: "
            "the recomputation would draw new noise"
        )
