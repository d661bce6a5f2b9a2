"""Losses as other authors write them. They are the peers of the divergences and of the presets in measurements.

The divergences are written from the definitions in their papers. They are functions of (N, V) logits and return one
value per position, in float32 unless an input is float64.
"""

import sys
import types
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sgfast.benchmarking.plain import log_softmax


def generalized_jsd(student: Tensor, teacher: Tensor, beta: float = 0.5) -> Tensor:
    """JSD(beta) = beta·KL(q‖m) + (1−beta)·KL(p‖m), m = beta·q + (1−beta)·p, with the mixture formed from logarithms.

    Agarwal et al. 2024, "On-Policy Distillation of Language Models" (GKD), equation 1. GKD trainers minimise this loss.
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


def textbrewer_loss(name: str) -> Callable[..., Tensor]:
    """TextBrewer's own loss: a name of its ``MATCH_LOSS_MAP``, or ``"kd "`` and a name of its ``KD_LOSS_MAP``."""
    # TextBrewer imports a TensorBoard writer, which no loss uses.
    sys.modules.setdefault("tensorboardX", types.SimpleNamespace(SummaryWriter=None))
    import textbrewer

    if name.startswith("kd "):
        return textbrewer.KD_LOSS_MAP[name.removeprefix("kd ")]
    loss = textbrewer.MATCH_LOSS_MAP[name]

    def nst(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
        # The release divides masked matrices by the length. TextBrewer's repository divides by the width, as sgfast.
        if mask is None:
            return loss(student, teacher)
        scaled = [[first * (first.shape[1] / first.shape[2]), second] for first, second in (student, teacher)]
        return loss(*scaled, mask)

    return nst if name == "nst" else loss
