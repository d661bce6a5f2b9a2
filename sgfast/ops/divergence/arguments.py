"""The checks of one call of `divergences`, for every way to compute the call."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sgfast.ops import validation
from sgfast.ops.divergence.kinds import LABEL_KIND
from sgfast.ops.divergence.problem import (
    TOP_K_OF,
    check_label_smoothing,
    check_labels,
    check_options,
)
from sgfast.ops.sides import CleanSide, LogitsOrSide, check_sides, tensor_of
from sgfast.ops.topk.selection import check_k


def checked_arguments(
    noisy: LogitsOrSide,
    clean: CleanSide,
    kinds: str | Sequence[str],
    *,
    top_k: int | None = None,
    top_k_of: str = "both",
    support: str = "tail",
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    label_smoothing: float = 0.0,
    beta: float | None = None,
    skew: float | None = None,
    impl: str | None = None,
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Check the arguments of `divergences` but the temperature and the bound on a chunk.

    Returns:
        The kinds without repetition, the kind of hard labels last; and the fields of a `Problem` by name.
    """
    check_sides("noisy_logits", noisy, "clean_logits", clean)
    rows = tensor_of(noisy)
    mask = validation.row_mask(mask, "mask", "noisy_logits", rows)
    labels = check_labels(labels, "noisy_logits", rows)
    names, beta, skew = check_options(kinds, support, beta, skew, impl, with_labels=labels is not None)
    validation.check_choice("top_k_of", top_k_of, TOP_K_OF)
    check_label_smoothing(label_smoothing)
    if label_smoothing > 0 and labels is None:
        raise ValueError(f"label_smoothing={label_smoothing} needs labels; got None")
    if top_k is not None:
        check_k("top_k", top_k, noisy.shape[-1])
    if labels is not None and names == (LABEL_KIND,):  # nothing to compute where it is ignored
        mask = labels >= 0 if mask is None else mask & (labels >= 0)
        top_k = None
    return names, {
        "labels": labels,
        "support_mask": None,
        "mask": mask,
        "top_k": top_k or 0,
        "top_k_of": top_k_of,
        "support": support,
        "beta": beta,
        "skew": skew,
        "label_smoothing": float(label_smoothing),
        "impl": impl,
    }
