r"""The strength of a transform beside its input: norms and angles of its components, per position.

For an input x and the two parts that the last forward added, mean shift µ and noise σε, over one dimension:

    input_norm                  ‖x‖
    mean_norm                   ‖µ‖
    unshifted_noise_norm        ‖σε‖
    mean_shifted_noise_norm     ‖µ + σε‖
    mean_domination_percent     ‖µ‖ / (‖µ‖ + ‖σε‖)
    mean_domination_ratio       ‖µ‖ / ‖σε‖
    mean_cosine_similarity      cos(x, µ)
    noise_domination_percent    ‖µ + σε‖ / (‖x‖ + ‖µ + σε‖)
    noise_domination_ratio      ‖µ + σε‖ / ‖x‖
    noise_cosine_similarity     cos(x, µ + σε)

"percent" is a fraction in [0, 1], and 0 if both of its norms are 0 (our choice). Ratios are the result of the division,
which may be inf or NaN. The cosine with a zero vector is 0. Suppressed features count with the noise drawn for them.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sgfast.ops import rows, validation
from sgfast.ops.hidden import hidden_distances
from sgfast.ops.validation import check_integer

if TYPE_CHECKING:
    from sgfast.noise_layer.base import BaseNoiseLayer


def get_noise_metrics_factory(noise_layer: "BaseNoiseLayer", dim: int = -1) -> Callable[[], dict[str, Tensor]]:
    """Create a function that measures the components of a noise layer's most recent forward.

    The module's docstring has the formulas. The function may be called any number of times. It raises RuntimeError if
    the layer has had no forward.

    Args:
        noise_layer: the layer to observe.
        dim: the negative dimension of norms and cosines.

    Returns:
        A function of no arguments that returns the ten quantities by name. Each quantity is flat: it has the values at
        the positions (the input's shape without ``dim``) that the noise mask selects, in their order. Without a mask it
        has all positions. A mask of the shape ``input.shape[:n]`` covers the leading dimensions; a mask of another
        shape broadcasts against the positions. The values are detached, float32 (float64 if the layer uses float64).

    Raises:
        TypeError: ``dim`` is not an int.
        ValueError: ``dim`` is not negative.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from sgfast.metrics.noise_metrics import get_noise_metrics_factory
        >>> last_forward = SimpleNamespace(
        ...     input=torch.tensor([[3.0, 4.0], [0.0, 1.0]]),
        ...     mean=torch.tensor([6.0, 8.0]),
        ...     noise=torch.zeros(2, 2),
        ...     noise_mask=torch.tensor([True, False]),
        ... )
        >>> metrics = get_noise_metrics_factory(last_forward)()
        >>> metrics["mean_norm"], metrics["noise_domination_ratio"], metrics["mean_cosine_similarity"]
        (tensor([10.]), tensor([2.]), tensor([1.]))
    """
    if check_integer("dim", dim) >= 0:
        raise ValueError(f"dim must be negative; got {dim}")

    @torch.no_grad()
    def get_noise_metrics() -> dict[str, Tensor]:
        # `noise` is read once, because each access may regenerate it.
        input, mean, noise = noise_layer.input, noise_layer.mean, noise_layer.noise
        if input is None or mean is None or noise is None:
            raise RuntimeError("noise metrics need a forward of the noise layer before they are asked for")
        if -dim > input.dim():
            raise ValueError(f"dim={dim} does not fit the noise layer's input of shape {tuple(input.shape)}")
        selected = _selected_positions(noise_layer.noise_mask, input, dim)
        dtype = rows.compute_dtype(input, mean, noise)
        x, mean, noise = (
            component.expand(input.shape).movedim(dim, -1)[selected].to(dtype) for component in (input, mean, noise)
        )
        return _measure(x, mean, noise)

    return get_noise_metrics


def _measure(x: Tensor, mean: Tensor, noise: Tensor) -> dict[str, Tensor]:
    """Compute the ten quantities of (positions, features)."""
    shifted_noise = mean + noise
    input_norm, mean_norm, noise_norm, shifted_norm = (
        torch.linalg.vector_norm(component, dim=-1) for component in (x, mean, noise, shifted_noise)
    )
    return {
        "input_norm": input_norm,
        "mean_norm": mean_norm,
        "unshifted_noise_norm": noise_norm,
        "mean_shifted_noise_norm": shifted_norm,
        "mean_domination_percent": _share(mean_norm, noise_norm),
        "mean_domination_ratio": mean_norm / noise_norm,
        "mean_cosine_similarity": hidden_distances(x, mean).cosine_similarity,
        "noise_domination_percent": _share(shifted_norm, input_norm),
        "noise_domination_ratio": shifted_norm / input_norm,
        "noise_cosine_similarity": hidden_distances(x, shifted_noise).cosine_similarity,
    }


def _share(part: Tensor, rest: Tensor) -> Tensor:
    """Return part / (part + rest), and 0 where both are 0."""
    total = part + rest
    return torch.where(total == 0, 0, part / total)


def _selected_positions(noise_mask: Tensor | None, input: Tensor, dim: int) -> Tensor:
    """Return the mask as bool, of the input's shape without ``dim``."""
    shape = [*input.shape[:dim], *input.shape[input.dim() + dim + 1 :]]
    if noise_mask is None:
        return torch.ones(shape, dtype=torch.bool, device=input.device)
    mask = validation.as_bool("noise_mask", noise_mask)
    if mask.shape == input.shape[: mask.dim()]:
        mask = mask.view(*mask.shape, *[1] * (input.dim() - mask.dim()))
    if mask.dim() == input.dim() and mask.shape[dim] == 1:
        mask = mask.squeeze(dim)
    try:
        return mask.expand(shape)
    except RuntimeError as error:
        raise ValueError(
            f"the noise mask must select positions, {tuple(shape)}, or broadcast to them; got shape "
            f"{tuple(noise_mask.shape)} for dim={dim} of an input of shape {tuple(input.shape)}"
        ) from error
