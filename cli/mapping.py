"""A run and a cube become a map and its GeoTIFF; `jaxtrain` and `ingest.raster.cog` meet here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.progress import Reporter
from cli.session import Session
from zarr_store.errors import InvalidInput

if TYPE_CHECKING:
    import numpy.typing as npt

    from jaxtrain.inference.maps import Map

__all__ = ["class_colours", "export_cog", "run_prediction"]


def run_prediction(
    session: Session,
    run: Path,
    cube: str,
    out: str,
    *,
    cog: Path | None = None,
    time: str | None = None,
    probabilities: bool = False,
) -> dict[str, Any]:
    """Predict with progress on stderr, then write the GeoTIFF if `cog` names one.

    Returns:
        The result of `jaxtrain.predict` as JSON, with `cog`.
    """
    from jaxtrain import predict

    if cog is not None:
        _check_target(cog)
    with Reporter(session, "predict", unit="batches") as progress:
        result = predict(run, cube, out, time=time, probabilities=probabilities, on_batch=progress.update)
    for text in result.warnings:
        session.warn(text)
    if cog is not None:
        from jaxtrain.inference.maps import open_map

        export_cog(open_map(out), cog)
    return {**result.to_dict(), "cog": None if cog is None else str(cog)}


def _check_target(cog: Path) -> None:
    """Refuse a GeoTIFF that could not be written, before minutes of prediction."""
    if cog.suffix.lower() not in (".tif", ".tiff"):
        raise InvalidInput(f"--cog needs a .tif file, got {cog}")
    if cog.is_dir():
        raise InvalidInput(f"--cog {cog} is a folder; name a .tif file in it")


def export_cog(made: Map, path: Path) -> None:
    """Write the classes of a map as a COG with colour table and class names, or its values, in strips of its chunks."""
    from ingest.raster.cog import write_cog
    from jaxtrain.inference.maps import CHUNK, NODATA

    layer = "value" if made.values else "class"
    tags = {"terrashard_run": str(made.attributes.get("run", "")),
            "terrashard_step": str(made.attributes.get("step", ""))}  # fmt: skip

    def strips() -> Iterator[tuple[int, int, npt.NDArray[Any]]]:
        for row in range(0, made.grid.height, CHUNK):
            yield row, 0, made.read(layer, slice(row, min(row + CHUNK, made.grid.height)))

    if made.values:
        write_cog(
            path, strips(), made.grid, dtype="float32", nodata=float("nan"), descriptions=made.classes.names, tags=tags
        )
        return
    write_cog(
        path,
        strips(),
        made.grid,
        dtype="uint8",
        nodata=NODATA,
        colours=class_colours(made),
        class_names=dict(enumerate(made.classes.names)),
        descriptions=("class",),
        tags=tags,
    )


def class_colours(made: Map) -> dict[int, tuple[int, int, int]]:
    """Return class value → (red, green, blue)."""
    return {value: (red, green, blue) for value, (red, green, blue) in enumerate(made.classes.rgb().tolist())}
