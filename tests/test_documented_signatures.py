"""Every documented function and class takes the documented arguments: their names, order, kinds and defaults.

What is written here is what users read, so that a renamed argument or another default fails. Arguments beyond the
documented ones may exist, after them and with a default.
"""

import enum
import importlib
import inspect
from typing import Any

import pytest
import torch

from sgfast.huggingface.tokenization_utils import PromptType

_LOGITS = "noisy_logits, clean_logits, support_mask=None, *"
_LOGIT_OPTIONS = "top_k=None, support='tail', mask=None, temperature=1.0, impl=None"
_CLOAK = (
    "input_shape=None, scale=(1e-4, 2.0), shallow=1.0, percent_to_mask=None, value_range=None, "
    "locs_requires_grad=True, rhos_requires_grad=True, rhos_init=-4.0, seed=None"
)
_ATTACKED = "transformed, table, input_ids, noise_mask=None, *, metric='l2'"
_CATALYST = (
    "inverse_l2_power_law_catalyst_loss_weight=0.0, inverse_l2_power_law_characteristic_length=1.0, "
    "inverse_l2_power_law_exponent_of_decay=1.0"
)

DOCUMENTED = {
    # the loss pages
    "loss.distillation.distillation_loss_factory": (
        "noisy_model, distillation_layer_index, alpha, std_log_ratio_loss_weight, "
        "input_embedding_similarity_loss_weight, distillation_layer_cosine_distance_loss_weight, "
        f"distillation_layer_l2_distance_loss_weight=0.0, {_CATALYST}"
    ),
    "loss.distillation.mutual_information_distillation_loss_factory": (
        "noisy_model, distillation_layer_index, alpha, distillation_layer_l2_distance_loss_weight, "
        f"mutual_information_loss_weight, {_CATALYST}, input_embedding_similarity_loss_weight=0.0, "
        "combine_noise_masks_for_mutual_information_sub_batches=True"
    ),
    "loss.distillation.cross_entropy_distillation_factory": (
        "noisy_model, distillation_cross_entropy_loss_weight, absolute_cosine_similarity_penalty_weight, "
        "median_norm_penalty_weight"
    ),
    "loss.distillation.mutual_information_cross_entropy_distillation_factory": (
        "noisy_model, mutual_information_loss_weight, distillation_cross_entropy_loss_weight, "
        "absolute_cosine_similarity_penalty_weight, median_norm_penalty_weight, "
        "combine_noise_masks_for_mutual_information_sub_batches=True"
    ),
    "loss.jigsaw.jigsaw_loss_factory": (
        "noisy_teacher_model, noisy_student_model, distillation_layer_index, alpha, std_log_ratio_loss_weight, "
        "input_embedding_similarity_loss_weight, distillation_layer_cosine_distance_loss_weight, "
        "distillation_layer_l2_distance_loss_weight=0.0, distillation_protection_l2_loss_weight=0.0, "
        "apply_distillation_protection_loss_mask=True, clean_embedding_performance_on_student_model_loss_weight=0.0, "
        f"{_CATALYST}"
    ),
    "loss.cloak.composite_cloak_loss_factory": "noisy_model, loss_function, alpha, respect_std_mask=True",
    "loss.divergences.jefferys_divergence": f"{_LOGITS}, {_LOGIT_OPTIONS}",
    "loss.divergences.jeffreys_divergence": f"{_LOGITS}, {_LOGIT_OPTIONS}",
    "loss.divergences.jensen_shannon_divergence": f"{_LOGITS}, {_LOGIT_OPTIONS}",
    "loss.divergences.total_variation": f"{_LOGITS}, {_LOGIT_OPTIONS}",
    "loss.divergences.squared_hellinger_distance": f"{_LOGITS}, {_LOGIT_OPTIONS}",
    "loss.divergences.kl_divergence": f"{_LOGITS}, {_LOGIT_OPTIONS}",
    "loss.divergences.cross_entropy": f"{_LOGITS}, {_LOGIT_OPTIONS}",
    "loss.DivergenceLoss": (
        "kind, *, top_k=None, top_k_of='both', support='tail', temperature=1.0, beta=None, skew=None, "
        "scale_by_temperature_squared=False, hard_label_weight=0.0, label_smoothing=0.0, ignore_index=-100, "
        "shared_vocab=None, reduction='mean', max_chunk_bytes=None, impl=None"
    ),
    "loss.DivergenceLoss.forward": "self, student, teacher, *, labels=None, mask=None, weights=None, num_items=None",
    "loss.presets.DistillationLoss": "config",
    "loss.presets.DistillationLoss.forward": "self, student_outputs, teacher_outputs",
    # the metrics page
    "metrics.get_noise_metrics_factory": "noise_layer, dim=-1",
    "metrics.get_top_k_support_mask": "noisy_logits, clean_logits, num_logits",
    "metrics.get_utility_metrics_factory": (
        "noisy_model, num_logits=None, max_batch_size=None, max_sequence_length=None"
    ),
    "metrics.percentage_changed_ids": "input_ids, reconstructed_ids, noise_mask",
    "utils.torch.split_2d": "tensor, max_batch_size, max_sequence_length",
    "metrics.compute_percentile_voronoi_l2_distance": "weight, percentile=5, half=True",
    "metrics.information_bounds": "mean, std, mask=None, *, alpha=0.5",
    "metrics.fano_error_bound": "mutual_information, num_classes",
    "metrics.pac_privacy_success_bound": "mutual_information, prior",
    "metrics.privacy.nearest_neighbor_failure_rate": f"{_ATTACKED}, beta=1",
    "metrics.privacy.max_rank_failure_rate": f"{_ATTACKED}, r=1",
    "metrics.privacy.token_transformation_rate": f"{_ATTACKED}, k, symmetric=False",
    "metrics.privacy.mean_reconstruction_rank": _ATTACKED,
    "metrics.privacy.repeated_query_attack": f"{_ATTACKED}, beta=1",
    "metrics.privacy.LearnedInversionAttack": "table",
    "metrics.UtilityMetrics.update": "self, noisy_logits, clean_logits, attention_mask",
    "metrics.PrivacyMetrics": "table",
    "metrics.PrivacyMetrics.update": "self, transformed, input_ids, noise_mask=None",
    # operations
    "ops.divergences": (
        "noisy_logits, clean_logits, kinds, *, top_k=None, top_k_of='both', support='tail', mask=None, labels=None, "
        "label_smoothing=0.0, temperature=1.0, beta=None, skew=None, max_chunk_bytes=None, impl=None"
    ),
    "ops.top_k_support": "noisy_logits, clean_logits, k",
    "ops.hidden_distances": "noisy, clean, mask=None, *, eps=1e-8, impl=None",
    "ops.standard_normal": "shape, seed, *, offset=0, dtype=torch.float32, device=None, impl=None",
    "ops.apply_noise": (
        "input, mean, std, *, seed, offset=0, noise_mask=None, keep_mask=None, value_range=None, impl=None"
    ),
    "ops.pairwise_gaussian_kl": (
        "mean_a, std_a, mean_b, std_b, mask_a=None, mask_b=None, *, combine_masks=True, impl=None"
    ),
    "ops.nearest_embeddings": "queries, table, k=1, *, metric='l2', farthest=False, max_chunk_bytes=None, impl=None",
    "ops.embedding_ranks": "queries, table, targets, *, metric='l2', max_chunk_bytes=None, impl=None",
    "explain": "operation, *args, **kwargs",
    "use_impl": "impl",
    # noise layers and models
    "noise_layer.BaseNoiseLayer.forward": "self, input, noise_mask=None, **kwargs",
    "noise_layer.CloakStandardDeviationParameterization": "scale=(1e-4, 2.0), shallow=1.0",
    "noise_layer.DirectStandardDeviationParameterization": "scale=(1e-4, 2.0)",
    "noise_layer.PercentMasker": "percent",
    "noise_layer.CloakNoiseLayer": _CLOAK,
    "noise_layer.CloakNoiseLayer1": _CLOAK,
    "noise_layer.CloakNoiseLayer2": f"{_CLOAK}, *, stds",
    "noise_layer.CloakNoiseLayerOneShot": _CLOAK,
    "noise_layer.PatchCloakNoiseLayer": (
        "patch_size, in_channels=None, scale=(1e-4, 2.0), shallow=1.0, percent_to_mask=None, value_range=None, "
        "rhos_init=-4.0, seed=None"
    ),
    "noise_layer.transformer_cloak.TransformerCloak": (
        "config_path, transformer_type, scale=(1e-4, 2.0), shallow=1.0, percent_to_mask=None, "
        "directly_learn_stds=False, mean_num_hidden_layers=1, std_num_hidden_layers=1, mean_num_attention_heads=None, "
        "std_num_attention_heads=None, mean_dropout=0.0, std_dropout=0.0, rhos_init=-4.0, value_range=None, seed=None"
    ),
    "noise_layer.recommend_scale": "embedding_weight",
    "model.NoisyModel": (
        "*layer_and_base, noise_layer_class=None, base_model=None, target_layer=None, target_parameter=None, "
        "input_shape=None, **noise_layer_kwargs"
    ),
    "model.NoisyModel.forward": "self, *args, noise_mask=None, **kwargs",
    "model.NoisyModel.noise_disabled": "self",
    "model.NoisyModel.noise_loss_wrapper": "self, base_loss, alpha",
    "model.noisy_transformer_masking_model.NoiseMaskedNoisyTransformerModel": (
        "noise_layer_class, base_model, input_shape=None, target_layer='model.embed_tokens', *, "
        "clean_pass='separate', noise_layer=None, **noise_layer_kwargs"
    ),
    "model.PeftNoiseMaskedNoisyTransformerModel": (
        "noise_layer_class, base_model, input_shape=None, target_layer='model.embed_tokens', *, "
        "clean_pass='separate', noise_layer=None, **noise_layer_kwargs"
    ),
    # Hugging Face and client
    "huggingface.tokenization_utils.TokenizerWrapper": (
        "tokenizer, model_type, include_labels=False, ignore_prompt_loss=False, prompt_type=PromptType.CHAT"
    ),
    "huggingface.tokenization_utils.NoiseTokenizer": "tokenizer",
    "huggingface.trainer.SgtTrainer": "model, args=None, *, loss, **trainer_kwargs",
    "client.StainedGlassTransformForText": "model, tokenizer_wrapper, parameter_names",
    "client.StainedGlassTransformForText.save_pretrained": "self, path",
    "client.StainedGlassTransformForText.from_pretrained": "path",
}
# Documented as required. It may be left out here for the older name by which the Quickstart gives it.
MAY_BE_LEFT_OUT = {("loss.distillation.distillation_loss_factory", "distillation_layer_cosine_distance_loss_weight")}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_arguments(name):
    documented = _signature(DOCUMENTED[name])
    found = dict(inspect.signature(_find(name)).parameters)
    positional = [p.name for p in documented.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in found.values() if p.kind is p.POSITIONAL_OR_KEYWORD][: len(positional)] == positional
    for parameter in documented.values():
        same = found.pop(parameter.name)
        assert same.kind is parameter.kind
        if (name, parameter.name) in MAY_BE_LEFT_OUT:
            assert (parameter.default, same.default) == (parameter.empty, None)
        else:
            assert same.default == parameter.default
            assert type(same.default) is type(parameter.default)
    assert [p.name for p in found.values() if p.default is p.empty and p.kind is not p.VAR_KEYWORD] == []


# Fields of what is returned, in order, and the entries of the maps that users look into.
NAMES = {
    "model.NoisyModelOutput": ["base_model_output", "input", "transformed", "mean", "std", "mask", "noise_mask"],
    "ops.HiddenDistances": ["cosine_distance", "l2", "normalized_l2", "cosine_similarity"],
    "metrics.InformationBounds": ["mean_pairwise_kl", "kl_upper", "bhattacharyya_lower", "chernoff_lower"],
    "huggingface.tokenization_utils.PromptType": ["CHAT", "INSTRUCTION"],
    "loss.presets.ADAPTOR_KEYS": [
        "logits",
        "logits_mask",
        "losses",
        "inputs_mask",
        "labels",
        "hidden",
        "attention",
    ],
    "loss.presets.KD_LOSS_MAP": ["mse", "ce"],
    "loss.presets.PROJ_MAP": ["linear", "relu", "tanh"],
    "loss.presets.MATCH_LOSS_MAP": [
        "attention_mse_sum",
        "attention_mse",
        "attention_ce_mean",
        "attention_ce",
        "hidden_mse",
        "cos",
        "pkd",
        "fsp",
        "nst",
    ],
    "loss.presets.WEIGHT_SCHEDULER": ["linear_decay", "linear_growth"],
    "loss.presets.TEMPERATURE_SCHEDULER": ["constant", "flsw", "cwsm"],
}


@pytest.mark.parametrize("name", NAMES)
def test_names(name):
    found = _find(name)
    if "MAP" in name or "SCHEDULER" in name:
        for entry in NAMES[name]:
            assert callable(found[entry])
    elif inspect.isclass(found) and issubclass(found, enum.Enum):
        assert [member.name for member in found] == NAMES[name]
    elif inspect.isclass(found):
        fields = getattr(found, "_fields", None) or list(found.__annotations__)
        assert list(fields) == NAMES[name]
    else:
        assert found == NAMES[name]


def _signature(arguments: str) -> dict[str, inspect.Parameter]:
    function = eval(f"lambda {arguments}: None", {"torch": torch, "PromptType": PromptType})
    return dict(inspect.signature(function).parameters)


def _find(name: str) -> Any:
    """The object at a path below `sgfast`."""
    found = importlib.import_module("sgfast")
    for part in name.split("."):
        if not hasattr(found, part):
            importlib.import_module(f"{found.__name__}.{part}")
        found = getattr(found, part)
    return found
