"""A language model's log-probabilities of the next token, for several hypotheses about the tokens before it."""

from typing import Any

import torch
from torch import Tensor


class NextTokenPrior:
    """``weight · log p(token | tokens so far)`` for each hypothesis; 0 for a sequence's first token.

    Args:
        language_model: a causal language model of transformers, in evaluation mode.
        weight: factor of the log-probabilities.
        vocabulary: number of tokens V. A model with more logits (padding) gives the first V.
    """

    def __init__(self, language_model: Any, weight: float, vocabulary: int) -> None:
        from transformers import DynamicCache

        self._model, self._weight, self._vocabulary = language_model, weight, vocabulary
        self._cache, self._length = DynamicCache(), 0
        self._log_probs: Tensor | None = None

    def scores(self) -> Tensor | None:
        """Return (H, V) in float64, or None before the first token."""
        return self._log_probs

    def begin(self, tokens: Tensor) -> None:
        """Read the first tokens, which are known, (P,), in one pass."""
        self._read(tokens[None])

    def extend(self, parents: Tensor, tokens: Tensor) -> None:
        """Continue hypotheses: new hypothesis h is the old one ``parents[h]`` and the token ``tokens[h]``."""
        if self._length:
            self._cache.reorder_cache(parents)
        self._read(tokens[:, None])

    def _read(self, tokens: Tensor) -> None:
        count = tokens.shape[1]
        logits = self._model(
            input_ids=tokens,
            position_ids=torch.arange(self._length, self._length + count, device=tokens.device)[None],
            past_key_values=self._cache,
            use_cache=True,
        ).logits[:, -1]
        if logits.shape[-1] < self._vocabulary:
            raise ValueError(
                f"language_model must have a logit for each of the table's {self._vocabulary} rows; "
                f"got {logits.shape[-1]}"
            )
        log_probs = torch.log_softmax(logits[:, : self._vocabulary].double(), dim=-1)
        self._log_probs, self._length = self._weight * log_probs, self._length + count
