"""How much of the model's next-token distribution survives the transform."""

from collections.abc import Callable

import torch
from torch import Tensor

from sgfast.model.noisy_transformer_masking_model import NoiseMaskedNoisyTransformerModel
from sgfast.ops.divergence import divergences
from sgfast.ops.topk import check_k, top_k_support
from sgfast.utils.torch import split_2d

# Key in the result → kind of `sgfast.ops.divergences`. "jefferys" is the documented spelling.
UTILITY_DIVERGENCES = {
    "next_token_utility/jefferys": "jeffreys",
    "next_token_utility/jensen_shannon": "jensen_shannon",
    "next_token_utility/total_variation": "total_variation",
    "next_token_utility/squared_hellinger_distance": "squared_hellinger",
}


def get_top_k_support_mask(noisy_logits: Tensor, clean_logits: Tensor, num_logits: int) -> Tensor:
    """Boolean mask of the union of both sides' top-``num_logits`` indices at every position.

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
    indices, _ = top_k_support(noisy_logits, clean_logits, num_logits)
    mask = torch.zeros(noisy_logits.shape, dtype=torch.bool, device=noisy_logits.device)
    return mask.scatter_(-1, indices, True)  # padding repeats a valid index


def get_utility_metrics_factory(
    noisy_model: NoiseMaskedNoisyTransformerModel,
    num_logits: int | None = None,
    max_batch_size: int | None = None,
    max_sequence_length: int | None = None,
) -> Callable[[], dict[str, Tensor]]:
    """Create a function that measures how far the last forward's noisy logits are from the clean ones.

    Four divergences (`sgfast.ops.divergences`: Jeffreys, Jensen–Shannon, total variation, squared Hellinger; nats),
    averaged over the attended tokens of each sequence, then over the sequences that have one. All sequences empty
    gives NaN. Splitting bounds memory and never changes the result.

    Args:
        noisy_model: while the returned function is alive, its forwards run to the logits.
        num_logits: restrict each divergence to the terms in the union of both sides' top-k; None for all.
        max_batch_size: rows computed at once; None for all.
        max_sequence_length: positions computed at once; None for all.

    Returns:
        A function of no arguments, callable once after each forward, giving float32 scalars under the keys
        ``next_token_utility/jefferys``, ``…/jensen_shannon``, ``…/total_variation`` and
        ``…/squared_hellinger_distance``.

    Raises:
        ValueError: a size below 1.
        RuntimeError: (the function) no forward since its last call.
    """
    if num_logits is not None:
        check_k("num_logits", num_logits, noisy_model.base_model.get_input_embeddings().weight.shape[0])
    for name, size in (("max_batch_size", max_batch_size), ("max_sequence_length", max_sequence_length)):
        if size is not None and size < 1:
            raise ValueError(f"{name} must be None or at least 1; got {size}")
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
    """The four divergences per token, (B, T), under their keys; 0 where not attended."""
    sizes = max_batch_size, max_sequence_length
    blocks = [split_2d(tensor, *sizes) for tensor in (noisy_logits, clean_logits, attention_mask)]
    rows = [
        [
            divergences(noisy, clean, tuple(UTILITY_DIVERGENCES.values()), top_k=num_logits, mask=mask)
            for noisy, clean, mask in zip(*row, strict=True)
        ]
        for row in zip(*blocks, strict=True)
    ]
    return {
        key: torch.cat([torch.cat([block[kind] for block in row], dim=1) for row in rows])
        for key, kind in UTILITY_DIVERGENCES.items()
    }


def mean_over_sequences(values: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean over attended tokens of each sequence, then over sequences that have one; NaN if none has."""
    attended = attention_mask.sum(-1)
    means = torch.where(attention_mask, values, 0).sum(-1) / attended
    return torch.where(attended > 0, means, 0).sum() / (attended > 0).sum()
