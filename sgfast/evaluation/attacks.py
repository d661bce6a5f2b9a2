"""Attacks that cost too much for every token. They run on a sample of the file, which is transformed again for them.

Nothing of the sample is kept while the file is read. A record's noise depends only on the seed and on the record's
place in the file, so reading and transforming the record again gives the same embeddings.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgfast.evaluation.budget import Budget
from sgfast.evaluation.settings import Settings
from sgfast.evaluation.subject import Subject, record_noise_seed
from sgfast.evaluation.survey import Example, Survey, read_examples
from sgfast.metrics.information import fano_error_bound, information_bounds, pac_privacy_success_bound
from sgfast.metrics.inversion import LearnedInversionAttack
from sgfast.metrics.privacy import repeated_query_attack
from sgfast.noise_layer.seeds import mix_seed

DRAWS = 16
CANDIDATES = 256
# Words that keep seeds of different uses apart. A record's noise uses the number of its draw, which is smaller.
_POSITIONS, _CANDIDATES = 2**32, 2**32 + 1


class _Sample(NamedTuple):
    """A record of the sample on the device. ``used`` (T,) bool selects its tokens that are in the sample."""

    example: Example
    input_ids: Tensor
    noise_mask: Tensor
    used: Tensor


class SampleAttacks:
    """Runs each attack over the sample that a survey chose."""

    def __init__(
        self, settings: Settings, subject: Subject, survey: Survey, budget: Budget, max_length: int | None
    ) -> None:
        self._settings, self._subject, self._survey = settings, subject, survey
        self._budget, self._max_length = budget, max_length

    def run(self, name: str, on_record: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """Run an attack of `SAMPLE_ATTACKS`.

        Raises:
            ValueError: a learned inversion has fewer than three different texts.
        """
        attacks = {"repeated": self._repeated, "learned": self._learned, "information": self._information}
        return {"tokens": self._survey.sampled_tokens, **attacks[name](on_record)}

    def _samples(self, on_record: Callable[[], None]) -> Iterator[_Sample]:
        tokens = {sampled.index: sampled.tokens for sampled in self._survey.sample}
        wrapper, device = self._subject.tokenizer_wrapper, self._subject.table.device
        for example in read_examples(self._settings, wrapper, self._max_length, tokens.__contains__):
            positions = example.noise_mask.nonzero().squeeze(-1)
            order = torch.randperm(len(positions), generator=self._generator(example.index, _POSITIONS))
            used = torch.zeros_like(example.noise_mask)
            used[positions[order[: tokens[example.index]]]] = True
            yield _Sample(example, *(part.to(device) for part in (example.input_ids, example.noise_mask, used)))
            on_record()

    def _generator(self, *words: int) -> torch.Generator:
        return torch.Generator().manual_seed(mix_seed(self._settings.seed, *words) >> 1)

    def _repeated(self, on_record: Callable[[], None]) -> dict[str, Any]:
        """Failure rates of nearest neighbours on means of 1, 2, 4, … draws; see `repeated_query_attack`."""
        failures: dict[int, int] = {}
        for sample in self._samples(on_record):
            embeddings = self._subject.embed(sample.input_ids)
            # One draw in memory at a time.
            draws = (self._transform(sample, embeddings, draw).output[sample.used] for draw in range(DRAWS))
            rates = repeated_query_attack(
                draws,
                self._subject.table,
                sample.input_ids[sample.used],
                beta=self._settings.beta,
                max_chunk_bytes=self._budget.chunk_bytes(len(sample.input_ids)),
            )
            tokens = int(sample.used.sum())
            for count, rate in rates.items():
                failures[count] = failures.get(count, 0) + round(float(rate) * tokens)
        return {"failure_rates": {str(n): failed / self._survey.sampled_tokens for n, failed in failures.items()}}

    def _transform(self, sample: _Sample, embeddings: Tensor, draw: int = 0) -> Any:
        seed = record_noise_seed(self._settings.seed, sample.example.index, draw)
        return self._subject.transform(embeddings, sample.noise_mask, seed)

    def _learned(self, on_record: Callable[[], None]) -> dict[str, Any]:
        """A trained inversion, measured on texts held out from its training; see `LearnedInversionAttack`."""
        table, tokens = self._subject.table, self._survey.sampled_tokens
        transformed = torch.empty(tokens, table.shape[1], device=table.device)
        input_ids = torch.empty(tokens, dtype=torch.int64, device=table.device)
        groups = torch.empty(tokens, dtype=torch.int64)
        texts: dict[tuple[int, ...], int] = {}
        first = 0
        for sample in self._samples(on_record):
            part = slice(first, first := first + int(sample.used.sum()))
            transformed[part] = self._transform(sample, self._subject.embed(sample.input_ids)).output[sample.used]
            input_ids[part] = sample.input_ids[sample.used]
            # Equal texts stay together.
            groups[part] = texts.setdefault(tuple(sample.input_ids.tolist()), len(texts))
        attack = LearnedInversionAttack(
            table, seed=self._settings.seed, max_chunk_bytes=self._budget.inversion_chunk_bytes(tokens)
        )
        result = attack.evaluate(transformed[:, None], input_ids[:, None], groups=groups)._asdict()
        # The number of held-out sequences is left out: each sequence here is one token.
        return {name: value for name, value in result.items() if name != "held_out_sequences"}

    def _information(self, on_record: Callable[[], None]) -> dict[str, Any]:
        """Bounds on how well the transformed distributions of tokens can be told apart; see `information_bounds`."""
        tokens = self._survey.sampled_tokens
        chosen = torch.zeros(tokens, dtype=torch.bool)
        chosen[torch.randperm(tokens, generator=self._generator(_CANDIDATES))[:CANDIDATES]] = True
        parts: list[tuple[Tensor, ...]] = []
        first = 0
        for sample in self._samples(on_record):
            positions = sample.used.nonzero().squeeze(-1)
            part = chosen[first : first + len(positions)].to(positions.device)
            first += len(positions)
            positions = positions[part]
            embeddings = self._subject.embed(sample.input_ids)
            transformed = self._transform(sample, embeddings)
            mean = embeddings[positions].double() + transformed.mean[positions].double()
            suppressed = transformed.suppressed
            seen = torch.ones_like(mean, dtype=torch.bool) if suppressed is None else ~suppressed[positions]
            parts.append((sample.input_ids[positions], mean, transformed.std[positions].double(), seen))
        input_ids, mean, std, seen = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        # Each token once: an attacker who confuses two places of one token has still read the token.
        places = list({token: place for place, token in enumerate(input_ids.tolist())}.values())
        return _readings(mean[places], std[places], seen[places])


def _readings(mean: Tensor, std: Tensor, seen: Tensor) -> dict[str, Any]:
    """Compute bounds for (N, D) candidates from the features that are not suppressed."""
    bounds = information_bounds(mean, std, seen)
    candidates, upper = len(mean), float(bounds.kl_upper)
    # A suppressed feature is replaced by a function of the text. The bounds leave out the information in it.
    proven = bool(seen.all()) and candidates > 1
    return {
        "candidates": candidates,
        "mean_pairwise_kl": float(bounds.mean_pairwise_kl),
        "kl_upper": upper,
        "bhattacharyya_lower": float(bounds.bhattacharyya_lower),
        "are_bounds": proven,
        "fano_error_bound": fano_error_bound(upper, candidates) if proven else None,
        "pac_success_bound": pac_privacy_success_bound(upper, 1 / candidates) if proven else None,
    }
