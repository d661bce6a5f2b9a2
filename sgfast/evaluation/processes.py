"""The processes that share an evaluation: one process, or all processes that torchrun started."""

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

# The first process to finish waits for the last: shares are uneven, and texts differ in length.
_PATIENCE = datetime.timedelta(days=30)


@dataclass(frozen=True)
class Processes:
    """This process and the number of all processes."""

    rank: int = 0
    count: int = 1

    def gather(self, value: Any) -> list[Any]:
        """Return every process's value, by rank. The processes wait for each other."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(values, value)
        return values


@contextmanager
def joined() -> Iterator[Processes]:
    """Join the processes that torchrun started, if this process is one of them."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes()
        return
    torch.distributed.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Processes(torch.distributed.get_rank(), count)
    finally:
        torch.distributed.destroy_process_group()
