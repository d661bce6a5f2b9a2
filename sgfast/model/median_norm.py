"""Typical norm of the values that a noise layer transforms."""

from typing import cast

import torch
from torch import Tensor

from sgfast.model.adapters import with_adapters
from sgfast.model.decoder import backbone_of, hidden_states_of, shallow_trunk
from sgfast.model.noisy_transformer_masking_model import NoiseMaskedNoisyTransformerModel
from sgfast.ops import rows


@torch.no_grad()
def median_target_norm(noisy_model: NoiseMaskedNoisyTransformerModel) -> float:
    """Return the lower median over all token ids of the norm of the target layer's output, without noise and adapters.

    Norms are computed in float32 (in float64 for a float64 model), in chunks of token ids. A target layer deeper than
    the embedding gets every token as a sequence of length 1, at position 0.
    """
    embedding = noisy_model.base_model.get_input_embeddings()
    vocabulary, width = embedding.weight.shape
    step = max(1, rows.DEFAULT_CHUNK_BYTES // (4 * width))
    with with_adapters(noisy_model.base_model, False):
        norms = [
            _norms(noisy_model, torch.arange(start, min(start + step, vocabulary), device=embedding.weight.device))
            for start in range(0, vocabulary, step)
        ]
    return float(torch.cat(norms).median())


def _norms(noisy_model: NoiseMaskedNoisyTransformerModel, token_ids: Tensor) -> Tensor:
    output = _target_output(noisy_model, token_ids)
    norms: Tensor = torch.linalg.vector_norm(output, dim=-1, dtype=rows.compute_dtype(output))
    return norms.flatten()


def _target_output(noisy_model: NoiseMaskedNoisyTransformerModel, token_ids: Tensor) -> Tensor:
    """Return the target layer's outputs for n token ids, (n, D) or (n, 1, D)."""
    target = noisy_model.causal_lm.get_submodule(noisy_model.target_layer)
    if target is noisy_model.base_model.get_input_embeddings():
        return cast(Tensor, target(token_ids))
    depth = noisy_model.target_depth
    trunk = backbone_of(noisy_model.base_model) if depth is None else shallow_trunk(noisy_model.base_model, depth + 1)
    seen: list[Tensor] = []
    handle = target.register_forward_hook(lambda module, inputs, output: seen.append(hidden_states_of(output)))
    try:
        trunk(input_ids=token_ids[:, None], use_cache=False)
    finally:
        handle.remove()
    return seen[0]
