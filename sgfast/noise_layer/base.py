"""What all noise layers share: the transform itself, the seeds, and the memory of the last forward."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sgfast.noise_layer.arguments import Scale, ValueRange, check_scale, check_seed, check_value_range
from sgfast.noise_layer.masker import PercentMasker
from sgfast.ops import validation
from sgfast.ops.noise import apply_noise
from sgfast.ops.philox import standard_normal


class BaseNoiseLayer(nn.Module, ABC):
    """Add learned noise: ``output = where(n, (input + std·eps)·keep + mean, input)``.

    A subclass says what mean and std are, in `estimate`. eps is `sgfast.ops.standard_normal` under a seed that
    changes with every forward: drawn from torch's generator of the input's device, or, given ``seed``, mixed from it,
    the number of the forward and the process rank, so that no two inputs share their noise.

    After a forward these attributes hold its values, until the next one: ``input``, ``mean``, ``std``, ``mask``
    (True = suppressed feature, or None), ``noise_mask`` (True = transformed, or None), ``noise`` (std·eps) and
    ``output``. ``mean``, ``std`` and ``output`` keep their graph until a loss consumes them. None of them, and no
    seed, enters the state_dict; the number of forwards does.

    Args:
        scale: (min, max) of the standard deviations.
        masker: which features to suppress, from their standard deviations; None for none.
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
        # In the state_dict, so that a resumed training does not repeat the noise it began with; a tensor, so that
        # torch.compile does not specialise on it.
        self.register_buffer("forward_count", torch.zeros((), dtype=torch.int64))
        self.clear()

    @abstractmethod
    def estimate(self, input: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Mean shift and standard deviation for an input, broadcastable to it."""

    def suppressed_features(self, std: Tensor) -> Tensor | None:
        """Which features to replace by their mean shift: of std's shape, True = suppressed; None for none."""
        return None if self.masker is None else self.masker(std)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay would pull back to no transform at all; see `parameter_groups`."""
        return {name for name, _ in self.named_parameters()}

    def forward(
        self, input: Tensor, noise_mask: Tensor | None = None, *, seed: int | Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Transform the selected elements.

        Args:
            input: (batch, ...) floating.
            noise_mask: True = transform; of the input's leading dimensions, or broadcastable; None selects all.
            seed: the noise's seed for this forward, in place of the layer's own.
            kwargs: what the estimators take besides (an attention mask, say).

        Returns:
            The transformed input, in its dtype; the input itself while ``enabled`` is False.

        Raises:
            TypeError: the input is not a floating tensor.
            ValueError: masks or input of another shape than the layer's.
            RuntimeError: the layer has a ``seed`` of its own and is recomputed under activation checkpointing: its
                stream has moved on. Give ``seed`` for the forward, or leave the layer's None.
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
        """The seed of the last forward's noise; an int64 tensor where it was drawn on the device."""
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
        """Keep the last forward's values but not their graph; losses call this when they have consumed them."""
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
        if self.seed is None:
            # On the device, so that nothing waits for it; from torch's generator, so that manual_seed and the
            # restoring of RNG states (activation checkpointing, resumed training) replay it.
            return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:  # inside a backward
            raise RuntimeError(
                "a noise layer with a fixed seed cannot be recomputed under activation checkpointing: it would draw "
                "other noise. Pass seed= to its forward, or build it with seed=None"
            )
        self.forward_count.add_(1)
        return fold_in(mix_seed(self.seed, _process_rank()), self.forward_count.to(device, copy=True))

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles carry parameters and settings, not the last forward's graph."""
        state = dict(self.__dict__)
        for name in ("input", "mean", "std", "mask", "noise_mask", "output", "_forward_seed"):
            state[name] = None
        return state


def mix_seed(*words: int) -> int:
    """Fold integers into one 64-bit seed (SplitMix64 steps, Steele et al. 2014): close inputs, unrelated seeds."""
    state = 0
    for word in words:
        state = (state + word + 0x9E3779B97F4A7C15) % 2**64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
        state ^= state >> 31
    return state


def fold_in(seed: int, count: Tensor) -> Tensor:
    """Fold an int64 tensor into a seed as `mix_seed` folds a word, on the tensor's device."""

    def signed(value: int) -> int:  # the int64 with the lower 64 bits; products of int64 wrap as those of words do
        return (value + 2**63) % 2**64 - 2**63

    def shifted(words: Tensor, bits: int) -> Tensor:  # a logical shift: zeros come in from the left
        return words.bitwise_right_shift(bits).bitwise_and(2 ** (64 - bits) - 1)

    words = count + signed(seed + 0x9E3779B97F4A7C15)
    words = (words ^ shifted(words, 30)) * signed(0xBF58476D1CE4E5B9)
    words = (words ^ shifted(words, 27)) * signed(0x94D049BB133111EB)
    mixed: Tensor = words ^ shifted(words, 31)
    return mixed


def _process_rank() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return 0
