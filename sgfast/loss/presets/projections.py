"""Projections from the student's width to the teacher's, ``f(dim_in, dim_out) -> Module``."""

from collections.abc import Callable

from torch import nn


def linear_projection(dim_in: int, dim_out: int) -> nn.Module:
    """A linear layer; weights from N(0, 0.02²), bias 0."""
    return _initialised(nn.Linear(dim_in, dim_out))


def projection_with_activation(activation: str) -> Callable[[int, int], nn.Module]:
    """Return a factory of linear layers followed by an activation.

    Args:
        activation: a class of ``torch.nn`` by name, such as ``"ReLU"``.

    Raises:
        ValueError: there is no such activation.
    """
    activation_class = getattr(nn.modules.activation, activation, None)
    if activation_class is None:
        raise ValueError(f"activation must name an activation of torch.nn; got {activation!r}")

    def projection(dim_in: int, dim_out: int) -> nn.Module:
        return nn.Sequential(_initialised(nn.Linear(dim_in, dim_out)), activation_class())

    return projection


def _initialised(layer: nn.Linear) -> nn.Linear:
    nn.init.normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer
