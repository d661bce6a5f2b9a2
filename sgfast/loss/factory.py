"""The shared part of all loss factories: the three returned functions, the types of their values, argument checks."""

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypedDict, cast

import torch
from torch import Tensor

from sgfast.model.capture import Capture, Consumer
from sgfast.model.decoder import resolve_layer_index
from sgfast.model.noise_loss import check_interpolation
from sgfast.model.noisy_transformer_masking_model import NoiseMaskedNoisyTransformerModel
from sgfast.noise_layer.arguments import check_log_scale
from sgfast.ops import validation
from sgfast.ops.validation import check_real

Normalizers = Mapping[str, Tensor | float]


class ComponentLossesDict(TypedDict, total=False):
    """Detached, unweighted components of a loss, and their weighted ``total``. Components of weight 0 are absent."""

    std_log_ratio: Tensor
    input_embedding_similarity: Tensor
    absolute_cosine_similarity: Tensor
    median_norm_penalty: Tensor
    mutual_information: Tensor
    known_transform_attack: Tensor
    inverse_l2_power_law_catalyst: Tensor
    distillation_layer_cosine_distance: Tensor
    distillation_layer_l2_distance: Tensor
    distillation_cross_entropy: Tensor
    distillation_protection_l2: Tensor
    clean_embedding_performance: Tensor
    total: Tensor


class HyperparametersDict(TypedDict, total=False):
    """A factory's int, float and None arguments by name."""

    distillation_layer_index: int | None
    alpha: float
    std_log_ratio_loss_weight: float
    input_embedding_similarity_loss_weight: float
    absolute_cosine_similarity_penalty_weight: float
    median_norm_penalty_weight: float
    mutual_information_loss_weight: float
    known_transform_attack_loss_weight: float
    inverse_l2_power_law_catalyst_loss_weight: float
    inverse_l2_power_law_characteristic_length: float
    inverse_l2_power_law_exponent_of_decay: float
    distillation_layer_cosine_distance_loss_weight: float
    distillation_layer_l2_distance_loss_weight: float
    distillation_cross_entropy_loss_weight: float
    distillation_protection_l2_loss_weight: float
    clean_embedding_performance_on_student_model_loss_weight: float


class LossFunction(Protocol):
    """The loss of the last forward, a scalar."""

    def __call__(self, loss_mask: Tensor, *, normalizers: Normalizers | None = None) -> Tensor:
        """Consume the last forward; see the factory."""


LossFunctions = tuple[LossFunction, Callable[[], ComponentLossesDict], Callable[[], HyperparametersDict]]

_WEIGHTED = {
    "std_log_ratio_loss_weight": "std_log_ratio",
    "input_embedding_similarity_loss_weight": "input_embedding_similarity",
    "absolute_cosine_similarity_penalty_weight": "absolute_cosine_similarity",
    "median_norm_penalty_weight": "median_norm_penalty",
    "mutual_information_loss_weight": "mutual_information",
    "known_transform_attack_loss_weight": "known_transform_attack",
    "inverse_l2_power_law_catalyst_loss_weight": "inverse_l2_power_law_catalyst",
    "distillation_layer_cosine_distance_loss_weight": "distillation_layer_cosine_distance",
    "distillation_layer_l2_distance_loss_weight": "distillation_layer_l2_distance",
    "distillation_cross_entropy_loss_weight": "distillation_cross_entropy",
    "distillation_protection_l2_loss_weight": "distillation_protection_l2",
    "clean_embedding_performance_on_student_model_loss_weight": "clean_embedding_performance",
}
_POSITIVE = ("inverse_l2_power_law_characteristic_length", "inverse_l2_power_law_exponent_of_decay")
# These components weigh 1 − alpha. The others measure the transform's strength and weigh alpha.
_UTILITY = (
    "distillation_layer_cosine_distance",
    "distillation_layer_l2_distance",
    "distillation_protection_l2",
    "clean_embedding_performance",
)
# These components read the model's outputs. The others read the transform alone.
READ_OUTPUTS = (*_UTILITY, "distillation_cross_entropy")
_NEED_LOG_SIGMA = ("std_log_ratio", "mutual_information", "known_transform_attack")


class Weights(NamedTuple):
    """The weights of a factory's components."""

    wanted: frozenset[str]  # components of weight > 0; only these are computed
    final: dict[str, float]  # multiplied by alpha or 1 − alpha


def check_hyperparameters(
    noisy_model: NoiseMaskedNoisyTransformerModel, hyperparameters: HyperparametersDict
) -> Weights:
    """Check a factory's numbers and return the weights of its components."""
    arguments = cast(dict[str, Any], hyperparameters)
    alpha = check_interpolation(arguments["alpha"]) if "alpha" in arguments else None
    weights = {}
    for argument, component in _WEIGHTED.items():
        if argument in arguments:
            weights[component] = check_real(argument, arguments[argument])
            if not 0 <= weights[component] < math.inf:
                raise ValueError(f"{argument} must be finite and not negative; got {arguments[argument]}")
    for argument in _POSITIVE:
        if argument in arguments and not check_real(argument, arguments[argument]) > 0:
            raise ValueError(f"{argument} must be positive; got {arguments[argument]}")
    wanted = frozenset(component for component, weight in weights.items() if weight)
    if alpha is not None:
        weights = {name: ((1 - alpha) if name in _UTILITY else alpha) * weight for name, weight in weights.items()}
    if not any(weights.values()):
        raise ValueError(f"alpha and the weights leave nothing to minimise: {', '.join(weights)} all weigh 0")
    if not wanted.isdisjoint(_NEED_LOG_SIGMA):
        check_log_scale(noisy_model.noise_layer.scale)
    return Weights(wanted, weights)


def check_noisy_model(
    name: str, noisy_model: Any, kind: type[NoiseMaskedNoisyTransformerModel] = NoiseMaskedNoisyTransformerModel
) -> None:
    """Check for a noisy language model."""
    if not isinstance(noisy_model, kind):
        raise TypeError(f"{name} must be a {kind.__name__}; got {type(noisy_model).__name__}")


def resolve_distillation_layer(
    noisy_model: NoiseMaskedNoisyTransformerModel, distillation_layer_index: int | None
) -> int | None:
    """Check the index of a decoder layer and return it as 0-based; None for the logits."""
    if distillation_layer_index is None:
        return None
    return resolve_layer_index(noisy_model.base_model, distillation_layer_index)


def attach(noisy_model: NoiseMaskedNoisyTransformerModel, layer: int | None, wanted: frozenset[str]) -> Consumer:
    """Let forwards keep the tensors that the wanted components read: a layer's outputs or the logits."""
    return attach_reader(noisy_model, layer, not wanted.isdisjoint(READ_OUTPUTS))


def attach_reader(
    noisy_model: NoiseMaskedNoisyTransformerModel, layer: int | None, reads: bool, **halves: bool
) -> Consumer:
    """Let forwards keep a layer's outputs, or the logits for None, if ``reads`` is True."""
    layers = frozenset({layer}) if reads and layer is not None else frozenset[int]()
    return noisy_model.attach(layers=layers, logits=reads and layer is None, sides=layer is None, **halves)


def loss_functions(
    consumers: Mapping[str, Consumer],
    compute: Callable[[Sequence[Capture], Tensor, Normalizers], dict[str, Tensor]],
    weights: Mapping[str, float],
    hyperparameters: HyperparametersDict,
) -> LossFunctions:
    """Build a factory's three functions, each callable once after a forward of every model.

    Args:
        consumers: the consumer that is attached to each model; the keys name the models in errors.
        compute: returns the components from a forward of each model, the counted positions (B, T) bool (l & a) and
            the normalizers.
        weights: weights of the components.
        hyperparameters: return value of the last function.
    """
    state = _State()
    names = " and of ".join(consumers)

    def forwards() -> tuple[int, ...]:
        return tuple(consumer.forwards for consumer in consumers.values())

    def loss(loss_mask: Tensor, *, normalizers: Normalizers | None = None) -> Tensor:
        missing = [name for name, consumer in consumers.items() if not consumer.has_forward]
        if missing:
            raise RuntimeError(f"the loss needs a forward pass of {' and of '.join(missing)} since its last call")
        captures = [consumer.pending("the loss") for consumer in consumers.values()]
        attended = captures[0].attention_mask
        _check_loss_arguments(loss_mask, attended, normalizers)
        components = compute(captures, validation.as_bool("loss_mask", loss_mask) & attended, normalizers or {})
        for consumer in consumers.values():
            consumer.take("the loss")
        total = weighted_sum(components, weights)
        detached = {name: value.detach() for name, value in (components | {"total": total}).items()}
        state.components, state.computed_at = cast(ComponentLossesDict, detached), forwards()
        return total

    def get_losses() -> ComponentLossesDict:
        components, state.components = state.components, None
        if components is None or state.computed_at != forwards():
            raise RuntimeError("get_losses needs a call of the loss since its own last call and the last forward")
        return components

    def get_hyperparameters() -> HyperparametersDict:
        now = forwards()
        if any(reported == count for reported, count in zip(state.reported_at, now, strict=False)):
            raise RuntimeError(f"get_hyperparameters needs a forward pass of {names} since its last call")
        state.reported_at = now
        return hyperparameters.copy()

    return loss, get_losses, get_hyperparameters


class _State:
    components: ComponentLossesDict | None = None
    computed_at: tuple[int, ...] = ()
    reported_at: tuple[int, ...] = ()


def _check_loss_arguments(loss_mask: Tensor, attended: Tensor, normalizers: Normalizers | None) -> None:
    validation.check_tensor("loss_mask", loss_mask, beside=attended)
    if loss_mask.shape != attended.shape:
        raise ValueError(
            f"loss_mask must have the shape of the tokens, {tuple(attended.shape)}; got {tuple(loss_mask.shape)}"
        )
    validation.check_device("loss_mask", loss_mask, "the tokens", attended)
    unknown = set(normalizers or ()) - {"loss_tokens", "noise_tokens", "attended_tokens"}
    if unknown:
        allowed = "loss_tokens, noise_tokens and attended_tokens"
        raise ValueError(f"normalizers may hold {allowed}; got {', '.join(sorted(unknown))}")
    for name, count in (normalizers or {}).items():
        if isinstance(count, Tensor):
            validation.check_tensor(f"normalizers[{name!r}]", count)
        if not isinstance(count, numbers.Real) and not (isinstance(count, Tensor) and count.dim() == 0):
            got = f"shape {tuple(count.shape)}" if isinstance(count, Tensor) else type(count).__name__
            raise TypeError(f"normalizers[{name!r}] must be a number or a tensor without dimensions; got {got}")


def weighted_sum(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Σ weight · loss. A component of weight 0 is left out, so that an infinite one cannot make the sum NaN."""
    return torch.stack([weights[name] * value for name, value in losses.items() if weights[name]]).sum()
