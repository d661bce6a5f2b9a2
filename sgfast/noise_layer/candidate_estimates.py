"""Mean shifts and standard deviations that a `TransformerCloak` gives to other tokens in a text's places, with graph.

`sgfast.noise_layer.next_token` computes the same values for a reader who goes from left to right, without a graph.
"""

from typing import Any

import torch
from torch import Tensor

from sgfast.noise_layer.transformer_cloak import TransformerCloak

# Queries of one pass. A pass runs the text again, and each query attends to the keys of all queries of its pass.
QUERIES_OF_A_PASS = 512


def candidate_estimates(
    noise_layer: TransformerCloak, text: Tensor, places: Tensor, candidates: Tensor
) -> tuple[Tensor, Tensor]:
    """Return mean shift and standard deviation of candidates that stand in the places of a text's own tokens.

    One pass of each estimator runs the text and all candidates. A candidate for place t attends to the tokens before t
    and to itself, so that it gets the values that the layer would give to it after these tokens.

    Args:
        noise_layer: with estimators that are causal and use eager or sdpa attention.
        text: (T, D), the embeddings of one text without padding.
        places: (P,) int64, each in [0, T).
        candidates: (P, K, D), the embeddings of K candidates for each place.

    Returns:
        ``(mean, std)``, (P, K, D) each; std in float32. The gradients reach the layer's parameters and the embeddings.
    """
    text = text[: int(places.max())]
    position_ids = torch.cat(
        [torch.arange(len(text), device=text.device), places.repeat_interleave(candidates.shape[1])]
    )
    tokens = torch.cat([text, candidates.flatten(0, 1)])[None]
    outputs = []
    for estimator in (noise_layer.mean_estimator, noise_layer.std_estimator):
        masks = _attention_masks(estimator.body.config, position_ids, len(text), estimator.head.weight.dtype)
        output = estimator(tokens, masks, position_ids[None])
        outputs.append(output[0, len(text) :].view(candidates.shape))
    mean, rho = outputs
    return mean, noise_layer.parameterization(rho)


def _attention_masks(config: Any, position_ids: Tensor, length: int, dtype: torch.dtype) -> Any:
    """Return the mask (1, 1, N, N) for ``length`` tokens of a text and the queries after them.

    A body with several types of layers gets one mask for each type.
    """
    count = len(position_ids)
    order = torch.arange(count, device=position_ids.device)
    distance = position_ids[:, None] - position_ids[None]
    seen = (distance > 0) & (order < length)
    seen |= order[:, None] == order
    window = getattr(config, "sliding_window", None)
    in_window = seen if window is None else seen & (distance < window)
    full, sliding = (
        torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)[None, None]
        for mask in (seen, in_window)
    )
    if getattr(config, "layer_types", None):
        return {"full_attention": full, "sliding_attention": sliding}
    return sliding
