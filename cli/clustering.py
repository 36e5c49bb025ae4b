"""What the commands of clusters, components, anomalies and change share: workers, and files that GDAL writes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cli.session import Session

__all__ = ["add_map_files", "open_workers"]


@contextlib.contextmanager
def open_workers(session: Session, dask: str | None, memory: str | None) -> Iterator[tuple[Any, bool]]:
    """Yield who computes blocks, and whether this process writes the results.

    Args:
        session: The running command.
        dask: Address of a Dask scheduler; None for this process, or for the processes of the run that it belongs to.
        memory: Bytes of data that each process keeps between passes, such as "4GB".
    """
    from dask.utils import parse_bytes

    from jaxtrain.parallel.processes import start_distributed
    from jaxtrain.tasks.work import MEMORY, LocalWorkers, ProcessWorkers, keep_blocks
    from zarr_store.errors import InvalidInput

    try:
        kept = MEMORY if memory is None else parse_bytes(memory)
    except ValueError as error:
        raise InvalidInput(f"--memory {memory}: expected a size such as 4GB") from error
    keep_blocks(kept)
    try:
        if dask is not None:
            from cli.dask_blocks import dask_blocks

            with dask_blocks(dask, kept) as workers:
                yield workers, True
            return
        info = start_distributed()
        if info.count > 1:
            yield ProcessWorkers(info.index, info.count), info.is_first
        else:
            yield LocalWorkers(), True
    finally:
        keep_blocks(MEMORY)


def add_map_files(folder: Path, name: str) -> None:
    """Write a map of a folder of results as GeoTIFF and picture, beside it: NAME.zarr → NAME.tif and quicklook.png."""
    from cli.mapping import export_cog
    from cli.picture import draw
    from jaxtrain.inference.maps import is_map, open_map

    made = folder / f"{name}.zarr"
    if is_map(made):
        export_cog(open_map(made), folder / f"{name}.tif")
        draw(str(made), str(folder / "quicklook.png"))
