"""Matrix products that no setting of the user's makes coarser."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision_products(device: torch.device) -> Iterator[None]:
    """Multiply float32 matrices on ``device`` in float32: no autocast, no TF32, no bfloat16 inside the block.

    ``torch.set_float32_matmul_precision`` and ``torch.backends`` are settings of the whole process, so other threads'
    products are precise for the moment too; the settings come back on leaving.
    """
    # Each backend's own setting is read and restored: the older process-wide getter raises once anyone has used these.
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
