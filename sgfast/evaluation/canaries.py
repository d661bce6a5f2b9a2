"""Canaries: secrets in the data, such as names and numbers, whose recovery is counted.

A file of canaries is a text or JSONL file like the data: each record is one secret (`{"text": "…"}`). Secrets are
looked for in the texts and in the contents of messages. They count where their tokens are transformed.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgfast.evaluation.settings import EvaluationError, Settings
from sgfast.utils.records import Record, read_records


def check_canaries(path: Path, settings: Settings) -> None:
    """Check that the data holds every canary.

    Raises:
        EvaluationError: a record of the canaries is a chat, or the data has no such text.
        RecordError: a file cannot be read.
    """
    records_with_canaries(path, settings)


def records_with_canaries(path: Path, settings: Settings) -> dict[int, list[str]]:
    """Return the first record with each canary: the record's number, and the canaries in it.

    Raises:
        EvaluationError: as in `check_canaries`.
    """
    wanted: dict[str, int] = {}
    for record in read_records(path):
        if record.text is None:
            raise EvaluationError(f"{path}, line {record.line}: a canary must be a text; got messages")
        wanted.setdefault(record.text, record.line)
    found: dict[int, list[str]] = {}
    for index, record in enumerate(read_records(settings.data, text_unit=settings.text_unit)):
        for canary in [canary for canary in wanted if _holds(record, canary)]:
            found.setdefault(index, []).append(canary)
            del wanted[canary]
    if wanted:
        raise EvaluationError(f"{path}, line {min(wanted.values())}: {settings.data} has no such text")
    return found


def _holds(record: Record, canary: str) -> bool:
    texts = [record.text] if record.text is not None else [message["content"] for message in record.messages or ()]
    return any(canary in text for text in texts)


def canary_tokens(tokenizer: Any, input_ids: Tensor, noise_mask: Tensor, canaries: list[str]) -> Tensor:
    """Return (T,) bool, True at the transformed tokens that hold a canary.

    Each run of transformed tokens is decoded token by token. The place of a token in the text is then known for every
    tokenizer.
    """
    marked = torch.zeros_like(noise_mask, dtype=torch.bool)
    places = noise_mask.nonzero().squeeze(-1).tolist()
    runs: list[list[int]] = []
    for place in places:
        if runs and runs[-1][-1] == place - 1:
            runs[-1].append(place)
        else:
            runs.append([place])
    for run in runs:
        ids = input_ids[run].tolist()
        ends = [len(tokenizer.decode(ids[: count + 1])) for count in range(len(ids))]
        text = tokenizer.decode(ids)
        for canary in canaries:
            start = text.find(canary)
            while start >= 0:
                for place, first, end in zip(run, [0, *ends], ends, strict=False):
                    marked[place] |= first < start + len(canary) and end > start
                start = text.find(canary, start + 1)
    return marked
