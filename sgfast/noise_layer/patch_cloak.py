"""A noise layer for images. Its noise depends on the content of each patch."""

from torch import Tensor
from torch.nn import functional as F

from sgfast.noise_layer.arguments import Scale, ValueRange
from sgfast.noise_layer.lazy import LazyNoiseLayer
from sgfast.noise_layer.masker import PercentMasker
from sgfast.noise_layer.parameterizations import CloakStandardDeviationParameterization
from sgfast.ops.validation import check_count, check_finite


class PatchCloakNoiseLayer(LazyNoiseLayer):
    """``x~ = (x + sigma(x)·eps)·keep + mu(x)``: the pixels of a patch decide the mu and sigma of the same pixels.

    A convolution with kernel and stride ``patch_size`` and in_channels · patch_size² outputs gives mu. A second one
    gives rho, and `CloakStandardDeviationParameterization` turns rho into sigma. The weights of both start at 0 and the
    bias of rho at ``rhos_init``, so that an untrained layer adds weak unshifted noise. Images are padded with zeros on
    the right and at the bottom to whole patches. The architecture is our choice: only the names are public.

    Args:
        patch_size: side of a patch in pixels.
        in_channels: channels of the images; None to take them from the first forward, or from the loaded state_dict.
        scale: (min, max) of the standard deviations.
        shallow: temperature of the parameterization.
        percent_to_mask: fraction of each image's features to replace by their mu: the features of largest sigma.
        value_range: (low or None, high or None), a clamp on transformed elements.
        rhos_init: rho of the untrained layer.
        seed: see `BaseNoiseLayer`.

    Shape:
        input (batch, in_channels, height, width) → the same; ``mean``, ``std`` and ``mask`` have this shape too.

    Raises:
        ValueError: an argument out of range; from a forward: an input of other channels.
        TypeError: an argument of another type.

    Example:
        >>> import torch
        >>> layer = PatchCloakNoiseLayer(4, scale=(1e-3, 1.0), percent_to_mask=0.25)
        >>> _ = layer(torch.ones(2, 3, 6, 9))
        >>> layer.mask.sum((1, 2, 3))
        tensor([40, 40])
    """

    def __init__(
        self,
        patch_size: int,
        in_channels: int | None = None,
        scale: Scale = (1e-4, 2.0),
        shallow: float = 1.0,
        percent_to_mask: float | None = None,
        value_range: ValueRange | None = None,
        rhos_init: float = -4.0,
        seed: int | None = None,
    ) -> None:
        masker = None if percent_to_mask is None else PercentMasker(percent_to_mask)
        super().__init__(scale, masker=masker, value_range=value_range, seed=seed)
        self.patch_size = check_count("patch_size", patch_size)
        self.parameterization = CloakStandardDeviationParameterization(scale, shallow)
        self.declare("mean_weight", 0.0)
        self.declare("mean_bias", 0.0)
        self.declare("rho_weight", 0.0)
        self.declare("rho_bias", check_finite("rhos_init", rhos_init))
        if in_channels is not None:
            self.materialize((check_count("in_channels", in_channels),))

    def parameter_shapes(self, features: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the weights and biases of two convolutions."""
        outputs = features[0] * self.patch_size**2
        weight = (outputs, features[0], self.patch_size, self.patch_size)
        return {"mean_weight": weight, "mean_bias": (outputs,), "rho_weight": weight, "rho_bias": (outputs,)}

    def estimate(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Return mu and sigma of every pixel, of the input's shape."""
        if input.dim() != 4:
            raise ValueError(f"input must be images, (batch, channels, height, width); got shape {tuple(input.shape)}")
        self.materialize(tuple(input.shape[1:]), input.device)
        channels = self.get_parameter("mean_weight").shape[1]
        if input.shape[1] != channels:
            raise ValueError(f"input must have {channels} channels; got shape {tuple(input.shape)}")
        return self._per_pixel(input, "mean"), self.parameterization(self._per_pixel(input, "rho"))

    def no_weight_decay(self) -> set[str]:
        """The names of the biases. Biases hold the part that all patches share."""
        return {"mean_bias", "rho_bias"}

    def _per_pixel(self, input: Tensor, name: str) -> Tensor:
        weight, bias = self.get_parameter(f"{name}_weight"), self.get_parameter(f"{name}_bias")
        height, width = input.shape[-2:]
        padding = (0, -width % self.patch_size, 0, -height % self.patch_size)
        patches = F.conv2d(F.pad(input.to(weight.dtype), padding), weight, bias, stride=self.patch_size)
        return F.pixel_shuffle(patches, self.patch_size)[..., :height, :width]
