"""The GPU programme: test every kernel on the GPU, time it against its floor and against torch.compile.

    python -m benchmarks.gpu

Writes ``results/<date>-<device>.json``. Without a GPU it says so and exits 0. Times are medians with cold caches; a
launch's floor is the bytes that must move (``sgfast_kernels.cases``), set against what a plain copy reaches here.
"""

import datetime
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgfast.ops import divergence_rows, hidden, topk
from sgfast.ops.divergence_terms import divergence, make_atoms, partials

_ROOT = Path(__file__).parents[1]
_RESULTS = Path(__file__).parent / "results"


def _hidden_forward(noisy: Tensor, clean: Tensor, mask: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    values, row_scalars = hidden._forward_rows(noisy, clean, eps)
    return torch.where(mask, values, 0), row_scalars


def _hidden_backward(
    noisy: Tensor, clean: Tensor, mask: Tensor, upstream: Tensor, row_scalars: Tensor, eps: float, *needs: bool
) -> tuple[Tensor | None, ...]:
    gradients = hidden._backward_rows(noisy, clean, upstream, row_scalars, eps, *needs)
    return tuple(None if one is None else torch.where(mask[:, None], one, 0).to(noisy.dtype) for one in gradients)


def _lse_pair(noisy: Tensor, clean: Tensor, mask: Tensor, temperature: Tensor) -> tuple[Tensor, ...]:
    scalars = []
    for side in (noisy, clean):
        maximum = side.float().amax(-1, keepdim=True)
        weights = ((side.float() - maximum) / temperature[:, None]).exp()
        scalars += [maximum.squeeze(-1), weights.sum(-1)]
    return tuple(torch.where(mask, one, 0) for one in scalars)


def _atoms(noisy: Tensor, clean: Tensor, temperature: Tensor, scalars: Sequence[Tensor]) -> Any:
    x, y = (side.float() / temperature[:, None] for side in (noisy, clean))
    x_max, x_sum, y_max, y_sum = (one[:, None] for one in scalars)
    log_p = x - x_max / temperature[:, None] - x_sum.log()
    log_q = y - y_max / temperature[:, None] - y_sum.log()
    return make_atoms(log_p.exp(), log_q.exp(), log_p, log_p - log_q)


def _divergence_forward(
    noisy: Tensor,
    clean: Tensor,
    mask: Tensor,
    temperature: Tensor,
    kinds: Sequence[str],
    beta: float,
    skew: float,
    labels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    lse = _lse_pair(noisy, clean, mask, temperature)
    atoms = _atoms(noisy, clean, temperature, lse)
    values, sums = [], []
    for kind in kinds:
        if kind == "label_cross_entropy":
            taken = noisy.float().gather(-1, labels[:, None])[:, 0]
            values.append(noisy.float().logsumexp(-1) - taken)
            sums += [(noisy.float() - noisy.float().amax(-1, keepdim=True)).exp().sum(-1), torch.zeros_like(taken)]
        else:
            values.append(divergence(kind, atoms, beta, skew, False))
            sums += [partial.sum(-1) for partial in partials(kind, atoms, beta, skew, False)]
    return torch.where(mask, torch.stack(values), 0), torch.where(mask, torch.stack([*lse, *sums]), 0)


def _divergence_backward(
    noisy: Tensor,
    clean: Tensor,
    mask: Tensor,
    temperature: Tensor,
    upstream: Tensor,
    row_scalars: Tensor,
    kinds: Sequence[str],
    beta: float,
    skew: float,
    needs_noisy: bool,
    needs_clean: bool,
    labels: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    atoms = _atoms(noisy, clean, temperature, row_scalars[:4].unbind(0))
    totals = [torch.zeros_like(atoms.p), torch.zeros_like(atoms.q)]
    label_gradient = torch.zeros_like(atoms.p)
    for i, kind in enumerate(kinds):
        if kind == "label_cross_entropy":
            weights = (noisy.float() - row_scalars[0][:, None]).exp() / row_scalars[4 + 2 * i][:, None]
            at_label = torch.arange(noisy.shape[-1], device=noisy.device) == labels[:, None]
            label_gradient = upstream[i][:, None] * (weights - at_label.float())
            continue
        for side, partial in enumerate(partials(kind, atoms, beta, skew, False)):
            probability, taken_off = (atoms.p, atoms.q)[side], row_scalars[4 + 2 * i + side][:, None]
            totals[side] = totals[side] + upstream[i][:, None] * (partial - probability * taken_off)
    return tuple(
        torch.where(mask[:, None], total / temperature[:, None] + extra, 0).to(noisy.dtype) if needed else None
        for total, extra, needed in zip(totals, (label_gradient, 0), (needs_noisy, needs_clean), strict=True)
    )


def _top_k_union(noisy: Tensor, clean: Tensor, mask: Tensor, temperature: Tensor, k: int) -> tuple[Tensor, Tensor]:
    indices, valid = topk.union_of_top_k(noisy, clean, k)
    sides = []
    for side in (noisy, clean):
        first = topk.top_k_indices(side, k)
        last = first[:, -1:]
        parts = []
        for part in (side.float(), side.float().scatter(-1, first, -torch.inf)):
            maximum = part.amax(-1)
            parts += [maximum, ((part - maximum[:, None]) / temperature[:, None]).exp().sum(-1)]
        sides.append(torch.stack([*parts, side.gather(-1, last).squeeze(-1).float(), last.squeeze(-1).float()]))
    return torch.where(valid & mask[:, None], indices, -1).int(), torch.stack(sides)


def _divergence_topk_forward(
    noisy: Tensor,
    clean: Tensor,
    mask: Tensor,
    temperature: Tensor,
    k: int,
    support: str,
    kinds: Sequence[str],
    beta: float,
    skew: float,
) -> tuple[Tensor, Tensor, Tensor]:
    union, masses = _top_k_union(noisy, clean, mask, temperature, k)
    indices, valid = topk.unpack_union(union)
    settings = divergence_rows.Settings(tuple(kinds), support, beta, skew)
    values = divergence_rows.forward_rows(noisy, clean, temperature[:, None], settings, indices, valid)
    sides = [divergence_rows._side(side, temperature[:, None], torch.float32) for side in (noisy, clean)]
    atoms, *sums = divergence_rows._atoms(*sides, support, indices, valid)
    scalars = [masses[0, 0], sums[0][:, 0], masses[1, 0], sums[1][:, 0]]
    for side, (_, _, largest, *_) in zip((noisy, clean), masses, strict=True):
        outside = side.float().scatter(-1, indices, -torch.inf)
        weights = ((outside - largest[:, None]) / temperature[:, None]).exp().sum(-1)
        scalars += [largest, weights] if support == "tail" else [torch.zeros_like(weights)] * 2
    for kind in kinds:
        both = partials(kind, atoms, beta, skew, support == "truncate")
        for probability, partial in zip((atoms.p, atoms.q), both, strict=True):
            total = partial.sum(-1)
            at_tail = partial[:, -1] - probability[:, -1] * total
            scalars.append({"truncate": -total, "renormalize": torch.zeros_like(total), "tail": at_tail}[support])
    return torch.where(mask, values, 0), union, torch.where(mask, torch.stack(scalars), 0)


def _divergence_topk_backward(
    noisy: Tensor,
    clean: Tensor,
    mask: Tensor,
    temperature: Tensor,
    upstream: Tensor,
    union: Tensor,
    row_scalars: Tensor,
    support: str,
    kinds: Sequence[str],
    beta: float,
    skew: float,
    *needs: bool,
) -> tuple[Tensor | None, ...]:
    indices, valid = topk.unpack_union(union)
    settings = divergence_rows.Settings(tuple(kinds), support, beta, skew)
    arguments = (noisy, clean, temperature[:, None], settings, indices, valid, upstream, needs)
    gradients = []
    for i, (side, gradient) in enumerate(zip((noisy, clean), divergence_rows.backward_rows(*arguments), strict=True)):
        if gradient is None:
            gradients.append(None)
            continue
        inside = torch.zeros_like(gradient, dtype=torch.bool).scatter(-1, indices, True)
        # Outside the support the kernel multiplies what forward kept, which in these cases is arbitrary.
        first = 2 * i + (4 if support == "tail" else 0)
        largest, total = row_scalars[first][:, None], row_scalars[first + 1][:, None]
        rate = (upstream * row_scalars[8 + i :: 2]).sum(0)[:, None] / temperature[:, None]
        outside = ((side.float() - largest) / temperature[:, None]).exp() / total * rate
        outside = torch.zeros_like(outside) if support == "renormalize" else outside
        gradient = torch.where(inside, gradient, outside)
        gradients.append(torch.where(mask[:, None], gradient, 0).to(side.dtype))
    return tuple(gradients)


# What torch.compile is given for each function that cases launch: the PyTorch implementation of the same result.
BASELINES: dict[str, Callable[..., Any]] = {
    "hidden_forward": _hidden_forward,
    "hidden_backward": _hidden_backward,
    "lse_pair": lambda *arguments: torch.stack(_lse_pair(*arguments)),
    "divergence_forward": _divergence_forward,
    "divergence_backward": _divergence_backward,
    "top_k_union": _top_k_union,
    "divergence_topk_forward": _divergence_topk_forward,
    "divergence_topk_backward": _divergence_topk_backward,
}


def run_tests() -> str:
    """Run the numerical tests of the kernels on the GPU; return pytest's last line."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "triton", "tests/ops"],
        cwd=_ROOT,
        env=environment | {"SGFAST_TEST_DEVICE": "cuda"},
        stdout=subprocess.PIPE,
        text=True,
    )
    if process.returncode:
        print(process.stdout)
    return process.stdout.strip().splitlines()[-1]


def assert_equal_results(function: Callable[..., Any], baseline: Callable[..., Any], arguments: Sequence[Any]) -> None:
    """Check that two functions compute the same, up to the rounding of sums and of bfloat16."""
    for one, other in zip(function(*arguments), baseline(*arguments), strict=True):
        if one is not None or other is not None:
            torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-4)


def time_cases(device: str, median_ms: Callable[[Callable[[], Any]], float]) -> list[dict[str, Any]]:
    """Check each case against its baseline and time both."""
    from sgfast_kernels.cases import CASES

    timings = []
    for case in CASES:
        arguments = case.arguments(case.rows, device)
        torch._dynamo.reset()
        baseline = torch.compile(BASELINES[case.function.__name__])
        assert_equal_results(case.function, baseline, arguments)
        kernel_ms = median_ms(lambda case=case, arguments=arguments: case.function(*arguments))
        compiled_ms = median_ms(lambda baseline=baseline, arguments=arguments: baseline(*arguments))
        floor_bytes = case.rows * case.width * case.floor
        timings.append(
            {
                "case": case.name,
                "rows": case.rows,
                "ms": kernel_ms,
                "torch_compile_ms": compiled_ms,
                "floor_gb_per_s": floor_bytes / kernel_ms / 1e6,
            }
        )
    return timings


def copy_gb_per_s(device: str, median_ms: Callable[[Callable[[], Any]], float]) -> float:
    """Bytes read and written per second by a copy of a gigabyte: the ceiling that counts."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    destination = torch.empty_like(source)
    return 2 * source.numel() / median_ms(lambda: destination.copy_(source)) / 1e6


def main() -> int:
    """Run the programme; return the exit status."""
    if not torch.cuda.is_available():
        print("no GPU here: nothing was run")
        return 0
    import triton
    from triton.testing import do_bench

    def median_ms(function: Callable[[], Any]) -> float:
        return float(do_bench(function, return_mode="median"))

    name = torch.cuda.get_device_name()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=_ROOT, capture_output=True, text=True).stdout.strip()
    now = datetime.datetime.now(datetime.UTC)
    result = {
        "device": name,
        "capability": torch.cuda.get_device_capability(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit,
        "date": now.isoformat(timespec="seconds"),
        "tests": run_tests(),
        "copy_gb_per_s": copy_gb_per_s("cuda", median_ms),
        "timings": time_cases("cuda", median_ms),
    }
    _RESULTS.mkdir(exist_ok=True)
    file = _RESULTS / f"{now:%Y-%m-%d}-{name.replace(' ', '-')}.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{name}: {result['tests']}; a copy reaches {result['copy_gb_per_s']:.0f} GB/s")
    for timing in result["timings"]:
        print(
            f"{timing['case']:36s} {timing['ms']:7.3f} ms, {timing['floor_gb_per_s']:6.0f} GB/s of floor, "
            f"torch.compile {timing['torch_compile_ms'] / timing['ms']:5.2f} times as long"
        )
    print(f"written to {file.relative_to(_ROOT)}")
    failed = " failed" in str(result["tests"]) or " error" in str(result["tests"])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
