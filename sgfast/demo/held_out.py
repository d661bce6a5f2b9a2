"""The demo's figures: utility and privacy of a transform on held-out text."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from sgfast.huggingface.tokenization_utils import TokenizerWrapper
from sgfast.metrics.known_transform import KnownTransformResult, known_transform_attack
from sgfast.metrics.per_sequence import UTILITY_DIVERGENCES
from sgfast.metrics.privacy import nearest_neighbor_failure_rate
from sgfast.metrics.reconstruction import percentage_changed_ids
from sgfast.metrics.utility import mean_over_sequences, token_divergences
from sgfast.model.decoder import embedding_table_of
from sgfast.model.noisy_transformer_masking_model import NoiseMaskedNoisyTransformerModel
from sgfast.ops.nearest import nearest_embeddings

TOP_K = 100
# What the attacker who knows the transform reads: the first tokens of some passages, for the sake of the time.
READ_PASSAGES, READ_TOKENS = 8, 16
# Tokens that this attacker scores exactly at each place.
_CANDIDATES = 256


def as_chats(passages: Sequence[str]) -> list[list[dict[str, str]]]:
    """Make each passage a chat of one user message, because a client's private text stands in user messages."""
    return [[{"role": "user", "content": passage}] for passage in passages]


@torch.no_grad()
def measure(
    noisy_model: NoiseMaskedNoisyTransformerModel,
    tokenizer_wrapper: TokenizerWrapper,
    passages: Sequence[str],
    *,
    batch_size: int,
    max_length: int,
    seed: int,
) -> dict[str, float]:
    """Measure a transform on held-out passages. The noise depends on ``seed`` alone.

    Returns:
        Means over passages: the utility divergences over the whole vocabulary (the keys of `UTILITY_DIVERGENCES`) and
        over the top 100 logits (``…_top_100``). Means over transformed tokens: ``next_token_agreement`` (the fraction
        whose most likely next token is unchanged), ``clean_perplexity`` and ``noisy_perplexity`` of the true next
        token, ``mean_sigma``, ``nearest_neighbor_failure_rate``, ``nearest_neighbor_failure_rate_cosine``, and
        ``percentage_changed_ids``, a fraction of the tokens that the nearest-neighbour attack reads.
    """
    table = embedding_table_of(noisy_model.base_model)
    sums: dict[str, float] = {}
    weights: dict[str, float] = {}

    def add(name: str, value: Tensor | float, weight: float) -> None:
        if weight:  # a batch without a transformed token has no value
            sums[name] = sums.get(name, 0.0) + float(value) * weight
            weights[name] = weights.get(name, 0.0) + weight

    with _evaluating(noisy_model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for start in range(0, len(passages), batch_size):
            chats = as_chats(passages[start : start + batch_size])
            inputs = tokenizer_wrapper(chats, truncation=True, max_length=max_length)
            inputs = {name: tensor.to(table.device) for name, tensor in inputs.items()}
            output = noisy_model(**inputs)
            clean_logits, noisy_logits = output.base_model_output.clean_logits, output.base_model_output.noisy_logits
            attended = inputs["attention_mask"] != 0
            for suffix, num_logits in (("", None), (f"_top_{TOP_K}", TOP_K)):
                per_token = token_divergences(noisy_logits, clean_logits, attended, num_logits)
                for name in UTILITY_DIVERGENCES:
                    add(name + suffix, mean_over_sequences(per_token[name], attended), len(chats))
            selected = inputs["noise_mask"]
            tokens, transformed = inputs["input_ids"][selected], output.transformed[selected]
            add("mean_sigma", output.std[selected].mean(), len(tokens))
            for metric, suffix in (("l2", ""), ("cosine", "_cosine")):
                rate = nearest_neighbor_failure_rate(transformed, table, tokens, metric=metric)  # type: ignore[arg-type]
                add(f"nearest_neighbor_failure_rate{suffix}", rate, len(tokens))
            _, nearest = nearest_embeddings(transformed, table)
            changed = percentage_changed_ids(tokens[None], nearest.T, torch.ones_like(tokens[None], dtype=torch.bool))
            add("percentage_changed_ids", changed, len(tokens))
            predicting, targets = selected[:, 1:], inputs["input_ids"][:, 1:]
            agreement = clean_logits.argmax(-1) == noisy_logits.argmax(-1)
            add("next_token_agreement", agreement[selected].float().mean(), len(tokens))
            for name, logits in (("clean", clean_logits), ("noisy", noisy_logits)):
                loss = torch.nn.functional.cross_entropy(logits[:, :-1][predicting].float(), targets[predicting])
                add(f"{name}_perplexity", loss, int(predicting.sum()))
    means = {name: sums[name] / weights[name] for name in sums}
    for name in ("clean_perplexity", "noisy_perplexity"):
        means[name] = float(torch.tensor(means[name]).exp())
    return means


@torch.no_grad()
def known_transform_failure_rate(
    noisy_model: NoiseMaskedNoisyTransformerModel,
    tokenizer_wrapper: TokenizerWrapper,
    passages: Sequence[str],
    *,
    max_length: int,
    seed: int,
) -> float:
    """Return the fraction of tokens that an attacker fails to read who knows the transform and the language model.

    The tokens are the first `READ_TOKENS` transformed tokens of the first `READ_PASSAGES` passages.
    """
    inputs = tokenizer_wrapper(as_chats(passages[:READ_PASSAGES]), truncation=True, max_length=max_length)
    table = embedding_table_of(noisy_model.base_model)
    input_ids, attention_mask, noise_mask = (
        inputs[name].to(table.device) for name in ("input_ids", "attention_mask", "noise_mask")
    )
    attention_mask = attention_mask * (noise_mask.cumsum(-1) <= READ_TOKENS)
    noise_mask = noise_mask & (attention_mask != 0)
    with _evaluating(noisy_model):
        transformed = noisy_model.transform(input_ids, attention_mask, noise_mask, seed=seed)
        result = _read_knowing(noisy_model, transformed, attention_mask, noise_mask, input_ids)
    assert result.failure_rate is not None
    return result.failure_rate.item()


def known_transform_reading(
    noisy_model: NoiseMaskedNoisyTransformerModel,
    embeddings: Tensor,
    attention_mask: Tensor,
    noise_mask: Tensor,
    tokenizer: object,
) -> str:
    """The text that an attacker who knows the transform and the language model reads in one transformed prompt."""
    with _evaluating(noisy_model):
        result = _read_knowing(noisy_model, embeddings, attention_mask, noise_mask, None)
    return str(tokenizer.decode(result.tokens[noise_mask]))  # type: ignore[attr-defined]


def _read_knowing(
    noisy_model: NoiseMaskedNoisyTransformerModel,
    embeddings: Tensor,
    attention_mask: Tensor,
    noise_mask: Tensor,
    input_ids: Tensor | None,
) -> KnownTransformResult:
    table = embedding_table_of(noisy_model.base_model)
    return known_transform_attack(
        embeddings,
        noisy_model.noise_layer,
        table,
        noise_mask,
        attention_mask=attention_mask,
        input_ids=input_ids,
        language_model=noisy_model.causal_lm,
        candidates=min(_CANDIDATES, len(table)),
    )


@contextmanager
def _evaluating(noisy_model: NoiseMaskedNoisyTransformerModel) -> Iterator[None]:
    was_training = noisy_model.training
    noisy_model.eval()
    try:
        yield
    finally:
        noisy_model.train(was_training)
