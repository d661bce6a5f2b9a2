"""One run writes to a folder at a time."""

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from sgfast.utils import locks
from sgfast.utils.files import check_output_folder

# Only where a folder itself cannot be locked: on Windows and on some network file systems.
_LOCK_FILE = ".sgfast-lock"


@contextmanager
def one_writer(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Hold a folder for this run alone while the block runs; make the folder if it is not there.

    The lock dies with its process, also by ``kill -9``, and leaves no file. Of several processes of one run
    (``torch.distributed``) the first holds the lock for all of them, so that every process must call this. A folder
    that was made here and is still empty when the block fails is removed.

    Args:
        folder: of the run's files.

    Raises:
        BlockingIOError: another run writes there; on every process of this run.
        NotADirectoryError: it is no folder.
        OSError: it cannot be made.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> with one_writer(folder):
        ...     try:
        ...         one_writer(folder).__enter__()
        ...     except BlockingIOError as error:
        ...         print(str(error).removeprefix(folder))
         is being written by another run: wait for it, or give another folder
    """
    refusal: OSError | None = None
    with contextlib.ExitStack() as stack:
        if _rank() == 0:
            try:
                stack.enter_context(_held(Path(folder)))
            except OSError as error:
                refusal = error
        refusal = _told_by_the_first(refusal)
        if refusal is not None:
            raise refusal
        yield


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    check_output_folder(folder)
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    descriptor = _locked(folder)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # not empty
            for path in absent:
                path.rmdir()
        raise
    finally:
        if descriptor is not None:
            locks.release(descriptor)


def _locked(folder: Path) -> int | None:
    """An open file that holds the lock; None where there are no locks at all."""
    folder = Path(os.path.realpath(folder))
    for path, flags in ((folder, os.O_RDONLY), (folder / _LOCK_FILE, os.O_RDWR | os.O_CREAT)):
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = os.open(path, flags, 0o666)
            except FileNotFoundError:  # removed meanwhile by a run that was refused
                continue
            except OSError:
                break
            try:
                locked = locks.try_lock(descriptor)
            except OSError:
                os.close(descriptor)
                break
            if not locked:
                os.close(descriptor)
                raise BlockingIOError(f"{folder} is being written by another run: wait for it, or give another folder")
            if locks.is_at(descriptor, path):
                return descriptor
            locks.release(descriptor)
    return None


def _rank() -> int:
    return torch.distributed.get_rank() if _is_distributed() else 0


def _told_by_the_first(refusal: OSError | None) -> OSError | None:
    """What the first process found, on every process."""
    if not _is_distributed():
        return refusal
    told = [refusal]
    torch.distributed.broadcast_object_list(told)
    return told[0]


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
