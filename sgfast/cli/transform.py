"""Command ``sgfast transform``: the tensors that a client sends, for one prompt or for every record of a file."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from sgfast.client.text_transform import StainedGlassTransformForText
from sgfast.training.data import as_chat
from sgfast.utils.files import check_output_file, replacing
from sgfast.utils.records import IndexedRecords, Record, RecordError, TextUnit
from sgfast.utils.tensor_stream import streamed_tensors, write_tensors


def run_transform(
    *,
    file: Path,
    prompt: str | None,
    data: Path | None,
    out: Path,
    seed: int | None,
    text_unit: TextUnit,
    force: bool = False,
) -> None:
    """Transform one prompt or a file of records. The output is written only if every record can be transformed.

    Args:
        file: the file of the transform.
        prompt: a user's message. Exactly one of ``prompt`` and ``data`` is given.
        data: a file of records.
        out: the file to write.
        seed: seed of the noise. None draws from the operating system.
        text_unit: unit of a record in a text file.
        force: replace the output file if it exists.

    Raises:
        ValueError: both or neither of ``prompt`` and ``data`` are given, ``out`` is an input file, or an input is
            invalid.
        FileExistsError: ``out`` exists, and ``force`` is False.
    """
    if (prompt is None) == (data is None):
        raise ValueError("give exactly one of --prompt and --data")
    if any(source and source.exists() and out.exists() and out.samefile(source) for source in (file, data)):
        raise ValueError(f"--out {out} is an input file, which would be replaced: give another file")
    if check_output_file(out).exists() and not force:
        raise FileExistsError(f"--out {out} exists: give another file, or replace it with --force")
    # IndexedRecords checks every line. The check comes first, because the transform takes longer to load.
    records = None if data is None else IndexedRecords(data, text_unit=text_unit)
    if records is None:
        _transform_prompt(file, str(prompt), out, seed)
    else:
        _transform_records(file, records, out, seed)


def _transform_prompt(file: Path, prompt: str, out: Path, seed: int | None) -> None:
    with replacing(out, alone=True) as temporary:
        client = StainedGlassTransformForText.from_pretrained(file)
        encoded = client.encode([{"role": "user", "content": prompt}], seed=seed)
        write_tensors(temporary, encoded, {"format": "pt"})
    batch, tokens, width = encoded["inputs_embeds"].shape
    print(f"wrote {out}: {batch} x {tokens} tokens x {width} features")


def _transform_records(file: Path, records: IndexedRecords, out: Path, seed: int | None) -> None:
    keys = list(_distinct_keys(records))
    metadata = {"format": "pt", "content": "sgfast transformed texts", "keys": json.dumps(keys)}
    columns = (TextColumn("records"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    tokens = 0
    with streamed_tensors(out, metadata) as stream:
        client = StainedGlassTransformForText.from_pretrained(file)
        with Progress(*columns, console=Console(stderr=True)) as progress:
            for index, record in enumerate(progress.track(records, total=len(records))):
                encoded = _encode(client, records.path, record, None if seed is None else record_seed(seed, index))
                for name, tensor in encoded.items():
                    stream.write(f"{record.key}.{name}", tensor)
                tokens += encoded["attention_mask"].numel()
    width = client.parameters[client.embedding_name].shape[-1]
    print(f"wrote {out}: {len(records)} records, {tokens} tokens x {width} features")


def _distinct_keys(records: IndexedRecords) -> Iterator[str]:
    """Yield the records' keys, which name the tensors. A key that occurs twice is an error."""
    seen = set()
    for record in records:
        if record.key in seen:
            raise RecordError(f'{records.path}, line {record.line}: the "id" {record.key!r} occurred before')
        seen.add(record.key)
        yield record.key


def _encode(client: StainedGlassTransformForText, path: Path, record: Record, seed: int | None) -> dict[str, Tensor]:
    chat = as_chat(record)
    try:
        # A chat that ends with an answer needs no generation prompt.
        return client.encode(chat, seed=seed, add_generation_prompt=chat[-1]["role"] != "assistant")
    except (ValueError, TypeError) as error:
        raise RecordError(f"{path}, line {record.line}: {error}") from error


def record_seed(seed: int, index: int) -> int:
    """Return the seed of one record. With one seed for all records, differences of outputs would have no noise."""
    return int.from_bytes(hashlib.sha256(f"{seed} {index}".encode()).digest()[:8], "little")
