"""The state of an evaluation on the disk. Any number of processes resume the evaluation from it after an interruption.

A folder holds a description of the evaluation (``run.json``) and parts. A part holds the measurements of one process in
one run: the accumulators' integers with the last record (``N-RANK.safetensors``), and the values of each sequence
(``N-RANK.jsonl``). The state says how many bytes of the lines belong to it. Records of later lines, which a killed
process wrote, are measured again. The state is replaced by a rename after its lines are on the disk.
"""

import heapq
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgfast.evaluation.settings import EvaluationError
from sgfast.utils.files import naming, replacing
from sgfast.utils.tensor_stream import write_tensors

_FOLDER, _RUN_FILE = "progress", "run.json"


@dataclass
class Reached:
    """The records of a part: all records up to ``last`` whose number is ``rank`` modulo ``processes``."""

    rank: int
    processes: int
    last: int = -1
    records: int = 0
    tokens: int = 0
    bytes: int = 0

    def covers(self, index: int) -> bool:
        """Return True if a record was measured in this part or in an earlier one."""
        return index <= self.last and index % self.processes == self.rank


class Progress:
    """The state of an evaluation, in a folder beside its results."""

    def __init__(self, out: Path) -> None:
        self.folder = out / _FOLDER

    def read_run(self) -> dict[str, Any] | None:
        """Read the description of the evaluation in the folder; None if there is none.

        Raises:
            EvaluationError: the file is no such description.
        """
        path = self.folder / _RUN_FILE
        try:
            run = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise EvaluationError(f"{path} is damaged: remove {self.folder} to start afresh") from error
        if not (isinstance(run, dict) and "identity" in run):
            raise EvaluationError(f"{path} is damaged: remove {self.folder} to start afresh")
        return run

    def begin(self, run: Mapping[str, Any]) -> None:
        """Remove the old state, and describe a new evaluation."""
        self.remove()
        self.folder.mkdir(parents=True)
        write_json(self.folder / _RUN_FILE, run)

    def update_run(self, run: Mapping[str, Any]) -> None:
        """Replace the description."""
        write_json(self.folder / _RUN_FILE, run)

    def remove(self) -> None:
        """Remove the folder and all in it."""
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def parts(self) -> list["Part"]:
        """Read all parts on the disk.

        Raises:
            EvaluationError: a part is damaged.
        """
        return [Part.read(path) for path in sorted(self.folder.glob("*.safetensors"))]

    def next_run(self) -> int:
        """Return a number for the parts of another run."""
        # Hidden files are left out: a process that is killed while it writes leaves them behind.
        return 1 + max((int(path.stem.split("-")[0]) for path in self.folder.glob("[0-9]*-*.*")), default=0)

    def sequences(self) -> Iterator[str]:
        """Yield the lines of all sequences in the records' order, with one line of every part in memory."""
        yield from (line for _, line in heapq.merge(*(part.lines() for part in self.parts()), key=lambda pair: pair[0]))


@dataclass(frozen=True)
class Part:
    """The measurements of one process in one run, as they are on the disk."""

    path: Path
    reached: Reached
    counts: dict[str, Tensor]

    @classmethod
    def read(cls, path: Path) -> "Part":
        """Read a part.

        Raises:
            EvaluationError: the part is damaged.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                reached = Reached(**json.loads(file.metadata()["reached"]))
                return cls(path, reached, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise EvaluationError(f"{path} is damaged: remove {path.parent} to start afresh") from error

    def lines(self) -> Iterator[tuple[int, str]]:
        """Yield the lines that belong to the state, each with its record's number."""
        path = self.path.with_suffix(".jsonl")
        remaining = self.reached.bytes
        if remaining == 0:
            return
        with path.open("rb") as file:
            for line in file:
                remaining -= len(line)
                text = line.decode("utf-8")
                yield json.loads(text)["index"], text
                if remaining <= 0:
                    return


class PartWriter:
    """Writes a part: every line at once, the state at intervals."""

    def __init__(self, folder: Path, run: int, rank: int, processes: int) -> None:
        self._state_path = folder / f"{run}-{rank}.safetensors"
        self._lines_path = folder / f"{run}-{rank}.jsonl"
        self._lines: io.BufferedWriter = self._lines_path.open("wb")
        self.reached = Reached(rank, processes)

    def add(self, index: int, tokens: int, values: Mapping[str, Any]) -> None:
        """Add the values of one sequence."""
        line = json.dumps({"index": index, **values}, allow_nan=False, ensure_ascii=False).encode("utf-8") + b"\n"
        with naming(self._lines_path):
            self._lines.write(line)
        self.reached.last = index
        self.reached.records += 1
        self.reached.tokens += tokens
        self.reached.bytes += len(line)

    def save(self, counts: Mapping[str, Tensor]) -> None:
        """Save the state, so that nothing that was added is lost."""
        with naming(self._lines_path):
            self._lines.flush()
            os.fsync(self._lines.fileno())
        with replacing(self._state_path) as temporary:
            tensors = {name: tensor.to("cpu", torch.int64) for name, tensor in counts.items()}
            write_tensors(temporary, tensors, {"reached": json.dumps(asdict(self.reached))})

    def close(self) -> None:
        """Close the file of lines."""
        self._lines.close()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file. A file at the path is replaced once the new one is whole."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
