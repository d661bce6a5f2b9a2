"""Files that a user names, opened without waiting: a pipe or a device has no end, or none that comes soon."""

import io
import os
import stat
from pathlib import Path


def open_regular(path: str | os.PathLike[str], *, wanted: str = "file") -> io.BufferedReader:
    """Open a regular file, or a link to one, to read its bytes.

    Args:
        path: of the file.
        wanted: what the file should be, for the error that says it is a folder.

    Raises:
        ValueError: no such file, not readable, or a folder, pipe, socket or device; the message names the path.
    """
    check_path(path)
    try:
        # A pipe is waited for when it is opened, unless told not to.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        if Path(path).is_dir():  # Windows does not open it
            raise ValueError(f"{path} is a folder, not a {wanted}") from error
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    kind = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(kind):
        os.close(descriptor)
        raise ValueError(f"{path} is a folder, not a {wanted}" if stat.S_ISDIR(kind) else f"{path} is no regular file")
    return os.fdopen(descriptor, "rb")


def check_path(path: str | os.PathLike[str]) -> None:
    """Check that a path can be one: without a zero, and in the characters that names of files have.

    Raises:
        ValueError: it cannot.
    """
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError as error:
        raise ValueError(f"{os.fspath(path)!r} is no path: {error.reason}") from error
    if b"\0" in encoded:
        raise ValueError(f"{os.fspath(path)!r} is no path: it holds a zero")
