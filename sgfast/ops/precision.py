"""Matrix products in full precision, whatever the user's settings say."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision_products(device: torch.device) -> Iterator[None]:
    """Multiply float32 matrices on ``device`` in float32: no autocast, no TF32, no bfloat16 inside the block.

    ``torch.set_float32_matmul_precision`` and ``torch.backends`` are settings of the whole process. Products of other
    threads are therefore precise too while the block runs. The old settings return at the end of the block.
    """
    # Each backend's own setting is read and restored. The older getter for the whole process raises after anyone has
    # used the backends' settings.
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    coarser = [(backend, backend.fp32_precision) for backend in backends if backend.fp32_precision in ("tf32", "bf16")]
    try:
        for backend, _ in coarser:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, setting in coarser:
            backend.fp32_precision = setting
