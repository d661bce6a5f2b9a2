"""Noise loss, which makes a transform stronger, and the weight alpha between this loss and the task's loss."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sgfast.ops import rows, validation
from sgfast.ops.validation import check_real

_MEASURED_BATCHES = 10
_RATE = 0.05
_MOMENTUM = 0.9


def negative_log_mean(
    std: Tensor, mask: Tensor | None = None, noise_mask: Tensor | None = None, shape: torch.Size | None = None
) -> Tensor:
    """Compute −log(mean sigma) as in Cloak (Mireshghallah et al. 2021).

    The mean is over the features of selected elements, without suppressed features.

    Args:
        std: sigma, broadcastable to the input's shape.
        mask: True = suppressed feature, with the shape of ``std``.
        noise_mask: 1 = transformed, with the same shapes as in `sgfast.ops.apply_noise`. Needs ``shape``.
        shape: shape of the input.

    Returns:
        A scalar in float32 (float64 for float64 input). 0 with zero gradients if no element is left.

    Example:
        >>> import torch
        >>> negative_log_mean(torch.tensor([0.5, 1.5, 9.0]), torch.tensor([False, False, True])).abs()
        tensor(0.)
    """
    std = std.to(rows.compute_dtype(std))
    kept = None if mask is None else ~mask
    if noise_mask is not None:
        assert shape is not None
        selected = validation.as_bool("noise_mask", noise_mask)
        if selected.shape == shape[: selected.dim()]:
            selected = selected.view(*selected.shape, *[1] * (len(shape) - selected.dim()))
        kept = selected if kept is None else selected & kept
    if kept is None:
        return -std.mean().log()
    kept = kept & torch.ones_like(std, dtype=torch.bool)  # broadcasts both masks and std to one shape
    count = kept.sum()
    mean = torch.where(kept, std, 0).sum() / count.clamp(min=1)
    return -torch.where(count > 0, mean, 1).log()


def check_loss_function(name: str, loss_function: Any) -> None:
    """Check that a loss function is callable."""
    if not callable(loss_function):
        raise TypeError(f"{name} must be callable; got {type(loss_function).__name__}")


def scalar_loss(name: str, value: Any) -> Tensor:
    """Check that a base loss returned a scalar, and convert the scalar to the dtype of losses."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must return a torch.Tensor; got {type(value).__name__}")
    if value.numel() != 1:
        raise ValueError(f"{name} must return a scalar (for example, reduction='mean'); got shape {tuple(value.shape)}")
    return value.reshape(()).to(rows.compute_dtype(value))


def check_interpolation(alpha: Any) -> float:
    """Check that alpha, the weight between two losses, lies in [0, 1], and return it as a float."""
    if not 0 <= check_real("alpha", alpha) <= 1:
        raise ValueError(f"alpha must lie in [0, 1]; got {alpha}")
    return float(alpha)


def interpolate(base_loss: Tensor, noise_loss: Tensor, alpha: float | Tensor) -> Tensor:
    """Compute (1 − alpha) · base_loss + alpha · noise_loss.

    A loss whose fixed weight is 0 is left out, also if the loss is infinite.
    """
    if isinstance(alpha, float) and alpha in (0.0, 1.0):
        return noise_loss if alpha else base_loss
    return (1 - alpha) * base_loss + alpha * noise_loss


class AdaptiveAlpha(nn.Module):
    """Alpha that rises while the base loss stays within a tolerance of the clean model's, and falls otherwise.

    The average is the moving average of the base loss, with momentum 0.9. The level is the mean of the clean model's
    base loss over the first ten batches. Dual ascent on the constraint average ≤ level + tolerance gives the update

        logit(alpha) ← logit(alpha) + 0.05 · clamp((level + tolerance − average) / tolerance, −1, 1)

    Alpha starts at 1/2 and stays in [0.01, 0.99]. The update rule is this library's choice: no publication describes
    the original one. All values are computed on the loss's device in float32, and are part of the state_dict. Under
    DistributedDataParallel, which broadcasts buffers, alpha is the alpha of the first rank.

    Example:
        >>> import torch
        >>> adaptive = AdaptiveAlpha()
        >>> adaptive.measure(torch.tensor(0.2))
        >>> adaptive.update(torch.tensor(0.2), tolerance=0.1)
        >>> adaptive()
        tensor(0.5125)
    """

    logit: Tensor
    level: Tensor
    average: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("logit", "level", "average"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float32))
        # Counts on the host: decisions that depend on counts must not wait for a device.
        self.measured = 0
        self.updates = 0

    def forward(self) -> Tensor:
        """Return alpha, a scalar."""
        return self.logit.sigmoid()

    @property
    def measuring(self) -> bool:
        """Whether the clean model's level needs more batches."""
        return self.measured < _MEASURED_BATCHES

    @torch.no_grad()
    def measure(self, clean_loss: Tensor) -> None:
        """Add the clean model's base loss on one batch to the level."""
        self.measured += 1
        self._to(clean_loss.device)
        self.level = self.level + (clean_loss.float() - self.level) / self.measured

    @torch.no_grad()
    def update(self, base_loss: Tensor, tolerance: float) -> None:
        """Update alpha with the base loss of one batch. A loss that is not finite is replaced by the average."""
        self._to(base_loss.device)
        # The first loss starts the average; later losses move the average.
        kept = _MOMENTUM if self.updates else 0.0
        observed = torch.where(base_loss.isfinite(), base_loss.float(), self.average)
        self.average = kept * self.average + (1 - kept) * observed
        self.updates += 1
        slack = (self.level + tolerance - self.average) / tolerance
        limit = torch.tensor(0.99).logit().item()
        self.logit = (self.logit + _RATE * slack.clamp(-1, 1)).clamp(-limit, limit)

    def _to(self, device: torch.device) -> None:
        if self.logit.device != device:
            self.to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AdaptiveAlpha":
        """Move the buffers but keep float32: small steps would be lost in a model's half precision."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in self._buffers.items():
            self._buffers[name] = None if buffer is None else buffer.float()
        return self

    def get_extra_state(self) -> dict[str, int]:
        """Return the counts."""
        return {"measured": self.measured, "updates": self.updates}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Restore the counts."""
        self.measured, self.updates = state["measured"], state["updates"]
