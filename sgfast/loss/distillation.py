"""Losses that train a transform by distillation: the noisy model should compute what the clean one does."""

from torch import Tensor

from sgfast.loss import components as terms
from sgfast.loss.factory import (
    ComponentLossesDict,
    HyperparametersDict,
    LossFunctions,
    Normalizers,
    check_positive,
    check_something_weighs,
    check_weights,
    loss_functions,
    weighted_sum,
)
from sgfast.model.capture import Capture
from sgfast.model.decoder import resolve_layer_index
from sgfast.model.noise_loss import check_interpolation
from sgfast.model.noisy_transformer_masking_model import NoiseMaskedNoisyTransformerModel
from sgfast.noise_layer.arguments import check_log_scale
from sgfast.ops.hidden import hidden_distances


def distillation_loss_factory(
    noisy_model: NoiseMaskedNoisyTransformerModel,
    distillation_layer_index: int | None,
    alpha: float,
    std_log_ratio_loss_weight: float,
    input_embedding_similarity_loss_weight: float,
    distillation_layer_cosine_distance_loss_weight: float | None = None,
    distillation_layer_l2_distance_loss_weight: float = 0.0,
    inverse_l2_power_law_catalyst_loss_weight: float = 0.0,
    inverse_l2_power_law_characteristic_length: float = 1.0,
    inverse_l2_power_law_exponent_of_decay: float = 1.0,
    *,
    distillation_layer_distance_loss_weight: float | None = None,
) -> LossFunctions:
    """Create a loss that trades similarity at one decoder layer against the strength of the transform.

        loss = (1−alpha) (w_cos cos + w_l2 l2) + alpha (w_std std + w_sim sim + w_cat cat)

    with the components of `sgfast.loss.components`. A component of weight 0 is not computed.

    Args:
        noisy_model: the model to train. While anything created here is alive, its training forwards run only as deep
            as the distilled layer.
        distillation_layer_index: decoder layer whose outputs are compared (negative counts from the end); None for
            the logits.
        alpha: in [0, 1]: 0 is all similarity, 1 all strength.
        std_log_ratio_loss_weight: pushes standard deviations up.
        input_embedding_similarity_loss_weight: pushes transformed embeddings away in angle.
        distillation_layer_cosine_distance_loss_weight: pulls the layer's outputs together in angle.
        distillation_layer_l2_distance_loss_weight: pulls them together in relative distance.
        inverse_l2_power_law_catalyst_loss_weight: pushes transformed embeddings away in distance.
        inverse_l2_power_law_characteristic_length: distance at which that push is about 1; the 5th percentile of the
            table's Voronoi distances is a good value.
        inverse_l2_power_law_exponent_of_decay: how fast it falls with distance.
        distillation_layer_distance_loss_weight: older name of the cosine weight.

    Returns:
        ``(loss, get_losses, get_hyperparameters)``, each callable once after a forward of ``noisy_model``:
        ``loss(loss_mask, *, normalizers=None)`` gives the scalar to call ``backward`` on, ``loss_mask`` (B, T) being
        nonzero where a position counts; ``normalizers={"loss_tokens": …, "noise_tokens": …}`` replaces the batch's
        token counts by global ones, for gradient accumulation. ``get_losses()`` gives the detached, unweighted
        components and ``total``; ``get_hyperparameters()`` this call's int, float and None arguments.

    Raises:
        ValueError: alpha outside [0, 1], a negative weight, a length or exponent that is not positive, no such layer,
            nothing left to minimise, or a noise layer whose scale starts at 0 (log sigma would be infinite).
        TypeError: the cosine weight is missing or given under both names.
    """
    if (distillation_layer_cosine_distance_loss_weight is None) == (distillation_layer_distance_loss_weight is None):
        raise TypeError("give distillation_layer_cosine_distance_loss_weight (once)")
    cosine_weight = distillation_layer_cosine_distance_loss_weight
    if cosine_weight is None:
        cosine_weight = distillation_layer_distance_loss_weight
    assert cosine_weight is not None
    hyperparameters: HyperparametersDict = {
        "distillation_layer_index": distillation_layer_index,
        "alpha": alpha,
        "std_log_ratio_loss_weight": std_log_ratio_loss_weight,
        "input_embedding_similarity_loss_weight": input_embedding_similarity_loss_weight,
        "distillation_layer_cosine_distance_loss_weight": cosine_weight,
        "distillation_layer_l2_distance_loss_weight": distillation_layer_l2_distance_loss_weight,
        "inverse_l2_power_law_catalyst_loss_weight": inverse_l2_power_law_catalyst_loss_weight,
        "inverse_l2_power_law_characteristic_length": inverse_l2_power_law_characteristic_length,
        "inverse_l2_power_law_exponent_of_decay": inverse_l2_power_law_exponent_of_decay,
    }
    check_interpolation(alpha)
    check_weights(
        {
            "std_log_ratio_loss_weight": std_log_ratio_loss_weight,
            "input_embedding_similarity_loss_weight": input_embedding_similarity_loss_weight,
            "distillation_layer_cosine_distance_loss_weight": cosine_weight,
            "distillation_layer_l2_distance_loss_weight": distillation_layer_l2_distance_loss_weight,
            "inverse_l2_power_law_catalyst_loss_weight": inverse_l2_power_law_catalyst_loss_weight,
        }
    )
    check_positive(
        {
            "inverse_l2_power_law_characteristic_length": inverse_l2_power_law_characteristic_length,
            "inverse_l2_power_law_exponent_of_decay": inverse_l2_power_law_exponent_of_decay,
        }
    )
    weights = {
        "distillation_layer_cosine_distance": cosine_weight,
        "distillation_layer_l2_distance": distillation_layer_l2_distance_loss_weight,
        "std_log_ratio": std_log_ratio_loss_weight,
        "input_embedding_similarity": input_embedding_similarity_loss_weight,
        "inverse_l2_power_law_catalyst": inverse_l2_power_law_catalyst_loss_weight,
    }
    interpolated = {
        name: (1 - alpha if name.startswith("distillation_layer") else alpha) * weight
        for name, weight in weights.items()
    }
    check_something_weighs(interpolated)
    if weights["std_log_ratio"]:
        check_log_scale(noisy_model.noise_layer.scale)
    layer = None
    if distillation_layer_index is not None:
        layer = resolve_layer_index(noisy_model.base_model, distillation_layer_index)

    def compute(capture: Capture, counted: Tensor, normalizers: Normalizers) -> tuple[Tensor, ComponentLossesDict]:
        losses: ComponentLossesDict = {}
        loss_tokens = normalizers.get("loss_tokens")
        if weights["distillation_layer_cosine_distance"] or weights["distillation_layer_l2_distance"]:
            clean, noisy = capture.halves(layer)
            distances = hidden_distances(noisy, clean, counted)
            if weights["distillation_layer_cosine_distance"]:
                losses["distillation_layer_cosine_distance"] = terms.distillation_layer_cosine_distance(
                    distances.cosine_distance, counted, loss_tokens
                )
            if weights["distillation_layer_l2_distance"]:
                losses["distillation_layer_l2_distance"] = terms.distillation_layer_l2_distance(
                    distances.normalized_l2, counted, loss_tokens
                )
        selected, noise_tokens = capture.noise_mask, normalizers.get("noise_tokens")
        if weights["std_log_ratio"]:
            losses["std_log_ratio"] = terms.std_log_ratio(
                capture.transform.std, noisy_model.noise_layer.scale[1], selected, capture.transform.mask, noise_tokens
            )
        if weights["input_embedding_similarity"] or weights["inverse_l2_power_law_catalyst"]:
            distances = hidden_distances(capture.transform.output, capture.transform.input, selected)
            if weights["input_embedding_similarity"]:
                losses["input_embedding_similarity"] = terms.input_embedding_similarity(
                    distances.cosine_similarity, selected, noise_tokens
                )
            if weights["inverse_l2_power_law_catalyst"]:
                losses["inverse_l2_power_law_catalyst"] = terms.inverse_l2_power_law_catalyst(
                    distances.l2,
                    inverse_l2_power_law_characteristic_length,
                    inverse_l2_power_law_exponent_of_decay,
                    selected,
                    noise_tokens,
                )
        noisy_model.noise_layer.release_graph()
        return weighted_sum(losses, interpolated), losses

    consumer = noisy_model.attach(layers=frozenset() if layer is None else frozenset({layer}), logits=layer is None)
    return loss_functions(consumer, compute, hyperparameters)
