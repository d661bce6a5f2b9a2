"""What others compute, written from the definitions in their papers: what the operations are measured beside.

Plain functions of (..., V) logits that return one value per position. Nothing here is chunked, fused or masked unless
its docstring says so; computations are in float32 unless an input is float64.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def divergences(noisy: Tensor, clean: Tensor, kinds: Sequence[str]) -> dict[str, Tensor]:
    """What a user of PyTorch would write: log_softmax of both sides, then the formulas; beta = ½, skew = 0.1."""
    a, b = _log_softmax(noisy), _log_softmax(clean)
    p, q = a.exp(), b.exp()
    formulas: dict[str, Callable[[], Tensor]] = {
        "forward_kl": lambda: q * (b - a),
        "reverse_kl": lambda: p * (a - b),
        "jeffreys": lambda: (p - q) * (a - b),
        "jensen_shannon": lambda: _skew_kl(p, a, q, 0.5) / 2 + _skew_kl(q, b, p, 0.5) / 2,
        "total_variation": lambda: (p - q).abs() / 2,
        "squared_hellinger": lambda: (p.sqrt() - q.sqrt()).square() / 2,
        "cross_entropy": lambda: -q * a,
        "skew_forward_kl": lambda: _skew_kl(q, b, p, 0.1),
        "skew_reverse_kl": lambda: _skew_kl(p, a, q, 0.1),
    }
    return {kind: formulas[kind]().sum(-1) for kind in kinds}


def generalized_jsd(student: Tensor, teacher: Tensor, beta: float = 0.5) -> Tensor:
    """JSD(beta) = beta·KL(q‖m) + (1−beta)·KL(p‖m), m = beta·q + (1−beta)·p, with the mixture formed from logarithms.

    Agarwal et al. 2024, "On-Policy Distillation of Language Models" (GKD), equation 1: what GKD trainers minimise.
    """
    a, b = _log_softmax(student), _log_softmax(teacher)
    weights = torch.tensor([1 - beta, beta], dtype=a.dtype, device=a.device).log()
    m = torch.logaddexp(a + weights[0], b + weights[1])
    return (beta * b.exp() * (b - m) + (1 - beta) * a.exp() * (a - m)).sum(-1)


def forward_kl_by_chunks(student: Tensor, teacher: Tensor, chunks: int = 8) -> Tensor:
    """KL(q‖p) without the teacher's entropy, which has no gradient, one chunk of positions after the other.

    Hinton et al. 2015, "Distilling the Knowledge in a Neural Network"; cut into chunks as in torchtune's losses.
    """
    parts = zip(student.chunk(chunks), teacher.chunk(chunks), strict=True)
    return torch.cat([-(_log_softmax(y).exp() * _log_softmax(x)).sum(-1) for x, y in parts])


def reverse_kl_by_chunks(student: Tensor, teacher: Tensor, chunks: int = 8) -> Tensor:
    """KL(p‖q), one chunk of positions after the other.

    Gu et al. 2024, "MiniLLM"; cut into chunks as in torchtune's losses.
    """
    values = []
    for x, y in zip(student.chunk(chunks), teacher.chunk(chunks), strict=True):
        a = _log_softmax(x)
        values.append((a.exp() * (a - _log_softmax(y))).sum(-1))
    return torch.cat(values)


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _skew_kl(p: Tensor, log_p: Tensor, q: Tensor, skew: float) -> Tensor:
    """Terms of KL(p‖skew·p + (1−skew)·q): Ko et al. 2024, DistiLLM; with skew = ½ half of Jensen–Shannon."""
    return p * (log_p - (skew * p + (1 - skew) * q).log())
