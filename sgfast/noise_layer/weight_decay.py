"""Optimizer groups that keep weight decay away from the parameters of a transform.

Decay pulls mean shifts to 0 and rhos to the middle of the scale. The loss does not show this.
"""

import warnings
from typing import Any

import torch
from torch import nn

from sgfast.noise_layer.base import BaseNoiseLayer
from sgfast.ops.validation import check_real


def exempt_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the noise layers' parameters that weight decay would erase, by their names in the module."""
    parameters = dict(module.named_parameters())
    return {
        name: parameters[name]
        for prefix, layer in module.named_modules()
        if isinstance(layer, BaseNoiseLayer)
        for name in (f"{prefix}.{own}".lstrip(".") for own in sorted(layer.no_weight_decay()))
        if name in parameters
    }


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two groups for an optimizer: parameters with weight decay, and parameters that decay would erase.

    Args:
        module: a noise layer, a noisy model, or anything that contains one. Frozen parameters are left out.
        weight_decay: weight decay of the first group; the second has 0.

    Raises:
        ValueError: weight_decay is negative, or nothing in the module can be trained.

    Example:
        >>> import torch
        >>> from sgfast.noise_layer import CloakNoiseLayer
        >>> groups = parameter_groups(CloakNoiseLayer((1, 4)), weight_decay=0.01)
        >>> [(len(group["params"]), group["weight_decay"]) for group in groups]
        [(2, 0.0)]
    """
    if not check_real("weight_decay", weight_decay) >= 0:
        raise ValueError(f"weight_decay must not be negative; got {weight_decay}")
    exempt = {id(parameter) for parameter in exempt_parameters(module).values()}
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [one for one in trained if id(one) not in exempt], "weight_decay": float(weight_decay)},
        {"params": [one for one in trained if id(one) in exempt], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("module must have a parameter that requires a gradient; all are frozen")
    return groups


def check_weight_decay(optimizer: torch.optim.Optimizer, module: nn.Module) -> list[str]:
    """Warn of parameters that the optimizer's weight decay would erase, and return their names.

    Example:
        >>> import torch, warnings
        >>> from sgfast.noise_layer import CloakNoiseLayer
        >>> layer = CloakNoiseLayer((1, 4))
        >>> with warnings.catch_warnings(record=True):
        ...     check_weight_decay(torch.optim.AdamW(layer.parameters()), layer)
        ['locs', 'rhos']
        >>> check_weight_decay(torch.optim.AdamW(parameter_groups(layer, 0.01)), layer)
        []
    """
    decayed = {
        id(parameter) for group in optimizer.param_groups if group.get("weight_decay") for parameter in group["params"]
    }
    names = [name for name, parameter in exempt_parameters(module).items() if id(parameter) in decayed]
    if names:
        warnings.warn(
            f"weight decay will erase what the transform learns in {', '.join(names)}: build the optimizer from "
            f"sgfast.noise_layer.parameter_groups",
            stacklevel=2,
        )
    return names
