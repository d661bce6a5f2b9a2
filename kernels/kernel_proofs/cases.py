"""The launches that are proved. They are compiled for each GPU, counted in the interpreter, and timed on a GPU.

A case calls a launching function of ``sgfast_kernels`` with real arguments. The compiled kernel therefore has the
signature, the specialisations and the tile of a real launch. To add a kernel, add its cases.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from sgfast_kernels import (
    divergence_backward,
    divergence_forward,
    divergence_topk_backward,
    divergence_topk_forward,
    hidden_backward,
    hidden_forward,
    lse_pair,
    nearest_candidates,
    noise_backward,
    noise_forward,
    rank_candidates,
    standard_normal,
    top_k_union,
)
from sgfast_kernels.divergence.atoms import SUPPORTS
from sgfast_kernels.divergence.kinds import DIVERGENCES
from torch import Tensor


class Case(NamedTuple):
    """One launch, its floor and its budgets. An element is one column of one row in all tensors together."""

    name: str
    function: Callable[..., Any]
    #: ``arguments(rows, device)`` → the arguments of the function.
    arguments: Callable[[int, str], tuple[Any, ...]]
    width: int
    #: Bytes that must move per element: each input read once, each output written once.
    floor: float
    #: The limit of counted bytes over the floor: masks, row scalars and a ragged tail add bytes.
    traffic: float = 1.025
    #: Rows that are compiled for and timed: too many for any cache, few enough for a GPU of 16 GB.
    rows: int = 32768
    #: Registers a thread may use on NVIDIA (of 65536: 32 leave room for all 2048 threads, 64 for half).
    registers: int = 64
    #: Bytes per element that are loaded also where every row is masked.
    masked: float = 0.0
    #: Share of elements whose result may jump, since another device's arithmetic rounds or clamps differently.
    jumps: float = 0.0
    #: Loads of 16 bytes or more in the compiled loop; 0 where rows are not aligned.
    vector_loads: int = 0
    #: Instructions per element in the loop on sm90, one limit for each of the first launches. An H200 reads the 4 bytes
    #: of an element while it issues 26 instructions: with more instructions, memory waits.
    instructions: tuple[float, ...] = ()


def _hidden(dtype: torch.dtype, width: int, *gradients: bool) -> Callable[[int, str], tuple[Any, ...]]:
    """Arguments of hidden_forward, or of hidden_backward if ``gradients`` says which gradients are needed."""

    def arguments(rows: int, device: str) -> tuple[Any, ...]:
        noisy, clean = (torch.randn(rows, width, dtype=dtype, device=device) for _ in range(2))
        mask = torch.ones(rows, dtype=torch.bool, device=device)
        if not gradients:
            return noisy, clean, mask, 1e-8
        upstream, row_scalars = (torch.rand(4, rows, device=device) for _ in range(2))
        return noisy, clean, mask, upstream, row_scalars, 1e-8, *gradients

    return arguments


def _logits(dtype: torch.dtype, width: int, rows: int, device: str) -> tuple[Tensor, ...]:
    """Both sides, mask and temperature."""
    noisy, clean = (3 * torch.randn(rows, width, dtype=dtype, device=device) for _ in range(2))
    mask = torch.ones(rows, dtype=torch.bool, device=device)
    return noisy, clean, mask, torch.full((), 1.5, device=device).expand(rows)


def _lse(dtype: torch.dtype, width: int) -> Callable[[int, str], tuple[Any, ...]]:
    """Arguments of lse_pair."""
    return lambda rows, device: _logits(dtype, width, rows, device)


def _divergence(
    dtype: torch.dtype, width: int, kinds: Sequence[str], *gradients: bool
) -> Callable[[int, str], tuple[Any, ...]]:
    """Arguments of divergence_forward, or of divergence_backward if ``gradients`` says which are needed."""

    def arguments(rows: int, device: str) -> tuple[Any, ...]:
        logits = _logits(dtype, width, rows, device)
        # The middle column is the label. Any other column would do.
        labels = [torch.full((rows,), width // 2, device=device)] if "label_cross_entropy" in kinds else []
        if not gradients:
            return *logits, kinds, 0.5, 0.1, *labels
        # Maxima and sums must be the maxima and sums of the logits. The sums of partials may be anything.
        row_scalars = torch.rand(4 + 2 * len(kinds), rows, device=device)
        for i, side in enumerate(logits[:2]):
            row_scalars[2 * i] = side.amax(-1)
            weights = (side.float() - row_scalars[2 * i][:, None]).div_(1.5).exp_()
            row_scalars[2 * i + 1] = weights.sum(-1)
        return *logits, torch.rand(len(kinds), rows, device=device), row_scalars, kinds, 0.5, 0.1, *gradients, *labels

    return arguments


def _noise(
    dtype: torch.dtype, width: int, spread: str, *gradients: bool, clamped: bool = False
) -> Callable[[int, str], tuple[Any, ...]]:
    """Arguments of noise_forward, or of noise_backward if ``gradients`` says which gradients are needed.

    ``spread`` is the shape of mean and std: ``"full"``, a ``"vector"`` for all rows, or one ``"number"``.
    """

    def arguments(rows: int, device: str) -> tuple[Any, ...]:
        shape = {"full": (rows, width), "vector": (width,), "number": ()}[spread]
        mean, std = (torch.rand(shape, dtype=dtype, device=device) for _ in range(2))
        upstream, input = (torch.randn(rows, width, dtype=dtype, device=device) for _ in range(2))
        seed = torch.full((), -7, dtype=torch.int64, device=device)
        mask = torch.ones(rows, 1, dtype=torch.bool, device=device)
        bounds = (-1.5, 1.5) if clamped else (None, None)
        settings = (input, mean, std, seed, 2**33, mask, None, *bounds)
        return (upstream, *settings, *gradients) if gradients else settings

    return arguments


def _normal(dtype: torch.dtype, width: int) -> Callable[[int, str], tuple[Any, ...]]:
    """Arguments of standard_normal."""
    return lambda rows, device: (torch.full((), -7, dtype=torch.int64, device=device), (rows, width), 2**33, dtype)


_bf16, _fp32 = torch.bfloat16, torch.float32
_KINDS = {
    "kl": ("forward_kl",),
    "js": ("jensen_shannon",),
    "rest": ("jeffreys", "total_variation", "squared_hellinger"),
    "metrics": ("jeffreys", "jensen_shannon", "total_variation", "squared_hellinger"),
    "labels": ("forward_kl", "label_cross_entropy"),
    "all": DIVERGENCES,
}


def _forward(dtype: torch.dtype, width: int, kinds: str, **limits: Any) -> Case:
    """A case whose floor is one read of both sides. Two passes move twice the floor."""
    name = f"divergence_forward {'bf16' if dtype == _bf16 else 'fp32'} {width} {kinds}"
    arguments = _divergence(dtype, width, _KINDS[kinds])
    return Case(name, divergence_forward, arguments, width, 2 * dtype.itemsize, traffic=2.05, rows=2048, **limits)


def _backward(dtype: torch.dtype, width: int, kinds: str, *needs: bool, **limits: Any) -> Case:
    """A case that reads both sides and writes the gradients needed."""
    sides = "both" if all(needs) else "noisy"
    name = f"divergence_backward {'bf16' if dtype == _bf16 else 'fp32'} {width} {kinds} {sides}"
    arguments = _divergence(dtype, width, _KINDS[kinds], *needs)
    floor = (2 + sum(needs)) * dtype.itemsize
    return Case(name, divergence_backward, arguments, width, floor, rows=2048, **{"vector_loads": 4} | limits)


def _top_k(width: int, k: int, support: str | None = None, kinds: str = "kl") -> Case:
    """The support alone, or divergences over it too. The floor: both sides once, groups, groups read again."""

    def arguments(rows: int, device: str) -> tuple[Any, ...]:
        logits = _logits(_bf16, width, rows, device)
        return (*logits, k) if support is None else (*logits, k, support, _KINDS[kinds], 0.5, 0.1)

    groups = (2**i for i in range(3, 8))
    floor = 4 + min(32 / group + 4 * group * k / width for group in groups)
    # A thread of the selection holds 16 logits or groups. The tail's second read of few rows may cost more.
    registers = 224 if kinds == "all" else 160 if support == "tail" else 128
    limits: dict[str, Any] = {"rows": 4096, "traffic": 1.03 if k <= 64 else 1.05, "registers": registers}
    if support is None:
        return Case(f"top_k_union bf16 {width} k={k}", top_k_union, arguments, width, floor, **limits)
    name = f"divergence_topk_forward bf16 {width} k={k} {support} {kinds}"
    return Case(name, divergence_topk_forward, arguments, width, floor, **limits)


def _top_k_backward(width: int, k: int, support: str, kinds: str, *needs: bool) -> Case:
    """A case that reads the side whose gradient it writes. Under ``renormalize`` neither side is read."""

    def arguments(rows: int, device: str) -> tuple[Any, ...]:
        noisy, clean, mask, temperature = _logits(_bf16, width, rows, device)
        both = torch.cat([side.topk(k, dim=-1).indices for side in (noisy, clean)], dim=-1).sort(dim=-1).values
        both[:, 1:].masked_fill_(both[:, 1:] == both[:, :-1], width)
        union = both.sort(dim=-1).values
        # The factors of the gradients outside the support may be anything. Maxima and sums must be the logits'.
        scalars = torch.rand(8 + 2 * len(_KINDS[kinds]), rows, device=device)
        for i, side in enumerate((noisy, clean)):
            logits = torch.cat([side.float(), torch.full((rows, 1), -torch.inf, device=device)], dim=-1)
            outside = logits.scatter(-1, union, -torch.inf)
            whole = logits.gather(-1, union) if support == "renormalize" else logits
            for j, part in ((2 * i, whole), (4 + 2 * i, outside)):
                scalars[j] = part.amax(-1)
                scalars[j + 1] = ((part - scalars[j][:, None]) / 1.5).exp().sum(-1)
        union = union.masked_fill(union == width, -1).int()
        upstream = torch.rand(len(_KINDS[kinds]), rows, device=device)
        return noisy, clean, mask, temperature, upstream, union, scalars, support, _KINDS[kinds], 0.5, 0.1, *needs

    name = f"divergence_topk_backward bf16 {width} k={k} {support} {kinds} {'both' if all(needs) else 'noisy'}"
    floor = (2 if support == "renormalize" else 4) * sum(needs)
    registers = 192 if kinds == "all" else 64
    limits: dict[str, Any] = {
        "rows": 1024,
        "traffic": 1.1 if support == "renormalize" else 1.05,
        "registers": registers,
    }
    return Case(name, divergence_topk_backward, arguments, width, floor, **limits)


def _nearest(dtype: torch.dtype, width: int, scaled: bool, count: int, ranks: bool = False) -> Case:
    """64 table rows for each query. The floor is one read of both; each tile of the table reads the queries again."""

    def arguments(rows: int, device: str) -> tuple[Any, ...]:
        queries, center = torch.randn(rows, width, device=device), torch.randn(width, device=device) / 8
        table = torch.randn(64 * rows, width, dtype=dtype, device=device)
        scale = torch.full((64 * rows,), 0.5, device=device) if scaled else None
        sides = queries, queries.square().sum(1), queries.norm(dim=1), table, scale, center
        if not ranks:
            return *sides, -1, (1e-6, 1e-7, 1e-30), count
        first = table[0].float() * (0.5 if scaled else 1.0) - center
        limits = first.square().sum() - 2 * queries @ first
        return *sides, (1e-6, 1e-7, 1e-30), count, torch.stack([limits, limits])

    function = rank_candidates if ranks else nearest_candidates
    name = f"{function.__name__} {'bf16' if dtype == _bf16 else 'fp32'} {width}{' scaled' if scaled else ''} {count}"
    limits: dict[str, Any] = {"rows": 2048, "traffic": 1.3, "registers": 255, "jumps": 1e-2, "vector_loads": 1}
    return Case(name, function, arguments, width, 4 + 64 * dtype.itemsize, **limits)


def _noised(
    name: str, arguments: Callable[[int, str], tuple[Any, ...]], width: int, floor: float, **limits: Any
) -> Case:
    """A case of noise_forward or noise_backward. They need a few registers more than 64 and round eps."""
    function = noise_forward if name.startswith("forward") else noise_backward
    # Masked rows copy the input or the upstream gradient.
    masked = 4.0 if "fp32" in name else 2.0
    settings: dict[str, Any] = {"traffic": 1.01, "registers": 80, "masked": masked, "jumps": 1e-3} | limits
    return Case(f"noise_{name}", function, arguments, width, floor, **settings)


CASES = [
    Case(
        "hidden_forward bf16 64", hidden_forward, _hidden(_bf16, 64), 64, 4, traffic=1.13, registers=72, vector_loads=4
    ),
    Case("hidden_forward bf16 512", hidden_forward, _hidden(_bf16, 512), 512, 4, vector_loads=4),
    Case("hidden_forward bf16 4096", hidden_forward, _hidden(_bf16, 4096), 4096, 4, vector_loads=4),
    Case("hidden_forward bf16 4097", hidden_forward, _hidden(_bf16, 4097), 4097, 4, registers=80),
    Case("hidden_forward bf16 16384", hidden_forward, _hidden(_bf16, 16384), 16384, 4, vector_loads=4),
    Case("hidden_forward fp32 4096", hidden_forward, _hidden(_fp32, 4096), 4096, 8, registers=80, vector_loads=8),
    Case(
        "hidden_backward bf16 4096 noisy", hidden_backward, _hidden(_bf16, 4096, True, False), 4096, 6, vector_loads=4
    ),
    Case("hidden_backward bf16 4096 both", hidden_backward, _hidden(_bf16, 4096, True, True), 4096, 8, vector_loads=4),
    Case("hidden_backward fp32 4096 both", hidden_backward, _hidden(_fp32, 4096, True, True), 4096, 16, vector_loads=8),
    Case(
        "lse_pair bf16 32000",
        lse_pair,
        _lse(_bf16, 32000),
        32000,
        4,
        rows=8192,
        vector_loads=4,
        instructions=(15.5,),
    ),
    _forward(_bf16, 151936, "kl", instructions=(15.5, 12)),
    _forward(_bf16, 32000, "js", instructions=(15.5, 20)),
    _forward(_bf16, 32000, "rest", registers=80, instructions=(15.5, 20)),
    _forward(_bf16, 151936, "metrics", registers=96, instructions=(15.5, 27.5)),
    _forward(_bf16, 32000, "labels", instructions=(19.5, 12)),
    _forward(_bf16, 32001, "kl", instructions=(18.5, 15)),
    _forward(_fp32, 32000, "js", registers=80),
    _backward(_bf16, 151936, "kl", True, False, instructions=(14,)),
    _backward(_bf16, 32000, "js", True, False, instructions=(26,)),
    _backward(_bf16, 32000, "labels", True, False, instructions=(23,)),
    # A thread has half as many columns, and loads 8 bytes on AMD.
    _backward(_bf16, 32000, "all", True, True, registers=128, vector_loads=0),
    _backward(_fp32, 32000, "js", True, False),
    *(_top_k(width, k) for width, k in ((151936, 64), (32000, 100))),
    *(_top_k(width, k, support) for width, k in ((151936, 64), (32000, 100)) for support in SUPPORTS),
    _top_k(32000, 100, "tail", "all"),
    *(_top_k_backward(151936, 64, support, "kl", True, False) for support in SUPPORTS),
    *(_top_k_backward(32000, 100, support, "kl", True, False) for support in SUPPORTS),
    _top_k_backward(32000, 100, "tail", "all", True, True),
    _nearest(_bf16, 256, False, 16),
    _nearest(_fp32, 256, True, 64),
    _nearest(_bf16, 256, True, 16, ranks=True),
    Case("standard_normal fp32 4096", standard_normal, _normal(_fp32, 4096), 4096, 4, traffic=1.01),
    Case("standard_normal bf16 4096", standard_normal, _normal(_bf16, 4096), 4096, 2, traffic=1.01),
    _noised("forward bf16 4096", _noise(_bf16, 4096, "full"), 4096, 8, vector_loads=6),
    # Mean and std are counted for every row that loads them.
    _noised("forward bf16 4096 vector", _noise(_bf16, 4096, "vector"), 4096, 4, traffic=2.02, vector_loads=6),
    _noised("forward bf16 4095", _noise(_bf16, 4095, "full"), 4095, 8, registers=128),
    _noised("forward fp32 4096", _noise(_fp32, 4096, "full"), 4096, 16, vector_loads=6),
    _noised("backward bf16 4096", _noise(_bf16, 4096, "full", True, True, True), 4096, 8, vector_loads=2),
    _noised(
        "backward bf16 4096 clamped",
        _noise(_bf16, 4096, "full", True, True, True, clamped=True),
        4096,
        14,
        vector_loads=8,
    ),
    # Each of the few counted rows is a partial sum. With more rows, sixty-four rows share one partial sum.
    _noised("backward bf16 4096 vector", _noise(_bf16, 4096, "vector", True, True, True), 4096, 4, traffic=3.01),
]
