"""One noise draw for several models over one noise layer: what a student sees is what its teacher saw."""

import weakref
from typing import Any, NamedTuple

from torch import Tensor

from sgfast.model.capture import Transform
from sgfast.noise_layer.base import BaseNoiseLayer


class SharedDraw:
    """What a shared noise layer made of the last batch, for the models that have not run on it yet.

    A batch is known by its tensors themselves, not by their values: comparing those would stop a GPU's queue.
    """

    def __init__(self) -> None:
        self._seed: int | Tensor | None = None
        self._batch: tuple[tuple[Tensor | None, int], ...] = ()
        self._transform: Transform | None = None
        self._users: weakref.WeakSet[Any] = weakref.WeakSet()

    def find(self, model: Any, batch: tuple[Tensor | None, ...], noise_layer: BaseNoiseLayer) -> "Draw | None":
        """What another model drew for this batch, if this one has not used it; else forget it."""
        same = len(batch) == len(self._batch) and all(
            one is other and (one is None or one._version == version)
            for one, (other, version) in zip(batch, self._batch, strict=True)
        )
        if not same or model in self._users:
            self._transform, self._seed, self._batch, self._users = None, None, (), weakref.WeakSet()
            return None
        self._users.add(model)
        # A loss that has consumed the transform has let go of its graph: the same noise is then applied anew.
        fresh = self._transform is not None and noise_layer.output is self._transform.output
        return Draw(self._seed, self._transform if fresh else None)

    def keep(self, model: Any, batch: tuple[Tensor | None, ...], draw: "Draw") -> None:
        """Offer a new draw to the other models."""
        self._seed, self._transform = draw
        self._batch, self._users = _versions(batch), weakref.WeakSet([model])


class Draw(NamedTuple):
    """The seed of a batch's noise, and what it made of the batch while the graph of that lives."""

    seed: int | Tensor | None
    transform: Transform | None


def _versions(batch: tuple[Tensor | None, ...]) -> tuple[tuple[Tensor | None, int], ...]:
    return tuple((tensor, -1 if tensor is None else tensor._version) for tensor in batch)


_draws: "weakref.WeakKeyDictionary[BaseNoiseLayer, SharedDraw]" = weakref.WeakKeyDictionary()


def share_draws(noise_layer: BaseNoiseLayer) -> None:
    """Let the models over this layer see the same noise on the same batch."""
    _draws.setdefault(noise_layer, SharedDraw())


def shared_draw(noise_layer: BaseNoiseLayer) -> SharedDraw | None:
    """The layer's shared draw, or None where a single model has it."""
    return _draws.get(noise_layer)
