"""The tasks of the operations that ``sgfast bench`` measures: divergences, hidden distances, noise."""

import functools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from sgfast import ops
from sgfast.benchmarking import plain
from sgfast.benchmarking.growth import EAGER
from sgfast.benchmarking.liger import LIGER, liger_loss
from sgfast.benchmarking.measuring import Outputs, Task, first_rows
from sgfast.ops import dispatch

METRICS = ("jeffreys", "jensen_shannon", "total_variation", "squared_hellinger")
COMPILED = "torch.compile"
SEED = 7


def ours(impl: str) -> str:
    """Return the label of one of sgfast's implementations."""
    return "sgfast" if impl == "auto" else f"sgfast {impl}"


def divergence_tasks(
    *,
    tokens: int,
    vocab: int,
    top_k: int | None = None,
    noise: float = 1.0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    impls: Sequence[str] = ("auto",),
) -> list[Task]:
    """Make tasks over [tokens, vocab] logits: four metrics, and Jensen–Shannon with its gradient to the noisy side.

    Clean logits are normal with standard deviation 3. Noisy logits are the clean ones plus ``noise`` times a normal
    draw. Under ``top_k`` the metrics are truncated and Jensen–Shannon has one atom for the tail, as in their usual use.
    """
    task = functools.partial(
        divergence_task,
        sides=pair_of_logits(tokens, vocab, noise, dtype, device),
        sizes={"tokens": tokens, "vocab": vocab, "top_k": top_k, "noise": noise},
        top_k=top_k,
        impls=impls,
    )
    return [
        task("four metrics", METRICS, gradient=False, support="truncate"),
        task("jensen_shannon with gradient", ("jensen_shannon",), gradient=True, support="tail"),
    ]


def divergence_task(
    name: str,
    kinds: Sequence[str],
    *,
    sides: tuple[Tensor, Tensor],
    sizes: dict[str, float | str | None],
    gradient: bool,
    top_k: int | None,
    support: str,
    impls: Sequence[str],
) -> Task:
    """Make the task of several divergences, or of one divergence with its gradient to the noisy side."""
    noisy, _ = sides

    def ours_by(impl: str) -> Callable[..., Outputs]:
        def run(x: Tensor, y: Tensor) -> Outputs:
            found = ops.divergences(x, y, kinds, top_k=top_k, support=support, impl=impl)  # type: ignore[arg-type]
            return tuple(found.values())

        return run

    def by_formula(x: Tensor, y: Tensor) -> Outputs:
        if top_k is None:
            return tuple(plain.divergences(x, y, kinds).values())
        return tuple(plain.top_k_divergences(x, y, kinds, top_k, support).values())

    def oracle(x: Tensor, y: Tensor) -> Outputs:
        if top_k is None:
            return by_formula(x, y)
        return tuple(plain.top_k_divergences(x, y, kinds, top_k, support, ties_in_order=True).values())

    implementations = contenders(ours_by, by_formula, impls, noisy.device.type)
    by_liger = liger_loss(kinds[0], noisy.device.type) if len(kinds) == 1 and top_k is None else None
    if by_liger is not None:
        implementations[LIGER] = by_liger
    return Task(
        "divergences",
        name,
        sizes,
        sides,
        implementations,
        int(gradient),
        (2 + (gradient and (2 if top_k else 3))) * noisy.nbytes,
        noisy.numel(),
        oracle,
        # PyTorch's top-k takes any of equal logits, and lower precision has many equal logits.
        incomparable=frozenset({LIGER} if top_k is None or noisy.dtype == torch.float32 else {LIGER, EAGER, COMPILED}),
    )


def pair_of_logits(tokens: int, vocab: int, noise: float, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Draw noisy and clean logits: clean ones are normal with standard deviation 3, noisy ones differ by ``noise``."""
    return _pair(tokens, vocab, 3.0, noise, dtype, device)


def hidden_tasks(
    *,
    tokens: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    impls: Sequence[str] = ("auto",),
) -> list[Task]:
    """Make tasks over [tokens, width] hidden states: the four distances, without and with the noisy side's gradient."""
    noisy, clean = _pair(tokens, width, 1.0, 0.3, dtype, device)

    def ours_by(impl: str) -> Callable[..., Outputs]:
        return lambda x, y: ops.hidden_distances(x, y, impl=impl)  # type: ignore[arg-type]

    return [
        Task(
            "hidden",
            "distances with gradient" if gradient else "distances",
            {"tokens": tokens, "width": width},
            (noisy, clean),
            contenders(ours_by, plain.hidden_distances, impls, device),
            int(gradient),
            (5 if gradient else 2) * noisy.nbytes,
            noisy.numel(),
            plain.hidden_distances,
        )
        for gradient in (False, True)
    ]


def noise_tasks(
    *,
    tokens: int,
    width: int,
    shared: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    impls: Sequence[str] = ("auto",),
) -> list[Task]:
    """Make tasks of noise on [tokens, width] embeddings, without and with the gradients to all three operands.

    Mean and std differ for each element, as in a transformer's noise layer. With ``shared`` they differ only for each
    feature.
    """
    generator = torch.Generator().manual_seed(0)
    rows = 1 if shared else tokens
    operands = [torch.randn(count, width, generator=generator) for count in (tokens, rows, rows)]
    input, mean, std = (one.to(device, dtype) for one in (*operands[:2], operands[2].abs()))
    moved = sum(one.nbytes for one in (input, mean, std))
    name = "apply_noise, shared mean and std" if shared else "apply_noise"

    def ours_by(impl: str) -> Callable[..., Outputs]:
        return lambda x, m, s: (ops.apply_noise(x, m, s, seed=SEED, impl=impl),)  # type: ignore[arg-type]

    def by_formula(x: Tensor, m: Tensor, s: Tensor) -> Outputs:
        return (plain.apply_noise(x, m, s),)

    def on_the_same_draw(x: Tensor, m: Tensor, s: Tensor) -> Outputs:
        return (x + m + s * ops.standard_normal(x.shape, SEED, dtype=x.dtype, device=x.device),)

    return [
        Task(
            "noise",
            f"{name} with gradients" if gradient else name,
            {"tokens": tokens, "width": width},
            (input, mean, std),
            contenders(ours_by, by_formula, impls, device),
            3 if gradient else 0,
            # Forward and backward read the operands and one gradient, and write an output and the operands' gradients.
            (2 * moved + 2 * input.nbytes) if gradient else moved + input.nbytes,
            input.numel(),
            on_the_same_draw,
            (lambda *operands: operands) if shared else first_rows,
            frozenset({EAGER, COMPILED}),
        )
        for gradient in (False, True)
    ]


def contenders(
    ours_by: Callable[[str], Callable[..., Outputs]],
    by_formula: Callable[..., Outputs],
    impls: Iterable[str],
    device: str,
) -> dict[str, Callable[..., Outputs]]:
    """Return the implementations to compare: eager PyTorch, torch.compile if it is a contender, and sgfast's."""
    impls = list(impls)
    found = {EAGER: by_formula}
    if beside_compiled(impls, device):
        found[COMPILED] = dispatch.compiled(by_formula)
    return found | {ours(impl): ours_by(impl) for impl in impls}


def beside_compiled(impls: Iterable[str], device: str) -> bool:
    """Return True if torch.compile is a contender: sgfast is compiled too, as a kernel or by impl="compile"."""
    return "compile" in impls or torch.device(device).type != "cpu"


def _pair(rows: int, width: int, scale: float, noise: float, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Draw a noisy and a clean tensor on the device, because large logits take long to copy there."""
    generator = torch.Generator(device).manual_seed(0)
    clean = torch.randn(rows, width, generator=generator, device=device).mul_(scale)
    noisy = torch.randn(rows, width, generator=generator, device=device).mul_(noise).add_(clean)
    return noisy.to(dtype), clean.to(dtype)
