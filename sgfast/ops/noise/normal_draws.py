"""Seeded standard normal draws: the registered operator ``sgfast::standard_normal`` and the public function."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sgfast.ops import dispatch, rows, validation
from sgfast.ops.noise import philox
from sgfast.ops.operator import define


def triton_refusal(
    shape: Sequence[int] = (),
    seed: int | Tensor = 0,
    *,
    offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> str | None:
    """Say why Triton cannot draw, or return None."""
    if not isinstance(seed, Tensor):
        seed = torch.empty(0, device=device)
    return dispatch.triton_device_refusal(seed)


class Draw(NamedTuple):
    """The arguments of ``sgfast::standard_normal``, checked."""

    seed: Tensor
    shape: Sequence[int]
    offset: int
    dtype: torch.dtype
    impl: str | None


@define("standard_normal", Draw)
def forward(arguments: Draw) -> Tensor:
    """Draw the elements of the shape."""
    seed, shape, offset, dtype, impl = arguments
    implementation = dispatch.select(impl, triton_refusal(shape, seed)).implementation
    if implementation == "triton":
        import sgfast_kernels

        return sgfast_kernels.standard_normal(seed, shape, offset, dtype)
    keys = philox.round_keys(seed)
    values = torch.empty(shape, dtype=dtype, device=seed.device)
    flat = values.view(-1)
    step = philox.chunk_elements()
    rows.keep_freed_memory(16 * step)
    for start in range(0, flat.numel(), step):
        part = flat[start : start + step]
        part.copy_(philox.draws(keys, offset, start, part.numel(), implementation))
    return values


@forward.register_fake
def _(arguments: Draw) -> Tensor:
    return torch.empty(arguments.shape, dtype=arguments.dtype, device=arguments.seed.device)


@dispatch.describe_triton(triton_refusal)
def standard_normal(
    shape: Sequence[int],
    seed: int | Tensor,
    *,
    offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    impl: dispatch.Implementation | None = None,
) -> Tensor:
    """Draw standard normals that depend on nothing but seed, offset and their linear index.

    Element i is the same number for every shape, implementation and device, within ``NORMAL_ERROR`` (2.1e-6;
    bit for bit within one implementation on one device). The stream is public mathematics, not a cipher. Anyone who
    knows the seed knows the noise.

    Args:
        shape: of the result, any number of elements.
        seed: 0 ≤ seed < 2⁶⁴, or a one-element int64 tensor, read modulo 2⁶⁴ where it lies, without a host sync.
            Under torch.compile a seed that changes from call to call should be a tensor: the default compiler takes
            no changing int of 2⁶³ or more.
        offset: how many groups of four draws to skip, 0 ≤ offset < 2⁶³.
        dtype: float32, bfloat16, float16 or float64: the float32 stream, rounded once or widened.
        device: by default that of a seed tensor, else torch's default device.
        impl: see ``sgfast.ops.dispatch``.

    Returns:
        A tensor of the shape, dtype and device; it has no gradient.

    Raises:
        TypeError: seed or offset is not an integer (or, the seed, an int64 tensor), or dtype is not floating.
        ValueError: seed, offset or shape is out of range, or the seed tensor is not one element on the device.

    Example:
        >>> from sgfast.ops import standard_normal
        >>> standard_normal((3,), seed=7)
        tensor([ 2.9157e-04, -3.0485e-01,  1.7888e+00])
        >>> standard_normal((2, 4), seed=7)[1] == standard_normal((4,), seed=7, offset=1)
        tensor([True, True, True, True])
    """
    if any(size < 0 for size in shape):
        raise ValueError(f"shape must have no negative size; got {tuple(shape)}")
    if dtype not in validation.FLOATING:
        raise TypeError(f"dtype must be float32, bfloat16, float16 or float64; got {dtype}")
    philox.check_offset(offset)
    dispatch.check_impl(impl)
    values: Tensor = forward(Draw(philox.seed_tensor(seed, device), shape, offset, dtype, impl))
    return values
