"""Output files that are written whole or not at all, replace only regular files, and leave no temporary files."""

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sgfast.utils import locks

# A file that is being written is `.NAME.RANDOM` with this ending. Sweeps delete only files with this ending.
_UNFINISHED = ".sgfast-unfinished"
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}
# Errors of a disk that cannot store more.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


@contextmanager
def replacing(path: str | os.PathLike[str], *, alone: bool = False) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``, and rename that file to ``path`` if the block succeeds.

    The content is on the disk before the file is renamed, so a crash leaves either the old or the new file. If ``path``
    is a symbolic link, the link stays and its target is replaced. The function removes temporary files of earlier calls
    from the folder if their process is dead. Temporary files of living processes and of other users stay.

    Args:
        path: path of the file.
        alone: refuse to begin while another process writes the same file. By default, the last process to finish
            determines the content.

    Raises:
        OSError: before the block, `check_output_file` refuses the path, the folder takes no new file, or with
            ``alone`` another process writes the file (BlockingIOError). After the block, the disk is full; the error
            has the file's name.

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
        # mkstemp makes files that only their owner can read. The final file gets the usual permissions.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        check_output_file(path)  # again, because the block may have taken hours
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
    """Add the name of the file that the block writes to errors of a full disk. Python's own errors have no name.

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
    """Check that ``path`` can be written: the file is new or a regular file, and its folder exists.

    Returns:
        The path of the file, with symbolic links resolved.

    Raises:
        FileNotFoundError: the folder of ``path`` does not exist.
        IsADirectoryError: ``path`` is a folder.
        OSError: ``path`` is a device, a pipe, a socket, or a link that leads back to itself.
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
        NotADirectoryError: ``path`` or one of its parents is not a folder.
        OSError: ``path`` is a link to a path that does not exist.
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
    if path.is_dir() and os.name != "posix":  # Windows cannot open a folder
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(target: Path) -> tuple[int | None, Path]:
    """Make a temporary file beside the target, and return its open descriptor and its path.

    The descriptor holds a lock, so that sweeps see that the process is alive. The descriptor is None if the file system
    has no locks, and on Windows, where a locked file can be neither written nor renamed.
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
        if locked is None:  # without locks, sweeps remove nothing
            os.close(descriptor)
            return None, Path(name)
        if not locked:
            os.close(descriptor)
        elif locks.is_at(descriptor, Path(name)):
            return descriptor, Path(name)
        else:
            locks.release(descriptor)
        # A sweep of another process locked the new file first and removes it.


def _sweep(target: Path, own: Path) -> bool:
    """Remove temporary files of dead processes from the folder; return whether a living process writes the target."""
    written = False
    for path in target.parent.glob(f".*{_UNFINISHED}"):
        if path != own and not _removed(path):
            written |= path.name.startswith(f".{target.name}.") and path.exists()
    return written


def _removed(path: Path) -> bool:
    """Remove a temporary file of this user if no process holds its lock, and return whether that was the case."""
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
