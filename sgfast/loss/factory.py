"""What every loss factory shares: the three functions it returns, the types of their values, argument checks."""

from collections.abc import Callable, Mapping
from typing import Protocol, TypedDict, cast

import torch
from torch import Tensor

from sgfast.model.capture import Capture, Consumer

Normalizers = Mapping[str, Tensor | float]


class ComponentLossesDict(TypedDict, total=False):
    """Detached, unweighted components of a loss, and their weighted ``total``. Components of weight 0 are absent."""

    std_log_ratio: Tensor
    input_embedding_similarity: Tensor
    distillation_layer_cosine_distance: Tensor
    distillation_layer_l2_distance: Tensor
    inverse_l2_power_law_catalyst: Tensor
    total: Tensor


class HyperparametersDict(TypedDict, total=False):
    """A factory's int, float and None arguments by name."""

    distillation_layer_index: int | None
    alpha: float
    std_log_ratio_loss_weight: float
    input_embedding_similarity_loss_weight: float
    distillation_layer_cosine_distance_loss_weight: float
    distillation_layer_l2_distance_loss_weight: float
    inverse_l2_power_law_catalyst_loss_weight: float
    inverse_l2_power_law_characteristic_length: float
    inverse_l2_power_law_exponent_of_decay: float


class LossFunction(Protocol):
    """The loss of the last forward, a scalar."""

    def __call__(self, loss_mask: Tensor, *, normalizers: Normalizers | None = None) -> Tensor:
        """Consume the last forward; see the factory."""


LossFunctions = tuple[LossFunction, Callable[[], ComponentLossesDict], Callable[[], HyperparametersDict]]


def loss_functions(
    consumer: Consumer,
    compute: Callable[[Capture, Tensor, Normalizers], tuple[Tensor, ComponentLossesDict]],
    hyperparameters: HyperparametersDict,
) -> LossFunctions:
    """Build a factory's three functions, each callable once after a forward.

    Args:
        consumer: attached to the model.
        compute: from a forward, the counted positions (B, T) bool (l & a) and normalizers to loss and components.
        hyperparameters: what the last function returns.
    """
    state = _State()

    def loss(loss_mask: Tensor, *, normalizers: Normalizers | None = None) -> Tensor:
        capture = consumer.take("the loss")
        shape = capture.attention_mask.shape
        if loss_mask.shape != shape:
            raise ValueError(
                f"loss_mask must have the shape of the tokens, {tuple(shape)}; got {tuple(loss_mask.shape)}"
            )
        total, components = compute(capture, (loss_mask != 0) & capture.attention_mask, normalizers or {})
        values = cast(dict[str, Tensor], components) | {"total": total}
        state.components = cast(ComponentLossesDict, {name: value.detach() for name, value in values.items()})
        return total

    def get_losses() -> ComponentLossesDict:
        if state.components is None:
            raise RuntimeError("get_losses needs a call of the loss since its own last call")
        components, state.components = state.components, None
        return components

    def get_hyperparameters() -> HyperparametersDict:
        if state.reported_at == consumer.forwards:
            raise RuntimeError("get_hyperparameters needs a forward pass of the noisy model since its last call")
        state.reported_at = consumer.forwards
        return hyperparameters.copy()

    return loss, get_losses, get_hyperparameters


def weighted_sum(losses: ComponentLossesDict, weights: Mapping[str, float]) -> Tensor:
    """Σ weight · loss. A component of weight 0 is left out, so that an infinite one cannot make the sum NaN."""
    terms = [weights[name] * value for name, value in cast(dict[str, Tensor], losses).items() if weights[name]]
    return torch.stack(terms).sum()


class _State:
    components: ComponentLossesDict | None = None
    reported_at = -1


def check_alpha(alpha: float) -> None:
    """Check an interpolation factor."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1]; got {alpha}")


def check_weights(weights: Mapping[str, float]) -> None:
    """Check that no weight is negative and one is positive."""
    for name, weight in weights.items():
        if not weight >= 0:
            raise ValueError(f"{name} must not be negative; got {weight}")
    if not any(weights.values()):
        raise ValueError(f"at least one of {', '.join(weights)} must be positive")


def check_positive(values: Mapping[str, float]) -> None:
    """Check that every value is positive."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive; got {value}")


def check_log_scale(scale: tuple[float, float]) -> None:
    """Check that log sigma and 1/sigma are finite over a noise layer's scale."""
    if not scale[0] > 0:
        raise ValueError(
            f"a loss with log sigma or 1/sigma needs a noise layer whose scale starts above 0; got {scale}"
        )
