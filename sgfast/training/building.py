"""The objects of a run, built from its settings: models, loss, tokenizer and the client that will be saved."""

from typing import Any, NamedTuple

import torch

from sgfast.client.text_transform import StainedGlassTransformForText
from sgfast.huggingface.assets import load_causal_lm, model_sizes
from sgfast.huggingface.tokenization_utils import TokenizerWrapper
from sgfast.loss.factory import LossFunctions
from sgfast.model.decoder import check_layer_index, embedding_table_of
from sgfast.model.noisy_transformer_masking_model import NoiseMaskedNoisyTransformerModel
from sgfast.model.peft_noisy_transformer_masking_model import PeftNoiseMaskedNoisyTransformerModel
from sgfast.noise_layer.transformer_cloak import TransformerCloak
from sgfast.training.configuration import Configuration, ConfigurationError, LoraOptions
from sgfast.training.objectives import FACTORIES

# The range of sigma, in standard deviations of the model's embedding features, and the rho at which training begins.
_RELATIVE_SCALE = (0.01, 10.0)
_RHOS_INIT = -2.0
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Models(NamedTuple):
    """The models of a run: the model under noise and, for jigsaw, the student with adapters over the same base."""

    noisy_model: NoiseMaskedNoisyTransformerModel
    student: PeftNoiseMaskedNoisyTransformerModel | None
    tokenizer_wrapper: TokenizerWrapper
    client: StainedGlassTransformForText


def check_sizes(configuration: Configuration) -> None:
    """Check ``max_length`` and the loss's decoder layer against the model's configuration, before weights are loaded.

    Raises:
        ConfigurationError: the model has fewer positions, or no such layer.
    """
    sizes = model_sizes(configuration.model)
    _check_length(configuration.max_length, sizes.positions)
    index = configuration.loss_options.get("distillation_layer_index")
    if index is not None and sizes.layers is not None:
        try:
            check_layer_index(index, sizes.layers)
        except ValueError as error:
            raise ConfigurationError(f"loss {configuration.loss_name}: {error}") from error


def build_models(configuration: Configuration) -> Models:
    """Load the base model and put an untrained transform over it.

    Raises:
        ValueError: the model cannot be loaded or is of an unsupported family, it has fewer positions than
            ``max_length``, the tokenizer has no chat template where one is needed, noise-layer options that do not
            fit the model, or PEFT is missing.
    """
    base_model, tokenizer = load_causal_lm(configuration.model, _DTYPES[configuration.precision])
    _check_length(configuration.max_length, getattr(base_model.config, "max_position_embeddings", None))
    wrapper = TokenizerWrapper(tokenizer, type(base_model), ignore_prompt_loss=configuration.ignore_prompt_loss)
    torch.manual_seed(configuration.seed)
    return models_over(base_model, wrapper, configuration.noise_layer, configuration.lora)


def models_over(
    base_model: Any,
    tokenizer_wrapper: TokenizerWrapper,
    noise_layer_options: dict[str, Any],
    lora: LoraOptions | None = None,
) -> Models:
    """Put an untrained transform over a loaded model, and with ``lora`` a student over the same base.

    Without a ``scale`` among the options, sigma ranges from 0.01 to 10 standard deviations of the embedding table's
    values (our choice).
    """
    embedding = base_model.get_input_embeddings()
    target_layer = next(str(name) for name, module in base_model.named_modules() if module is embedding)
    options = {"rhos_init": _RHOS_INIT, **noise_layer_options}
    if "scale" not in options:
        spread = embedding_table_of(base_model).float().std().item()
        options["scale"] = tuple(factor * spread for factor in _RELATIVE_SCALE)
    try:
        noisy_model = NoiseMaskedNoisyTransformerModel(
            TransformerCloak,
            base_model,
            target_layer=target_layer,
            config_path=base_model.config,
            transformer_type=type(base_model.base_model),
            **options,
        )
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"noise_layer: {error}") from error
    client = StainedGlassTransformForText(noisy_model, tokenizer_wrapper, [f"{target_layer}.weight"])
    student = None if lora is None else _student(noisy_model, lora)
    return Models(noisy_model, student, tokenizer_wrapper, client)


def build_loss(models: Models, name: str, options: dict[str, Any]) -> LossFunctions:
    """Build the three functions of a loss by name, over one model or, for jigsaw, over teacher and student.

    Raises:
        ValueError: options that the factory or the model refuses.
    """
    trained = [models.noisy_model] if models.student is None else [models.noisy_model, models.student]
    try:
        functions: LossFunctions = FACTORIES[name](*trained, **options)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"loss {name}: {error}") from error
    return functions


def _check_length(max_length: int, positions: int | None) -> None:
    if positions is not None and max_length > positions:
        raise ConfigurationError(f"max_length is {max_length}, the model has {positions} positions")


def _student(teacher: NoiseMaskedNoisyTransformerModel, lora: LoraOptions) -> PeftNoiseMaskedNoisyTransformerModel:
    import peft

    try:
        configuration = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=lora.r,
            lora_alpha=lora.lora_alpha,
            lora_dropout=lora.lora_dropout,
            target_modules=lora.target_modules,
        )
        with_adapters = peft.get_peft_model(teacher.base_model, configuration)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"lora: {' '.join(str(error).split())}") from error
    return PeftNoiseMaskedNoisyTransformerModel(
        None, with_adapters, target_layer=teacher.target_layer, noise_layer=teacher.noise_layer
    )
