"""The mean shifts and standard deviations that a noise layer gives to candidates for the next token.

A causal noise layer gives to a token a mean shift and a standard deviation that depend on the token and on the tokens
before it. A reader who knows the layer can therefore compute both for every candidate for the next token, once the
tokens before are known. `next_token_estimates` does so for several hypotheses about these tokens at once.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sgfast.noise_layer.base import BaseNoiseLayer
from sgfast.noise_layer.transformer_cloak import TransformerCloak

# Candidates of one pass: each attends to the keys of all of them, so the cost of a candidate grows with their number.
_MOST_CANDIDATES = 512
# Estimates of earlier tokens that differ by this part of their size depend on later tokens.
_NON_CAUSAL = 1e-3


class Estimates(NamedTuple):
    """Mean shift, standard deviation (float32) and suppressed features (bool, or None), (H, C, D) each."""

    mean: Tensor
    std: Tensor
    suppressed: Tensor | None


class NextTokenEstimates(ABC):
    """Estimates for candidates after each of H hypotheses about the tokens before.

    At the start there is one hypothesis, a sequence without tokens.
    """

    hypotheses: int = 1

    @abstractmethod
    def most_candidates(self, max_bytes: int) -> int:
        """Return how many candidates fit into ``max_bytes`` of temporaries; at least 1."""

    @abstractmethod
    def estimate(self, candidates: Tensor) -> Estimates:
        """Return the estimates for the embeddings (C, D) of candidates, the same for every hypothesis."""

    @abstractmethod
    def begin(self, embeddings: Tensor) -> None:
        """Read the first tokens, which are known, (P, D), in one pass."""

    @abstractmethod
    def extend(self, parents: Tensor, embeddings: Tensor) -> None:
        """Continue hypotheses: new hypothesis h is the old one ``parents[h]`` and a token of ``embeddings`` (H, D)."""


def next_token_estimates(noise_layer: BaseNoiseLayer, length: int, width: int) -> NextTokenEstimates:
    """Return estimates for sequences of ``length`` tokens, whose embeddings have ``width`` features.

    A `TransformerCloak` keeps the keys and values of the tokens read, so that a candidate costs one step of its
    estimators. Any other layer runs over the whole sequence again for every candidate.

    Raises:
        ValueError: a `TransformerCloak` whose attention takes no mask for each candidate.
    """
    if isinstance(noise_layer, TransformerCloak):
        return _CachedEstimates(noise_layer)
    return _RepeatedEstimates(noise_layer, length, width)


@torch.no_grad()
def check_causal(noise_layer: BaseNoiseLayer, embeddings: Tensor) -> None:
    """Check on embeddings (T, D) that a layer's estimates for a token do not depend on later tokens.

    Raises:
        ValueError: they do.
    """
    if len(embeddings) < 2:
        return
    changed = torch.cat([embeddings[:-1], -embeddings[-1:]])
    pairs = zip(noise_layer.estimate(embeddings[None]), noise_layer.estimate(changed[None]), strict=True)
    for one, other in pairs:
        one, other = (part.expand(1, *embeddings.shape)[:, :-1].float() for part in (one, other))
        if bool((one - other).abs().max() > _NON_CAUSAL * one.abs().max()):
            raise ValueError(
                f"noise_layer must be causal: {type(noise_layer).__name__} gives a token a mean or deviation "
                "that depends on later tokens"
            )


@contextmanager
def evaluating(noise_layer: nn.Module) -> Iterator[None]:
    """Put a layer into evaluation mode inside the block, and restore the mode of each of its modules."""
    training = [module for module in noise_layer.modules() if module.training]
    noise_layer.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _CachedEstimates(NextTokenEstimates):
    def __init__(self, noise_layer: TransformerCloak) -> None:
        self._layer = noise_layer
        self._mean = _CachedBody(noise_layer.mean_estimator)
        self._std = _CachedBody(noise_layer.std_estimator)

    def most_candidates(self, max_bytes: int) -> int:
        return self._mean.most_candidates(self.hypotheses, max_bytes)

    def estimate(self, candidates: Tensor) -> Estimates:
        mean = self._mean.outputs(candidates)
        std = self._layer.parameterization(self._std.outputs(candidates))
        return Estimates(mean, std, self._layer.suppressed_features(std))

    def begin(self, embeddings: Tensor) -> None:
        self._mean.begin(embeddings)
        self._std.begin(embeddings)

    def extend(self, parents: Tensor, embeddings: Tensor) -> None:
        self._mean.extend(parents, embeddings)
        self._std.extend(parents, embeddings)
        self.hypotheses = len(parents)


class _CachedBody:
    """One estimator with the keys and values of the tokens read so far, a row for each hypothesis."""

    def __init__(self, estimator: Any) -> None:
        self._body, self._head = estimator.body, estimator.head
        config = self._body.config
        if config._attn_implementation not in ("eager", "sdpa"):
            raise ValueError(
                "noise_layer must use eager or sdpa attention, which take a mask for each candidate; "
                f"got {config._attn_implementation}"
            )
        self._cache, self._length, self._hypotheses = self._new_cache(), 0, 1
        self._window = getattr(config, "sliding_window", None)

    @staticmethod
    def _new_cache() -> Any:
        from transformers import DynamicCache

        # Without a config every layer keeps all keys; the mask leaves out what a sliding window has passed.
        return DynamicCache()

    def most_candidates(self, hypotheses: int, max_bytes: int) -> int:
        config = self._body.config
        inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        keys = self._length + _MOST_CANDIDATES
        # Activations of a layer, likelihoods, and the scores of attention where a backend writes them.
        size: int = 4 * (16 * config.hidden_size + 4 * inner) + 8 * keys * (1 + config.num_attention_heads)
        return max(1, min(_MOST_CANDIDATES, max_bytes // (hypotheses * size)))

    def outputs(self, candidates: Tensor) -> Tensor:
        """Return the head's outputs (H, C, D) for candidates (C, D) after each hypothesis."""
        candidates = candidates.to(self._head.weight.dtype).expand(self._hypotheses, *candidates.shape)
        count = candidates.shape[1]
        hidden = self._run_next(candidates)
        # A negative number removes so many of the last keys in every version of transformers.
        self._cache.crop(-count)
        output: Tensor = self._head(hidden)
        return output

    def begin(self, embeddings: Tensor) -> None:
        """Read the first tokens (P, D)."""
        count = len(embeddings)
        places = torch.arange(count, device=embeddings.device)
        seen = places[:, None] >= places
        in_window = seen if self._window is None else seen & (places[:, None] - places < self._window)
        self._run(embeddings[None].to(self._head.weight.dtype), places, seen, in_window)
        self._length = count

    def extend(self, parents: Tensor, embeddings: Tensor) -> None:
        """Replace the hypotheses, and add one token to each."""
        if self._length:
            self._cache.reorder_cache(parents)
        else:
            self._cache = self._new_cache()
        self._hypotheses = len(parents)
        self._run_next(embeddings[:, None].to(self._head.weight.dtype))
        self._length += 1

    def _run_next(self, inputs: Tensor) -> Tensor:
        """Run tokens that all stand at the next position. Each attends to the tokens read so far and to itself."""
        count = inputs.shape[1]
        seen = torch.zeros(count, self._length + count, dtype=torch.bool, device=inputs.device)
        seen[:, : self._length] = True
        seen[:, self._length :] = torch.eye(count, dtype=torch.bool, device=inputs.device)
        in_window = seen.clone()
        if self._window is not None:
            in_window[:, : max(0, self._length - self._window + 1)] = False
        places = torch.full((count,), self._length, device=inputs.device)
        return self._run(inputs, places, seen, in_window)

    def _run(self, inputs: Tensor, places: Tensor, seen: Tensor, in_window: Tensor) -> Tensor:
        """Run tokens at ``places``. ``seen`` and ``in_window`` are the keys that full and sliding layers read."""
        smallest = torch.finfo(inputs.dtype).min
        full, sliding = (
            torch.zeros(mask.shape, dtype=inputs.dtype, device=inputs.device).masked_fill(~mask, smallest)[None, None]
            for mask in (seen, in_window)
        )
        by_layer = bool(getattr(self._body.config, "layer_types", None))
        hidden: Tensor = self._body(
            inputs_embeds=inputs,
            attention_mask={"full_attention": full, "sliding_attention": sliding} if by_layer else sliding,
            position_ids=places[None],
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state
        return hidden


class _RepeatedEstimates(NextTokenEstimates):
    """Estimates of a layer without a cache: the whole sequence for every candidate, zeros after the candidate."""

    def __init__(self, noise_layer: BaseNoiseLayer, length: int, width: int) -> None:
        self._layer, self._total, self._length, self._width = noise_layer, length, 0, width
        self._tokens: Tensor | None = None

    def most_candidates(self, max_bytes: int) -> int:
        return max(1, max_bytes // (self.hypotheses * 32 * self._total * self._width))

    def estimate(self, candidates: Tensor) -> Estimates:
        tokens = self._before(candidates)
        hypotheses, count = len(tokens), len(candidates)
        sequences = tokens[:, None].repeat(1, count, 1, 1)
        sequences[:, :, self._length] = candidates
        flat = sequences.flatten(0, 1)
        mean, std = self._layer.estimate(flat)
        suppressed = self._layer.suppressed_features(std)

        def here(values: Tensor) -> Tensor:
            return values.expand_as(flat)[:, self._length].reshape(hypotheses, count, -1)

        return Estimates(here(mean), here(std), None if suppressed is None else here(suppressed))

    def begin(self, embeddings: Tensor) -> None:
        self._tokens = embeddings.new_zeros(1, self._total, self._width)
        self._tokens[0, : len(embeddings)] = embeddings
        self._length = len(embeddings)

    def extend(self, parents: Tensor, embeddings: Tensor) -> None:
        self._tokens = self._before(embeddings)[parents]
        self._tokens[:, self._length] = embeddings
        self._length += 1
        self.hypotheses = len(parents)

    def _before(self, like: Tensor) -> Tensor:
        if self._tokens is None:
            self._tokens = like.new_zeros(1, self._total, self._width)
        return self._tokens
