"""Divergences as float64 sums over atoms, written as plainly as possible; autograd differentiates them."""

import torch
from torch import Tensor


def atoms(noisy: Tensor, clean: Tensor, k: int | None, support: str | None) -> list[tuple[Tensor, Tensor]]:
    """Per row, the float64 probabilities over the support's atoms, written as plainly as possible."""
    out = []
    for x, y in zip(noisy.double().flatten(0, -2), clean.double().flatten(0, -2), strict=True):
        p, q = x.softmax(-1), y.softmax(-1)
        if support is not None:
            chosen = set()
            for side in (x, y):
                order = sorted(range(len(side)), key=lambda i: (-side[i].item(), i))
                chosen.update(order[:k])
            inside = torch.tensor(sorted(chosen))
            if support == "renormalize":
                p, q = x[inside].softmax(-1), y[inside].softmax(-1)
            else:
                outside = torch.ones(len(x), dtype=torch.bool, device=x.device)
                outside[inside] = False
                rest_p, rest_q = p[outside].sum()[None], q[outside].sum()[None]
                p, q = p[inside], q[inside]
                if support == "tail":
                    p, q = torch.cat([p, rest_p]), torch.cat([q, rest_q])
        out.append((p, q))
    return out


def oracle(kind: str, p: Tensor, q: Tensor, beta: float, skew: float) -> Tensor:
    def kl(u: Tensor, v: Tensor) -> Tensor:
        return torch.special.xlogy(u, u).sub(torch.special.xlogy(u, v)).sum()

    match kind:
        case "forward_kl":
            return kl(q, p)
        case "reverse_kl":
            return kl(p, q)
        case "jeffreys":
            return kl(p, q) + kl(q, p)
        case "jensen_shannon":
            m = beta * q + (1 - beta) * p
            return beta * kl(q, m) + (1 - beta) * kl(p, m)
        case "total_variation":
            return (p - q).abs().sum() / 2
        case "squared_hellinger":
            return (p.sqrt() - q.sqrt()).square().sum() / 2
        case "cross_entropy":
            return -torch.special.xlogy(q, p).sum()
        case "skew_forward_kl":
            return kl(q, skew * q + (1 - skew) * p)
        case "skew_reverse_kl":
            return kl(p, skew * p + (1 - skew) * q)
    raise AssertionError(kind)
