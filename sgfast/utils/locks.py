"""Locks that die with their process: the kernel keeps a lock for an open file and drops it when the file is closed."""

import contextlib
import errno
import os
import sys
from pathlib import Path

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

# Open files with a lock. Forked children inherit them, and would keep a lock alive after its owner.
_held: set[int] = set()


def try_lock(descriptor: int) -> bool:
    """Lock an open file or folder until `release`, or until this process ends in whatever way.

    Args:
        descriptor: of the open file. It stays the caller's when the answer is False.

    Returns:
        False if another opening of the same file holds the lock, in this process or in another.

    Raises:
        OSError: this file system, or Windows for a folder, has no such locks.
    """
    try:
        if sys.platform == "win32":
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
            return False
        raise
    _held.add(descriptor)
    return True


def release(descriptor: int) -> None:
    """Close a file that `try_lock` locked, which gives up its lock. A forked child's copy is closed already."""
    if descriptor in _held:
        _held.discard(descriptor)
        os.close(descriptor)


def is_at(descriptor: int, path: Path) -> bool:
    """Whether a path still names an open file: between opening and locking it may have been removed or renamed."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _close_in_child() -> None:
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
