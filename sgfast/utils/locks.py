"""Locks that end with their process: the operating system drops the lock of an open file when the file is closed."""

import contextlib
import errno
import os
import sys
from pathlib import Path

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

# Open files with a lock. Forked children inherit open files and would keep the locks after the owner has ended.
_held: set[int] = set()


def try_lock(descriptor: int) -> bool:
    """Lock an open file or folder until `release`, or until this process ends in any way.

    Args:
        descriptor: descriptor of the open file. If the result is False, the caller must close the descriptor.

    Returns:
        True if the lock is now held; False if another open descriptor of the same file holds the lock, in this process
        or in another.

    Raises:
        OSError: the file system has no such locks, or the descriptor is a folder on Windows.
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
    """Close a file that `try_lock` locked, and so release its lock. In a forked child, do nothing."""
    if descriptor in _held:
        _held.discard(descriptor)
        os.close(descriptor)


def is_at(descriptor: int, path: Path) -> bool:
    """Return whether a path still names an open file, which may have been removed or renamed before it was locked."""
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
