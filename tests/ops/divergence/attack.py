"""A random attack on the accuracy of divergences: seeded cases of every kind that has ever gone wrong.

`python -m tests.ops.divergence.attack --cases 5000 --impl torch` runs for as long as it takes and prints the worst
error of every kind, in units of what is promised; with ``TRITON_INTERPRET=1`` also ``--impl triton``.
"""

import argparse
import math
import random
from typing import NamedTuple

import torch
from torch import Tensor

from sgfast.ops import dispatch, divergences
from sgfast.ops.divergence import masked_divergence
from sgfast.ops.divergence.kinds import KINDS
from tests.ops.divergence.oracle import exact, top_k_mask

WIDTHS = (1, 2, 3, 5, 17, 64, 257, 1000, 5000, 32_000, 151_936)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# One rounding of the input's dtype, by rows.
ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 6e-4}


class Case(NamedTuple):
    """Logits (rows, V) and how they are compared; ``description`` is for messages."""

    noisy: Tensor
    clean: Tensor
    temperatures: tuple[Tensor, Tensor]
    top_k: int | None
    support_mask: Tensor | None
    support: str
    beta: float
    skew: float
    description: str


def _row(generator: torch.Generator, choice: random.Random, width: int) -> tuple[Tensor, str]:
    """One side's row in float64."""
    style = choice.choice(["flat", "normal", "peak", "peaks", "ties", "steps", "wide"])
    noise = torch.randn(width, generator=generator, dtype=torch.float64)
    if style == "flat":
        row = noise * choice.choice([0.0, 1e-3])
    elif style == "normal":
        row = noise * choice.choice([0.3, 1, 3])
    elif style == "wide":
        row = noise * choice.choice([10, 50])
    elif style in ("peak", "peaks"):
        row = noise * choice.choice([0.0, 0.5])
        for _ in range(1 if style == "peak" else 3):
            row[choice.randrange(width)] += choice.choice([4, 10, 15, 25, 30, 60])
    elif style == "ties":
        row = (noise * 2).round()
    else:
        row = torch.arange(width, dtype=torch.float64) * choice.choice([-1e-3, 0.01, 1.0])
    return row, style


def make(seed: int, widths: tuple[int, ...] = WIDTHS, impl: str = "torch") -> Case:
    """The case of a seed: what an implementation can run."""
    kernels = impl == "triton"
    dtypes = DTYPES[:-1] if kernels else DTYPES
    choice, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    width, rows, dtype = choice.choice(widths), choice.choice([1, 3]), choice.choice(dtypes)
    sides: list[list[Tensor]] = [[], []]
    words = []
    for _ in range(rows):
        clean, style = _row(generator, choice, width)
        relation = choice.choice(["other", "other", "near", "equal", "scaled"])
        if relation == "other":
            noisy, noisy_style = _row(generator, choice, width)
            relation = f"beside {noisy_style}"
        else:
            step = choice.choice([1e-4, 1e-2, 1.0]) if relation == "near" else 0.0
            noisy = clean + step * torch.randn(width, generator=generator, dtype=torch.float64)
            noisy = noisy * (2 if relation == "scaled" else 1)
        for side in (clean, noisy):
            if choice.random() < 0.2:
                gone = torch.rand(width, generator=generator) < choice.choice([0.1, 0.9])
                gone[side.argmax()] = False
                # Kernels take a ratio of 2^1e30 for infinite.
                side[gone] = choice.choice([-math.inf, -1e28, -1e20, -1e10])
                words.append("columns gone")
        shift = choice.choice([0.0, 0.0, 0.0, 1.0, -30.0, 300.0, 1e4, -1e4])
        noisy = noisy + shift
        if choice.random() < 0.3:
            noisy, clean = noisy + 1000.0, clean + 1000.0
        words.append(f"{style} {relation} shift {shift}")
        sides[0].append(noisy)
        sides[1].append(clean)
    limit = torch.finfo(dtype).max
    noisy, clean = (torch.stack(side).clamp(max=limit).to(dtype) for side in sides)
    temperature = torch.tensor([choice.choice([0.1, 0.5, 1.0, 1.0, 1.0, 2.0, 10.0]) for _ in range(rows)])
    other_temperature = temperature
    if choice.random() < 0.15 and not kernels:
        other_temperature = torch.tensor([choice.choice([0.5, 1.0, 3.0]) for _ in range(rows)])
    support = choice.choice(["full", "tail", "truncate", "renormalize"])
    top_k, support_mask = None, None
    if support != "full":
        if choice.random() < 0.6 or kernels:
            top_k = min(choice.choice([1, 2, 5, 50]), width)
        else:
            support_mask = torch.rand(noisy.shape, generator=generator) < choice.choice([0.05, 0.5, 0.95])
            support_mask[:, choice.randrange(width)] = True
            if support == "renormalize":  # both sides need some mass in it
                for side in (noisy, clean):
                    support_mask.scatter_(-1, side.argmax(-1, keepdim=True), True)
    beta, skew = (choice.choice([0.5, 0.3, 0.1, 0.9, 1e-2, 1e-4, 2e-8, 1 - 1e-4]) for _ in range(2))
    words.append(f"{tuple(noisy.shape)} {dtype} T={temperature.tolist()}, {other_temperature.tolist()}")
    words.append(f"{support} top_k={top_k} {beta=} {skew=}")
    return Case(
        noisy,
        clean,
        (temperature, other_temperature),
        top_k,
        support_mask,
        support,
        beta,
        skew if choice.random() < 0.9 else 0.0,
        f"seed {seed}: " + "; ".join(words),
    )


def _mixture(kind: str, case: Case) -> dict[str, float]:
    if kind == "jensen_shannon":
        return {"beta": case.beta}
    return {"skew": case.skew} if kind.startswith("skew_") else {}


def errors(case: Case, impl: str, kinds: tuple[str, ...] = KINDS) -> dict[str, float]:
    """Worst error over rows, by kind: of the value, and of each gradient, as a multiple of what is promised."""
    noisy, clean = (side.clone().requires_grad_() for side in (case.noisy, case.clean))
    options = {
        "support": "tail" if case.support == "full" else case.support,
        "temperature": case.temperatures[0] if case.temperatures[0] is case.temperatures[1] else case.temperatures,
        "impl": impl,
    }
    mixtures = {kind: _mixture(kind, case) for kind in kinds}
    if case.support_mask is None:
        together = {name: weight for mixture in mixtures.values() for name, weight in mixture.items()}
        values = divergences(noisy, clean, kinds, top_k=case.top_k, **options, **together)
    else:
        read = (noisy, clean, case.support_mask)
        values = {kind: masked_divergence(*read, kind, **options, **mixtures[kind]) for kind in kinds}
    wide = [side.double() for side in (case.noisy, case.clean)]
    wide_temperatures = tuple(temperature.double() for temperature in case.temperatures)
    mask = case.support_mask
    if case.top_k is not None:
        mask = top_k_mask(wide[0], case.top_k) | top_k_mask(wide[1], case.top_k)
    found = {}
    smallest = 0.0 if case.noisy.dtype == torch.float64 else 7e-46
    for kind in kinds:
        truth = exact(kind, *wide, mask, case.support, wide_temperatures, case.beta, case.skew, smallest)
        value = values[kind].detach().double()
        expected = truth.value.where(truth.value.abs() < 1e38, torch.inf)
        error = (value - expected).abs() / (1e-5 * expected.abs() + 5e-7)
        error = torch.where((value == expected) | (value > 1e37) & (expected > 1e37), 0, error)
        found[f"{kind} value"] = error.nan_to_num(nan=math.inf).max().item()
        gradients = torch.autograd.grad(values[kind].sum(), (noisy, clean), retain_graph=True)
        for name, gradient, want, undecided, temperature in zip(
            ("noisy", "clean"), gradients, truth.gradients, truth.undecided, wide_temperatures, strict=True
        ):
            off = (gradient.double() - want).norm(dim=-1)
            # A gradient is a difference of terms as large as the value: it has the digits that those have.
            allowed = (
                ROUNDING[case.noisy.dtype] * want.norm(dim=-1) + (5e-7 + 3e-7 * expected) / temperature + undecided
            )
            allowed += torch.finfo(case.noisy.dtype).smallest_normal * 2e-3 * case.noisy.shape[-1] ** 0.5
            ratio = torch.where(expected > 1e15, 0.0, off / allowed)
            found[f"{kind} to {name}"] = ratio.nan_to_num(nan=math.inf).max().item()
    return found


def main() -> None:
    """Attack, and print the worst cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--impl", default="torch")
    parser.add_argument("--widest", type=int, default=WIDTHS[-1])
    arguments = parser.parse_args()
    widths = tuple(width for width in WIDTHS if width <= arguments.widest)
    if dispatch.interpreting():
        from kernel_proofs import strict

        strict.install()
    worst: dict[str, tuple[float, str]] = {}
    beyond = 0
    for seed in range(arguments.first, arguments.first + arguments.cases):
        case = make(seed, widths, arguments.impl)
        found = errors(case, arguments.impl)
        beyond += any(ratio > 1 for ratio in found.values())
        for name, ratio in found.items():
            if ratio > worst.get(name, (-1.0, ""))[0]:
                worst[name] = ratio, case.description
    for name, (ratio, description) in sorted(worst.items(), key=lambda item: item[1][0]):
        print(f"{ratio:10.3g}  {name:32s} {description if ratio > 0.5 else ''}")
    print(f"{beyond} of {arguments.cases} cases beyond the promise")


if __name__ == "__main__":
    main()
