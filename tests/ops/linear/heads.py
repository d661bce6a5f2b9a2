"""Linear sides of both kinds, and their divergences and gradients in float64 by the oracle of the divergences."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgfast import LinearLogits
from tests.implementations import DEVICE
from tests.ops.divergence.oracle import exact, top_k_mask


class Head(NamedTuple):
    """A side's tensors and numbers; leaves of the graph where ``requires_grad``."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def side(self) -> LinearLogits:
        return LinearLogits(self.hidden, self.weight, self.bias, scale=self.scale, softcap=self.softcap)

    def tensors(self) -> list[Tensor]:
        return [one for one in (self.hidden, self.weight, self.bias) if one is not None]


def random_head(
    rows: int,
    width: int,
    vocabulary: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = True,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Head:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return drawn.to(DEVICE, dtype).requires_grad_()

    hidden, weight = normal(rows, width), normal(vocabulary, width)
    return Head(hidden, weight, normal(vocabulary) if bias else None, scale, softcap)


class Expected(NamedTuple):
    """Values (rows,) and the gradients of Σ upstream · value to each side's tensors."""

    values: Tensor
    gradients: tuple[list[Tensor], list[Tensor]]


def expected(
    kind: str,
    noisy: Head,
    clean: Head,
    upstream: Tensor,
    *,
    top_k: int | None = None,
    support: str = "tail",
    mask: Tensor | None = None,
    temperature: Any = 1.0,
) -> Expected:
    """The divergences by float64 logits, and the chain rule through the heads by hand."""
    logits = [_logits(head) for head in (noisy, clean)]
    rows = len(logits[0])
    both = temperature if isinstance(temperature, tuple) else (temperature, temperature)
    temperatures = tuple(torch.as_tensor(one, dtype=torch.float64).expand(rows) for one in both)
    support_mask = None if top_k is None else top_k_mask(logits[0], top_k) | top_k_mask(logits[1], top_k)
    found = exact(kind, *logits, support_mask, support, temperatures, 0.5, 0.1)
    selected = torch.ones(rows, dtype=torch.bool) if mask is None else mask.cpu()
    factors = torch.where(selected, upstream.double().cpu(), 0)[:, None]
    gradients = [
        _through_head(head, one, gradient * factors)
        for head, one, gradient in zip((noisy, clean), logits, found.gradients, strict=True)
    ]
    return Expected(torch.where(selected, found.value, 0), (gradients[0], gradients[1]))


def _logits(head: Head) -> Tensor:
    hidden, weight, *_ = (one.detach().double().cpu() for one in head.tensors())
    logits = hidden @ weight.T
    if head.bias is not None:
        logits = logits + head.bias.detach().double().cpu()
    logits = logits * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def _through_head(head: Head, logits: Tensor, gradient: Tensor) -> list[Tensor]:
    hidden, weight, *_ = (one.detach().double().cpu() for one in head.tensors())
    if head.softcap is not None:
        gradient = gradient * (1 - (logits / head.softcap) ** 2)
    gradient = gradient * head.scale
    return [gradient @ weight, gradient.T @ hidden, *([] if head.bias is None else [gradient.sum(0)])]


def error(actual: Tensor, wanted: Tensor) -> float:
    """The norm of the error over the norm."""
    return ((actual.double().cpu() - wanted).norm() / wanted.norm()).item()
