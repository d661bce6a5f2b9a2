"""Losses as others write them, from the definitions in their papers: what the divergences are measured beside.

Functions of (N, V) logits that return one value per position, in float32 unless an input is float64.
"""

import torch
from torch import Tensor

from sgfast.benchmarking.plain import log_softmax


def generalized_jsd(student: Tensor, teacher: Tensor, beta: float = 0.5) -> Tensor:
    """JSD(beta) = beta·KL(q‖m) + (1−beta)·KL(p‖m), m = beta·q + (1−beta)·p, with the mixture formed from logarithms.

    Agarwal et al. 2024, "On-Policy Distillation of Language Models" (GKD), equation 1: what GKD trainers minimise.
    """
    a, b = log_softmax(student), log_softmax(teacher)
    weights = torch.tensor([1 - beta, beta], dtype=a.dtype, device=a.device).log()
    m = torch.logaddexp(a + weights[0], b + weights[1])
    return (beta * b.exp() * (b - m) + (1 - beta) * a.exp() * (a - m)).sum(-1)


def forward_kl_by_chunks(student: Tensor, teacher: Tensor, chunks: int = 8) -> Tensor:
    """KL(q‖p) without the teacher's entropy, which has no gradient, one chunk of positions after the other.

    Hinton et al. 2015, "Distilling the Knowledge in a Neural Network"; cut into chunks as in torchtune's losses.
    """
    parts = zip(student.chunk(chunks), teacher.chunk(chunks), strict=True)
    return torch.cat([-(log_softmax(y).exp() * log_softmax(x)).sum(-1) for x, y in parts])


def reverse_kl_by_chunks(student: Tensor, teacher: Tensor, chunks: int = 8) -> Tensor:
    """KL(p‖q), one chunk of positions after the other.

    Gu et al. 2024, "MiniLLM"; cut into chunks as in torchtune's losses.
    """
    values = []
    for x, y in zip(student.chunk(chunks), teacher.chunk(chunks), strict=True):
        a = log_softmax(x)
        values.append((a.exp() * (a - log_softmax(y))).sum(-1))
    return torch.cat(values)
