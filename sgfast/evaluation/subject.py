"""The subject of an evaluation: a model and a transform that was made for it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgfast.client.text_transform import StainedGlassTransformForText
from sgfast.evaluation.settings import EvaluationError, Settings
from sgfast.huggingface.assets import load_causal_lm, model_sizes
from sgfast.huggingface.tokenization_utils import TokenizerWrapper
from sgfast.model.decoder import backbone_of, causal_lm_of, embedding_scale_of, embedding_table_of
from sgfast.model.head import language_model_head
from sgfast.noise_layer.seeds import mix_seed
from sgfast.noise_layer.transformer_cloak import TransformerCloak

# The rounding of a table to bfloat16 and back changes it by less than this.
_SAME_TABLE = 0.01
_ROWS_COMPARED = 4096


@dataclass(frozen=True)
class Transformed:
    """The values of one transformed sequence: (T, D) each, ``suppressed`` bool or None."""

    output: Tensor
    mean: Tensor
    std: Tensor
    suppressed: Tensor | None


@dataclass(frozen=True)
class Subject:
    """A model, its transform, and the tokenizer that the transform's client uses."""

    noise_layer: TransformerCloak
    tokenizer_wrapper: TokenizerWrapper
    table: Tensor
    head: Callable[[Tensor], Tensor]
    vocabulary: int
    positions: int | None
    language_model: Any
    _embedding: torch.nn.Module
    _backbone: torch.nn.Module

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values of one token, in the model and in the transform's estimators."""
        estimators = (self.noise_layer.mean_estimator, self.noise_layer.std_estimator)
        return sum(_cache_bytes(module) for module in (self.language_model, *(one.body for one in estimators)))

    @torch.no_grad()
    def embed(self, input_ids: Tensor) -> Tensor:
        """Return the clean embeddings (T, D)."""
        embedded: Tensor = self._embedding(input_ids)
        return embedded

    @torch.no_grad()
    def transform(self, embeddings: Tensor, noise_mask: Tensor, seed: int) -> Transformed:
        """Transform one sequence. The same seed gives the same noise: use this for evaluation, never for sending."""
        layer = self.noise_layer
        dtype = next(layer.parameters()).dtype
        ones = noise_mask.new_ones((1, len(noise_mask)), dtype=torch.int64)
        try:
            output = layer(embeddings[None].to(dtype), noise_mask[None], attention_mask=ones, seed=seed)
            assert layer.mean is not None
            assert layer.std is not None
            suppressed = None if layer.mask is None else layer.mask.expand_as(output)[0]
            return Transformed(output[0], layer.mean.expand_as(output)[0], layer.std.expand_as(output)[0], suppressed)
        finally:
            layer.clear()

    @torch.no_grad()
    def final_hidden(self, embeddings: Tensor) -> Tensor:
        """Return the input of the model's head, (T, D), for one sequence of embeddings (T, D)."""
        dtype = next(self._backbone.parameters()).dtype
        hidden: Tensor = self._backbone(inputs_embeds=embeddings[None].to(dtype), use_cache=False).last_hidden_state
        return hidden[0]


def _cache_bytes(module: Any) -> int:
    config = module.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width * next(module.parameters()).element_size())


def record_noise_seed(seed: int, index: int, draw: int = 0) -> int:
    """Return the seed of one draw for one record. It depends on the record's place, not on the process and run.

    Reproducible noise is for evaluation only. Anyone who knows the seed can remove the noise.

    Example:
        >>> record_noise_seed(0, 1) == record_noise_seed(0, 2)
        False
    """
    return mix_seed(seed, index, draw)


def load_model(settings: Settings, device: torch.device) -> Any:
    """Load the model once for all transforms.

    Raises:
        ValueError: the model cannot be loaded, or has no backbone.
    """
    model, _ = load_causal_lm(settings.model, getattr(torch, settings.precision))
    backbone_of(model)
    return model.to(device).requires_grad_(False)


def load_subject(model: Any, settings: Settings) -> Subject:
    """Load the transform, and check that it was made for the model and that the settings fit.

    Raises:
        FileNotFoundError: no such transform.
        ValueError: a damaged file, a transform for another model, or a setting beyond the model's sizes.
    """
    client = StainedGlassTransformForText.from_pretrained(settings.transform)
    table = embedding_table_of(model)
    _check_table(client, model, settings.transform)
    # The model's table serves both: the file's copy goes.
    client.parameters.clear()
    causal_lm = causal_lm_of(model)
    subject = Subject(
        noise_layer=client.noise_layer.to(table.device).eval(),
        tokenizer_wrapper=client.tokenizer_wrapper,
        table=table,
        head=language_model_head(model),
        vocabulary=causal_lm.get_output_embeddings().weight.shape[0],
        positions=getattr(causal_lm.config, "max_position_embeddings", None),
        language_model=causal_lm,
        _embedding=causal_lm.get_input_embeddings(),
        _backbone=backbone_of(model),
    )
    _check_limits(settings, subject.vocabulary, len(table), subject.positions)
    return subject


def check_sizes(settings: Settings) -> None:
    """Check settings against the model's configuration, before the weights are loaded.

    Raises:
        EvaluationError: a setting beyond the model's sizes.
    """
    sizes = model_sizes(settings.model)
    _check_limits(settings, sizes.vocabulary, sizes.vocabulary, sizes.positions)


def _check_limits(settings: Settings, logits: int | None, tokens: int | None, positions: int | None) -> None:
    for option, value, limit, what in (
        ("num-logits", settings.num_logits, logits, "logits"),
        ("beta", settings.beta, tokens, "tokens"),
        ("max-length", settings.max_length, positions, "positions"),
    ):
        if value is not None and limit is not None and value > limit:
            raise EvaluationError(f"--{option} is {value}, the model has {limit} {what}")


def _check_table(client: StainedGlassTransformForText, model: Any, path: Path) -> None:
    theirs = client.parameters[client.embedding_name]
    embedding = causal_lm_of(model).get_input_embeddings()
    ours = embedding.weight.detach()
    if theirs.shape != ours.shape:
        raise EvaluationError(
            f"{path} is a transform for another model: its embedding table is {tuple(theirs.shape)}, "
            f"the model's {tuple(ours.shape)}"
        )
    scales = client.embedding_scale, embedding_scale_of(embedding)
    if abs(scales[0] - scales[1]) > _SAME_TABLE * scales[1]:
        raise EvaluationError(
            f"{path} is a transform for another model: it scales embeddings by {scales[0]:g}, the model by "
            f"{scales[1]:g}"
        )
    difference = norm = 0.0
    for some, others in zip(torch.split(theirs, _ROWS_COMPARED), torch.split(ours, _ROWS_COMPARED), strict=True):
        reference = others.to("cpu", torch.float32)
        difference += float((some.to("cpu", torch.float32) - reference).double().square().sum())
        norm += float(reference.double().square().sum())
    if not difference <= _SAME_TABLE**2 * norm:
        raise EvaluationError(
            f"{path} is a transform for another model: the embeddings in it are not the model's (they differ by "
            f"{(difference / norm) ** 0.5 if norm else float('inf'):.0%})"
        )
