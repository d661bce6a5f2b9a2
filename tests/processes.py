"""Run a function in several processes that form one group, or in a fork that is killed."""

import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch.distributed
import torch.multiprocessing


def in_processes(count: int, function: Callable[..., None], *arguments: Any) -> None:
    """Call `function(rank, *arguments)` in each; where one raises, so does this."""
    with tempfile.TemporaryDirectory() as directory:
        torch.multiprocessing.spawn(_run, (count, directory, function, arguments), nprocs=count)


def _run(rank: int, count: int, directory: str, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/meeting", rank=rank, world_size=count)
    function(rank, *arguments)
    torch.distributed.barrier()
    # DistributedDataParallel keeps its group, and the group's threads, beyond destroy_process_group. One that releases
    # a tensor while the interpreter ends aborts the process (pytorch/pytorch#190489): it ends without the interpreter.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


@contextmanager
def forked(hold: Callable[[Callable[[], int]], None]) -> Iterator[int]:
    """A fork of this process in the middle of `hold(begun)`, which calls `begun()` there; killed at the block's end."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        hold(lambda: os.write(writer, b"x"))
        os._exit(0)
    os.close(writer)
    try:
        assert os.read(reader, 1) == b"x", "the fork ended before"
        yield pid
    finally:
        os.close(reader)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)


def kill(pid: int) -> None:
    """Kill -9, and wait until it is dead."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
