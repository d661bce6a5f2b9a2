"""One noise draw for several models over one noise layer: what a student sees is what its teacher saw."""

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sgfast.model.capture import Transform
from sgfast.noise_layer.base import BaseNoiseLayer


class SharedDraw:
    """What a shared noise layer made of the last batch, for the models that have not run on it yet.

    A batch is known by its tensors themselves, not by their values: comparing those would stop a GPU's queue. What is
    always shared is the noise, by its seed. What the layer made of it is shared too while that would come out the same
    again: over the same target module, with the same parameters, and with a graph if one is wanted.
    """

    def __init__(self) -> None:
        self._source: tuple[nn.Module | None, tuple[int, ...]] = (None, ())
        self._seed: int | Tensor | None = None
        self._batch: tuple[tuple[Tensor | None, int], ...] = ()
        self._transform: Transform | None = None
        self._users: weakref.WeakSet[Any] = weakref.WeakSet()

    def find(
        self, model: Any, batch: tuple[Tensor | None, ...], noise_layer: BaseNoiseLayer, target: nn.Module
    ) -> "Draw | None":
        """What another model drew for this batch, if this one has not used it; else forget it."""
        same = len(batch) == len(self._batch) and all(
            one is other and _version(one) == version for one, (other, version) in zip(batch, self._batch, strict=True)
        )
        if not same or model in self._users:
            self._transform, self._seed, self._batch, self._users = None, None, (), weakref.WeakSet()
            return None
        self._users.add(model)
        return Draw(self._seed, self._transform if self._would_repeat(noise_layer, target) else None)

    def _would_repeat(self, noise_layer: BaseNoiseLayer, target: nn.Module) -> bool:
        # A loss that has consumed the transform has let go of its graph.
        if self._transform is None or noise_layer.output is not self._transform.output:
            return False
        has_graph = self._transform.output.requires_grad or not torch.is_grad_enabled()
        source, versions = self._source
        return has_graph and source is target and versions == _versions(noise_layer)

    def keep(
        self,
        model: Any,
        batch: tuple[Tensor | None, ...],
        draw: "Draw",
        noise_layer: BaseNoiseLayer,
        target: nn.Module,
    ) -> None:
        """Offer a new draw to the other models."""
        self._seed, self._transform = draw
        self._batch = tuple((tensor, _version(tensor)) for tensor in batch)
        self._source = (target, _versions(noise_layer))
        self._users = weakref.WeakSet([model])


class Draw(NamedTuple):
    """The seed of a batch's noise, and what it made of the batch while the graph of that lives."""

    seed: int | Tensor | None
    transform: Transform | None


def _version(tensor: Tensor | None) -> int:
    """Counts changes in place; tensors made under inference_mode do not."""
    return -1 if tensor is None or tensor.is_inference() else tensor._version


def _versions(noise_layer: BaseNoiseLayer) -> tuple[int, ...]:
    return tuple(_version(parameter) for parameter in noise_layer.parameters())


_draws: "weakref.WeakKeyDictionary[BaseNoiseLayer, SharedDraw]" = weakref.WeakKeyDictionary()


def share_draws(noise_layer: BaseNoiseLayer) -> None:
    """Let the models over this layer see the same noise on the same batch."""
    _draws.setdefault(noise_layer, SharedDraw())


def shared_draw(noise_layer: BaseNoiseLayer) -> SharedDraw | None:
    """The layer's shared draw, or None where a single model has it."""
    return _draws.get(noise_layer)
