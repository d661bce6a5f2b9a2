"""Output files: whole or not there, in place of regular files alone, and nothing left of saves that were killed."""

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sgfast.utils import locks

# A file that is being written is `.NAME.RANDOM` with this ending. Sweeps delete such files: no others end so.
_UNFINISHED = ".sgfast-unfinished"
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}
# What a disk reports that takes no more.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


@contextmanager
def replacing(path: str | os.PathLike[str], *, alone: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` to write to; rename it over ``path`` if the block succeeds.

    The content is on the disk before it gets the name: after a crash there is the old file or the new one. A symbolic
    link stays: the file that it names is replaced. Temporary files of this function whose process is dead are removed
    from the folder; those of living processes and of other users stay.

    Args:
        path: of the file.
        alone: refuse to begin while another process writes the same file. By default the last to finish wins.

    Raises:
        OSError: before the block is entered, what `check_output_file` refuses, a folder that takes no new file, and
            with ``alone`` another writer (BlockingIOError); afterwards a full disk, with the file's name.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "notes.txt"
        >>> with replacing(target) as temporary:
        ...     _ = temporary.write_text("whole")
        >>> target.read_text()
        'whole'
    """
    target = check_output_file(path)
    descriptor, temporary = _temporary(target)
    try:
        if _sweep(target, temporary) and alone:
            raise BlockingIOError(f"{path} is being written by another process: wait for it, or give another file")
        yield temporary
        synchronize(temporary)
        # mkstemp makes files for their owner alone; a file that is handed out gets the usual permissions.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        check_output_file(path)  # again: the block may have taken hours
        temporary.replace(target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename == str(temporary):
            error.filename = None
        with naming(path):
            raise
    finally:
        if descriptor is not None:
            locks.release(descriptor)
    synchronize(target.parent)


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Give the error of a full disk the name of the file that the block writes; Python's own has none.

    Raises:
        OSError: the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM and error.filename is None:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise


def check_output_file(path: str | os.PathLike[str]) -> Path:
    """Check that a file may be written at ``path``: a new one, or in place of a regular file.

    Returns:
        The file itself, where ``path`` is a symbolic link to it.

    Raises:
        FileNotFoundError: there is no folder for it.
        IsADirectoryError: it is a folder.
        OSError: it is a device, a pipe, a socket, or a link that leads back to itself.
    """
    given = Path(path)
    try:
        kind = stat.S_IFMT(os.stat(given).st_mode)
    except FileNotFoundError:
        kind = stat.S_IFREG
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror}") from error
    if kind == stat.S_IFDIR:
        raise IsADirectoryError(f"{path} cannot be written: it is a folder, not a file")
    if kind != stat.S_IFREG:
        raise OSError(f"{path} cannot be written: it is {_KINDS.get(kind, 'something else')}, not a regular file")
    target = Path(os.path.realpath(given))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no folder {target.parent}")
    return target


def check_output_folder(path: str | os.PathLike[str]) -> None:
    """Check that ``path`` is a folder or can become one.

    Raises:
        NotADirectoryError: it is something else, or lies in something else.
        OSError: it is a link that leads nowhere.
    """
    folder = Path(path)
    try:
        kind = stat.S_IFMT(os.stat(folder).st_mode)
    except FileNotFoundError:
        if folder.is_symlink():
            raise OSError(f"{path} must be a folder; it is a link to nothing") from None
        return
    except OSError as error:
        raise NotADirectoryError(f"{path} must be a folder: {error.strerror}") from error
    if kind != stat.S_IFDIR:
        raise NotADirectoryError(f"{path} must be a folder; it is {_KINDS.get(kind, 'a file')}")


def synchronize(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    if path.is_dir() and os.name != "posix":  # where a folder cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(target: Path) -> tuple[int | None, Path]:
    """A new file beside the target, locked by what is open, so that sweeps see that its process lives.

    None is open where files have no locks, or, as on Windows, a locked file can be neither written nor renamed.
    """
    while True:
        try:
            descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=_UNFINISHED)
        except OSError as error:
            raise type(error)(error.errno, error.strerror, str(target)) from error
        try:
            locked = locks.try_lock(descriptor) if os.name == "posix" else None
        except OSError:
            locked = None
        if locked is None:  # nothing here is ever swept
            os.close(descriptor)
            return None, Path(name)
        if not locked:
            os.close(descriptor)
        elif locks.is_at(descriptor, Path(name)):
            return descriptor, Path(name)
        else:
            locks.release(descriptor)
        # A sweep came between the file and its lock, and removes it.


def _sweep(target: Path, own: Path) -> bool:
    """Remove what dead processes left half-written in the target's folder; whether a living one writes the target."""
    written = False
    for path in target.parent.glob(f".*{_UNFINISHED}"):
        if path != own and not _removed(path):
            written |= path.name.startswith(f".{target.name}.") and path.exists()
    return written


def _removed(path: Path) -> bool:
    """Remove an unfinished file of this user that no process holds."""
    flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags)
    except OSError:
        return False
    try:
        status = os.fstat(descriptor)
        owned = os.name == "posix" and stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
        if not owned or not locks.try_lock(descriptor):
            os.close(descriptor)
            return False
    except OSError:
        os.close(descriptor)
        return False
    try:
        if locks.is_at(descriptor, path):
            with contextlib.suppress(OSError):
                path.unlink()
        return True
    finally:
        locks.release(descriptor)
