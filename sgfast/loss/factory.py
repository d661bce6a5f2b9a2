"""What every loss factory shares: the three functions it returns, the types of their values, argument checks."""

import math
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
        attended = consumer.pending("the loss").attention_mask
        _check_loss_arguments(loss_mask, attended, normalizers)
        total, components = compute(consumer.take("the loss"), (loss_mask != 0) & attended, normalizers or {})
        values = cast(dict[str, Tensor], components) | {"total": total}
        state.components = cast(ComponentLossesDict, {name: value.detach() for name, value in values.items()})
        state.computed_at = consumer.forwards
        return total

    def get_losses() -> ComponentLossesDict:
        components, state.components = state.components, None
        if components is None or state.computed_at != consumer.forwards:
            raise RuntimeError("get_losses needs a call of the loss since its own last call and the last forward")
        return components

    def get_hyperparameters() -> HyperparametersDict:
        if state.reported_at == consumer.forwards:
            raise RuntimeError("get_hyperparameters needs a forward pass of the noisy model since its last call")
        state.reported_at = consumer.forwards
        return hyperparameters.copy()

    return loss, get_losses, get_hyperparameters


class _State:
    components: ComponentLossesDict | None = None
    computed_at = reported_at = -1


def _check_loss_arguments(loss_mask: Tensor, attended: Tensor, normalizers: Normalizers | None) -> None:
    if not isinstance(loss_mask, Tensor):
        raise TypeError(f"loss_mask must be a torch.Tensor; got {type(loss_mask).__name__}")
    if loss_mask.shape != attended.shape:
        raise ValueError(
            f"loss_mask must have the shape of the tokens, {tuple(attended.shape)}; got {tuple(loss_mask.shape)}"
        )
    unknown = set(normalizers or ()) - {"loss_tokens", "noise_tokens"}
    if unknown:
        raise ValueError(f"normalizers may hold loss_tokens and noise_tokens; got {', '.join(sorted(unknown))}")


def weighted_sum(losses: ComponentLossesDict, weights: Mapping[str, float]) -> Tensor:
    """Σ weight · loss. A component of weight 0 is left out, so that an infinite one cannot make the sum NaN."""
    terms = [weights[name] * value for name, value in cast(dict[str, Tensor], losses).items() if weights[name]]
    return torch.stack(terms).sum()


def check_weights(weights: Mapping[str, float]) -> None:
    """Check that every weight is finite and none is negative."""
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name} must be finite and not negative; got {weight}")


def check_something_weighs(weights: Mapping[str, float]) -> None:
    """Check that the components' final weights, alpha included, leave something to minimise."""
    if not any(weights.values()):
        raise ValueError(f"alpha and the weights leave nothing to minimise: {', '.join(weights)} all weigh 0")


def check_positive(values: Mapping[str, float]) -> None:
    """Check that every value is positive."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive; got {value}")
