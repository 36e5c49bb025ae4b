"""A path or URL becomes the store of its kind: a folder, a bucket or an Icechunk repository.

`FolderStore` of `folder.py` is a folder of a file system. `ObjectStore` of `objects.py` is a bucket, with the same
promises; `IcechunkStore` of `repository.py` is a repository in a folder, with one commit for each run. Where
tensorstore has no driver, `virtual.py` reads the pixels through zarr-python.
"""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from zarr_store.errors import InvalidInput
from zarr_store.folder import FolderStore
from zarr_store.store import REPOSITORY_MARKER, Kind, Pending, Store, translate_os_errors

__all__ = ["FolderStore", "Kind", "Pending", "Store", "open_store", "store_for", "translate_os_errors"]

OBJECT_SCHEMES = ("s3", "gs", "az")


def open_store(url: str | os.PathLike[str]) -> Store:
    """Open the store at a path, a file:// URL or a bucket's s3://, gs:// or az:// URL; it may be empty.

    Raises:
        InvalidInput: The URL has another scheme, or holds credentials.
    """
    text = os.fspath(url)
    if urlsplit(text).scheme in OBJECT_SCHEMES:
        from zarr_store.objects import ObjectStore  # here: most cubes are folders, and obstore takes time to load

        return ObjectStore.at(text)
    folder = FolderStore.at(text)
    return _repository(folder) if (folder.root / REPOSITORY_MARKER).is_file() else folder


def store_for(url: str | os.PathLike[str], kind: Kind | None) -> Store:
    """Return the store for a cube of the given kind; an existing cube is opened as what it is.

    Raises:
        InvalidInput: As `open_store`; or the place cannot hold a repository.
    """
    store = open_store(url)
    if kind != "icechunk" or store.kind == kind:
        return store
    if not isinstance(store, FolderStore):
        raise InvalidInput(
            f"--store icechunk: {store.url} is in a bucket, and a run stages its shards as files beside the "
            "repository; give a local or mounted folder"
        )
    return store if store.exists() else _repository(store)


def _repository(folder: FolderStore) -> Store:
    from zarr_store.repository import IcechunkStore  # here: it is an extra, and few cubes are repositories

    return IcechunkStore(folder.root)
