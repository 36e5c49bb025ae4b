"""`terrashard change` detects breaks in the time series of each pixel of a cube."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.reading import Bands, Collection, Dask, Dates, Memory
from cli.session import Session, command

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    @command(
        app,
        examples=(
            "terrashard change series.zarr series_changes",
            "terrashard change series.zarr series_changes --bands red,nir,swir16 --harmonics 1",
        ),
    )
    def change(
        session: Session,
        cube: Annotated[str, typer.Argument(metavar="CUBE", help="A cube of more than a year.")],
        out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the results.")],
        collection: Collection = None,
        bands: Bands = None,
        time: Dates = None,
        harmonics: Annotated[int, typer.Option(min=1, max=3, help="Number of annual harmonics in the model.")] = 2,
        consecutive: Annotated[
            int, typer.Option(min=2, max=20, help="Clear dates in a row that must deviate for a break.")
        ] = 6,
        probability: Annotated[
            float, typer.Option(metavar="SHARE", help="Share of the dates without change that lie within the limit.")
        ] = 0.99,
        most: Annotated[
            int, typer.Option(min=1, max=20, help="Largest number of breaks that are kept for each pixel.")
        ] = 4,
        dask: Dask = None,
        memory: Memory = None,
    ) -> None:
        """Detect breaks in the time series of each pixel, by a harmonic model: date, magnitude and kind of each break.

        The cube streams from box to box, so memory does not grow with it. A run that was stopped continues.
        """
        from cli.clustering import add_change_files, open_workers
        from cli.progress import Reporter
        from jaxtrain.tasks.changes import ChangeOptions, find_changes

        options = ChangeOptions(
            collection=collection, bands=bands or (), time=time, harmonics=harmonics, consecutive=consecutive,
            probability=probability, most=most,
        )  # fmt: skip
        with open_workers(session, dask, memory) as (workers, leads), Reporter(session, "change") as progress:
            result = find_changes(
                cube, out, options, workers=workers, leads=leads, finish=add_change_files,
                on_progress=lambda step, done, total: progress.update(done, total, step),
            )  # fmt: skip
        if not leads:
            return
        for text in result.warnings:
            session.warn(text)
        session.say(
            f"{out}: {result.breaks:,} breaks in {result.changed:,} of {result.followed:,} pixels, "
            f"{result.unfollowed:,} with too few clear dates, {result.seconds:.1f} s"
        )
        for name, count in result.kinds.items():
            session.say(f"  {name:16} {count:,}")
        session.emit(result.to_dict())
