"""Noise draws that several models with one noise layer share: a student and its teacher get the same noisy values."""

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sgfast.model.capture import Transform
from sgfast.noise_layer.base import BaseNoiseLayer


class SharedDraw:
    """Last draw of a shared noise layer, for the models that have not yet run on the same batch.

    A batch is recognized by its tensor objects, not by their values: a comparison of values would synchronise a GPU.
    The seed of the noise is always shared. The transformed values are shared too if a new computation would repeat
    them: the target module is the same, the noise layer's parameters have not changed, and a graph exists if one is
    needed.
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
        """Return the draw of another model for this batch; None, and forget the draw, if this model has used it."""
        same = len(batch) == len(self._batch) and all(
            one is other and _version(one) == version for one, (other, version) in zip(batch, self._batch, strict=True)
        )
        if not same or model in self._users:
            self._transform, self._seed, self._batch, self._users = None, None, (), weakref.WeakSet()
            return None
        self._users.add(model)
        return Draw(self._seed, self._transform if self._would_repeat(noise_layer, target) else None)

    def _would_repeat(self, noise_layer: BaseNoiseLayer, target: nn.Module) -> bool:
        # A loss that has used the transform has freed its graph.
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
    """Seed of a batch's noise, and the transform of the batch if the transform can be reused."""

    seed: int | Tensor | None
    transform: Transform | None


def _version(tensor: Tensor | None) -> int:
    """Return how often a tensor was changed in place; −1 for None and inference tensors, which have no count."""
    return -1 if tensor is None or tensor.is_inference() else tensor._version


def _versions(noise_layer: BaseNoiseLayer) -> tuple[int, ...]:
    return tuple(_version(parameter) for parameter in noise_layer.parameters())


_draws: "weakref.WeakKeyDictionary[BaseNoiseLayer, SharedDraw]" = weakref.WeakKeyDictionary()


def share_draws(noise_layer: BaseNoiseLayer) -> None:
    """Let all models with this noise layer use the same noise on the same batch."""
    _draws.setdefault(noise_layer, SharedDraw())


def shared_draw(noise_layer: BaseNoiseLayer) -> SharedDraw | None:
    """Return the shared draw of a noise layer, or None if the noise layer is not shared."""
    return _draws.get(noise_layer)
