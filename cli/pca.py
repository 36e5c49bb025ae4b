"""`terrashard pca` writes the principal components of a cube, a sample store, or vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.reading import Bands, Collection, Dask, DateRule, Dates, Memory, Standardise
from cli.session import Session, command

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    @command(app, examples=("terrashard pca zagreb.zarr zagreb_pca -n 3 --standardise",))
    def pca(
        session: Session,
        data: Annotated[
            str, typer.Argument(metavar="CUBE|STORE|EMBEDDING", help="Cube, sample store or vectors to transform.")
        ],
        out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the results.")],
        components: Annotated[int, typer.Option("-n", "--components", min=1, help="Number of components.")] = 3,
        collection: Collection = None,
        bands: Bands = None,
        time: Dates = None,
        dates: DateRule = "mean",
        standardise: Standardise = False,
        dask: Dask = None,
        memory: Memory = None,
    ) -> None:
        """Compute principal components in two passes over the data, and write them as Zarr, GeoTIFF and picture."""
        from cli.clustering import add_component_files, open_workers
        from cli.progress import Reporter
        from jaxtrain.tasks.components import find_components

        with open_workers(session, dask, memory) as (workers, leads), Reporter(session, "pca") as progress:
            result = find_components(
                data, out, components, collection=collection, bands=bands or (), time=time, dates=dates,
                standardise=standardise, workers=workers, leads=leads, finish=add_component_files,
                on_progress=lambda step, done, total: progress.update(done, total, step),
            )  # fmt: skip
        if not leads:
            return
        for text in result.warnings:
            session.warn(text)
        session.say(f"{out}: {components} components of {result.pixels:,} rows, {result.seconds:.1f} s")
        for at, (vector, ratio) in enumerate(zip(result.vectors, result.ratio, strict=True)):
            largest = sorted(zip(result.features, vector, strict=True), key=lambda pair: -abs(pair[1]))[:4]
            shown = ", ".join(f"{name} {value:+.2f}" for name, value in largest)
            session.say(f"  component {at + 1}: {ratio:6.1%} of the variance; {shown}")
        session.emit(result.to_dict())
