"""The measurement of one record, and the accumulators that add up all records."""

import copy
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgfast.evaluation.budget import Budget
from sgfast.evaluation.settings import RANK_ATTACKS, Settings
from sgfast.evaluation.subject import Subject, record_noise_seed
from sgfast.evaluation.survey import Example
from sgfast.metrics.accumulators import PrivacyMetrics, UtilityMetrics
from sgfast.metrics.per_sequence import sequence_utility_from_hidden
from sgfast.metrics.privacy import token_ranks

# The rates that follow from ranks, by the attack that they belong to.
_RATES = {
    "nearest": ("nearest_neighbor_failure_rate", "mean_reconstruction_rank"),
    "farthest": ("max_rank_failure_rate",),
    "transformation": ("token_transformation_rate_", "symmetric_token_transformation_rate_"),
}


class Measurement:
    """The accumulators of an evaluation."""

    def __init__(self, settings: Settings, subject: Subject) -> None:
        self.utility = UtilityMetrics(settings.num_logits)
        self.privacy = PrivacyMetrics(subject.table, beta=settings.beta)

    def counts(self) -> dict[str, Tensor]:
        """Return the integers of the accumulators."""
        return {
            "utility": self.utility.state_dict()["counts"],
            "ranks": self.privacy.state_dict()["counts"],
        }

    def add(self, counts: Mapping[str, Tensor]) -> None:
        """Add the integers of another process or run."""
        for name, metric in (("utility", self.utility), ("ranks", self.privacy)):
            other = copy.copy(metric)
            other.load_state_dict({"counts": counts[name], "options": metric.state_dict()["options"]})
            metric.merge(other)


def max_length_of(settings: Settings, subject: Subject) -> int | None:
    """Return the number of tokens kept of a record: the setting or, without it, the model's positions."""
    return subject.positions if settings.max_length is None else settings.max_length


def budget_of(settings: Settings, subject: Subject) -> Budget:
    """Return the budget for the subject's sizes."""
    return Budget(settings.memory_budget, max(subject.vocabulary, len(subject.table)), subject.table.shape[1])


class Measured(NamedTuple):
    """The values of one record by name, the ranks of its tokens (T,) if asked for, and its mean sigma."""

    utility: dict[str, Tensor]
    ranks: Tensor | None
    mean_sigma: Tensor


def measure_example(settings: Settings, subject: Subject, budget: Budget, example: Example) -> Measured:
    """Measure one record alone. Its values depend on nothing else in the file."""
    device = subject.table.device
    input_ids, noise_mask = example.input_ids.to(device), example.noise_mask.to(device)
    max_chunk_bytes = budget.chunk_bytes(len(input_ids))
    clean = subject.embed(input_ids)
    transformed = subject.transform(clean, noise_mask, record_noise_seed(settings.seed, example.index))
    output, mean_sigma = transformed.output, transformed.std[noise_mask].double().mean()
    del transformed
    clean_hidden, noisy_hidden = subject.final_hidden(clean), subject.final_hidden(output)
    del clean
    utility = sequence_utility_from_hidden(
        noisy_hidden[None],
        clean_hidden[None],
        subject.head,
        torch.ones_like(input_ids)[None],
        input_ids=input_ids[None],
        top_k=settings.num_logits,
        max_chunk_bytes=max_chunk_bytes,
    )
    del clean_hidden, noisy_hidden
    ranks = None
    if any(name in RANK_ATTACKS for name in settings.attacks):
        ranks = token_ranks(output, subject.table, input_ids, noise_mask, max_chunk_bytes=max_chunk_bytes)
    return Measured(utility, ranks, mean_sigma)


def add_measured(
    settings: Settings, measurement: Measurement, example: Example, measured: Measured
) -> dict[str, float | int | str | None]:
    """Add a record's values to the accumulators, and return the values for people and programs to read."""
    measurement.utility.add(measured.utility)
    values = {name: value for name, value in measured.utility.items() if name != "attended_tokens"}
    if measured.ranks is not None:
        ranks = measured.ranks[None]
        measurement.privacy.add(ranks)
        values |= selected_rates(measurement.privacy.per_sequence(ranks), settings.attacks)
    return {
        "key": example.record.key,
        "line": example.record.line,
        "tokens": len(example.input_ids),
        "transformed_tokens": int(example.noise_mask.sum()),
        "truncated": example.truncated,
        "mean_sigma": number(measured.mean_sigma),
        **{name: number(value) for name, value in values.items()},
    }


def selected_rates(rates: Mapping[str, Any], attacks: tuple[str, ...]) -> dict[str, Any]:
    """Return the rates of the attacks that were asked for."""
    prefixes = tuple(prefix for name in attacks for prefix in _RATES.get(name, ()))
    return {name: value for name, value in rates.items() if prefixes and name.startswith(prefixes)}


def number(value: Any) -> float | int | None:
    """Return a number for JSON, and None for NaN and infinities."""
    plain = value.item() if isinstance(value, Tensor) else value
    return None if isinstance(plain, float) and not math.isfinite(plain) else plain


def numbers(values: dict[str, Any]) -> dict[str, Any]:
    """Apply `number` to all values of a dictionary, and of dictionaries in it."""
    return {name: numbers(value) if isinstance(value, dict) else number(value) for name, value in values.items()}
