"""Jigsaw training: a student with adapters learns to read transformed tokens, and the base model alone does not.

The teacher runs the base model without adapters, the student runs it with adapters. Both see one noise draw. The
teacher's clean output is the constant reference for the other three outputs:

* the student's noisy output should be close to the reference; gradients reach the noise layer and the adapters;
* the teacher's noisy output should be far from the reference; gradients reach the noise layer;
* the student's clean output should be far from the reference; gradients reach the adapters.

The base models never get gradients.
"""

from collections.abc import Sequence

from torch import Tensor

from sgfast.loss import components
from sgfast.loss.components import captured
from sgfast.loss.factory import (
    HyperparametersDict,
    LossFunctions,
    Normalizers,
    attach_reader,
    check_hyperparameters,
    check_noisy_model,
    loss_functions,
    resolve_distillation_layer,
)
from sgfast.model.capture import Capture, Outputs
from sgfast.model.noisy_transformer_masking_model import NoiseMaskedNoisyTransformerModel
from sgfast.model.peft_noisy_transformer_masking_model import PeftNoiseMaskedNoisyTransformerModel
from sgfast.ops.validation import check_bool


def jigsaw_loss_factory(
    noisy_teacher_model: NoiseMaskedNoisyTransformerModel,
    noisy_student_model: PeftNoiseMaskedNoisyTransformerModel,
    distillation_layer_index: int | None,
    alpha: float,
    std_log_ratio_loss_weight: float,
    input_embedding_similarity_loss_weight: float,
    distillation_layer_cosine_distance_loss_weight: float,
    distillation_layer_l2_distance_loss_weight: float = 0.0,
    distillation_protection_l2_loss_weight: float = 0.0,
    apply_distillation_protection_loss_mask: bool = True,
    clean_embedding_performance_on_student_model_loss_weight: float = 0.0,
    inverse_l2_power_law_catalyst_loss_weight: float = 0.0,
    inverse_l2_power_law_characteristic_length: float = 1.0,
    inverse_l2_power_law_exponent_of_decay: float = 1.0,
) -> LossFunctions:
    """Create a loss under which only the student learns to read transformed tokens.

        loss = (1−alpha) (w_cos cos + w_l2 l2 + w_prot prot + w_clean clean) + alpha (w_std std + w_sim sim + w_cat cat)

    cos and l2 compare the student's noisy with the teacher's clean outputs. Both models must share one noise layer,
    ``noise_layer=teacher.noise_layer``, and be called with the same tensors. They may share one base model. Outputs
    that no weighted component reads are not computed in training: by default the teacher computes only its clean half,
    and the student only its noisy half.

    Args:
        noisy_teacher_model: the base model without adapters.
        noisy_student_model: the base model with the adapters to train.
        distillation_layer_index: decoder layer whose outputs are compared (negative counts from the teacher's end);
            None for the logits.
        alpha: in [0, 1]: 0 is all similarity, 1 all strength.
        std_log_ratio_loss_weight: pushes standard deviations up.
        input_embedding_similarity_loss_weight: pushes transformed embeddings away in angle.
        distillation_layer_cosine_distance_loss_weight: pulls student and teacher together in angle.
        distillation_layer_l2_distance_loss_weight: pulls student and teacher together in relative distance.
        distillation_protection_l2_loss_weight: keeps the teacher from reading transformed tokens.
        apply_distillation_protection_loss_mask: True counts the positions of the loss mask in the protection
            component; False counts all attended positions.
        clean_embedding_performance_on_student_model_loss_weight: keeps the student from reading clean tokens. This
            component costs the memory of a second pass with a graph.
        inverse_l2_power_law_catalyst_loss_weight: pushes transformed embeddings away in distance.
        inverse_l2_power_law_characteristic_length: as in `sgfast.loss.distillation.distillation_loss_factory`.
        inverse_l2_power_law_exponent_of_decay: as in `sgfast.loss.distillation.distillation_loss_factory`.

    Returns:
        ``(loss, get_losses, get_hyperparameters)``, as `sgfast.loss.distillation` describes them, each callable once
        after a forward of both models, in any order. With ``apply_distillation_protection_loss_mask=False`` give
        ``normalizers`` the entry ``attended_tokens`` too. Without this entry the batch's mean of the protection
        component is weighted by the batch's share of ``loss_tokens``.

    Raises:
        ValueError: alpha outside [0, 1], a negative weight, a length or exponent that is not positive, no such layer,
            nothing left to minimise, a noise layer whose scale starts at 0, or two noise layers.
        TypeError: an argument of another type.
        RuntimeError: from ``loss``: a model has not run since its last call, or the two saw different batches or noise.

    Example:
        >>> import peft, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
        >>> from sgfast.model import NoiseMaskedNoisyTransformerModel, PeftNoiseMaskedNoisyTransformerModel
        >>> from sgfast.noise_layer import TransformerCloak
        >>> config = LlamaConfig(
        ...     vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
        ... )
        >>> base_model = LlamaForCausalLM(config)
        >>> teacher = NoiseMaskedNoisyTransformerModel(
        ...     TransformerCloak, base_model, config_path=config, transformer_type=LlamaModel
        ... )
        >>> adapted = peft.get_peft_model(base_model, peft.LoraConfig(target_modules=["q_proj"]))
        >>> student = PeftNoiseMaskedNoisyTransformerModel(None, adapted, noise_layer=teacher.noise_layer)
        >>> loss, get_losses, _ = jigsaw_loss_factory(
        ...     teacher.train(),
        ...     student.train(),
        ...     distillation_layer_index=0,
        ...     alpha=0.5,
        ...     std_log_ratio_loss_weight=0.01,
        ...     input_embedding_similarity_loss_weight=0.0,
        ...     distillation_layer_cosine_distance_loss_weight=1.0,
        ...     distillation_protection_l2_loss_weight=0.1,
        ... )
        >>> batch = {"input_ids": torch.arange(6).view(2, 3)}
        >>> outputs = teacher(**batch), student(**batch)
        >>> loss(loss_mask=torch.ones(2, 3)).backward()
        >>> sorted(get_losses())
        ['distillation_layer_cosine_distance', 'distillation_protection_l2', 'std_log_ratio', 'total']
    """
    hyperparameters: HyperparametersDict = {
        "distillation_layer_index": distillation_layer_index,
        "alpha": alpha,
        "std_log_ratio_loss_weight": std_log_ratio_loss_weight,
        "input_embedding_similarity_loss_weight": input_embedding_similarity_loss_weight,
        "distillation_layer_cosine_distance_loss_weight": distillation_layer_cosine_distance_loss_weight,
        "distillation_layer_l2_distance_loss_weight": distillation_layer_l2_distance_loss_weight,
        "distillation_protection_l2_loss_weight": distillation_protection_l2_loss_weight,
        "clean_embedding_performance_on_student_model_loss_weight": (
            clean_embedding_performance_on_student_model_loss_weight
        ),
        "inverse_l2_power_law_catalyst_loss_weight": inverse_l2_power_law_catalyst_loss_weight,
        "inverse_l2_power_law_characteristic_length": inverse_l2_power_law_characteristic_length,
        "inverse_l2_power_law_exponent_of_decay": inverse_l2_power_law_exponent_of_decay,
    }
    check_noisy_model("noisy_teacher_model", noisy_teacher_model)
    check_noisy_model("noisy_student_model", noisy_student_model, PeftNoiseMaskedNoisyTransformerModel)
    check_bool("apply_distillation_protection_loss_mask", apply_distillation_protection_loss_mask)
    noise_layer = noisy_teacher_model.noise_layer
    if noisy_student_model.noise_layer is not noise_layer:
        raise ValueError("teacher and student must share one noise layer: give the student noise_layer=teacher's")
    wanted, weights = check_hyperparameters(noisy_teacher_model, hyperparameters)
    layer = resolve_distillation_layer(noisy_teacher_model, distillation_layer_index)
    resolve_distillation_layer(noisy_student_model, layer)
    protects, hides = "distillation_protection_l2" in wanted, "clean_embedding_performance" in wanted

    def compute(captures: Sequence[Capture], counted: Tensor, normalizers: Normalizers) -> dict[str, Tensor]:
        teacher, student = captures
        _check_same_batch(teacher, student)
        loss_tokens, noise_tokens = normalizers.get("loss_tokens"), normalizers.get("noise_tokens")
        losses = captured.layer_components(student.noisy, teacher.clean, layer, counted, wanted, loss_tokens)
        if protects and apply_distillation_protection_loss_mask:
            closeness = _normalized_l2(teacher.noisy, teacher.clean, layer, counted)
            losses["distillation_protection_l2"] = components.distillation_protection_l2(
                closeness, counted, loss_tokens
            )
        elif protects:
            attended = teacher.attention_mask
            closeness = _normalized_l2(teacher.noisy, teacher.clean, layer, attended)
            losses["distillation_protection_l2"] = _over_attended(closeness, attended, counted, normalizers)
        if hides:
            closeness = _normalized_l2(student.clean, teacher.clean, layer, counted)
            losses["clean_embedding_performance"] = components.clean_embedding_performance(
                closeness, counted, loss_tokens
            )
        losses |= captured.std_component(student, wanted, noise_layer.scale[1], noise_tokens)
        losses |= captured.embedding_components(
            student,
            wanted,
            noise_tokens,
            inverse_l2_power_law_characteristic_length,
            inverse_l2_power_law_exponent_of_decay,
        )
        noise_layer.release_graph()
        return losses

    distils = bool(wanted & {"distillation_layer_cosine_distance", "distillation_layer_l2_distance"})
    reads = distils or protects or hides
    consumers = {
        "the noisy teacher model": attach_reader(noisy_teacher_model, layer, reads, noisy=protects),
        "the noisy student model": attach_reader(
            noisy_student_model, layer, distils or hides, clean=hides, noisy=distils, clean_graph=hides
        ),
    }
    return loss_functions(consumers, compute, weights, hyperparameters)


def _normalized_l2(outputs: Outputs, reference: Outputs, layer: int | None, mask: Tensor) -> Tensor:
    return captured.output_distances(outputs, reference, layer, mask).normalized_l2


def _over_attended(normalized_l2: Tensor, attended: Tensor, counted: Tensor, normalizers: Normalizers) -> Tensor:
    """The protection component over all attended positions."""
    loss_tokens, attended_tokens = normalizers.get("loss_tokens"), normalizers.get("attended_tokens")
    value = components.distillation_protection_l2(normalized_l2, attended, attended_tokens)
    if attended_tokens is not None or loss_tokens is None:
        return value
    return components.masked_mean(value.expand(counted.shape), counted, loss_tokens)


def _check_same_batch(teacher: Capture, student: Capture) -> None:
    """Check, without waiting for a device, that both models saw one batch under one noise draw."""
    shapes = [tuple(capture.attention_mask.shape) for capture in (teacher, student)]
    if shapes[0] != shapes[1]:
        raise RuntimeError(f"teacher and student ran on different batches, {shapes[0]} and {shapes[1]} tokens")
    drawn = [capture.enabled_transform and capture.enabled_transform.seed for capture in (teacher, student)]
    if drawn[0] is not drawn[1]:
        raise RuntimeError("teacher and student drew different noise: call both with the same tensors, in turn")
