"""PEFT adapters in a base model: their parameters, and a switch that runs the model with or without them.

PEFT puts its adapter layers into the base model in place. A teacher and a student can therefore share one base model:
the teacher runs the model with adapters off, the student with adapters on.
"""

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

from torch import nn


def adapter_layers(model: nn.Module) -> list[Any]:
    """Return the layers that hold adapters. The list is empty if PEFT was never imported."""
    if "peft" not in sys.modules:
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return [module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]


def adapter_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters of the adapters, without the parameters of the adapted layers."""
    for layer in adapter_layers(model):
        for name, child in layer.named_children():
            if name not in ("base_layer", "original_module"):
                yield from child.parameters()


def train_adapters(model: nn.Module, mode: bool) -> None:
    """Set the training mode of the adapters (their dropout). Other modules keep their mode."""
    for layer in adapter_layers(model):
        for name, child in layer.named_children():
            if name not in ("base_layer", "original_module"):
                child.train(mode)


class AdapterState(NamedTuple):
    """State of the adapters of one layer."""

    layer: Any
    off: bool
    learns: list[bool]  # requires_grad of each of the layer's parameters


def adapter_states(model: nn.Module) -> list[AdapterState]:
    """Return the present state of all adapters."""
    return [
        AdapterState(layer, layer.disable_adapters, [parameter.requires_grad for parameter in layer.parameters()])
        for layer in adapter_layers(model)
    ]


@contextmanager
def in_states(states: list[AdapterState]) -> Iterator[None]:
    """Put adapters into the given states inside the block, and restore their states afterwards."""
    before = [
        AdapterState(layer, layer.disable_adapters, [parameter.requires_grad for parameter in layer.parameters()])
        for layer, *_ in states
    ]
    _set(states)
    try:
        yield
    finally:
        _set(before)


def with_adapters(model: nn.Module, on: bool) -> AbstractContextManager[None]:
    """Run the model with its adapters on or off inside the block. Each parameter keeps its ``requires_grad``."""
    return in_states([state._replace(off=not on) for state in adapter_states(model) if state.off == on])


def _set(states: list[AdapterState]) -> None:
    for layer, off, learns in states:
        if layer.disable_adapters != off:
            layer.enable_adapters(not off)
        # This loop comes last, because PEFT's switch changes requires_grad too.
        for parameter, value in zip(layer.parameters(), learns, strict=True):
            parameter.requires_grad_(value)
