r"""Seeded Gaussian noise applied to embeddings.

With eps = ``standard_normal(input.shape, seed, offset=offset)``, a noise mask n and a keep mask k:

    apply_noise = where(n, clamp(where(k, input + std·eps, 0) + mean), input)

Arithmetic in float32 (float64 for a float64 input), eps rounded once to the input's dtype, output in the input's
dtype. Unselected elements equal the input bit for bit. Their values, NaN and inf too, reach no gradient but the
input's. For an upstream gradient g, zero where unselected or outside the clamp's range:

    ∂mean = g,   ∂std = where(k, g·eps, 0),   ∂input = where(k, g, 0), and the untouched upstream where unselected

each summed over the dimensions in which mean or std was broadcast. eps is regenerated in backward from the seed;
nothing but the inputs is kept. `philox` has the stream; the Triton kernels are in
``sgfast_kernels.noise``.
"""

from torch import Tensor

from sgfast.ops import dispatch, validation
from sgfast.ops.noise import philox
from sgfast.ops.noise.operator import Problem, forward, over_leading, triton_refusal


@dispatch.describe_triton(triton_refusal)
def apply_noise(
    input: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    seed: int | Tensor,
    offset: int = 0,
    noise_mask: Tensor | None = None,
    keep_mask: Tensor | None = None,
    value_range: tuple[float | None, float | None] | None = None,
    impl: dispatch.Implementation | None = None,
) -> Tensor:
    """Shift and perturb the selected elements: ``where(n, clamp(where(k, input + std·eps, 0) + mean), input)``.

    Args:
        input: any shape, float32, bfloat16, float16 or float64, any strides.
        mean: floating, broadcastable to the input: the full shape, (D,), (1, T, D), a scalar tensor.
        std: likewise; it is used as it is, negative values included.
        seed: of eps = ``standard_normal(input.shape, seed, offset=offset)``, see there. The draw depends on an
            element's index only, not on strides or masks.
        offset: how many groups of four draws to skip.
        noise_mask: 1 = transform; None transforms everything. A mask with the shape of the input's leading
            dimensions covers those; any other shape must broadcast to the input.
        keep_mask: 1 = keep the feature; the mean alone replaces other features. It broadcasts to the input.
        value_range: (low or None, high or None), a clamp on transformed elements; outside it their gradient is 0.
        impl: see ``sgfast.ops.dispatch``.

    Returns:
        A contiguous tensor of the input's shape and dtype, differentiable with respect to input, mean and std.
        Unselected elements are bit-equal to the input.

    Raises:
        TypeError: an operand is not a floating tensor, a mask not a tensor, seed or offset not an integer.
        ValueError: shapes do not broadcast to the input's, devices differ, seed or offset is out of range, or
            value_range is not an ordered pair.

    Example:
        >>> import torch
        >>> from sgfast.ops.noise import apply_noise
        >>> embeddings, noise_mask = torch.zeros(2, 3), torch.tensor([True, False])
        >>> apply_noise(embeddings, torch.tensor(5.0), torch.tensor(0.1), seed=7, noise_mask=noise_mask)
        tensor([[5.0000, 4.9695, 5.1789],
                [0.0000, 0.0000, 0.0000]])
    """
    validation.check_floating("input", input)
    for name, operand in (("mean", mean), ("std", std)):
        validation.check_floating(name, operand, input)
        _check_broadcast(name, operand, input)
    noise_mask = _boolean_mask("noise_mask", noise_mask, input)
    keep_mask = _boolean_mask("keep_mask", keep_mask, input)
    noise_mask = over_leading(noise_mask, input)
    if noise_mask is not None:
        _check_broadcast("noise_mask", noise_mask, input)
    if keep_mask is not None:
        _check_broadcast("keep_mask", keep_mask, input)
    lowest, highest = _check_range(value_range)
    philox.check_offset(offset)
    dispatch.check_impl(impl)
    dispatch.refuse_forward_mode("apply_noise", input, mean, std)
    key = philox.seed_tensor(seed, input.device)
    problem = Problem(input, mean, std, key, offset, noise_mask, keep_mask, lowest, highest, impl)
    noised: Tensor = forward(problem)
    return noised


def _boolean_mask(name: str, mask: Tensor | None, input: Tensor) -> Tensor | None:
    if mask is None:
        return None
    validation.check_tensor(name, mask, "a torch.Tensor or None", input)
    return validation.as_bool(name, mask)


def _check_broadcast(name: str, tensor: Tensor, input: Tensor) -> None:
    """Check that a tensor lies on the input's device and broadcasts to its shape."""
    validation.check_device(name, tensor, "input", input)
    trailing = input.shape[input.dim() - tensor.dim() :]
    if tensor.dim() > input.dim() or any(
        own not in (1, size) for own, size in zip(tensor.shape, trailing, strict=True)
    ):
        raise ValueError(
            f"{name} must broadcast to the shape of input, {tuple(input.shape)}; got {tuple(tensor.shape)}"
        )


def _check_range(value_range: tuple[float | None, float | None] | None) -> tuple[float | None, float | None]:
    if value_range is None:
        return None, None
    if len(value_range) != 2:
        raise ValueError(f"value_range must be (low or None, high or None); got {value_range}")
    lowest, highest = value_range
    if lowest is not None and highest is not None and not lowest <= highest:
        raise ValueError(f"value_range must have low ≤ high; got {value_range}")
    return lowest, highest
