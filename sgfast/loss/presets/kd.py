"""Losses between logits, ``f(logits_S, logits_T, temperature=1)``, as TextBrewer's ``KD_LOSS_MAP`` has them.

The losses have no T² factor and do not mask padding on their own. The ``mask`` argument selects rows.
"""

from torch import Tensor

from sgfast.loss.presets.checks import masked_mean
from sgfast.loss.presets.score_rows import score_rows
from sgfast.ops import dispatch, divergences, validation


def kd_mse_loss(
    logits_S: Tensor, logits_T: Tensor, temperature: float | Tensor = 1, *, mask: Tensor | None = None
) -> Tensor:
    """Mean over rows and classes of ((s − t) / temperature)².

    A class whose logit is −inf on either side is not compared, but stays in the mean (TextBrewer gives NaN or inf).

    Args:
        logits_S: (..., V), float32, bfloat16, float16 or float64; computed in float32 (float64 if a side is).
        logits_T: of the same shape. Gradients reach both sides.
        temperature: a positive number, or a tensor of shape () or (...), not zero.
        mask: (...), 1 = selected rows; the others are not read. None selects all.

    Returns:
        A scalar, float32 or float64; 0 where no row is selected.

    Raises:
        TypeError: an argument's type.
        ValueError: shapes differ, or the temperature is not positive.

    Example:
        >>> import torch
        >>> kd_mse_loss(torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, -1.0]]), temperature=2)
        tensor(2.)
    """
    mask = _check(logits_S, logits_T, temperature, mask)
    squares = score_rows(logits_S, logits_T, "squared_error", mask=mask) / logits_S.shape[-1]
    if isinstance(temperature, Tensor):
        temperature = temperature.to(squares.device, squares.dtype)
    return masked_mean(squares / temperature**2, mask)


def kd_ce_loss(
    logits_S: Tensor, logits_T: Tensor, temperature: float | Tensor = 1, *, mask: Tensor | None = None
) -> Tensor:
    """Mean over rows of −Σ q log p, p = softmax(s / temperature), q = softmax(t / temperature): nats.

    The teacher's entropy is part of the loss. The loss is infinite if the student excludes (−inf) a class that the
    teacher allows. A class that is −inf on both sides counts 0 (TextBrewer gives NaN).

    Args:
        logits_S: (..., V), float32, bfloat16, float16 or float64; computed in float32 (float64 if a side is).
        logits_T: of the same shape. Gradients reach both sides.
        temperature: a positive number, or a tensor of shape () or (...), not zero.
        mask: (...), 1 = selected rows; the others are not read. None selects all.

    Returns:
        A scalar, float32 or float64; 0 where no row is selected.

    Raises:
        TypeError: an argument's type.
        ValueError: shapes differ, or the temperature is not positive.

    Example:
        >>> import torch
        >>> kd_ce_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[5.0, -5.0]]))
        tensor(0.6931)
    """
    mask = _check(logits_S, logits_T, temperature, mask)
    # A scheduler's temperature may be negative, and the Triton kernels accept none.
    impl: dispatch.Implementation | None = "torch" if isinstance(temperature, Tensor) else None
    found = divergences(logits_S, logits_T, "cross_entropy", mask=mask, temperature=temperature, impl=impl)
    return masked_mean(found["cross_entropy"], mask)


def _check(logits_S: Tensor, logits_T: Tensor, temperature: float | Tensor, mask: Tensor | None) -> Tensor | None:
    validation.check_pair("logits_S", logits_S, "logits_T", logits_T)
    if isinstance(temperature, Tensor):
        validation.check_tensor("temperature", temperature)
        if temperature.shape not in (logits_S.shape[:-1], ()):
            raise ValueError(
                f"temperature must be a number or have the row shape {tuple(logits_S.shape[:-1])}; "
                f"got {tuple(temperature.shape)}"
            )
    elif not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite; got {temperature}")
    return validation.row_mask(mask, "mask", "logits_S", logits_S)
