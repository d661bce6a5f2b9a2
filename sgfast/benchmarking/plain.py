"""The operations as a user of PyTorch would write them: the peers of measurements, and in float64 the reference.

Nothing here is chunked, fused or masked. Computations are in float32 unless an input is float64.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Values = dict[str, Tensor]


def divergences(noisy: Tensor, clean: Tensor, kinds: Sequence[str]) -> Values:
    """Compute log_softmax of both sides, then the formulas; beta = ½, skew = 0.1."""
    return _sums(log_softmax(noisy), log_softmax(clean), kinds)


def top_k_divergences(
    noisy: Tensor, clean: Tensor, kinds: Sequence[str], k: int, support: str, *, ties_in_order: bool = False
) -> Values:
    """Compute divergences over the union of both sides' largest k: ``truncate``, ``renormalize`` or ``tail``.

    ``torch.topk`` promises no order among equal logits, and bfloat16 has many equal logits. With ``ties_in_order`` the
    lower index comes first.
    """
    if ties_in_order:
        first, second = (side.sort(dim=-1, descending=True, stable=True).indices[..., :k] for side in (noisy, clean))
    else:
        first, second = (side.topk(k, dim=-1).indices for side in (noisy, clean))
    taken = torch.zeros(noisy.shape, dtype=torch.bool, device=noisy.device).scatter_(-1, first, True)
    indices = torch.cat([first, second], dim=-1)
    counted = torch.cat([torch.ones_like(first, dtype=torch.bool), ~taken.gather(-1, second)], dim=-1)
    a, b = (log_softmax(side).gather(-1, indices) for side in (noisy, clean))
    if support == "renormalize":
        a, b = (side - side.masked_fill(~counted, -torch.inf).logsumexp(-1, keepdim=True) for side in (a, b))
    if support == "tail":
        sides = []
        for side in (a, b):
            rest = 1 - torch.where(counted, side.exp(), 0).sum(-1, keepdim=True)
            sides.append(torch.cat([side, rest.clamp_min(1e-30).log()], dim=-1))
        a, b = sides
        counted = F.pad(counted, (0, 1), value=True)
    return _sums(a, b, kinds, counted)


def hidden_distances(noisy: Tensor, clean: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute 1 − cos, ‖noisy − clean‖₂, ‖noisy − clean‖₂ / ‖clean‖₂, and cos."""
    x, y = (side.to(torch.promote_types(side.dtype, torch.float32)) for side in (noisy, clean))
    cosine = F.cosine_similarity(x, y, dim=-1)
    distance = (x - y).norm(dim=-1)
    return 1 - cosine, distance, distance / y.norm(dim=-1).clamp_min(1e-8), cosine


def apply_noise(input: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Compute input + mean + std·ε with PyTorch's own draw, which autograd keeps."""
    return input + mean + std * torch.randn_like(input)


def pairwise_gaussian_kl(mean_a: Tensor, std_a: Tensor, mean_b: Tensor, std_b: Tensor) -> Tensor:
    """Compute all pairs of diagonal Gaussians at once, as a tensor (A, B, T, D)."""
    m_a, s_a, m_b, s_b = mean_a[:, None], std_a[:, None], mean_b[None], std_b[None]
    terms = (s_b / s_a).log() + (s_a.square() + (m_a - m_b).square()) / (2 * s_b.square()) - 0.5
    return terms.sum((-1, -2))


def nearest_embeddings(queries: Tensor, table: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor]:
    """Search by ``torch.cdist`` (of unit vectors for cosine) and ``topk``, all queries at once."""
    x, y = (side.to(torch.promote_types(side.dtype, torch.float32)) for side in (queries, table))
    if metric == "cosine":
        return (1 - F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).T).topk(k, largest=False)
    return torch.cdist(x, y).topk(k, largest=False)


def _sums(a: Tensor, b: Tensor, kinds: Sequence[str], counted: Tensor | None = None) -> Values:
    """Sum the kinds' terms over the last dimension, from log p and log q."""
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
    terms = {kind: formulas[kind]() for kind in kinds}
    if counted is not None:
        terms = {kind: torch.where(counted, one, 0) for kind, one in terms.items()}
    return {kind: one.sum(-1) for kind, one in terms.items()}


def log_softmax(logits: Tensor) -> Tensor:
    """Compute log_softmax in float32, or in float64 for float64 logits."""
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _skew_kl(p: Tensor, log_p: Tensor, q: Tensor, skew: float) -> Tensor:
    """Return the terms of KL(p‖skew·p + (1−skew)·q) (Ko et al. 2024, DistiLLM); skew = ½: half of Jensen–Shannon."""
    return p * (log_p - (skew * p + (1 - skew) * q).log())
