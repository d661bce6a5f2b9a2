"""Distillation by the clean model's next-token distributions; users import these from `sgfast.loss.distillation`.

These are the losses of the paper "Learning Obfuscations Of LLM Embedding Sequences: Stained Glass Transform" (arXiv
2506.09452), as far as it is public.
"""

from collections.abc import Sequence

from torch import Tensor

from sgfast.loss import terms
from sgfast.loss.factory import (
    HyperparametersDict,
    LossFunctions,
    Normalizers,
    attach,
    check_hyperparameters,
    check_noisy_model,
    loss_functions,
)
from sgfast.model.capture import Capture
from sgfast.model.median_norm import median_target_norm
from sgfast.model.noisy_transformer_masking_model import NoiseMaskedNoisyTransformerModel
from sgfast.noise_layer.arguments import check_bool


def cross_entropy_distillation_factory(
    noisy_model: NoiseMaskedNoisyTransformerModel,
    distillation_cross_entropy_loss_weight: float,
    absolute_cosine_similarity_penalty_weight: float,
    median_norm_penalty_weight: float,
) -> LossFunctions:
    """Create a loss that trades the clean model's next-token distributions against the strength of the transform.

        loss = w_ce ce + w_acs acs + w_mnp mnp

    Args:
        noisy_model: the model to train.
        distillation_cross_entropy_loss_weight: pulls the noisy logits to the clean ones.
        absolute_cosine_similarity_penalty_weight: makes transformed embeddings orthogonal to clean ones.
        median_norm_penalty_weight: keeps the norms of mean-shifted embeddings near the median norm of the target
            layer's outputs over all token ids, which is taken here, once.

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
    }
    return _factory(noisy_model, hyperparameters)


def mutual_information_cross_entropy_distillation_factory(
    noisy_model: NoiseMaskedNoisyTransformerModel,
    mutual_information_loss_weight: float,
    distillation_cross_entropy_loss_weight: float,
    absolute_cosine_similarity_penalty_weight: float,
    median_norm_penalty_weight: float,
    combine_noise_masks_for_mutual_information_sub_batches: bool = True,
) -> LossFunctions:
    """Create the loss of `cross_entropy_distillation_factory` with what the transform tells about the text.

        loss = w_ce ce + w_mi mi + w_acs acs + w_mnp mnp

    Batches must have an even number of rows: the two halves are compared.

    Args:
        noisy_model: the model to train.
        mutual_information_loss_weight: makes transformed texts hard to tell apart.
        distillation_cross_entropy_loss_weight: as in `cross_entropy_distillation_factory`.
        absolute_cosine_similarity_penalty_weight: likewise.
        median_norm_penalty_weight: likewise.
        combine_noise_masks_for_mutual_information_sub_batches: compare two rows at the positions that are transformed
            in both; False: at those transformed in the first and attended in the second.

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
    }
    return _factory(noisy_model, hyperparameters, combine_noise_masks_for_mutual_information_sub_batches)


def _factory(
    noisy_model: NoiseMaskedNoisyTransformerModel, hyperparameters: HyperparametersDict, combine: bool = True
) -> LossFunctions:
    check_noisy_model("noisy_model", noisy_model)
    wanted, weights = check_hyperparameters(noisy_model, hyperparameters)
    check_bool("combine_noise_masks_for_mutual_information_sub_batches", combine)
    median_norm = median_target_norm(noisy_model) if "median_norm_penalty" in wanted else 0.0

    def compute(captures: Sequence[Capture], counted: Tensor, normalizers: Normalizers) -> dict[str, Tensor]:
        (capture,) = captures
        noise_tokens = normalizers.get("noise_tokens")
        losses = terms.mutual_information_loss(capture, wanted, combine, noise_tokens, even=True)
        losses |= terms.cross_entropy_loss(capture, counted, wanted, normalizers.get("loss_tokens"))
        losses |= terms.angle_and_distance_losses(capture, wanted, noise_tokens)
        losses |= terms.median_norm_loss(capture, wanted, median_norm, noise_tokens)
        noisy_model.noise_layer.release_graph()
        return losses

    return loss_functions({"the noisy model": attach(noisy_model, None, wanted)}, compute, weights, hyperparameters)
