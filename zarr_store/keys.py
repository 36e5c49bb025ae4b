"""Check names and keys from metadata: their form, and where they lead in a folder.

A cube may come from somebody else, and its metadata name groups, arrays and objects. Such a name becomes part of a
key, and a key part of a path. So each name must match one pattern when a store is opened, each key must stay inside its
store, and no link inside a folder is followed to a place outside it.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Any

from zarr_store.errors import IntegrityError

__all__ = ["GROUP_NAME", "RESERVED_NAMES", "check_key", "check_name", "path_to_read", "path_to_write", "refuse_links"]

GROUP_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""Pattern of the names of groups and arrays."""

RESERVED_NAMES = ("overview", "labels", "_terrashard")
"""Names of folders in a cube that are no collections."""

_SPECIAL = ("", ".", "..")


def check_name(name: Any, what: str, where: str) -> str:
    """Return a name from metadata if it can name a group or an array.

    Args:
        name: As the metadata have it.
        what: Its kind, for the message: "collection", "array" …
        where: The object that holds the metadata, for the message.

    Raises:
        IntegrityError: It is not such a name.
    """
    if not isinstance(name, str) or not GROUP_NAME.fullmatch(name):
        raise IntegrityError(
            f"{where} names a {what} {name!r}: expected letters, digits, '.', '_' and '-' (at most 100, first a letter "
            "or digit). Nothing was read or changed there: do not use this folder unless you know who made it"
        )
    return name


def check_key(key: str, where: str) -> str:
    """Return a key if it stays inside its store.

    Raises:
        IntegrityError: It is absolute, climbs with "..", or holds an empty part, a backslash or a control character.
    """
    parts = key.split("/")
    if any(part in _SPECIAL for part in parts) or "\\" in key or any(ord(letter) < 32 for letter in key):
        raise IntegrityError(
            f"{where} has no object {key!r}: a key is names with slashes between them and stays inside its store. "
            "Nothing was read or changed: its metadata were not made by terrashard"
        )
    return key


def path_to_write(top: Path, key: str) -> Path:
    """Return the path of a key below `top` if no folder on the way is a link.

    The last part may be a link: a writer puts a new file in its place, and a deletion removes the link alone.

    Raises:
        IntegrityError: The key leads out of the folder, or through a link.
    """
    path = str(top)
    for part in check_key(key, path).split("/")[:-1]:
        path = f"{path}/{part}"
        if os.path.islink(path):
            raise IntegrityError(
                f"{path} is a link to {os.readlink(path)}: nothing is written or deleted through a link inside a "
                "store. Nothing was changed: replace the link by the folder that belongs there"
            )
    return top / key


def path_to_read(top: Path, key: str) -> Path:
    """Return the path of a key below `top` if it leads to a file or folder inside `top`, or to nothing.

    Raises:
        IntegrityError: The key or a link leads out of the folder, or to something that is not a file.
    """
    path = str(top)
    for part in check_key(key, path).split("/"):
        path = f"{path}/{part}"
        try:
            mode = os.lstat(path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            break
        if stat.S_ISLNK(mode):
            mode = _target_mode(top, path)
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise IntegrityError(f"{path} is neither a file nor a folder ({stat.filemode(mode)}); it is not read")
    return top / key


def refuse_links(top: Path, folder: Path) -> None:
    """Refuse a folder with links that lead out of it, before another library opens its files by their paths.

    Args:
        top: The store; links that stay inside it are fine.
        folder: In the store; need not exist.

    Raises:
        IntegrityError: A link in the folder leads out of `top`, or something in it is not a file.
    """
    waiting, linked = [str(folder)], set()
    while waiting:
        try:
            entries = os.scandir(waiting.pop())
        except (FileNotFoundError, NotADirectoryError):
            continue
        with entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                elif not entry.is_file(follow_symlinks=False):
                    path_to_read(top, os.path.relpath(entry.path, top))
                    target = os.path.realpath(entry.path)
                    if target not in linked:  # links may lead in circles
                        linked.add(target)
                        waiting.append(target)


def _target_mode(top: Path, link: str) -> int:
    """Return the mode of the target of a link inside `top`; that of a file if the target does not exist."""
    target = os.path.realpath(link)
    if not Path(target).is_relative_to(os.path.realpath(top)):
        raise IntegrityError(
            f"{link} is a link to {target}, which lies outside {top}: it is not followed. Replace the link by the file "
            "or folder that belongs there"
        )
    try:
        return os.stat(target).st_mode
    except OSError:
        return stat.S_IFREG
