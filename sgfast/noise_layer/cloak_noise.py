"""Noise layers that learn one mean shift and one standard deviation for every feature, the same for every input.

They follow Cloak (Mireshghallah et al., "Not all features are equal", WWW 2021). Parameters ``locs`` (mu) and ``rhos``
(sigma by `CloakStandardDeviationParameterization`) have the shape of one sample. Weight decay erases both: see
`parameter_groups`.
"""

import torch
from torch import Tensor, nn

from sgfast.noise_layer.arguments import Scale, ValueRange, check_input_shape
from sgfast.noise_layer.base import BaseNoiseLayer
from sgfast.noise_layer.lazy import LazyNoiseLayer
from sgfast.noise_layer.masker import PercentMasker
from sgfast.noise_layer.parameterizations import CloakStandardDeviationParameterization
from sgfast.ops import validation
from sgfast.ops.validation import check_bool, check_finite


class CloakNoiseLayer(LazyNoiseLayer):
    """``x~ = (x + sigma·eps)·keep + mu`` with learned mu and sigma of every feature.

    Args:
        input_shape: (batch, *features), the batch of any size; None to take it from the first forward, or from the
            state_dict that is loaded.
        scale: (min, max) of the standard deviations.
        shallow: temperature of the parameterization.
        percent_to_mask: fraction of the features to replace by their mu: the features of largest sigma at each forward.
        value_range: (low or None, high or None), a clamp on transformed elements.
        locs_requires_grad: True learns mu.
        rhos_requires_grad: True learns sigma.
        rhos_init: rho of the untrained layer.
        seed: see `BaseNoiseLayer`.

    Shape:
        input (batch, *features) → the same; ``mean``, ``std`` and ``mask`` after a forward: (*features).

    Raises:
        ValueError: an argument out of range; from a forward: an input of other features.
        TypeError: an argument of another type.

    Example:
        >>> import torch
        >>> layer = CloakNoiseLayer(input_shape=(1, 2, 3), scale=(1e-3, 1.0), percent_to_mask=0.5, seed=0)
        >>> layer(torch.ones(4, 2, 3)).shape, int(layer.mask.sum())
        (torch.Size([4, 2, 3]), 3)
    """

    def __init__(
        self,
        input_shape: tuple[int, ...] | None = None,
        scale: Scale = (1e-4, 2.0),
        shallow: float = 1.0,
        percent_to_mask: float | None = None,
        value_range: ValueRange | None = None,
        locs_requires_grad: bool = True,
        rhos_requires_grad: bool = True,
        rhos_init: float = -4.0,
        seed: int | None = None,
    ) -> None:
        masker = None if percent_to_mask is None else PercentMasker(percent_to_mask)
        super().__init__(scale, masker=masker, value_range=value_range, seed=seed)
        self.parameterization = CloakStandardDeviationParameterization(scale, shallow)
        self.declare("locs", 0.0, check_bool("locs_requires_grad", locs_requires_grad))
        rho = check_finite("rhos_init", rhos_init)
        self.declare("rhos", rho, check_bool("rhos_requires_grad", rhos_requires_grad))
        shape = check_input_shape(input_shape)
        if shape is not None:
            self.materialize(shape[1:])

    def parameter_shapes(self, features: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return the shape of a sample for both parameters."""
        return {"locs": features, "rhos": features}

    @property
    def stds(self) -> Tensor:
        """The standard deviations of all features, without graph. `CloakNoiseLayer2` takes them."""
        if not self.materialized:
            raise RuntimeError(f"{type(self).__name__} has no shape yet: give it input_shape, or run one forward")
        return self.parameterization(self.get_parameter("rhos").detach())

    def estimate(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Return mu and sigma, of the shape of a sample."""
        self.materialize(tuple(input.shape[1:]), input.device)
        locs = self.get_parameter("locs")
        _check_features(input, locs)
        # A view, because a module would register the parameter itself again under every attribute's name.
        return locs.view_as(locs), self.parameterization(self.get_parameter("rhos"))

    def suppressed_features(self, std: Tensor) -> Tensor | None:
        """Return the features of largest sigma, (*features)."""
        return None if self.masker is None else self.masker(std[None])[0]


class CloakNoiseLayer1(CloakNoiseLayer):
    """Cloak's first phase: learn mu and sigma, and suppress nothing.

    `CloakNoiseLayer2` reads from the ``stds`` of the trained layer which features to suppress. The arguments are the
    arguments of `CloakNoiseLayer`; ``percent_to_mask`` must be None.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...] | None = None,
        scale: Scale = (1e-4, 2.0),
        shallow: float = 1.0,
        percent_to_mask: None = None,
        value_range: ValueRange | None = None,
        locs_requires_grad: bool = True,
        rhos_requires_grad: bool = True,
        rhos_init: float = -4.0,
        seed: int | None = None,
    ) -> None:
        if percent_to_mask is not None:
            raise ValueError(f"percent_to_mask must be None: the first phase suppresses nothing; got {percent_to_mask}")
        super().__init__(
            input_shape,
            scale,
            shallow,
            None,
            value_range,
            locs_requires_grad,
            rhos_requires_grad,
            rhos_init,
            seed,
        )


class CloakNoiseLayerOneShot(CloakNoiseLayer):
    """Both of Cloak's phases at once: learn mu and sigma while the features of largest sigma are suppressed.

    Every forward chooses the suppressed features anew from its sigmas. The arguments are the arguments of
    `CloakNoiseLayer`.
    """


class CloakNoiseLayer2(BaseNoiseLayer):
    """Cloak's second phase: sigma and the suppressed features are fixed, mu is learned.

    A suppressed feature is replaced by its mu, a constant. ``stds`` and the choice of features are buffers: the
    state_dict of a trained layer holds them.

    Args:
        input_shape: (batch, *features), checked against ``stds``; None to skip the check.
        scale: (min, max) of the standard deviations.
        shallow: has no effect here, like ``rhos_requires_grad`` and ``rhos_init``, because no rho is learned. One set
            of arguments serves both phases.
        percent_to_mask: fraction of the features to suppress: the features of largest sigma. Required.
        value_range: (low or None, high or None), a clamp on transformed elements.
        locs_requires_grad: whether mu is learned.
        seed: see `BaseNoiseLayer`.
        stds: (*features), within the scale: the ``stds`` of a trained `CloakNoiseLayer1`.

    Shape:
        input (batch, *features) → the same.

    Raises:
        ValueError: an argument out of range, ``percent_to_mask`` missing, or ``stds`` outside the scale.
        TypeError: an argument of another type.

    Example:
        >>> import torch
        >>> CloakNoiseLayer2(percent_to_mask=0.5, stds=torch.tensor([0.1, 1.0, 0.2, 0.9])).suppressed
        tensor([False,  True, False,  True])
    """

    stds: Tensor
    suppressed: Tensor

    def __init__(
        self,
        input_shape: tuple[int, ...] | None = None,
        scale: Scale = (1e-4, 2.0),
        shallow: float = 1.0,
        percent_to_mask: float | None = None,
        value_range: ValueRange | None = None,
        locs_requires_grad: bool = True,
        rhos_requires_grad: bool = True,
        rhos_init: float = -4.0,
        seed: int | None = None,
        *,
        stds: Tensor,
    ) -> None:
        super().__init__(scale, value_range=value_range, seed=seed)
        if percent_to_mask is None:
            raise ValueError("percent_to_mask must be a fraction in [0, 1]: the second phase suppresses; got None")
        validation.check_floating("stds", stds)
        shape = check_input_shape(input_shape)
        if shape is not None and shape[1:] != stds.shape:
            raise ValueError(f"stds must have the features of input_shape, {shape[1:]}; got shape {tuple(stds.shape)}")
        if not bool(((stds >= self.scale[0] * (1 - 1e-6)) & (stds <= self.scale[1] * (1 + 1e-6))).all()):
            raise ValueError(f"stds must lie within the scale {self.scale}; got {stds.min():g} to {stds.max():g}")
        self.register_buffer("stds", stds.detach().clone())
        self.register_buffer("suppressed", PercentMasker(percent_to_mask)(stds[None])[0])
        locs = torch.zeros(stds.shape, dtype=torch.get_default_dtype(), device=stds.device)
        self.locs = nn.Parameter(locs, requires_grad=check_bool("locs_requires_grad", locs_requires_grad))

    def estimate(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Return mu and sigma, of the shape of a sample."""
        _check_features(input, self.locs)
        # A layer in half precision has rounded its stds, possibly past the scale.
        return self.locs.view_as(self.locs), self.stds.float().clamp(*self.scale)

    def suppressed_features(self, std: Tensor) -> Tensor | None:
        """Return the features that were chosen when the layer was built."""
        return self.suppressed


def _check_features(input: Tensor, locs: Tensor) -> None:
    if input.dim() == 0 or input.shape[1:] != locs.shape:
        raise ValueError(
            f"input must be a batch of the features that the noise layer has parameters for, "
            f"(batch, {', '.join(map(str, locs.shape))}); got shape {tuple(input.shape)}"
        )
