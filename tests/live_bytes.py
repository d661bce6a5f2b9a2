"""The memory that the PyTorch implementation of an operation holds at once."""

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made inside the block: ``live`` now, ``peak`` at most.

    A registered operator counts as one call. To count the tensors made inside the operator, call its function
    directly, as ``operator.implementation``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # An argument that was not made inside the block existed before: the argument and its views are not counted.
        for tensor in tree_leaves((args, kwargs)):
            self._meet(tensor, counted=False)
        outputs = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            self._meet(tensor, counted=True)
        self.peak = max(self.peak, self.live)
        return outputs

    def _meet(self, tensor: Any, counted: bool) -> None:
        if not isinstance(tensor, Tensor) or tensor.untyped_storage()._cdata in self._seen:
            return
        storage = tensor.untyped_storage()
        size = storage.nbytes() if counted else 0
        self._seen.add(storage._cdata)
        self.live += size
        weakref.finalize(storage, self._forget, storage._cdata, size)

    def _forget(self, identity: int, size: int) -> None:
        self._seen.discard(identity)
        self.live -= size
