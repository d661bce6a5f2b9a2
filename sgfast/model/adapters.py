"""PEFT adapters in a base model: which parameters are theirs, and running the model with them or without.

PEFT puts its adapter layers into the base model in place, so that a teacher and a student can share one base: the
teacher runs it with adapters off, the student with adapters on.
"""

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

from torch import nn


def adapter_layers(model: nn.Module) -> list[Any]:
    """The layers that hold adapters; none where PEFT was never imported."""
    if "peft" not in sys.modules:
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return [module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]


def adapter_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The adapters' parameters, without those of the layers they adapt."""
    for layer in adapter_layers(model):
        for name, child in layer.named_children():
            if name not in ("base_layer", "original_module"):
                yield from child.parameters()


def train_adapters(model: nn.Module, mode: bool) -> None:
    """Set the mode of the adapters (their dropout), and of nothing else."""
    for layer in adapter_layers(model):
        for name, child in layer.named_children():
            if name not in ("base_layer", "original_module"):
                child.train(mode)


class AdapterState(NamedTuple):
    """One layer's adapters: off or not, and which of its parameters learn."""

    layer: Any
    off: bool
    learns: list[bool]


def adapter_states(model: nn.Module) -> list[AdapterState]:
    """The state of all adapters now."""
    return [
        AdapterState(layer, layer.disable_adapters, [parameter.requires_grad for parameter in layer.parameters()])
        for layer in adapter_layers(model)
    ]


@contextmanager
def in_states(states: list[AdapterState]) -> Iterator[None]:
    """Put adapters into these states inside the block."""
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
    """Run the model with its adapters on or off inside the block; which parameters learn stays as it is."""
    return in_states([state._replace(off=not on) for state in adapter_states(model) if state.off == on])


def _set(states: list[AdapterState]) -> None:
    for layer, off, learns in states:
        if layer.disable_adapters != off:
            layer.enable_adapters(not off)
        # After PEFT's own switch, which sets these too.
        for parameter, value in zip(layer.parameters(), learns, strict=True):
            parameter.requires_grad_(value)
