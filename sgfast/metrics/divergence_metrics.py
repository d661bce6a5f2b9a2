"""Divergences between two language models over a stream of tokens: means, percentiles and extremes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sgfast.metrics.distributions import Distributions
from sgfast.ops import validation
from sgfast.ops.divergence import divergences
from sgfast.ops.divergence.problem import SUPPORTS, Support, check_kinds
from sgfast.ops.sides import CleanSide, LogitsOrSide, check_sides

DEFAULT_KINDS = ("forward_kl", "reverse_kl", "jensen_shannon", "total_variation")


class DivergenceMetrics(Distributions):
    """Divergences of a candidate from a reference over any number of tokens, in constant memory.

    q is the reference's distribution of a token, p the candidate's: ``forward_kl`` is KL(q‖p) = Σ q (log q − log p),
    in nats. The reference may be a model as it was trained, the candidate the same model quantised, pruned, distilled
    or transformed.

    The state is integers, 2 MiB a kind, whatever the number of tokens. The mean is correctly rounded, the extremes are
    exact, and a percentile is within 1e-3 relative of that of the same values sorted.

    Args:
        kinds: one or more of the kinds of `sgfast.ops.divergences`.
        top_k: restrict each divergence to the union of both sides' top-k; None for all.
        support: meaning of the restriction, see ``sgfast.ops.divergences``.
        max_chunk_bytes: bound on the divergences' temporaries, see ``sgfast.ops.divergences``.

    Raises:
        TypeError: an option is not an int.
        ValueError: an option below 1, an unknown kind or support, or no kind.

    Example:
        >>> import torch
        >>> from sgfast.metrics import DivergenceMetrics
        >>> metrics = DivergenceMetrics(kinds=("forward_kl", "total_variation"))
        >>> candidate = torch.tensor([[0.0, 0.0], [0.0, 3.0]]).log1p()
        >>> metrics.update(candidate, torch.zeros(2, 2))
        >>> figures = metrics.compute()
        >>> round(figures["forward_kl"]["mean"], 4), round(figures["total_variation"]["max"], 4), figures["tokens"]
        (0.1116, 0.3, 2)
    """

    def __init__(
        self,
        kinds: str | Sequence[str] = DEFAULT_KINDS,
        top_k: int | None = None,
        *,
        support: Support = "tail",
        max_chunk_bytes: int | None = None,
    ) -> None:
        names = (kinds,) if isinstance(kinds, str) else tuple(kinds)
        check_kinds("kinds", names)
        if not names:
            raise ValueError("kinds must name at least one kind")
        if top_k is not None:
            validation.check_count("top_k", top_k)
        validation.check_choice("support", support, SUPPORTS)
        validation.chunk_bytes(max_chunk_bytes)
        self._kinds, self._top_k, self._support, self._max_chunk_bytes = names, top_k, support, max_chunk_bytes
        super().__init__(names, {"top_k": top_k, "support": support})

    @torch.no_grad()
    def update(self, candidate: LogitsOrSide, reference: CleanSide, mask: Tensor | None = None) -> None:
        """Add tokens.

        Args:
            candidate: (..., V) logits, or a `sgfast.sides.LinearLogits` of hidden states (..., D) and a head.
            reference: (..., V) logits, or a side of `sgfast.sides` that the kinds can be computed from.
            mask: (...), 1 = count this token; None for all. Other tokens are not read.

        Raises:
            TypeError, ValueError: see ``sgfast.ops.divergences``.
        """
        check_sides("candidate", candidate, "reference", reference)
        values = divergences(
            candidate,
            reference,
            self._kinds,
            top_k=self._top_k,
            support=self._support,
            mask=mask,
            max_chunk_bytes=self._max_chunk_bytes,
        )
        self.add(values, None if mask is None else validation.as_bool("mask", mask))
