"""The bytes per logit that the divergences' kernels move do not jump between neighbouring vocabularies.

The interpreting process of ``kernel_proofs.interpreted`` runs these tests.
"""

import pytest
import torch
from kernel_proofs import strict
from sgfast_kernels import lse_pair
from sgfast_kernels.divergence.backward import divergence_backward
from sgfast_kernels.divergence.forward import divergence_forward

from sgfast.benchmarking.growth import largest_cliff

pytestmark = pytest.mark.triton

ROWS = 1
# Each size is at most half larger than the last. Sizes around the borders of tiles and real vocabularies are included.
VOCABULARIES = [1000, 1023, 1024, 1025, 1536, 2048, 2049, 3072, 4095, 4096, 4097, 6144, 8192, 8193, 12000, 16384, 24000]
VOCABULARIES += [32000, 32001, 32768, 49152, 65536, 65537, 98304, 131072, 151936, 200000, 262144]


def moved_bytes(vocab: int, launch) -> int:
    noisy, clean = (3 * torch.randn(ROWS, vocab, dtype=torch.bfloat16) for _ in range(2))
    mask, temperature = torch.ones(ROWS, dtype=torch.bool), torch.ones(()).expand(ROWS)
    with strict.count_traffic() as launches:
        launch(noisy, clean, mask, temperature)
    return sum(sum(one.loaded.values()) + sum(one.stored.values()) for one in launches)


def forward(*arguments):
    divergence_forward(*arguments, ("jensen_shannon",), 0.5, 0.1)


def backward(*arguments):
    upstream, scalars = torch.ones(1, ROWS), torch.ones(6, ROWS)
    divergence_backward(*arguments, upstream, scalars, ("forward_kl",), 0.5, 0.1, True, False)


@pytest.mark.parametrize("launch", [lse_pair, forward, backward], ids=["lse_pair", "forward", "backward"])
def test_no_cliff_between_neighbouring_vocabularies(launch):
    moved = [moved_bytes(vocab, launch) for vocab in VOCABULARIES]
    assert all(bytes_moved >= 4 * ROWS * vocab for bytes_moved, vocab in zip(moved, VOCABULARIES, strict=True))
    assert largest_cliff(VOCABULARIES, moved) <= 1.3
    # Bytes do not jump down either.
    assert largest_cliff([-vocab for vocab in VOCABULARIES], [-one for one in moved]) <= 1.3
