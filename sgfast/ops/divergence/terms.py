r"""Divergences between two distributions, atom by atom, in forms that keep their digits.

Atoms carry probabilities p (noisy) and q (clean) and d = log p − log q, which is formed from the logits and never from
the rounded probabilities. With P = max(p, q), w = 1 − e^−|d| and h = 1 − e^(−|d|/2), so that w = h(2 − h),

    |p − q| = P·w,  (√p − √q)² = P·h²       exact to one rounding however close p and q are, and free of overflow
    m = λq + (1−λ)p = P·(1 − κw)            κ is the weight of the smaller: λ where p > q, else 1−λ
    log(m/q) = log1p(−κw) + max(d, 0)       and log(m/p) = log1p(−κw) + max(−d, 0)
    KL(q‖m) = Σ (1−λ)(p − q) − q·log(m/q)   each term ≥ 0;  λ = 0 is KL(q‖p)

The linear part (1−λ)(p − q) sums to 0 over a whole distribution; a truncated sum leaves the linear part out.
Jensen–Shannon is beta·KL(q‖m) + (1−beta)·KL(p‖m), and the two linear parts cancel.

Partial derivatives with respect to log p (not the logits) are given as factor·p + rest; those with respect to log q
likewise. The gradient of the logits is p·(factor − Σ factor·p) + rest − p·Σ rest. The factors are subtracted before the
product with p. No digits are then lost where one atom has nearly all mass. Over a whole distribution Σ p = 1, so a
multiple of p added to a partial derivative does not change the gradient. The multiple is chosen so that nothing cancels
near p = q.

The arithmetic is written for the CPU, where every operation is a pass over memory. A selection (torch.where) costs as
much as ten products there. Signs are therefore made by copysign, and 0 · inf = 0 by nan_to_num.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sgfast.ops.divergence.kinds import KIND_TABLE, Kind


class Atoms:
    """Both distributions over the same atoms, (rows, atoms). Each quantity that kinds read is computed once."""

    def __init__(
        self,
        p: Tensor,
        q: Tensor,
        log_ratio: Tensor,
        log_p: Tensor | None,
        reads_half_gaps: bool,
        ordered: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Take d = log p − log q: ±inf where one side is 0, 0 where both are; log p if it is needed.

        ``ordered`` is the larger and the smaller of p and q, if they are known.
        """
        self.p, self.q, self.log_p = p, q, log_p
        self.log_ratio, self._ordered = log_ratio, ordered
        # Compiled code has computed e^(−|d|/2) for the probabilities already.
        self._halves = torch.compiler.is_compiling() or reads_half_gaps
        self._computed: dict[str, Tensor] = {}

    def _once(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        # functools.cached_property takes a lock, which torch.compile cannot trace.
        if name not in self._computed:
            self._computed[name] = compute()
        return self._computed[name]

    @property
    def gap(self) -> Tensor:
        """|d|."""
        return self._once("gap", lambda: self.log_ratio.abs())

    @property
    def larger(self) -> Tensor:
        """P = max(p, q)."""
        return self._ordered[0] if self._ordered else self._once("larger", lambda: torch.maximum(self.p, self.q))

    def sum_of_sides(self) -> Tensor:
        """p + q; a new tensor."""
        return self.larger + self._ordered[1] if self._ordered else self.p + self.q

    def smaller_times_gap(self) -> Tensor:
        """min(p, q)·|d|, 0 where the smaller is; a new tensor."""
        if self._ordered:
            return self._ordered[1] * self.gap.clamp(max=torch.finfo(self.gap.dtype).max)
        return nan_to_zero(torch.minimum(self.p, self.q).mul_(self.gap))

    @property
    def half_shrinkage(self) -> Tensor:
        """−h = e^(−|d|/2) − 1, in [−1, 0]."""
        return self._once("half_shrinkage", lambda: expm1(self.gap * -0.5))

    @property
    def squared_half_shrinkage(self) -> Tensor:
        """h²."""
        return self._once("squared_half_shrinkage", lambda: self.half_shrinkage * self.half_shrinkage)

    @property
    def shrinkage(self) -> Tensor:
        """−w = e^−|d| − 1, in [−1, 0]."""
        if self._halves:
            return self._once("shrinkage", lambda: self.squared_half_shrinkage.add(self.half_shrinkage, alpha=2))
        return self._once("shrinkage", lambda: expm1(-self.gap))

    @property
    def negative_distance(self) -> Tensor:
        """−|p − q|."""
        return self._once("negative_distance", lambda: self.larger * self.shrinkage)

    @property
    def signed_shrinkage(self) -> Tensor:
        """w with the sign of d."""
        return self._once("signed_shrinkage", lambda: torch.copysign(self.shrinkage, self.log_ratio))

    @property
    def difference(self) -> Tensor:
        """p − q."""
        return self._once("difference", lambda: self.larger * self.signed_shrinkage)

    def log_mixture(self, weight: float) -> Tensor:
        """log(m/P) = log1p(−κw) for the mixture m with this weight of q; a new tensor."""
        if weight == 0.5 and torch.compiler.is_compiling() and self.shrinkage.dtype == torch.float32:
            return _log1p_of_half(self.shrinkage)
        if _is_moderate(weight):
            return self._negative_mixture_loss(weight).log1p_()
        return torch.where(
            self.shrinkage > -0.5, self._negative_mixture_loss(weight).log1p_(), self.mixture(weight).log_()
        )

    def mixture(self, weight: float) -> Tensor:
        """m/P = 1 − κw; a new tensor."""
        if _is_moderate(weight):
            return self._negative_mixture_loss(weight).add_(1)
        # With an extreme weight κw may be next to 1. The rounding of κw would then show in 1 − κw. The form m/P = (1−κ)
        # + κ·e^−|d| avoids this.
        share_of_larger = self._by_sign(1 - weight, weight)
        return (-self.gap).exp_().mul_(self._by_sign(weight, 1 - weight)).add_(share_of_larger)

    def over_mixture(self, weight: float) -> Tensor:
        """(p − q)/m; a new tensor."""
        return self.signed_shrinkage / self.mixture(weight)

    def _negative_mixture_loss(self, weight: float) -> Tensor:
        if weight == 0.5:
            return self.shrinkage * 0.5
        if _is_moderate(weight):
            return (self.shrinkage * 0.5).add_(self.signed_shrinkage, alpha=0.5 - weight)
        return self._by_sign(weight, 1 - weight).mul_(self.shrinkage)

    def _by_sign(self, where_positive: float, elsewhere: float) -> Tensor:
        """One number where d > 0, another elsewhere; a new tensor."""
        positive = indicator(self.log_ratio)
        return positive.mul(where_positive).add_(1 - positive, alpha=elsewhere)


def _is_moderate(weight: float) -> bool:
    """Return True if both weights of a mixture are so large that weight − ½ keeps their digits."""
    return 1 / 64 <= weight <= 63 / 64


def nan_to_zero(tensor: Tensor) -> Tensor:
    """Replace NaN, the result of 0 · inf, by 0 in a new tensor.

    Rows whose logits are NaN are found by their sums.
    """
    if torch.compiler.is_compiling():  # a test for NaN would make Inductor leave the vector unit
        return torch.where(tensor == tensor, tensor, 0)
    return tensor.nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf)


def indicator(tensor: Tensor) -> Tensor:
    """Return 1 where a tensor is positive, else 0, in its dtype: on a CPU much faster than a selection."""
    if torch.compiler.is_compiling():
        return (tensor > 0).to(tensor.dtype)
    return torch.gt(tensor, 0, out=torch.empty_like(tensor))


def total_of_rows(terms: Tensor, *, precise: bool = False) -> Tensor:
    """Sum over each row, (rows, 1).

    An addition to a large term rounds at the size of that term. Compiled code adds thousands of terms in sequence, so
    it adds in float64. Eager PyTorch adds about fifty in sequence; ``precise`` sums are taken in float64 there too.
    """
    if precise or torch.compiler.is_compiling():
        return terms.sum(-1, keepdim=True, dtype=torch.float64).to(terms.dtype)
    return terms.sum(-1, keepdim=True)


def expm1(exponent: Tensor) -> Tensor:
    """Compute e^x − 1 of a new tensor x ≤ 0, with all its digits."""
    if not torch.compiler.is_compiling():
        return exponent.expm1_()
    # Inductor's vector code for expm1 is exp(x) − 1, which loses digits near 0. On [−¼, 0] a polynomial for (e^x − 1)/x
    # is used. For float32 its error is half of the last digit. For float64 the polynomial is the series 1 + x(1/2! +
    # x(1/3! + …)).
    if exponent.dtype == torch.float32:
        series = _polynomial(exponent, (1.0, 0.499999515, 0.166651083, 0.0414906549, 0.00751360807))
    else:
        series = _polynomial(exponent, [1 / math.factorial(n) for n in range(1, 15)])
    return torch.where(exponent > -0.25, exponent * series, exponent.exp() - 1)


def _log1p_of_half(x: Tensor) -> Tensor:
    """log(1 + x/2) = 2 artanh(x/(x + 4)) for −1 ≤ x ≤ 0, to float32's digits, in a third of log1p's time."""
    z = x / (x + 4)
    # 2 artanh(z)/z as a polynomial of z² on [0, 1/9].
    return _polynomial(z * z, (2.0, 0.666663214, 0.400245966, 0.279651582, 0.281577784)) * z


def _polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    total = x * coefficients[-1] + coefficients[-2]
    for coefficient in coefficients[-3::-1]:
        total = total * x + coefficient
    return total


def row_sum(kind: str, atoms: Atoms, beta: float, skew: float, truncated: bool) -> Tensor:
    """Sum one kind's terms over each row, (rows, 1). `finish` turns the sums of all rows into values at once."""
    known = _simplest(kind, skew)
    return total_of_rows(_terms(known.name, atoms, beta, skew, not (truncated and known.signed)))


def finish(kind: str, sums: Tensor, beta: float, skew: float, truncated: bool) -> Tensor:
    """Turn the row sums of one kind into values ≥ 0, in place. KL and skew kinds of a truncated sum may be negative."""
    known = _simplest(kind, skew)
    # The terms of Jensen-Shannon with equal weights are doubled: see `_jensen_shannon`.
    sums.mul_(known.factor / 2 if known.name == "jensen_shannon" and beta == 0.5 else known.factor)
    # Without the last rounding the values would be ≥ 0 already.
    return sums if truncated and known.signed else sums.clamp_(min=0)


def _simplest(kind: str, skew: float) -> Kind:
    """Return the kind that is computed: a skew kind without a mixture is a plain kind."""
    known = KIND_TABLE[kind]
    return KIND_TABLE[known.without_mixture] if known.without_mixture and skew == 0 else known


def _terms(kind: str, atoms: Atoms, beta: float, skew: float, linear: bool) -> Tensor:
    """Compute the terms of a row's sum. `finish` has the factors, because a factor costs less after the sum."""
    match kind:
        case "forward_kl":
            terms = nan_to_zero(atoms.q * atoms.log_ratio).neg_()
            return terms.add_(atoms.difference) if linear else terms
        case "reverse_kl":
            terms = nan_to_zero(atoms.p * atoms.log_ratio)
            return terms.sub_(atoms.difference) if linear else terms
        case "skew_forward_kl":
            terms = _times_log_mixture(atoms, "q", skew, -1.0)
            return terms.add_(atoms.difference, alpha=1 - skew) if linear else terms
        case "skew_reverse_kl":
            terms = _times_log_mixture(atoms, "p", 1 - skew, -1.0)
            return terms.sub_(atoms.difference, alpha=1 - skew) if linear else terms
        case "jeffreys":
            return nan_to_zero(atoms.negative_distance * atoms.gap)
        case "jensen_shannon":
            return _jensen_shannon(atoms, beta)
        case "total_variation":
            return atoms.negative_distance
        case "squared_hellinger":
            return atoms.squared_half_shrinkage * atoms.larger
        case "cross_entropy":
            assert atoms.log_p is not None
            return nan_to_zero(atoms.q * atoms.log_p).neg_()
    raise AssertionError(kind)


def _jensen_shannon(atoms: Atoms, beta: float) -> Tensor:
    """beta·q·log(m/q) + (1−beta)·p·log(m/p) = m·log1p(−κw) + κ·min(p, q)·|d|; doubled where beta is ½."""
    if beta != 0.5:
        return _times_log_mixture(atoms, "q", beta, beta).add_(_times_log_mixture(atoms, "p", beta, 1 - beta))
    return atoms.smaller_times_gap().addcmul_(atoms.log_mixture(beta), atoms.sum_of_sides())


def _times_log_mixture(atoms: Atoms, side: str, weight: float, factor: float) -> Tensor:
    """factor·q·log(m/q), or factor·p·log(m/p), for m = weight·q + (1−weight)·p, 0 < weight < 1; a new tensor."""
    return nan_to_zero(_log_mixture_over(atoms, side, weight).mul_(atoms.q if side == "q" else atoms.p)).mul_(factor)


def _log_mixture_over(atoms: Atoms, side: str, weight: float) -> Tensor:
    """log(m/q), or log(m/p), for the mixture m with this weight of q; infinite where q (or p) is 0; a new tensor."""
    log_mixture = atoms.log_mixture(weight)
    if side == "q":
        return log_mixture.add_(atoms.log_ratio.clamp(min=0))
    return log_mixture.sub_(atoms.log_ratio.clamp(max=0))


def partial_derivative(
    kind: str, side: int, atoms: Atoms, beta: float, skew: float, truncated: bool
) -> tuple[Tensor | None, Tensor | None]:
    """One kind's partial with respect to log p (side 0) or log q (side 1) as factor·p (or q) + rest.

    A part that is None is 0. The caller must not write to the parts. A factor may be infinite. It has no meaning where
    the probability is 0.
    """
    towards = (_partial_to_p, _partial_to_q)[side]
    return towards(_simplest(kind, skew).name, atoms, beta, skew, not truncated)


def may_be_infinite(kind: str, side: int, skew: float) -> bool:
    """Say whether this partial is infinite where one probability is 0 and the other is not."""
    return _simplest(kind, skew).infinite_partials[side]


def _partial_to_p(
    kind: str, atoms: Atoms, beta: float, skew: float, linear: bool
) -> tuple[Tensor | None, Tensor | None]:
    match kind:
        case "forward_kl" | "cross_entropy":
            return None, atoms.difference if linear else -atoms.q
        case "reverse_kl":
            return atoms.log_ratio + (0 if linear else 1), None
        case "skew_forward_kl":
            return atoms.over_mixture(skew).mul_((1 - skew) ** 2).sub_(0 if linear else 1 - skew), None
        case "skew_reverse_kl":
            factor = atoms.over_mixture(1 - skew).mul_((skew - 1) * skew)
            return factor.sub_(_log_mixture_over(atoms, "p", 1 - skew)).add_(0 if linear else 1 - skew), None
        case "jeffreys":
            return atoms.log_ratio, atoms.difference
        case "jensen_shannon":
            return _log_mixture_over(atoms, "p", beta).mul_(beta - 1), None
        case "total_variation":
            return atoms.log_ratio.sign().mul_(0.5), None
        case "squared_hellinger":
            return _hellinger_partial(atoms, indicator(atoms.log_ratio))
    raise AssertionError(kind)


def _partial_to_q(
    kind: str, atoms: Atoms, beta: float, skew: float, linear: bool
) -> tuple[Tensor | None, Tensor | None]:
    match kind:
        case "forward_kl":
            return (0 if linear else 1) - atoms.log_ratio, None
        case "reverse_kl":
            return None, -(atoms.difference if linear else atoms.p)
        case "skew_forward_kl":
            factor = atoms.over_mixture(skew).mul_((1 - skew) * skew)
            return factor.sub_(_log_mixture_over(atoms, "q", skew)).add_(0 if linear else 1 - skew), None
        case "skew_reverse_kl":
            return atoms.over_mixture(1 - skew).mul_(-((1 - skew) ** 2)).sub_(0 if linear else 1 - skew), None
        case "jeffreys":
            return -atoms.log_ratio, -atoms.difference
        case "jensen_shannon":
            return _log_mixture_over(atoms, "q", beta).mul_(-beta), None
        case "total_variation":
            return atoms.log_ratio.sign().mul_(-0.5), None
        case "squared_hellinger":
            return _hellinger_partial(atoms, indicator(-atoms.log_ratio))
        case "cross_entropy":
            assert atoms.log_p is not None
            return -atoms.log_p, None
    raise AssertionError(kind)


def _hellinger_partial(atoms: Atoms, is_larger: Tensor) -> tuple[Tensor, Tensor]:
    """½(p − √(pq)): ½h·p where p is the larger side, −½h·√(pq) elsewhere. The sides may be exchanged."""
    half = atoms.half_shrinkage * 0.5
    return (half * is_larger).neg_(), half.mul_((atoms.p * atoms.q).sqrt_()).mul_(1 - is_larger)
