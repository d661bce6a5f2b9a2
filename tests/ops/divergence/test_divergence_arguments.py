"""Arguments of divergences: errors, refusals of the kernels, and `sgfast.explain`."""

import pytest
import torch

import sgfast
from sgfast.ops import divergences
from tests.implementations import RUNS_TRITON
from tests.ops.divergence.problems import pair


def test_what_the_kernels_refuse():
    noisy, clean = pair(2, 5)
    refused = {
        "noisy_logits is float64": ((noisy.double(), clean), {}),
        "clean_logits has strides": ((noisy, clean.T.contiguous().T), {}),
    }
    if not RUNS_TRITON:
        refused = {"cpu tensors": ((noisy, clean), {})}
    for reason, (sides, options) in refused.items():
        with pytest.raises(RuntimeError, match=f"impl='triton' cannot run: .*{reason}"):
            divergences(*sides, "jeffreys", impl="triton", **options)
        assert sgfast.explain(divergences, *sides, "jeffreys", **options).implementation == "torch"


@pytest.mark.triton
@pytest.mark.skipif(not RUNS_TRITON, reason="needs kernels")
def test_a_kind_without_kernels_runs_in_pytorch(monkeypatch):
    import sgfast_kernels

    noisy, clean = pair(2, 5)
    monkeypatch.setattr(sgfast_kernels, "KIND_NAMES", tuple(set(sgfast_kernels.KIND_NAMES) - {"jeffreys"}))
    with pytest.raises(RuntimeError, match="impl='triton' cannot run: no kernels for jeffreys"):
        divergences(noisy, clean, ["forward_kl", "jeffreys"], impl="triton")
    assert "no kernels for jeffreys" in sgfast.explain(divergences, noisy, clean, "jeffreys").reason
    assert divergences(noisy, clean, "forward_kl", impl="triton")["forward_kl"].min() > 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kinds": "kl"}, ValueError, "kinds must be among .*forward_kl.*got 'kl'"),
        ({"kinds": []}, ValueError, "at least one"),
        ({"top_k": 6}, ValueError, "top_k must be between 1 and the vocabulary's size, 5; got 6"),
        ({"top_k": 0}, ValueError, "got 0"),
        ({"top_k": 2.0}, TypeError, "top_k must be an int"),
        ({"support": "union"}, ValueError, "support must be one of truncate"),
        ({"kinds": "jensen_shannon", "beta": 0.0}, ValueError, "At 0 it would be the kind forward_kl, at 1 reverse_kl"),
        ({"kinds": "skew_forward_kl", "skew": 1.0}, ValueError, "skew must be at least 0 and less than 1"),
        ({"beta": "a"}, TypeError, "beta must be a number; got str"),
        ({"skew": [0.1]}, TypeError, "skew must be a number; got list"),
        ({"temperature": "2"}, TypeError, "temperature must be a number; got str"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
        ({"temperature": torch.ones(3)}, ValueError, "temperature must be a number or have the row shape"),
        ({"temperature": torch.ones(2, requires_grad=True)}, ValueError, "must not require a gradient"),
        ({"mask": torch.ones(2, 5)}, ValueError, "mask must have the shape of noisy_logits"),
        ({"clean_logits": torch.zeros(2, 4)}, ValueError, r"one shape; got \(2, 5\) and \(2, 4\)"),
        ({"clean_logits": torch.zeros(2, 5, dtype=torch.int64)}, TypeError, "clean_logits must be float32"),
        ({"kinds": "label_cross_entropy"}, ValueError, "kinds must be among"),
        ({"labels": [0, 1]}, TypeError, "labels must be a torch.Tensor or None; got list"),
        ({"labels": torch.zeros(2)}, TypeError, "labels must be integers; got torch.float32"),
        ({"labels": torch.zeros(2, dtype=torch.bool)}, TypeError, "labels must be integers; got torch.bool"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, r"labels must have the row shape \(2,\)"),
        (
            {"labels": torch.zeros(2, dtype=torch.int64, device="meta")},
            ValueError,
            "labels and noisy_logits must be on",
        ),
        ({"labels": torch.tensor([-1, 5])}, ValueError, r"less than the vocabulary's size, 5; got 5 at \(1,\)"),
        ({"max_chunk_bytes": 0}, ValueError, "max_chunk_bytes"),
        ({"impl": "cuda"}, ValueError, "impl must be one of"),
        ({"impl": "triton"}, RuntimeError, "impl='triton' cannot run"),
    ],
)
def test_errors_name_the_argument_and_what_is_allowed(arguments, error, message):
    defaults = {"noisy_logits": torch.zeros(2, 5), "clean_logits": torch.zeros(2, 5), "kinds": "jeffreys"}
    with pytest.raises(error, match=message):
        divergences(**(defaults | arguments))


def test_explain_says_what_would_run():
    noisy, clean = pair(2, 5)
    assert sgfast.explain(divergences, noisy, clean, "jeffreys").implementation == "torch"
    assert sgfast.explain(divergences, noisy, clean, "jeffreys", impl="compile").implementation == "compile"
