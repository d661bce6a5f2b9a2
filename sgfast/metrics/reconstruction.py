"""The fraction of a text that an attacker's reconstruction gets wrong."""

import torch
from torch import Tensor

from sgfast.ops import validation


def percentage_changed_ids(input_ids: Tensor, reconstructed_ids: Tensor, noise_mask: Tensor) -> Tensor:
    """Compute the fraction of the transformed tokens that a reconstruction gets wrong, for each sequence.

        Σ_t n_t [input_t ≠ reconstructed_t] / Σ_t n_t

    Args:
        input_ids: (..., T) integers, the true token ids.
        reconstructed_ids: (..., T) integers, the tokens that were read from the transformed embeddings.
        noise_mask: (..., T), nonzero where a token was transformed. Only transformed tokens count.

    Returns:
        (...) float32 in [0, 1], a fraction in spite of its documented name; NaN if nothing was transformed.

    Raises:
        ValueError: shapes or devices differ, or there is no dimension.
        TypeError: an argument is not a tensor, or ids are not integers.

    Example:
        >>> import torch
        >>> from sgfast.metrics.reconstruction import percentage_changed_ids
        >>> input_ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
        >>> reconstructed_ids = torch.tensor([[1, 2, 3], [1, 2, 6]])
        >>> noise_mask = torch.tensor([[True, False, True], [True, True, True]])
        >>> percentage_changed_ids(input_ids, reconstructed_ids, noise_mask)
        tensor([0.0000, 0.6667])
    """
    tensors = {"input_ids": input_ids, "reconstructed_ids": reconstructed_ids, "noise_mask": noise_mask}
    for name, tensor in tensors.items():
        validation.check_tensor(name, tensor, beside=None if name == "input_ids" else input_ids)
        if name != "noise_mask" and (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool):
            raise TypeError(f"{name} must hold integers; got {tensor.dtype}")
        if tensor.shape != input_ids.shape or tensor.dim() == 0:
            raise ValueError(
                f"{name} must have the shape (..., T) of input_ids, {tuple(input_ids.shape)}; got {tuple(tensor.shape)}"
            )
        if tensor.device != input_ids.device:
            raise ValueError(f"{name} must be on the device of input_ids, {input_ids.device}; got {tensor.device}")
    selected = validation.as_bool("noise_mask", noise_mask)
    changed = selected & (input_ids != reconstructed_ids)
    return changed.sum(-1, dtype=torch.float32) / selected.sum(-1, dtype=torch.float32)
