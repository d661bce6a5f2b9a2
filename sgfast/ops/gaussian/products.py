r"""The matrix products behind ``pairwise_gaussian_kl``, and the same sums term by term.

With x = m_i − c, y = m_j − c, ρ = 1/σ_j² (each 0 where masked) and any c, here the mean of both sets at that feature,

    Σ (σ_i² + (x − y)²) ρ = (σ_i² + x²)·ρ + 1·(y² ρ) − 2 x·(y ρ)

are inner products. Gradients, for upstream G, with R = G·ρ and Gᵀ·1, Gᵀ·x, Gᵀ·(σ_i² + x²) again matrix products:

    ∂/∂m_i = x (G·ρ) − G·(y ρ)          ∂/∂σ_i = σ_i (G·ρ) − (G·1) / σ_i
    ∂/∂m_j = ρ (y Gᵀ·1 − Gᵀ·x)          ∂/∂σ_j = (Gᵀ·1) / σ_j − (Gᵀ·(σ_i² + x²) − 2 y Gᵀ·x + y² Gᵀ·1) / σ_j³
"""

import torch
from torch import Tensor

# Means and stds (n, p, d), and the bool mask (n, p) of the positions that are used. A block is two triples.
Triple = tuple[Tensor, Tensor, Tensor]
Block = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _centred(block: Block) -> Block:
    """Float64 means less a common center, stds, and weights; masked entries are replaced by 0, 1 and 0."""
    mean_a, std_a, used_a, mean_b, std_b, used_b = block
    # A position that no partner uses belongs to no pair.
    used_a, used_b = used_a & used_b.any(0), used_b & used_a.any(0)
    selected_a, selected_b = used_a[..., None], used_b[..., None]
    x, y = (torch.where(on, m.to(torch.float64), 0) for on, m in ((selected_a, mean_a), (selected_b, mean_b)))
    count = selected_a.sum(0) + selected_b.sum(0)
    center = ((x.sum(0) + y.sum(0)) / count.clamp(min=1)).detach().nan_to_num(0, 0, 0)
    return (
        torch.where(selected_a, x - center, 0),
        torch.where(selected_a, std_a.to(torch.float64), 1),
        used_a.to(torch.float64),
        torch.where(selected_b, y - center, 0),
        torch.where(selected_b, std_b.to(torch.float64), 1),
        used_b.to(torch.float64),
    )


def _weighted(block: Block) -> tuple[Tensor, Tensor, Tensor]:
    """σ_i² + x², ρ and y ρ of a centred block, 0 where masked."""
    x, std_a, weight_a, y, std_b, weight_b = block
    spread = (std_a.square() + x.square()) * weight_a[..., None]
    precision = std_b.reciprocal().square() * weight_b[..., None]
    return spread, precision, y * precision


def products(block: Block) -> tuple[Tensor, Tensor, Tensor]:
    """Return three (A, B) float64 matrices: 2 KL, the magnitude of its rounding errors, and the common positions."""
    block = _centred(block)
    x, std_a, weight_a, y, std_b, weight_b = block
    spread, precision, product = _weighted(block)
    magnitude = spread.flatten(1) @ precision.flatten(1).T + weight_a @ (y * product).sum(-1).T
    positions = weight_a @ weight_b.T
    logs = weight_a @ std_b.log().sum(-1).T - std_a.log().sum(-1) @ weight_b.T
    twice = magnitude - 2 * (x.flatten(1) @ product.flatten(1).T) + 2 * logs - positions * x.shape[-1]
    return twice, magnitude, positions


def gradients_of_products(block: Block, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of Σ upstream · KL to means and stds, (A, p, d) and (B, p, d) in float64, 0 where masked."""
    block = _centred(block)
    x, std_a, weight_a, y, std_b, weight_b = block
    spread, precision, product = _weighted(block)
    selected_a, selected_b = weight_a[..., None] > 0, weight_b[..., None] > 0

    def over_b(values: Tensor) -> Tensor:
        return torch.where(selected_a, torch.tensordot(upstream, values, 1), 0)

    def over_a(values: Tensor) -> Tensor:
        return torch.where(selected_b, torch.tensordot(upstream.T, values, 1), 0)

    of_precision = over_b(precision)
    mean_a_gradient = x * of_precision - over_b(product)
    std_a_gradient = std_a * of_precision - over_b(weight_b[..., None]) / std_a
    of_x, of_one = over_a(x), over_a(weight_a[..., None])
    mean_b_gradient = y * (of_one * precision) - of_x * precision
    squares = over_a(spread) - 2 * y * of_x + y.square() * of_one
    std_b_gradient = (of_one - squares * precision) / std_b
    return mean_a_gradient, std_a_gradient, mean_b_gradient, std_b_gradient


def pair_sums(mean_a: Tensor, std_a: Tensor, mean_b: Tensor, std_b: Tensor, used: Tensor) -> Tensor:
    """2 KL of paired Gaussians, term by term in float64: (n, p, d), used (n, p, 1) → (n,)."""
    mean_a, std_a, mean_b, std_b = (one.to(torch.float64) for one in (mean_a, std_a, mean_b, std_b))
    ratio = torch.where(used, std_a / std_b, 1)
    shift = torch.where(used, (mean_a - mean_b) / std_b, 0)
    return (ratio.square() - 1 - 2 * ratio.log() + shift.square()).sum((1, 2))
