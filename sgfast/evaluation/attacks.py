"""Attacks that cost too much for every token. They run on a sample of the file, which is transformed again for them.

Nothing of the sample is kept while the file is read. A record's noise depends only on the seed and on the record's
place in the file, so reading and transforming the record again gives the same embeddings.
"""

from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgfast.evaluation.budget import Budget
from sgfast.evaluation.canaries import canary_tokens, records_with_canaries
from sgfast.evaluation.intervals import clustered_interval, wilson_interval
from sgfast.evaluation.known_attack import DRAWS as KNOWN_DRAWS
from sgfast.evaluation.known_attack import Prefix, cut_after, failure_counts, rates_of, read_prefixes
from sgfast.evaluation.settings import Settings
from sgfast.evaluation.subject import Subject, record_noise_seed
from sgfast.evaluation.survey import Example, Survey, read_examples
from sgfast.metrics.information import fano_error_bound, information_bounds, pac_privacy_success_bound
from sgfast.metrics.inversion import LearnedInversionAttack
from sgfast.metrics.known_transform import KnownTransformResult
from sgfast.metrics.privacy import repeated_query_attack
from sgfast.noise_layer.seeds import mix_seed

DRAWS = 16
CANDIDATES = 256
# Words that keep seeds of different uses apart. A record's noise uses the number of its draw, which is smaller.
_POSITIONS, _CANDIDATES, _KNOWN = 2**32, 2**32 + 1, 2**32 + 2
# A known-transform attack reads at least this many records, if the sample has so many.
RECORDS_READ = 8
# Parts of the sample on which the learned inversion is trained too: a curve over the number of training pairs.
_TRAINING_SHARES = (8, 2)
# A learned inversion needs three texts: to train on, to choose an epoch by, and to be measured on.
LEAST_TEXTS = 3


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
        attacks = {
            "repeated": self._repeated,
            "learned": self._learned,
            "known": self._known,
            "information": self._information,
        }
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
        failures: dict[int, list[tuple[float, int]]] = {}
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
                failures.setdefault(count, []).append((round(float(rate) * tokens), tokens))
        sampled = self._survey.sampled_tokens
        curve = {number: sum(failed for failed, _ in counts) / sampled for number, counts in failures.items()}
        best = min(curve, key=curve.__getitem__)
        return {
            "failure_rate": curve[best],
            "ci95": clustered_interval(failures[best]),
            "failure_rates": {str(number): rate for number, rate in curve.items()},
        }

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
        result = attack.evaluate(transformed[:, None], input_ids[:, None], groups=groups)
        curve = {}
        for share in _TRAINING_SHARES:
            chosen = groups % share == 0
            if len(torch.unique(groups[chosen])) >= LEAST_TEXTS:
                some = attack.evaluate(transformed[chosen][:, None], input_ids[chosen][:, None], groups=groups[chosen])
                curve[str(some.training_tokens)] = some.failure_rate
        curve[str(result.training_tokens)] = result.failure_rate
        # The number of held-out sequences is left out: each sequence here is one token.
        values = {name: value for name, value in result._asdict().items() if name != "held_out_sequences"}
        return {
            **values,
            "ci95": wilson_interval(result.failure_rate, result.held_out_tokens),
            "failure_rates": curve,
        }

    def _known(self, on_record: Callable[[], None]) -> dict[str, Any]:
        """Readings by an attacker who knows the transform and the language model; see `known_transform_attack`."""
        limit = max(1, self._settings.known_tokens // RECORDS_READ)
        found: dict[str, Any] = {}
        rates = {}
        # A mean of clamped draws is no Gaussian, and the attack reads Gaussians.
        clamps = self._subject.noise_layer.value_range is not None
        for draws in KNOWN_DRAWS[:1] if clamps else KNOWN_DRAWS:
            examples = self._read_whole(self._records_to_read(limit))
            prefixes = [self._prefix(example, draws, limit) for example in examples]
            result, counts = self._read(prefixes, draws)
            figures = rates_of(result, counts)
            found = found or figures
            rates[str(draws)] = figures["failure_rate"]
            for _ in prefixes:
                on_record()
        return {**found, "failure_rates": rates, **self._canaries()}

    def _canaries(self) -> dict[str, Any]:
        """The part of the canaries that the same attacker reads, in the records that hold them."""
        if self._settings.canaries is None:
            return {}
        texts = records_with_canaries(self._settings.canaries, self._settings)
        tokenizer = self._subject.tokenizer_wrapper.tokenizer
        prefixes = []
        for example in self._read_whole(texts):
            marked = canary_tokens(tokenizer, example.input_ids, example.noise_mask, texts[example.index])
            if bool(marked.any()):
                length = int(marked.nonzero()[-1]) + 1
                prefixes.append(self._prefix(example, 1, None, length, marked))
        if not prefixes:
            return {"canary_recall": None, "canaries": 0}
        result, _ = self._read(prefixes, 1)
        runs = sum(int((one.canaries & ~one.canaries.roll(1)).sum()) + bool(one.canaries[0]) for one in prefixes)
        return {"canary_recall": result.canary_recall, "canaries": runs}

    def _records_to_read(self, limit: int) -> set[int]:
        """Choose whole records of the sample, until their beginnings hold the wanted number of tokens."""
        sample = self._survey.sample
        order = torch.randperm(len(sample), generator=self._generator(_KNOWN)).tolist()
        chosen, tokens = set(), 0
        for place in order:
            if tokens >= self._settings.known_tokens:
                break
            chosen.add(sample[place].index)
            tokens += min(limit, sample[place].tokens)
        return chosen

    def _read_whole(self, indices: Collection[int]) -> Iterator[Example]:
        wrapper = self._subject.tokenizer_wrapper
        return read_examples(self._settings, wrapper, self._max_length, lambda index: index in indices)

    def _prefix(
        self, example: Example, draws: int, limit: int | None, length: int | None = None, marked: Tensor | None = None
    ) -> Prefix:
        """Transform a record ``draws`` times; return the mean of its beginning."""
        device = self._subject.table.device
        if limit is not None:
            length = cut_after(example.noise_mask, limit)
        input_ids, noise_mask = example.input_ids[:length].to(device), example.noise_mask[:length].to(device)
        embeddings = self._subject.embed(input_ids)
        total = torch.zeros((), device=device)
        for draw in range(draws):
            seed = record_noise_seed(self._settings.seed, example.index, draw)
            total = total + self._subject.transform(embeddings, noise_mask, seed).output.float()
        canaries = torch.zeros_like(noise_mask) if marked is None else marked[:length].to(device)
        return Prefix(input_ids, noise_mask, canaries, total / draws)

    def _read(self, prefixes: list[Prefix], draws: int) -> tuple[KnownTransformResult, list[tuple[float, int]]]:
        longest = max(len(one.input_ids) for one in prefixes)
        result, input_ids, noise_mask = read_prefixes(
            self._subject,
            prefixes,
            draws=draws,
            max_chunk_bytes=self._budget.known_chunk_bytes(len(prefixes), longest, self._subject.cache_bytes),
            on_token=lambda: None,
        )
        return result, failure_counts(result, input_ids, noise_mask)

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
