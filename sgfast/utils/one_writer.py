"""Lock of a folder, so that only one run at a time writes to the folder."""

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from sgfast.utils import locks
from sgfast.utils.files import check_output_folder

# Used only if the folder itself cannot be locked: on Windows and on some network file systems.
_LOCK_FILE = ".sgfast-lock"


@contextmanager
def one_writer(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Lock a folder for this run while the block runs, and make the folder if it does not exist.

    The lock ends with its process, also after ``kill -9``. The lock leaves no file, except on file systems that cannot
    lock a folder. If a run has several processes (``torch.distributed``), the first process holds the lock for all, and
    every process must call this function. If the block fails, an empty folder that this function made is removed.

    Args:
        folder: folder of the run's files.

    Raises:
        BlockingIOError: another run writes to the folder. Every process of this run raises the error.
        NotADirectoryError: ``folder`` is not a folder.
        OSError: the folder cannot be made.

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
        with contextlib.suppress(OSError):  # a folder that is not empty stays
            for path in absent:
                path.rmdir()
        raise
    finally:
        if descriptor is not None:
            locks.release(descriptor)


def _locked(folder: Path) -> int | None:
    """Return the descriptor of an open file that holds the lock; None if the file system has no locks."""
    folder = Path(os.path.realpath(folder))
    for path, flags in ((folder, os.O_RDONLY), (folder / _LOCK_FILE, os.O_RDWR | os.O_CREAT)):
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = os.open(path, flags, 0o666)
            except FileNotFoundError:  # a run that was refused has just removed the folder
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
    """Return the first process's refusal (None: no refusal) on every process."""
    if not _is_distributed():
        return refusal
    told = [refusal]
    torch.distributed.broadcast_object_list(told)
    return told[0]


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
