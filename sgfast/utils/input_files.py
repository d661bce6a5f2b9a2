"""Opening of files that a user names, without waiting. Pipes and devices are refused, because they may have no end."""

import io
import os
import stat
from pathlib import Path


def open_regular(path: str | os.PathLike[str], *, wanted: str = "file") -> io.BufferedReader:
    """Open a regular file, or a link to one, to read its bytes.

    Args:
        path: path of the file.
        wanted: kind of file, for the error if the path is a folder.

    Raises:
        ValueError: the file does not exist, is not readable, or is a folder, pipe, socket or device. The message names
            the path.
    """
    check_path(path)
    try:
        # Without O_NONBLOCK, opening a pipe waits for a writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        if Path(path).is_dir():  # Windows cannot open a folder
            raise ValueError(f"{path} is a folder, not a {wanted}") from error
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    kind = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(kind):
        os.close(descriptor)
        raise ValueError(f"{path} is a folder, not a {wanted}" if stat.S_ISDIR(kind) else f"{path} is no regular file")
    return os.fdopen(descriptor, "rb")


def check_path(path: str | os.PathLike[str]) -> None:
    """Check that a path has no zero byte and can be encoded as the name of a file.

    Raises:
        ValueError: the path has a zero byte or cannot be encoded.
    """
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError as error:
        raise ValueError(f"{os.fspath(path)!r} is no path: {error.reason}") from error
    if b"\0" in encoded:
        raise ValueError(f"{os.fspath(path)!r} is no path: it holds a zero")
