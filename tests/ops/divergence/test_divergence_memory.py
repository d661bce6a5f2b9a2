"""Memory of divergences: temporaries within the bound of a chunk, and nothing per logit kept for backward."""

import itertools

import pytest
import torch
from torch import Tensor

from sgfast.ops import divergences
from sgfast.ops.divergence import chunks
from sgfast.ops.divergence.atoms import Chunk, Settings
from sgfast.ops.divergence.kinds import KINDS, LABEL_KIND
from sgfast.ops.divergence.operator import BackwardProblem, backward, forward
from sgfast.ops.divergence.rows import forward_rows, write_gradients
from sgfast.ops.topk import operator as top_k_operator
from sgfast.ops.topk import selection
from tests.implementations import each_fast_implementation
from tests.live_bytes import LiveBytes
from tests.ops.divergence.problems import SUPPORTS, pair, problem


def test_nothing_per_logit_is_kept_for_backward():
    noisy, clean = (side.requires_grad_() for side in pair(16, 1000))
    inputs = {noisy.data_ptr(), clean.data_ptr()}
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in inputs:
            kept.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        divergences(noisy, clean, KINDS)
        row_scalars = 16 * (4 + 2 * len(KINDS)) * 4
        assert sum(kept) <= row_scalars + 8 * 16
        divergences(noisy, clean, KINDS, top_k=10, support="tail")
        assert sum(kept) <= row_scalars + 16 * 16 + 16 * 20 * 4


@each_fast_implementation
def test_only_row_scalars_are_kept_for_backward(impl):
    noisy, clean = (side.requires_grad_() for side in pair(16, 1000))
    inputs, kept = {side.untyped_storage().data_ptr() for side in (noisy, clean)}, []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in inputs:
            kept.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        divergences(noisy, clean, KINDS, impl=impl)
    assert sum(kept) <= 16 * (4 + 2 * len(KINDS)) * 4 + 4


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("beta", "top_k"), [(0.5, 50), (0.5, 1000), (0.3, 50)])
def test_temporaries_stay_within_what_chunks_are_planned_for(dtype, support, beta, top_k):
    noisy, clean = pair(4, 10_000, dtype=dtype)
    temperature, labels, row_vectors = torch.ones(4, 1), torch.arange(4)[:, None], 4 * 4 * 64
    with LiveBytes() as counted:
        indices, valid = selection.union_of_top_k(noisy, clean, top_k)
    assert counted.peak <= 4 * selection.temporary_bytes(noisy, top_k)
    for kinds in [(kind,) for kind in KINDS] + [KINDS[:2], KINDS[:3], KINDS[2:6], KINDS, (*KINDS, LABEL_KIND)]:
        settings = Settings(tuple(kinds), support or "full", beta, 0.1)
        count = chunks.temporaries(settings, 2 * top_k / 10_000, dtype != torch.float32)
        planned = noisy.numel() * 4 * count + row_vectors
        given_labels = labels if LABEL_KIND in kinds else None
        chunk = Chunk(noisy, clean, (temperature, temperature), settings, indices, valid, given_labels)
        targets = [torch.empty_like(noisy), torch.empty_like(clean)]
        with LiveBytes() as counted:
            forward_rows(chunk)
        assert counted.peak <= planned
        with LiveBytes() as counted:
            write_gradients(chunk, torch.ones(len(kinds), 4), targets)
        assert counted.peak <= planned


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize(
    "kinds",
    [
        ["jensen_shannon"],
        ["jeffreys", "jensen_shannon", "total_variation", "squared_hellinger"],
        ["jensen_shannon", "cross_entropy", "skew_forward_kl", "skew_reverse_kl"],
    ],
)
def test_compiled_temporaries_stay_within_what_chunks_are_planned_for(monkeypatch, kinds, wanted):
    monkeypatch.setattr(chunks.rows, "keep_freed_memory", lambda size: None)  # nobody writes to that block
    noisy, clean = (side.requires_grad_(wanted) for side in pair(24, 4000))

    def step():
        values = divergences(noisy, clean, kinds, impl="compile", max_chunk_bytes=2**30)
        return torch.autograd.grad(sum(values.values()).sum(), (noisy, clean)) if wanted else ()

    step()  # compiles
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        gradients = step()
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = list(itertools.accumulate(e.nbytes() for e in sorted(changes, key=lambda e: e.start_ns())))
    given = sum(gradient.nbytes for gradient in gradients)
    planned = chunks.compiled_temporaries(Settings(tuple(kinds), "full", 0.5, 0.1), torch.float32)
    row_vectors = 24 * 4 * 64
    assert given <= max(live) <= max(given, noisy.nbytes * planned) + row_vectors


@pytest.mark.parametrize("top_k", [0, 40])
@pytest.mark.parametrize("layout", ["contiguous", "masked", "shifted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_is_the_gradients_and_a_chunk(dtype, layout, top_k):
    """What a training step holds besides logits: at [512, 128256] as much more as the gradients are larger."""
    shape, width, bound = (8, 12), 4000, 2**20
    noisy, clean = (side.view(8, 13, width) for side in pair(8 * 13, width, dtype=dtype))
    noisy, clean = (side[:, 1:] if layout == "shifted" else side[:, 1:].contiguous() for side in (noisy, clean))
    mask = torch.arange(96).view(shape) % 3 != 0 if layout == "masked" else None
    kinds = ["jensen_shannon", "jeffreys"]
    asked = problem(noisy, clean, kinds, top_k=top_k, mask=mask, max_chunk_bytes=bound, impl="torch")
    row_vectors = 96 * 4 * (64 + 2 * top_k)
    with LiveBytes() as counted:
        values, indices, _ = forward.implementation(asked)
    assert counted.peak <= bound + row_vectors
    upstream = torch.ones_like(values)
    with LiveBytes() as counted:
        gradients = backward.implementation(
            BackwardProblem(asked, upstream=upstream, kept_indices=indices, row_scalars=None)
        )
    own = sum(gradient.nbytes for gradient in gradients)
    assert own == 2 * 96 * width * noisy.element_size()
    assert counted.peak <= own + bound + row_vectors
    with LiveBytes() as counted:
        top_k_operator.forward.implementation(
            top_k_operator.Problem(noisy, clean, k=40, max_chunk_bytes=bound, impl="torch")
        )
    assert counted.peak <= bound + 96 * 80 * 9


@pytest.mark.parametrize("top_k", [None, 10])
def test_a_twentieth_of_a_byte_per_logit_is_kept_for_backward(top_k):
    rows, width = 8, 32_000
    noisy, clean = (side.requires_grad_() for side in pair(rows, width, dtype=torch.bfloat16))
    inputs, kept = {side.untyped_storage().data_ptr() for side in (noisy, clean)}, {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in inputs:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        values = divergences(noisy, clean, KINDS, top_k=top_k, labels=torch.arange(rows))
    assert len(values) == len(KINDS) + 1
    assert sum(kept.values()) <= 0.05 * rows * width
