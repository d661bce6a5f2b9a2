"""The base of all noise layers: the transform itself, the seeds, and the memory of the last forward."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sgfast.noise_layer.arguments import Scale, ValueRange, check_scale, check_value_range
from sgfast.noise_layer.masker import PercentMasker
from sgfast.noise_layer.seeds import counted_seed, drawn_seed
from sgfast.ops import validation
from sgfast.ops.noise import apply_noise, standard_normal
from sgfast.ops.validation import check_seed


class BaseNoiseLayer(nn.Module, ABC):
    """Add learned noise: ``output = where(n, (input + std·eps)·keep + mean, input)``.

    A subclass computes mean and std in `estimate`. eps is `sgfast.ops.standard_normal` under a seed that changes with
    every forward. Without ``seed`` the forward's seed is drawn from torch's generator of the input's device. With
    ``seed`` the forward's seed is mixed from ``seed`` and the number of the forward. No two inputs share their noise,
    whatever ``torch.manual_seed`` is called with: the process rank (of the process group, or ``RANK`` in the
    environment), the number of a child process without a rank, and the device's index are mixed into every seed. The
    same program on the same rank and device repeats its noise. Processes that compute one model together on one input
    (tensor parallelism) need one noise: give ``seed`` for the forward.

    After a forward these attributes hold its values, until the next one: ``input``, ``mean``, ``std``, ``mask``
    (True = suppressed feature, or None), ``noise_mask`` (True = transformed, or None), ``noise`` (std·eps) and
    ``output``. ``mean``, ``std`` and ``output`` keep their graph until a loss consumes them. None of them, and no
    seed, enters the state_dict; the number of forwards does.

    Args:
        scale: (min, max) of the standard deviations.
        masker: chooses the features to suppress from their standard deviations; None suppresses none.
        value_range: (low or None, high or None), a clamp on transformed elements.
        seed: 0 ≤ seed < 2⁶⁴, or None.
    """

    input: Tensor | None
    mean: Tensor | None
    std: Tensor | None
    mask: Tensor | None
    noise_mask: Tensor | None
    output: Tensor | None
    forward_count: Tensor
    _forward_seed: int | Tensor | None

    def __init__(
        self,
        scale: Scale,
        *,
        masker: PercentMasker | None = None,
        value_range: ValueRange | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.scale = check_scale(scale)
        self.masker = masker
        self.value_range = check_value_range(value_range)
        self.seed = check_seed(seed)
        self.enabled = True
        # The count is in the state_dict, so that a resumed training does not repeat the noise of its beginning. The
        # count is a tensor, so that torch.compile does not specialise on its value.
        self.register_buffer("forward_count", torch.zeros((), dtype=torch.int64))
        self.clear()

    @abstractmethod
    def estimate(self, input: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the mean shift and the standard deviation for an input, broadcastable to it."""

    def suppressed_features(self, std: Tensor) -> Tensor | None:
        """Return the features to replace by their mean shift: std's shape, True = suppressed; None for none."""
        return None if self.masker is None else self.masker(std)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay would pull towards no transform at all; see `parameter_groups`."""
        return {name for name, _ in self.named_parameters()}

    def forward(
        self, input: Tensor, noise_mask: Tensor | None = None, *, seed: int | Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Transform the selected elements.

        Args:
            input: (batch, ...) floating.
            noise_mask: True = transform; its shape is the input's leading dimensions, or broadcastable; None selects
                all elements.
            seed: seed of the noise for this forward; it replaces the layer's own.
            kwargs: further arguments of the estimators (an attention mask, say).

        Returns:
            The transformed input, in its dtype; the input itself while ``enabled`` is False.

        Raises:
            TypeError: the input is not a floating tensor.
            ValueError: masks or input of another shape than the layer's.
            RuntimeError: backward recomputes the forward and cannot repeat the forward's noise. Either the layer has a
                ``seed`` of its own, whose stream has moved on, or it has none and the random state was not restored
                (``checkpoint(preserve_rng_state=False)``, torch.compile under an ``activation_memory_budget``). Give
                ``seed`` for the forward.
        """
        if not self.enabled:
            self.clear()
            return input
        validation.check_floating("input", input)
        mean, std = self.estimate(input, **kwargs)
        mask = self.suppressed_features(std)
        forward_seed = self._next_seed(input.device) if seed is None else seed
        output = apply_noise(
            input,
            mean,
            std,
            seed=forward_seed,
            noise_mask=noise_mask,
            keep_mask=None if mask is None else ~mask,
            value_range=self.value_range,
        )
        self.input, self.mean, self.std = input, mean, std
        self.mask, self.noise_mask, self.output, self._forward_seed = mask, noise_mask, output, forward_seed
        return output

    @property
    def forward_seed(self) -> int | Tensor | None:
        """The seed of the last forward's noise; an int64 tensor if it was drawn on the device."""
        return self._forward_seed

    @property
    def noise(self) -> Tensor | None:
        """std·eps of the last forward, regenerated from its seed."""
        if self.input is None or self.std is None or self._forward_seed is None:
            return None
        eps = standard_normal(self.input.shape, self._forward_seed, dtype=self.input.dtype, device=self.input.device)
        return self.std.detach() * eps

    def clear(self) -> None:
        """Forget the last forward."""
        self.input = self.mean = self.std = self.mask = self.noise_mask = self.output = None
        self._forward_seed = None

    def release_graph(self) -> None:
        """Keep the last forward's values without their graph. Losses call this after they have consumed the values."""
        self.mean, self.std, self.output = (
            tensor.detach() if tensor is not None else None for tensor in (self.mean, self.std, self.output)
        )

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Pass inputs through unchanged inside the block."""
        enabled, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = enabled

    def _next_seed(self, device: torch.device) -> Tensor:
        return drawn_seed(device) if self.seed is None else counted_seed(self.seed, self.forward_count, device)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles carry parameters and settings, not the last forward's graph."""
        state = dict(self.__dict__)
        for name in ("input", "mean", "std", "mask", "noise_mask", "output", "_forward_seed"):
            state[name] = None
        return state
