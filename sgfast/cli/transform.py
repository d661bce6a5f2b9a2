"""Command ``sgfast transform``: the tensors that a client sends, for one prompt or for every record of a file."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from sgfast.cli.progress import Follower
from sgfast.client.text_transform import StainedGlassTransformForText
from sgfast.training.data import as_chat
from sgfast.utils.devices import find_device
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
    device: str = "auto",
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
        device: name of the device that computes, see `sgfast.utils.devices.find_device`.

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
    on = find_device(device)
    # IndexedRecords checks every line. The check comes first, because the transform takes longer to load.
    records = None if data is None else IndexedRecords(data, text_unit=text_unit)
    if records is None:
        _transform_prompt(file, str(prompt), out, seed, on)
    else:
        _transform_records(file, records, out, seed, on)


def _transform_prompt(file: Path, prompt: str, out: Path, seed: int | None, device: torch.device) -> None:
    with replacing(out, alone=True) as temporary:
        client = _load(file, device)
        encoded = _on_cpu(client.encode([{"role": "user", "content": prompt}], seed=seed))
        write_tensors(temporary, encoded, {"format": "pt"})
    batch, tokens, width = encoded["inputs_embeds"].shape
    print(f"wrote {out}: {batch} x {tokens} tokens x {width} features")


def _transform_records(file: Path, records: IndexedRecords, out: Path, seed: int | None, device: torch.device) -> None:
    keys = list(_distinct_keys(records))
    metadata = {"format": "pt", "content": "sgfast transformed texts", "keys": json.dumps(keys)}
    tokens = 0
    with streamed_tensors(out, metadata) as stream:
        client = _load(file, device)
        with Follower(Console(stderr=True)) as follower:
            follower.begin("transforming", len(records), "records")
            for index, record in enumerate(records):
                encoded = _encode(client, records.path, record, None if seed is None else record_seed(seed, index))
                for name, tensor in encoded.items():
                    stream.write(f"{record.key}.{name}", tensor)
                tokens += encoded["attention_mask"].numel()
                follower.advance(1)
    width = client.parameters[client.embedding_name].shape[-1]
    print(f"wrote {out}: {len(records)} records, {tokens} tokens x {width} features")


def _load(file: Path, device: torch.device) -> StainedGlassTransformForText:
    client = StainedGlassTransformForText.from_pretrained(file)
    client.noise_layer.to(device)
    client.parameters = {name: tensor.to(device) for name, tensor in client.parameters.items()}
    return client


def _on_cpu(encoded: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in encoded.items()}


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
        return _on_cpu(client.encode(chat, seed=seed, add_generation_prompt=chat[-1]["role"] != "assistant"))
    except (ValueError, TypeError) as error:
        raise RecordError(f"{path}, line {record.line}: {error}") from error


def record_seed(seed: int, index: int) -> int:
    """Return the seed of one record. With one seed for all records, differences of outputs would have no noise."""
    return int.from_bytes(hashlib.sha256(f"{seed} {index}".encode()).digest()[:8], "little")
