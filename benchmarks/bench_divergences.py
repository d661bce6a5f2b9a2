"""The divergences beside the code that a user would write, eager and compiled, and beside other libraries' losses.

    python -m pytest benchmarks/bench_divergences.py [--small] [--device cuda] [--out benchmarks/results] [-k NAMES]

``-k "four and 32000"`` runs only the jobs with these words in their names.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import peers
from sgfast.benchmarking.families import COMPILED, METRICS, divergence_task, pair_of_logits
from sgfast.benchmarking.growth import EAGER
from sgfast.benchmarking.liger import LIGER, liger_loss
from sgfast.benchmarking.measuring import Outputs, Task
from sgfast.ops.divergence.kinds import KINDS

SHAPES = [(512, 32000, torch.float32), (128, 128256, torch.bfloat16)]
SMALL_SHAPES = [(16, 4096, torch.float32), (8, 8192, torch.bfloat16)]
# The kinds that are computed, and whether the gradient to the noisy side is computed as well.
JOBS: dict[str, tuple[tuple[str, ...], bool]] = {
    "four metrics": (METRICS, False),
    "jensen_shannon with gradient": (("jensen_shannon",), True),
    "forward_kl with gradient": (("forward_kl",), True),
    "reverse_kl with gradient": (("reverse_kl",), True),
    **{f"{kind} alone": ((kind,), False) for kind in KINDS},
}
IMPLEMENTATIONS = [EAGER, COMPILED, "sgfast", "sgfast compile"]
# Losses of other libraries, by the job that they do.
PEERS: dict[str, dict[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "jensen_shannon with gradient": {"GKD's formula": peers.generalized_jsd},
    "forward_kl with gradient": {"chunked forward KL": peers.forward_kl_by_chunks},
    "reverse_kl with gradient": {"chunked reverse KL": peers.reverse_kl_by_chunks},
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """All jobs, each with the implementations that can run here."""
    device, cases = metafunc.config.getoption("--device"), []
    for job, (kinds, _) in JOBS.items():
        names = [*IMPLEMENTATIONS, *PEERS.get(job, {})]
        if len(kinds) == 1 and liger_loss(kinds[0], device) is not None:
            names.append(LIGER)
        cases += [(job, name) for name in names]
    metafunc.parametrize(("job", "implementation"), cases)


def job_task(job: str, shape: tuple[int, int, torch.dtype], device: str) -> Task:
    """A job on logits of a shape, by PyTorch, by sgfast and by peers."""
    tokens, vocab, dtype = shape
    kinds, gradient = JOBS[job]
    task = divergence_task(
        job,
        kinds,
        sides=pair_of_logits(tokens, vocab, 1.0, dtype, device),
        sizes={"tokens": tokens, "vocab": vocab},
        gradient=gradient,
        top_k=None,
        support="truncate",
        impls=["auto", "compile"],
    )
    by_peers = {name: _outputs(loss) for name, loss in PEERS.get(job, {}).items()}
    return task._replace(
        implementations={**task.implementations, **by_peers},
        incomparable=task.incomparable | {"chunked forward KL"},  # it leaves out a constant
    )


def _outputs(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Outputs]:
    return lambda noisy, clean: (loss(noisy, clean),)


@pytest.mark.parametrize("shape", range(len(SHAPES)), ids=lambda index: "x".join(map(str, SHAPES[index][:2])))
def test_divergences(
    run_task: Callable[[Task, str], None], small: bool, device: str, shape: int, job: str, implementation: str
) -> None:
    run_task(job_task(job, (SMALL_SHAPES if small else SHAPES)[shape], device), implementation)
