"""Open a path that a user or a catalogue names only if it is a regular file.

A pipe without a writer, a terminal or `/dev/zero` opens like a file and then never ends: the process waits, or fills
its memory. So every file that comes from outside is looked at before it is opened, opened without waiting, and looked
at again. What is not a regular file is an `OSError`, which every door turns into its own message.
"""

from __future__ import annotations

import errno
import io
import os
import stat

__all__ = ["check_regular", "open_regular"]

_KINDS = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def check_regular(path: str | os.PathLike[str]) -> os.stat_result:
    """Refuse a path that leads to anything but a regular file, without opening it.

    Raises:
        OSError: It is absent, a folder, a pipe, a device or a socket.
    """
    found = os.stat(path)
    _check(found, path)
    return found


def open_regular(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Open a regular file for reading, without waiting for anything.

    Raises:
        OSError: It cannot be opened, or is a folder, a pipe, a device or a socket.
    """
    # opening some devices has an effect, so they are not opened to be looked at
    check_regular(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        _check(os.fstat(descriptor), path)  # it may have been swapped since
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _check(found: os.stat_result, path: str | os.PathLike[str]) -> None:
    if stat.S_ISREG(found.st_mode):
        return
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    kind = next((text for matches, text in _KINDS if matches(found.st_mode)), "something else")
    raise OSError(errno.EINVAL, f"expected a regular file, it is {kind}", os.fspath(path))
