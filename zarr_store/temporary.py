"""Temporary files and folders, which are written beside the place where they go, have suffixes from this module.

A process that is killed leaves them behind. So every one has a suffix from this list, by which `zarr_store.strays`
finds it, and no reader takes it for data.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

__all__ = ["OVERWRITE", "PARTIAL", "STALE", "TENSORSTORE_LOCK", "is_temporary", "remove_folder"]

PARTIAL = ".partial"
"""Suffix of a file or folder that is not yet in its place, or that is being removed."""
STALE = ".stale"
"""Suffix of the lock of a dead run, while another run takes it over."""
OVERWRITE = ".overwrite"
"""Suffix of a cube that takes the place of another one, or of the one that it has replaced."""
TENSORSTORE_LOCK = ".__lock"
"""Suffix of a file that tensorstore has not yet renamed."""


def is_temporary(name: str) -> bool:
    """Return whether a file or folder of this name inside a cube or a run directory is temporary."""
    return name.endswith((PARTIAL, STALE, TENSORSTORE_LOCK))


def remove_folder(folder: Path) -> None:
    """Remove a folder so that its name is free in one step; a process that is killed meanwhile leaves a stray."""
    doomed = tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=f".old{PARTIAL}", dir=folder.parent)
    os.rename(folder, doomed)  # an empty folder gives way
    shutil.rmtree(doomed, ignore_errors=True)
