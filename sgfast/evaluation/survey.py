"""The file's records as tokens, and a survey of them before anything is computed."""

import heapq
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from sgfast.evaluation.settings import EvaluationError, Settings
from sgfast.huggingface.tokenization_utils import TokenizerWrapper
from sgfast.noise_layer.seeds import mix_seed
from sgfast.training.data import encode_record
from sgfast.utils.records import Record, RecordError, read_records

# The sample holds tokens of at least this many records, if the file has so many.
_RECORDS_IN_SAMPLE = 8


@dataclass(frozen=True)
class Example:
    """One record's tokens, (T,) each. ``truncated`` is True if the record was longer."""

    index: int
    record: Record
    input_ids: Tensor
    noise_mask: Tensor
    truncated: bool


@dataclass(frozen=True, order=True)
class Sampled:
    """A record in the sample: its random priority, its number, and how many of its transformed tokens are used.

    The priority is not stored, because the seed follows from it.
    """

    priority: int
    index: int
    tokens: int


@dataclass
class Survey:
    """The number of a file's records and tokens, and the sample on which costly attacks run."""

    records: int = 0
    tokens: int = 0
    transformed_tokens: int = 0
    longest: int = 0
    truncated: int = 0
    # A heap. Its first entry is the first to leave the sample.
    sample: list[Sampled] = field(default_factory=list)
    sampled_tokens: int = 0

    def add(self, example: Example, seed: int, attack_tokens: int) -> None:
        """Count a record. The sample depends on the set of records, not on their order or number of parts."""
        self.records += 1
        self.tokens += len(example.input_ids)
        self.longest = max(self.longest, len(example.input_ids))
        self.truncated += example.truncated
        transformed = int(example.noise_mask.sum())
        self.transformed_tokens += transformed
        if transformed:
            used = min(transformed, max(1, attack_tokens // _RECORDS_IN_SAMPLE))
            self._sample(Sampled(-mix_seed(seed, example.index), example.index, used), attack_tokens)

    def merge(self, other: "Survey", attack_tokens: int) -> None:
        """Add the survey of other records."""
        self.records += other.records
        self.tokens += other.tokens
        self.transformed_tokens += other.transformed_tokens
        self.longest = max(self.longest, other.longest)
        self.truncated += other.truncated
        for sampled in other.sample:
            self._sample(sampled, attack_tokens)

    def _sample(self, sampled: Sampled, attack_tokens: int) -> None:
        """Put a record into the sample. Records of the lowest priority leave while the others hold enough tokens."""
        heapq.heappush(self.sample, sampled)
        self.sampled_tokens += sampled.tokens
        while self.sampled_tokens - self.sample[0].tokens >= attack_tokens:
            self.sampled_tokens -= heapq.heappop(self.sample).tokens

    def to_json(self) -> dict[str, Any]:
        """Return plain values for `from_json`. The order by priority is left out, because it tells the seed."""
        sample = [{"index": one.index, "tokens": one.tokens} for one in sorted(self.sample, key=lambda one: one.index)]
        return asdict(self) | {"sample": sample}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Survey":
        """Rebuild a complete survey from the values of `to_json`."""
        return cls(**(values | {"sample": [Sampled(0, **sampled) for sampled in values["sample"]]}))


def read_examples(
    settings: Settings,
    tokenizer_wrapper: TokenizerWrapper,
    max_length: int | None,
    wanted: Callable[[int], bool] = lambda index: True,
) -> Iterator[Example]:
    """Tokenize the wanted records of the file, one at a time.

    Raises:
        RecordError: a record cannot be read or tokenized; the message names file and line.
    """
    for index, record in enumerate(read_records(settings.data, text_unit=settings.text_unit)):
        if wanted(index):
            yield _tokenized(settings, tokenizer_wrapper, max_length, index, record)


def _tokenized(
    settings: Settings, tokenizer_wrapper: TokenizerWrapper, max_length: int | None, index: int, record: Record
) -> Example:
    try:
        rows = encode_record(tokenizer_wrapper, record, settings.text_as)
    except (ValueError, TypeError) as error:
        raise RecordError(f"{settings.data}, line {record.line}: {error}") from error
    input_ids, noise_mask = rows["input_ids"][0], rows["noise_mask"][0]
    if len(input_ids) == 0:
        raise RecordError(f"{settings.data}, line {record.line}: it has no token")
    truncated = max_length is not None and len(input_ids) > max_length
    return Example(index, record, input_ids[:max_length], noise_mask[:max_length], truncated)


def check_survey(survey: Survey, settings: Settings) -> None:
    """Check that the survey has found tokens to measure.

    Raises:
        EvaluationError: no token is transformed.
    """
    if survey.transformed_tokens == 0:
        raise EvaluationError(
            f"{settings.data}: the masks select no token to transform (a chat of answers alone has none)"
        )
