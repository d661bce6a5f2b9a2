"""Utility of a transform: the similarity of a noisy model's noisy and clean next-token distributions.

`sgfast.metrics.per_sequence` defines the metric and computes the values of each sequence from any two sets of logits.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sgfast.metrics.exact_sum import exact_sums, to_float64
from sgfast.metrics.per_sequence import UTILITY_DIVERGENCES, sequence_means
from sgfast.model.noisy_transformer_masking_model import NoiseMaskedNoisyTransformerModel
from sgfast.ops import validation
from sgfast.ops.divergence import divergences
from sgfast.ops.topk import top_k_support
from sgfast.ops.topk.selection import check_k
from sgfast.ops.validation import check_count
from sgfast.utils.torch import split_2d


def get_top_k_support_mask(noisy_logits: Tensor, clean_logits: Tensor, num_logits: int) -> Tensor:
    """Return the mask of the union of both sides' top-``num_logits`` indices at every position.

    Args:
        noisy_logits: (..., V) floating.
        clean_logits: of the same shape.
        num_logits: k, 1 ≤ k ≤ V; among equal logits the lower index wins.

    Returns:
        bool, (..., V), between k and min(2k, V) True entries per position.

    Raises:
        TypeError: logits that are not floating tensors, a k that is not an int.
        ValueError: shapes differ, or k is out of range.

    Example:
        >>> import torch
        >>> get_top_k_support_mask(torch.tensor([0.0, 5.0, 1.0]), torch.tensor([3.0, 5.0, 2.0]), 1)
        tensor([False,  True, False])
    """
    validation.check_pair("noisy_logits", noisy_logits, "clean_logits", clean_logits)
    check_k("num_logits", num_logits, noisy_logits.shape[-1])
    indices, _ = top_k_support(noisy_logits, clean_logits, num_logits)
    mask = torch.zeros(noisy_logits.shape, dtype=torch.bool, device=noisy_logits.device)
    return mask.scatter_(-1, indices, True)  # padding repeats a valid index


def get_utility_metrics_factory(
    noisy_model: NoiseMaskedNoisyTransformerModel,
    num_logits: int | None = None,
    max_batch_size: int | None = None,
    max_sequence_length: int | None = None,
) -> Callable[[], dict[str, Tensor]]:
    """Create a function that measures the divergences between the last forward's noisy and clean logits.

    The function computes four divergences (`sgfast.ops.divergences`: Jeffreys, Jensen–Shannon, total variation, squared
    Hellinger; nats). Each is averaged over the attended tokens of each sequence, then over the sequences with an
    attended token. The result is NaN if there is no such sequence. The logits are read in place, a few rows at a time.
    Further memory is bounded for all sizes: 25 MiB for both sides of [4, 2048, 151936] in bfloat16, and 145 MiB of
    PyTorch's own at its first use. Splitting changes the result by less than 1e-6 relative.

    Args:
        noisy_model: the model to measure. Its forwards run to the logits while the returned function is alive.
        num_logits: restrict each divergence to the terms in the union of both sides' top-k; None for all.
        max_batch_size: rows computed at once; None for all.
        max_sequence_length: positions computed at once; None for all.

    Returns:
        A function of no arguments, callable once after each forward, giving float32 scalars under the keys
        ``next_token_utility/jefferys``, ``…/jensen_shannon``, ``…/total_variation`` and
        ``…/squared_hellinger_distance``.

    Raises:
        TypeError: an argument's type.
        ValueError: a size below 1, or more logits than the vocabulary has.
        RuntimeError: (the function) no forward since its last call.
    """
    if not isinstance(noisy_model, NoiseMaskedNoisyTransformerModel):
        raise TypeError(f"noisy_model must be a NoiseMaskedNoisyTransformerModel; got {type(noisy_model).__name__}")
    if num_logits is not None:
        check_k("num_logits", num_logits, noisy_model.base_model.get_input_embeddings().weight.shape[0])
    for name, size in (("max_batch_size", max_batch_size), ("max_sequence_length", max_sequence_length)):
        if size is not None:
            check_count(name, size)
    consumer = noisy_model.attach(logits=True)

    @torch.no_grad()
    def get_utility_metrics() -> dict[str, Tensor]:
        capture = consumer.take("the utility metric")
        clean_logits, noisy_logits = capture.halves(None)
        per_token = token_divergences(
            noisy_logits, clean_logits, capture.attention_mask, num_logits, max_batch_size, max_sequence_length
        )
        return {key: mean_over_sequences(values, capture.attention_mask) for key, values in per_token.items()}

    return get_utility_metrics


def token_divergences(
    noisy_logits: Tensor,
    clean_logits: Tensor,
    attention_mask: Tensor,
    num_logits: int | None,
    max_batch_size: int | None = None,
    max_sequence_length: int | None = None,
) -> dict[str, Tensor]:
    """Return the four divergences per token, (B, T), under their keys; 0 for tokens that are not attended."""
    sizes = max_batch_size, max_sequence_length
    blocks = [split_2d(tensor, *sizes) for tensor in (noisy_logits, clean_logits, attention_mask)]
    rows = [
        [
            divergences(
                noisy, clean, tuple(UTILITY_DIVERGENCES.values()), top_k=num_logits, support="truncate", mask=mask
            )
            for noisy, clean, mask in zip(*row, strict=True)
        ]
        for row in zip(*blocks, strict=True)
    ]
    return {
        key: torch.cat([torch.cat([block[kind] for block in row], dim=1) for row in rows])
        for key, kind in UTILITY_DIVERGENCES.items()
    }


def mean_over_sequences(values: Tensor, attention_mask: Tensor) -> Tensor:
    """Average over the attended tokens of each sequence, then over the sequences with one; NaN without any."""
    validation.check_tensors(values=values, attention_mask=attention_mask)
    attended = validation.as_bool("attention_mask", attention_mask)
    means = sequence_means(values, attended)
    any_attended = attended.any(-1)
    total = to_float64(exact_sums(torch.where(any_attended, means, 0).flatten()))
    return (total / any_attended.sum()).to(values.dtype)
