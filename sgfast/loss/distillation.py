"""Losses that train a transform by distillation: the noisy model should compute what the clean one does.

Every factory returns ``(loss, get_losses, get_hyperparameters)``, each callable once after a forward of the model:

``loss(loss_mask, *, normalizers=None)``
    the scalar to call ``backward`` on, in float32. ``loss_mask`` (B, T) is nonzero where a position counts.
    ``normalizers={"loss_tokens": …, "noise_tokens": …}`` replaces the batch's counts of counted (l & a) and of
    transformed (n & a) tokens by global ones, so that the losses of several batches add up to that of all of them;
    ``"attended_tokens"`` (a) is read by `sgfast.loss.jigsaw` where a term averages over them.
    Mutual information, whose pairs belong to a batch, then adds up to the batches' mean weighted by ``noise_tokens``.
``get_losses()``
    the detached, unweighted components of weight > 0, and ``total``.
``get_hyperparameters()``
    the factory's int, float and None arguments.

A call out of this order raises RuntimeError. A component of weight 0 is not computed; at alpha 0 or 1 the side that
does not count still is, to be seen in ``get_losses``. While anything that a factory returned is alive, training
forwards of the model run as deep as its components read, and no deeper.
"""

from collections.abc import Sequence

from torch import Tensor

from sgfast.loss import terms
from sgfast.loss.cross_entropy_distillation import (
    cross_entropy_distillation_factory,
    mutual_information_cross_entropy_distillation_factory,
)
from sgfast.loss.factory import (
    HyperparametersDict,
    LossFunctions,
    Normalizers,
    attach,
    check_hyperparameters,
    check_noisy_model,
    loss_functions,
    resolve_distillation_layer,
)
from sgfast.model.capture import Capture
from sgfast.model.noisy_transformer_masking_model import NoiseMaskedNoisyTransformerModel
from sgfast.noise_layer.arguments import check_bool

__all__ = [
    "cross_entropy_distillation_factory",
    "distillation_loss_factory",
    "mutual_information_cross_entropy_distillation_factory",
    "mutual_information_distillation_loss_factory",
]


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
        noisy_model: the model to train.
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
        ``(loss, get_losses, get_hyperparameters)``; see `sgfast.loss.distillation`.

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
    check_noisy_model("noisy_model", noisy_model)
    wanted, weights = check_hyperparameters(noisy_model, hyperparameters)
    layer = resolve_distillation_layer(noisy_model, distillation_layer_index)

    def compute(captures: Sequence[Capture], counted: Tensor, normalizers: Normalizers) -> dict[str, Tensor]:
        (capture,) = captures
        noise_tokens = normalizers.get("noise_tokens")
        losses = terms.layer_losses(
            capture.noisy, capture.clean, layer, counted, wanted, normalizers.get("loss_tokens")
        )
        losses |= terms.std_loss(capture, wanted, noisy_model.noise_layer.scale[1], noise_tokens)
        losses |= terms.angle_and_distance_losses(
            capture,
            wanted,
            noise_tokens,
            inverse_l2_power_law_characteristic_length,
            inverse_l2_power_law_exponent_of_decay,
        )
        noisy_model.noise_layer.release_graph()
        return losses

    return loss_functions({"the noisy model": attach(noisy_model, layer, wanted)}, compute, weights, hyperparameters)


def mutual_information_distillation_loss_factory(
    noisy_model: NoiseMaskedNoisyTransformerModel,
    distillation_layer_index: int | None,
    alpha: float,
    distillation_layer_l2_distance_loss_weight: float,
    mutual_information_loss_weight: float,
    inverse_l2_power_law_catalyst_loss_weight: float = 0.0,
    inverse_l2_power_law_characteristic_length: float = 1.0,
    inverse_l2_power_law_exponent_of_decay: float = 1.0,
    input_embedding_similarity_loss_weight: float = 0.0,
    combine_noise_masks_for_mutual_information_sub_batches: bool = True,
) -> LossFunctions:
    """Create a loss that trades similarity at one decoder layer against what the transform tells about the text.

        loss = (1−alpha) (w_l2 l2) + alpha (w_mi mi + w_sim sim + w_cat cat)

    Batches must have at least 2 rows: the two halves are compared (of an odd batch the second is the larger one).

    Args:
        noisy_model: the model to train.
        distillation_layer_index: as in `distillation_loss_factory`.
        alpha: in [0, 1]: 0 is all similarity, 1 all strength.
        distillation_layer_l2_distance_loss_weight: pulls the layer's outputs together in relative distance.
        mutual_information_loss_weight: makes transformed texts hard to tell apart.
        inverse_l2_power_law_catalyst_loss_weight: as in `distillation_loss_factory`.
        inverse_l2_power_law_characteristic_length: likewise.
        inverse_l2_power_law_exponent_of_decay: likewise.
        input_embedding_similarity_loss_weight: likewise.
        combine_noise_masks_for_mutual_information_sub_batches: compare two rows at the positions that are transformed
            in both; False: at those transformed in the first and attended in the second.

    Returns:
        ``(loss, get_losses, get_hyperparameters)``; see `sgfast.loss.distillation`.

    Raises:
        ValueError: as `distillation_loss_factory`; from ``loss``: a batch of fewer than 2 rows.
        TypeError: an argument of another type.
    """
    hyperparameters: HyperparametersDict = {
        "distillation_layer_index": distillation_layer_index,
        "alpha": alpha,
        "distillation_layer_l2_distance_loss_weight": distillation_layer_l2_distance_loss_weight,
        "mutual_information_loss_weight": mutual_information_loss_weight,
        "inverse_l2_power_law_catalyst_loss_weight": inverse_l2_power_law_catalyst_loss_weight,
        "inverse_l2_power_law_characteristic_length": inverse_l2_power_law_characteristic_length,
        "inverse_l2_power_law_exponent_of_decay": inverse_l2_power_law_exponent_of_decay,
        "input_embedding_similarity_loss_weight": input_embedding_similarity_loss_weight,
    }
    check_noisy_model("noisy_model", noisy_model)
    wanted, weights = check_hyperparameters(noisy_model, hyperparameters)
    combine = check_bool(
        "combine_noise_masks_for_mutual_information_sub_batches", combine_noise_masks_for_mutual_information_sub_batches
    )
    layer = resolve_distillation_layer(noisy_model, distillation_layer_index)

    def compute(captures: Sequence[Capture], counted: Tensor, normalizers: Normalizers) -> dict[str, Tensor]:
        (capture,) = captures
        noise_tokens = normalizers.get("noise_tokens")
        losses = terms.mutual_information_loss(capture, wanted, combine, noise_tokens)
        losses |= terms.layer_losses(
            capture.noisy, capture.clean, layer, counted, wanted, normalizers.get("loss_tokens")
        )
        losses |= terms.angle_and_distance_losses(
            capture,
            wanted,
            noise_tokens,
            inverse_l2_power_law_characteristic_length,
            inverse_l2_power_law_exponent_of_decay,
        )
        noisy_model.noise_layer.release_graph()
        return losses

    return loss_functions({"the noisy model": attach(noisy_model, layer, wanted)}, compute, weights, hyperparameters)
