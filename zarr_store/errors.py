"""Every error that terrashard raises on purpose, and the exit code the command line gives it.

    TerrashardError                     1   a defect of ours
    ├── InvalidInput (ValueError)       2   an input cannot be used
    │   ├── UnknownName (KeyError)      2   a name that does not exist; the nearest one is offered
    │   ├── NotACube                    2   a path that holds something else, or nothing
    │   ├── CubeMismatch                2   an existing cube of another grid, band list or rule
    │   └── MisalignedWrite             2   a write that is not exactly one whole shard
    ├── NothingFound (LookupError)      4   a valid request has an empty result
    ├── Locked                          5   another run holds the cube
    ├── IntegrityError                  6   stored bytes are not what was written
    │   ├── MissingShard                6   a shard that was never written, or was deleted
    │   └── CorruptShard                6   a shard whose checksum does not match
    ├── NoSpace (OSError)               7   the disk, quota or inode table is full, or a file too large
    ├── AccessError (OSError)           8   network or authorisation
    │   └── AssetUnreadable             8   one asset of one scene could not be read
    └── Preempted                      75   stopped on request; the same command resumes

Each message names what was expected, what came, which object it is about and what to do.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable
from typing import ClassVar, Self

__all__ = [
    "AccessError",
    "AssetUnreadable",
    "CorruptShard",
    "CubeMismatch",
    "IntegrityError",
    "InvalidInput",
    "Locked",
    "MisalignedWrite",
    "MissingShard",
    "NoSpace",
    "NotACube",
    "NothingFound",
    "Preempted",
    "TerrashardError",
    "UnknownName",
    "space_advice",
]


class TerrashardError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what a command ends with."""

    exit_code: ClassVar[int] = 1

    def __str__(self) -> str:  # KeyError would show the repr of the message
        return str(self.args[0]) if self.args else ""


class InvalidInput(TerrashardError, ValueError):
    """An input cannot be used."""

    exit_code = 2


class UnknownName(InvalidInput, KeyError):
    """A name is not among the known ones."""

    @classmethod
    def of(cls, kind: str, name: str | Iterable[str], known: Iterable[str], where: str = "") -> Self:
        """Build the message that lists every wrong name, each with the nearest known one.

        >>> print(UnknownName.of("band", "bleu", ["blue", "red"]))
        unknown band 'bleu': did you mean 'blue'? (known: blue, red)
        >>> print(UnknownName.of("band", ["bleu", "x", "rad"], ["blue", "red"]))
        unknown bands 'bleu', 'x', 'rad': did you mean 'blue', 'red'? (known: blue, red)
        """
        names = sorted(known)
        wrong = [name] if isinstance(name, str) else list(dict.fromkeys(name))
        by_lower = {known_name.lower(): known_name for known_name in names}
        near = [match for text in wrong for match in difflib.get_close_matches(text.lower(), by_lower, 1, cutoff=0.5)]
        meant = ", ".join(dict.fromkeys(repr(by_lower[match]) for match in near))
        hint = f"did you mean {meant}? " if near else ""
        place = f" in {where}" if where else ""
        shown = ", ".join(names[:24]) + (", …" if len(names) > 24 else "")
        plural = "" if len(wrong) == 1 else "es" if kind.endswith("s") else "s"
        listed = ", ".join(map(repr, wrong))
        return cls(f"unknown {kind}{plural} {listed}{place}: {hint}(known: {shown or 'none'})")


class NotACube(InvalidInput):
    """A path holds nothing, or something other than a terrashard cube."""


class CubeMismatch(InvalidInput):
    """An existing cube was made with another grid, band list, time axis or rule."""


class MisalignedWrite(InvalidInput):
    """A write does not cover exactly one whole shard."""


class NothingFound(TerrashardError, LookupError):
    """A valid request has an empty result."""

    exit_code = 4


class Locked(TerrashardError):
    """Another run holds the cube or run directory."""

    exit_code = 5


class IntegrityError(TerrashardError):
    """Stored bytes differ from what was written."""

    exit_code = 6


class MissingShard(IntegrityError):
    """A shard that was never written or has been deleted: absent, which is not the same as nodata."""


class CorruptShard(IntegrityError):
    """A shard whose bytes fail their checksum."""


class NoSpace(TerrashardError, OSError):
    """The disk, quota or inode table is full, or a file would become larger than is allowed."""

    exit_code = 7


class AccessError(TerrashardError, OSError):
    """The network failed, or authorisation is missing."""

    exit_code = 8


class AssetUnreadable(AccessError):
    """One asset of one scene could not be read after all retries; `reason` is the cause alone, without secrets."""

    asset: str = ""
    reason: str = ""
    final: bool = False

    @classmethod
    def of(cls, scene: str, asset: str, reason: str, href: str, *, final: bool = False) -> Self:
        """Build the message that names the scene and the asset; `href` and `reason` must hold no secrets.

        Args:
            scene: Item id.
            asset: Asset key.
            reason: The cause alone.
            href: Address of the file.
            final: Whether the file as it is will never be read, so that to repeat the command changes nothing.
        """
        until = (
            "its pixels count as missing: no repeated run can read the file as it is"
            if final
            else "its pixels count as missing until a repeated run can read it"
        )
        error = cls(f"scene {scene or '?'}, asset {asset or '?'} ({href}) could not be read: {reason}; {until}")
        error.asset, error.reason, error.final = asset, reason, final
        return error


class Preempted(TerrashardError):
    """The run was asked to stop and saved its state; the same command resumes it."""

    exit_code = 75


def space_advice(number: int | None) -> str | None:
    """Return what to do if no more could be written, by the error number; None for any other error.

    >>> space_advice(errno.ENOSPC), space_advice(errno.ENOENT)
    ('free some', None)
    """
    if number in (errno.ENOSPC, errno.EDQUOT):
        return "free some"
    if number == errno.EFBIG:
        return "raise the limit on the size of a file (`ulimit -f`), or use another file system"
    return None
