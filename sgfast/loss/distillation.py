"""Losses that train a transform by distillation: the noisy model learns to compute what the clean model computes.

Every factory returns ``(loss, get_losses, get_hyperparameters)``, each callable once after a forward of the model:

``loss(loss_mask, *, normalizers=None)``
    returns the scalar to call ``backward`` on, in float32. ``loss_mask`` (B, T) is nonzero at positions that count.
    ``normalizers={"loss_tokens": …, "noise_tokens": …}`` replaces the batch's numbers of counted (l & a) and of
    transformed (n & a) tokens by global numbers, so that the losses of several batches add up to the loss of all of
    them. `sgfast.loss.jigsaw` also reads ``"attended_tokens"`` (a), for a component that averages over attended tokens.
    Mutual information compares the rows of one batch: its values add up to the batches' mean weighted by
    ``noise_tokens``.
``get_losses()``
    returns the detached, unweighted components of weight > 0, and ``total``.
``get_hyperparameters()``
    returns the factory's int, float and None arguments.

A call out of this order raises RuntimeError. A component of weight 0 is not computed. At alpha 0 or 1 the components
that alpha removes from the total are still computed and appear in ``get_losses``. While anything that a factory
returned is alive, training forwards of the model run as deep as its components read, and no deeper.

The two losses with cross entropy are the losses of the paper "Learning Obfuscations Of LLM Embedding Sequences: Stained
Glass Transform" (arXiv 2506.09452), as far as the paper states them.
"""

from collections.abc import Sequence

from torch import Tensor

from sgfast.loss.components import captured
from sgfast.loss.components.known_transform import attack_on, known_transform_component
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
from sgfast.model.median_norm import median_target_norm
from sgfast.model.noisy_transformer_masking_model import NoiseMaskedNoisyTransformerModel
from sgfast.ops.validation import check_bool

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
    known_transform_attack_loss_weight: float = 0.0,
) -> LossFunctions:
    """Create a loss that trades similarity at one decoder layer against the strength of the transform.

        loss = (1−alpha) (w_cos cos + w_l2 l2) + alpha (w_std std + w_sim sim + w_cat cat + w_kta kta)

    with the components of `sgfast.loss.components`. A component of weight 0 is not computed.

    Args:
        noisy_model: the model to train.
        distillation_layer_index: decoder layer whose outputs are compared (negative counts from the end); None for
            the logits.
        alpha: in [0, 1]: 0 is all similarity, 1 all strength.
        std_log_ratio_loss_weight: pushes standard deviations up.
        input_embedding_similarity_loss_weight: pushes transformed embeddings away in angle.
        distillation_layer_cosine_distance_loss_weight: pulls the layer's outputs together in angle.
        distillation_layer_l2_distance_loss_weight: pulls the layer's outputs together in relative distance.
        inverse_l2_power_law_catalyst_loss_weight: pushes transformed embeddings away in distance.
        inverse_l2_power_law_characteristic_length: distance at which the catalyst is about 1; the 5th percentile of
            the table's Voronoi distances is a good value.
        inverse_l2_power_law_exponent_of_decay: power with which the catalyst falls with distance.
        distillation_layer_distance_loss_weight: older name of the cosine weight.
        known_transform_attack_loss_weight: makes the true token hard to tell from others for an attacker who knows the
            transform; see `sgfast.loss.components.known_transform`. Needs a `TransformerCloak` over the embeddings.

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
        "known_transform_attack_loss_weight": known_transform_attack_loss_weight,
    }
    return _loss_functions(noisy_model, hyperparameters)


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
    *,
    known_transform_attack_loss_weight: float = 0.0,
) -> LossFunctions:
    """Create a loss that trades similarity at one decoder layer against the information that the transform reveals.

        loss = (1−alpha) (w_l2 l2) + alpha (w_mi mi + w_sim sim + w_cat cat + w_kta kta)

    Batches must have at least 2 rows, because the two halves are compared. The second half of an odd batch is larger.

    Args:
        noisy_model: the model to train.
        distillation_layer_index: as in `distillation_loss_factory`.
        alpha: in [0, 1]: 0 is all similarity, 1 all strength.
        distillation_layer_l2_distance_loss_weight: pulls the layer's outputs together in relative distance.
        mutual_information_loss_weight: makes transformed texts hard to tell apart.
        inverse_l2_power_law_catalyst_loss_weight: as in `distillation_loss_factory`.
        inverse_l2_power_law_characteristic_length: as in `distillation_loss_factory`.
        inverse_l2_power_law_exponent_of_decay: as in `distillation_loss_factory`.
        input_embedding_similarity_loss_weight: as in `distillation_loss_factory`.
        combine_noise_masks_for_mutual_information_sub_batches: True compares two rows at the positions that are
            transformed in both; False at the positions that are transformed in the first and attended in the second.
        known_transform_attack_loss_weight: as in `distillation_loss_factory`.

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
        "known_transform_attack_loss_weight": known_transform_attack_loss_weight,
    }
    return _loss_functions(
        noisy_model, hyperparameters, combine_noise_masks=combine_noise_masks_for_mutual_information_sub_batches
    )


def cross_entropy_distillation_factory(
    noisy_model: NoiseMaskedNoisyTransformerModel,
    distillation_cross_entropy_loss_weight: float,
    absolute_cosine_similarity_penalty_weight: float,
    median_norm_penalty_weight: float,
    *,
    known_transform_attack_loss_weight: float = 0.0,
) -> LossFunctions:
    """Create a loss that trades the clean model's next-token distributions against the strength of the transform.

        loss = w_ce ce + w_acs acs + w_mnp mnp + w_kta kta

    Args:
        noisy_model: the model to train.
        distillation_cross_entropy_loss_weight: pulls the noisy logits to the clean ones.
        absolute_cosine_similarity_penalty_weight: makes transformed embeddings orthogonal to clean ones.
        median_norm_penalty_weight: keeps the norms of mean-shifted embeddings near the median norm of the target
            layer's outputs over all token ids. The median norm is computed once, by this call.
        known_transform_attack_loss_weight: as in `distillation_loss_factory`.

    Returns:
        ``(loss, get_losses, get_hyperparameters)``; see `sgfast.loss.distillation`.

    Raises:
        ValueError: a negative weight, or nothing left to minimise.
        TypeError: an argument of another type.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
        >>> from sgfast.model import NoiseMaskedNoisyTransformerModel
        >>> from sgfast.noise_layer import TransformerCloak
        >>> config = LlamaConfig(
        ...     vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
        ... )
        >>> noisy_model = NoiseMaskedNoisyTransformerModel(
        ...     TransformerCloak, LlamaForCausalLM(config), config_path=config, transformer_type=LlamaModel
        ... )
        >>> loss, get_losses, _ = cross_entropy_distillation_factory(
        ...     noisy_model.train(),
        ...     distillation_cross_entropy_loss_weight=1.0,
        ...     absolute_cosine_similarity_penalty_weight=0.3,
        ...     median_norm_penalty_weight=0.05,
        ... )
        >>> output = noisy_model(input_ids=torch.arange(6).view(2, 3))
        >>> loss(loss_mask=torch.ones(2, 3)).backward()
        >>> sorted(get_losses())
        ['absolute_cosine_similarity', 'distillation_cross_entropy', 'median_norm_penalty', 'total']
    """
    hyperparameters: HyperparametersDict = {
        "distillation_cross_entropy_loss_weight": distillation_cross_entropy_loss_weight,
        "absolute_cosine_similarity_penalty_weight": absolute_cosine_similarity_penalty_weight,
        "median_norm_penalty_weight": median_norm_penalty_weight,
        "known_transform_attack_loss_weight": known_transform_attack_loss_weight,
    }
    return _loss_functions(noisy_model, hyperparameters)


def mutual_information_cross_entropy_distillation_factory(
    noisy_model: NoiseMaskedNoisyTransformerModel,
    mutual_information_loss_weight: float,
    distillation_cross_entropy_loss_weight: float,
    absolute_cosine_similarity_penalty_weight: float,
    median_norm_penalty_weight: float,
    combine_noise_masks_for_mutual_information_sub_batches: bool = True,
    *,
    known_transform_attack_loss_weight: float = 0.0,
) -> LossFunctions:
    """Create the loss of `cross_entropy_distillation_factory` with the mutual information as a further component.

        loss = w_ce ce + w_mi mi + w_acs acs + w_mnp mnp + w_kta kta

    Batches must have an even number of rows, because the two halves are compared.

    Args:
        noisy_model: the model to train.
        mutual_information_loss_weight: makes transformed texts hard to tell apart.
        distillation_cross_entropy_loss_weight: as in `cross_entropy_distillation_factory`.
        absolute_cosine_similarity_penalty_weight: as in `cross_entropy_distillation_factory`.
        median_norm_penalty_weight: as in `cross_entropy_distillation_factory`.
        combine_noise_masks_for_mutual_information_sub_batches: True compares two rows at the positions that are
            transformed in both; False at the positions that are transformed in the first and attended in the second.
        known_transform_attack_loss_weight: as in `distillation_loss_factory`.

    Returns:
        ``(loss, get_losses, get_hyperparameters)``; see `sgfast.loss.distillation`.

    Raises:
        ValueError: a negative weight, nothing left to minimise, or a noise layer whose scale starts at 0 (1/sigma would
            be infinite); from ``loss``: an odd number of rows.
        TypeError: an argument of another type.
    """
    hyperparameters: HyperparametersDict = {
        "mutual_information_loss_weight": mutual_information_loss_weight,
        "distillation_cross_entropy_loss_weight": distillation_cross_entropy_loss_weight,
        "absolute_cosine_similarity_penalty_weight": absolute_cosine_similarity_penalty_weight,
        "median_norm_penalty_weight": median_norm_penalty_weight,
        "known_transform_attack_loss_weight": known_transform_attack_loss_weight,
    }
    return _loss_functions(
        noisy_model,
        hyperparameters,
        combine_noise_masks=combine_noise_masks_for_mutual_information_sub_batches,
        even_batch=True,
    )


def _loss_functions(
    noisy_model: NoiseMaskedNoisyTransformerModel,
    hyperparameters: HyperparametersDict,
    *,
    combine_noise_masks: bool = True,
    even_batch: bool = False,
) -> LossFunctions:
    """Build the three functions of a factory. The weights among the hyperparameters choose the components."""
    check_noisy_model("noisy_model", noisy_model)
    wanted, weights = check_hyperparameters(noisy_model, hyperparameters)
    check_bool("combine_noise_masks_for_mutual_information_sub_batches", combine_noise_masks)
    layer = resolve_distillation_layer(noisy_model, hyperparameters.get("distillation_layer_index"))
    median_norm = median_target_norm(noisy_model) if "median_norm_penalty" in wanted else 0.0
    length = hyperparameters.get("inverse_l2_power_law_characteristic_length", 1.0)
    exponent = hyperparameters.get("inverse_l2_power_law_exponent_of_decay", 1.0)
    attack = attack_on(noisy_model) if "known_transform_attack" in wanted else None

    def compute(captures: Sequence[Capture], counted: Tensor, normalizers: Normalizers) -> dict[str, Tensor]:
        (capture,) = captures
        loss_tokens, noise_tokens = normalizers.get("loss_tokens"), normalizers.get("noise_tokens")
        losses = captured.mutual_information_component(
            capture, wanted, combine_noise_masks, noise_tokens, even=even_batch
        )
        losses |= captured.cross_entropy_component(capture, counted, wanted, loss_tokens)
        losses |= captured.layer_components(capture.noisy, capture.clean, layer, counted, wanted, loss_tokens)
        losses |= captured.std_component(capture, wanted, noisy_model.noise_layer.scale[1], noise_tokens)
        losses |= captured.embedding_components(capture, wanted, noise_tokens, length, exponent)
        losses |= captured.median_norm_component(capture, wanted, median_norm, noise_tokens)
        losses |= known_transform_component(capture, attack, noise_tokens)
        noisy_model.noise_layer.release_graph()
        return losses

    return loss_functions({"the noisy model": attach(noisy_model, layer, wanted)}, compute, weights, hyperparameters)
