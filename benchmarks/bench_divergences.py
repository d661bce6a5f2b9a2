"""The divergences on this machine's CPU beside what a user would write, eager and through torch.compile.

    OMP_NUM_THREADS=2 python -m pytest benchmarks/bench_divergences.py [--small] [-k "four and 32000"]

One table: milliseconds (the median of rounds after a warm-up), bytes per logit that autograd keeps for backward beyond
the inputs, and the largest errors against float64: of a value, absolute; of a row of the gradient, in the norm,
relative. Times compare only within one run.
"""

import importlib.util
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks import peers
from sgfast.ops import divergences
from sgfast.ops.divergence_terms import KINDS

Values = dict[str, Tensor]
FOUR = ("jeffreys", "jensen_shannon", "total_variation", "squared_hellinger")
SHAPES = [(512, 32000, torch.float32), (128, 128256, torch.bfloat16)]
SMALL_SHAPES = [(16, 4096, torch.float32), (8, 8192, torch.bfloat16)]


class Job(NamedTuple):
    """What is computed, and whether the gradient to the noisy side is too."""

    name: str
    kinds: tuple[str, ...]
    backward: bool


JOBS = [
    Job("four metrics", FOUR, False),
    Job("jensen_shannon with gradient", ("jensen_shannon",), True),
    Job("forward_kl with gradient", ("forward_kl",), True),
    Job("reverse_kl with gradient", ("reverse_kl",), True),
    *(Job(f"{kind} alone", (kind,), False) for kind in KINDS),
]


def _liger_jsd(student: Tensor, teacher: Tensor) -> Tensor:
    """Liger-Kernel's own function, one sum over all: what its chunked loss differentiates."""
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction

    return LigerFusedLinearJSDFunction.distillation_loss_fn(student.float(), teacher.float(), beta=0.5)


# Other people's losses, by the kind that they compute.
PEERS: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "GKD's formula": ("jensen_shannon", peers.generalized_jsd),
    "chunked forward KL": ("forward_kl", peers.forward_kl_by_chunks),
    "chunked reverse KL": ("reverse_kl", peers.reverse_kl_by_chunks),
}
if importlib.util.find_spec("liger_kernel"):
    PEERS["Liger-Kernel"] = ("jensen_shannon", _liger_jsd)

_compiled = {dynamic: torch.compile(peers.divergences, dynamic=dynamic) for dynamic in (False, True)}
IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor, tuple[str, ...]], Values]] = {
    "eager": peers.divergences,
    "eager, compiled": _compiled[False],
    "eager, compiled (dynamic)": _compiled[True],
    "sgfast": divergences,
    "sgfast, compiled": lambda noisy, clean, kinds: divergences(noisy, clean, kinds, impl="compile"),
}
CASES = [
    *((job, name) for job, name in itertools.product(JOBS, IMPLEMENTATIONS)),
    *((job, name) for job in JOBS if job.backward for name, (kind, _) in PEERS.items() if (kind,) == job.kinds),
]


def _function(name: str) -> Callable[[Tensor, Tensor, tuple[str, ...]], Values]:
    if name in IMPLEMENTATIONS:
        return IMPLEMENTATIONS[name]
    return lambda noisy, clean, kinds: {kinds[0]: PEERS[name][1](noisy, clean)}


def _run(function: Callable[..., Values], noisy: Tensor, clean: Tensor, job: Job) -> tuple[Values, Tensor | None]:
    if not job.backward:
        with torch.no_grad():
            return function(noisy, clean, job.kinds), None
    leaf = noisy.detach().requires_grad_()
    values = function(leaf, clean, job.kinds)
    (gradient,) = torch.autograd.grad(sum(value.sum() for value in values.values()), leaf)
    return values, gradient


def _kept_bytes_per_logit(function: Callable[..., Values], noisy: Tensor, clean: Tensor, kinds: Sequence[str]) -> float:
    leaf = noisy.detach().requires_grad_()
    inputs = {side.untyped_storage().data_ptr() for side in (leaf, clean)}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in inputs:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        values = function(leaf, clean, kinds)  # noqa: F841  # while they live, so does what they keep
    return sum(kept.values()) / noisy.numel()


def _errors(found: tuple[Values, Tensor | None], noisy: Tensor, clean: Tensor, job: Job) -> tuple[str, str]:
    """Errors of the first rows' values and gradients; of none where a peer returns a sum or leaves a constant out."""
    rows = 8
    values, gradient = found
    expected, expected_gradient = _run(peers.divergences, noisy[:rows].double(), clean[:rows].double(), job)
    value_error = max((values[kind][:rows] - expected[kind]).abs().max().item() for kind in job.kinds)
    if gradient is None or expected_gradient is None:
        return f"{value_error:.1e}", ""
    difference = (gradient[:rows].double() - expected_gradient).norm(dim=-1)
    return f"{value_error:.1e}", f"{(difference / expected_gradient.norm(dim=-1)).max().item():.1e}"


@pytest.mark.parametrize("shape", range(len(SHAPES)), ids=lambda index: "x".join(map(str, SHAPES[index][:2])))
@pytest.mark.parametrize(("job", "name"), CASES, ids=lambda one: one.name if isinstance(one, Job) else one)
def test_divergences(
    benchmark: Any, table: list[dict[str, Any]], request: pytest.FixtureRequest, job: Job, name: str, shape: int
) -> None:
    small = request.config.getoption("--small")
    if small and (job.name.endswith("alone") or "compiled" in name):
        pytest.skip("--small times no kind alone and nothing that compiles")
    rows, width, dtype = (SMALL_SHAPES if small else SHAPES)[shape]
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(rows, width, generator=generator) * 3
    noisy = (clean + torch.randn(rows, width, generator=generator)).to(dtype)
    clean = clean.to(dtype)
    torch._dynamo.reset()
    function = _function(name)
    found = benchmark.pedantic(
        _run, args=(function, noisy, clean, job), rounds=3 if small else 9, warmup_rounds=1 if small else 2
    )
    whole = name not in ("Liger-Kernel", "chunked forward KL")
    value_error, gradient_error = _errors(found, noisy, clean, job) if whole else ("", "")
    table.append(
        {
            "logits": f"[{rows}, {width}] {str(dtype).removeprefix('torch.')}",
            "job": job.name,
            "implementation": name,
            "ms": f"{1e3 * benchmark.stats.stats.median:.1f}",
            "kept B/logit": f"{_kept_bytes_per_logit(function, noisy, clean, job.kinds):.3f}" if job.backward else "",
            "value error": value_error,
            "gradient error": gradient_error,
        }
    )
