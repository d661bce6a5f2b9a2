"""The loss that makes a transform stronger, and the weight between it and the task's loss."""

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
    """−log(mean sigma) over selected elements and their unsuppressed features, as in Cloak (Mireshghallah et al. 2021).

    Args:
        std: sigma, broadcastable to the input's shape.
        mask: True = suppressed feature, of std's shape.
        noise_mask: 1 = transformed, read as `sgfast.ops.apply_noise` reads it; it needs ``shape``.
        shape: of the input.

    Returns:
        A scalar, float32 (float64); 0 with zero gradients where nothing is left to average.

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
    kept = kept & torch.ones_like(std, dtype=torch.bool)  # of the shape that both broadcast to
    count = kept.sum()
    mean = torch.where(kept, std, 0).sum() / count.clamp(min=1)
    return -torch.where(count > 0, mean, 1).log()


def check_loss_function(name: str, loss_function: Any) -> None:
    """Check for something to call."""
    if not callable(loss_function):
        raise TypeError(f"{name} must be callable; got {type(loss_function).__name__}")


def scalar_loss(name: str, value: Any) -> Tensor:
    """Check what a base loss returned and give it the precision of losses."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must return a torch.Tensor; got {type(value).__name__}")
    if value.numel() != 1:
        raise ValueError(f"{name} must return a scalar (reduction='mean', say); got shape {tuple(value.shape)}")
    return value.reshape(()).to(rows.compute_dtype(value))


def check_interpolation(alpha: Any) -> float:
    """Check a weight between two losses."""
    if not 0 <= check_real("alpha", alpha) <= 1:
        raise ValueError(f"alpha must lie in [0, 1]; got {alpha}")
    return float(alpha)


def interpolate(base_loss: Tensor, noise_loss: Tensor, alpha: float | Tensor) -> Tensor:
    """(1 − alpha) · base_loss + alpha · noise_loss; a loss of weight 0 is left out, infinite or not."""
    if isinstance(alpha, float) and alpha in (0.0, 1.0):
        return noise_loss if alpha else base_loss
    return (1 - alpha) * base_loss + alpha * noise_loss


class AdaptiveAlpha(nn.Module):
    """An alpha that rises as long as the task can afford it.

    Dual ascent on the constraint that the moving average of the base loss (momentum 0.9) stays at the clean model's
    level, its mean over the first ten batches, plus a tolerance:

        logit(alpha) ← logit(alpha) + 0.05 · clamp((level + tolerance − average) / tolerance, −1, 1)

    It starts at 1/2 and stays in [0.01, 0.99]. Our choice: the published algorithm is not described. Everything is
    computed on the loss's device, in float32, and is part of the state_dict. Under DistributedDataParallel, which
    broadcasts buffers, the first rank decides.

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
        # On the host: what is decided by them must not wait for a device.
        self.measured = 0
        self.updates = 0

    def forward(self) -> Tensor:
        """Alpha, a scalar."""
        return self.logit.sigmoid()

    @property
    def measuring(self) -> bool:
        """Whether the clean model's level still wants batches."""
        return self.measured < _MEASURED_BATCHES

    @torch.no_grad()
    def measure(self, clean_loss: Tensor) -> None:
        """Take a batch's base loss of the clean model into its level."""
        self.measured += 1
        self._to(clean_loss.device)
        self.level = self.level + (clean_loss.float() - self.level) / self.measured

    @torch.no_grad()
    def update(self, base_loss: Tensor, tolerance: float) -> None:
        """Take a step after a batch of this base loss; a batch whose loss is not finite counts as an average one."""
        self._to(base_loss.device)
        # A first loss begins the average; later ones move it.
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
        """Move, but keep float32: in a model's half precision small steps would be lost."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in self._buffers.items():
            self._buffers[name] = None if buffer is None else buffer.float()
        return self

    def get_extra_state(self) -> dict[str, int]:
        """The counts."""
        return {"measured": self.measured, "updates": self.updates}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Restore the counts."""
        self.measured, self.updates = state["measured"], state["updates"]
