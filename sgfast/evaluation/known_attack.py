"""The attacker who knows the transform, on whole records: this attacker reads from left to right."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgfast.evaluation.intervals import clustered_interval
from sgfast.metrics.known_transform import KnownTransformResult, known_transform_attack

# Tokens that are scored exactly at a place. In trials 256 lost none of the true tokens, 64 one in 200.
CANDIDATES = 256
# Numbers of transforms of one text that the attacker averages.
DRAWS = (1, 16)


class Prefix(NamedTuple):
    """The beginning of a record, (T,) each: tokens, transformed tokens, canaries; and its transformed embeddings."""

    input_ids: Tensor
    noise_mask: Tensor
    canaries: Tensor
    transformed: Tensor


def cut_after(noise_mask: Tensor, tokens: int) -> int:
    """Return the length of the beginning of a record with so many transformed tokens, or of the whole record."""
    places = noise_mask.nonzero().squeeze(-1)
    return len(noise_mask) if len(places) <= tokens else int(places[tokens - 1]) + 1


def read_prefixes(
    subject: Any, prefixes: Iterable[Prefix], *, draws: int, max_chunk_bytes: int, on_token: Callable[[], None]
) -> tuple[KnownTransformResult, Tensor, Tensor]:
    """Read records; return the result, the true tokens and the transformed tokens, (B, T) each."""

    def padded(parts: list[Tensor]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)

    some = list(prefixes)
    input_ids, noise_mask = (padded([getattr(one, name) for one in some]) for name in ("input_ids", "noise_mask"))
    attended = padded([torch.ones_like(one.noise_mask) for one in some])
    result = known_transform_attack(
        padded([one.transformed for one in some]),
        subject.noise_layer,
        subject.table,
        noise_mask,
        attention_mask=attended,
        input_ids=input_ids,
        canaries=padded([one.canaries for one in some]),
        language_model=subject.language_model,
        candidates=min(CANDIDATES, len(subject.table)),
        draws=draws,
        max_chunk_bytes=max_chunk_bytes,
        on_token=on_token,
    )
    return result, input_ids, noise_mask


def failure_counts(result: KnownTransformResult, input_ids: Tensor, noise_mask: Tensor) -> list[tuple[float, int]]:
    """Return for each record the number of transformed tokens that were read wrong, and of all transformed tokens."""
    wrong = (result.tokens != input_ids) & noise_mask
    return list(zip(wrong.sum(-1).tolist(), noise_mask.sum(-1).tolist(), strict=True))


def rates_of(result: KnownTransformResult, counts: list[tuple[float, int]]) -> dict[str, Any]:
    """Return the figures of a reading for the report."""
    return {
        "failure_rate": sum(wrong for wrong, _ in counts) / sum(tokens for _, tokens in counts),
        "ci95": clustered_interval(counts),
        "tokens": sum(tokens for _, tokens in counts),
        "records": len(counts),
        "top_10_failure_rate": result.top_10_failure_rate,
        "worst_decile_failure_rate": result.worst_decile_failure_rate,
        "exact_sequence_rate": result.exact_sequence_rate,
    }
