"""Losses that train a transform of images (or any input) against a task's own loss."""

from collections.abc import Callable
from typing import Any, ParamSpec, TypedDict

from torch import Tensor

from sgfast.model.noise_loss import (
    check_interpolation,
    check_loss_function,
    interpolate,
    negative_log_mean,
    scalar_loss,
)
from sgfast.model.noisy_model import Applied, NoisyModel
from sgfast.model.output import NoisyModelOutput
from sgfast.noise_layer.arguments import check_log_scale
from sgfast.ops.validation import check_bool

LossArguments = ParamSpec("LossArguments")


class CloakLossesDict(TypedDict, total=False):
    """Detached, unweighted components, and their weighted ``total``. A component of weight 0 is absent."""

    base_loss: Tensor
    noise_loss: Tensor
    total: Tensor


class CloakHyperparametersDict(TypedDict):
    """The factory's int, float and None arguments by name."""

    alpha: float


def composite_cloak_loss_factory(
    noisy_model: NoisyModel,
    loss_function: Callable[LossArguments, Tensor],
    alpha: float,
    respect_std_mask: bool = True,
) -> tuple[Callable[LossArguments, Tensor], Callable[[], CloakLossesDict], Callable[[], CloakHyperparametersDict]]:
    """Create a loss that trades a task's loss against −log(mean sigma), the strength of the transform.

        loss = (1 − alpha) · loss_function(...) + alpha · −log(mean sigma)

    A loss of weight 0 is not computed.

    Args:
        noisy_model: the model to train.
        loss_function: the task's loss, a scalar.
        alpha: in [0, 1]: 0 is all task, 1 all strength.
        respect_std_mask: True leaves suppressed features out of the mean; False averages them too. The argument acts on
            every kind of noise layer (our choice; the documented original never respects the masks of patch layers).

    Returns:
        ``(loss, get_losses, get_hyperparameters)``, each callable once after a forward of ``noisy_model``. ``loss``
        takes the arguments of ``loss_function`` and returns the scalar to call ``backward`` on. If an argument is a
        `NoisyModelOutput`, ``loss_function`` receives the base model's output in it. ``get_losses()`` returns the
        detached, unweighted ``base_loss`` and ``noise_loss``, and ``total``. ``get_hyperparameters()`` returns
        ``alpha``.

    Raises:
        ValueError: alpha outside [0, 1], a noise layer whose scale starts at 0 (log sigma would be infinite).
        TypeError: an argument of another type.
        RuntimeError: a call out of order.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from sgfast.model import NoisyModel
        >>> from sgfast.noise_layer import CloakNoiseLayerOneShot
        >>> noisy_model = NoisyModel(CloakNoiseLayerOneShot, nn.Linear(4, 2), scale=(0.5, 1.5), rhos_init=0.0)
        >>> loss, get_losses, _ = composite_cloak_loss_factory(noisy_model, nn.CrossEntropyLoss(), alpha=0.4)
        >>> output = noisy_model(torch.ones(3, 4))
        >>> loss(output.base_model_output, torch.tensor([0, 1, 1])).backward()
        >>> sorted(get_losses())
        ['base_loss', 'noise_loss', 'total']
    """
    if not isinstance(noisy_model, NoisyModel):
        raise TypeError(f"noisy_model must be a NoisyModel; got {type(noisy_model).__name__}")
    check_loss_function("loss_function", loss_function)
    weight = check_interpolation(alpha)
    check_bool("respect_std_mask", respect_std_mask)
    if weight:
        check_log_scale(noisy_model.noise_layer.scale)
    state = _State()

    def loss(*args: LossArguments.args, **kwargs: LossArguments.kwargs) -> Tensor:
        applied = _last_forward(noisy_model, "the loss", state.consumed)
        losses: CloakLossesDict = {}
        if weight < 1:
            arguments = [one.base_model_output if isinstance(one, NoisyModelOutput) else one for one in args]
            task: Callable[..., Any] = loss_function
            losses["base_loss"] = scalar_loss("loss_function", task(*arguments, **kwargs))
        if weight:
            mask = applied.mask if respect_std_mask else None
            losses["noise_loss"] = negative_log_mean(applied.std, mask, applied.noise_mask, applied.shape)
        absent = applied.std.new_zeros(())
        total = interpolate(losses.get("base_loss", absent), losses.get("noise_loss", absent), weight)
        state.consumed = applied
        noisy_model.noise_layer.release_graph()
        state.losses = {"total": total.detach()}
        for name in losses:
            state.losses[name] = losses[name].detach()  # type: ignore[literal-required]
        return total

    def get_losses() -> CloakLossesDict:
        losses, state.losses = state.losses, None
        if losses is None or noisy_model.applied is not state.consumed:
            raise RuntimeError("get_losses needs a call of the loss since its own last call and the last forward")
        return losses

    def get_hyperparameters() -> CloakHyperparametersDict:
        state.reported = _last_forward(noisy_model, "get_hyperparameters", state.reported)
        return {"alpha": weight}

    return loss, get_losses, get_hyperparameters


class _State:
    consumed: Applied | None = None
    reported: Applied | None = None
    losses: CloakLossesDict | None = None


def _last_forward(noisy_model: NoisyModel, caller: str, used: Applied | None) -> Applied:
    applied = noisy_model.applied
    if applied is None or applied is used:
        raise RuntimeError(f"{caller} needs a forward pass of the noisy model, with noise, since its last call")
    return applied
