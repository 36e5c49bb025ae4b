"""`terrashard anomaly` finds what is unusual in a cube, a sample store, or vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cli.reading import Bands, Collection, Dask, Dates, Memory
from cli.session import Session, command

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    @command(
        app,
        examples=(
            "terrashard anomaly zagreb.zarr zagreb_odd",
            "terrashard anomaly zagreb.zarr zagreb_odd --dates change --method local-rx --false-alarms 1e-4",
            "terrashard anomaly zagreb.zarr zagreb_odd --method autoencoder --run runs/autoencoder",
            "terrashard anomaly zagreb.zarr zagreb_clouds --time 2023-08-10 --usual 2023-08-15,2023-08-20",
            "terrashard anomaly vectors.zarr odd_windows --method embedding --false-alarms 0.01",
        ),
    )
    def anomaly(
        session: Session,
        data: Annotated[
            str, typer.Argument(metavar="CUBE|STORE|EMBEDDING", help="Cube, sample store or vectors to score.")
        ],
        out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the results.")],
        method: Annotated[
            Literal["rx", "local-rx", "autoencoder", "isolation", "embedding"],
            typer.Option(
                help="Distance from the mean of all, or of the ring around a pixel; error of an autoencoder; isolation "
                "forest; distance between vectors."
            ),
        ] = "rx",
        run: Annotated[
            Path | None, typer.Option(metavar="RUN", help="Run of an autoencoder, for autoencoder and embedding.")
        ] = None,
        collection: Collection = None,
        bands: Bands = None,
        time: Dates = None,
        dates: Annotated[
            Literal["mean", "stack", "change"],
            typer.Option(
                help="mean: bands are averaged over the dates. stack: each date has its own features. change: the last "
                "date less the mean of those before it; of radar, the ratio of intensities."
            ),
        ] = "mean",
        usual: Annotated[
            str | None,
            typer.Option(metavar="DATES", help="Normal dates, to which the method is fitted; default: --time."),
        ] = None,
        looks: Annotated[
            float, typer.Option(metavar="L", help="Equivalent number of looks of radar, for --dates change.")
        ] = 4.4,
        false_alarms: Annotated[
            float, typer.Option(metavar="RATE", help="Share of usual pixels that may be flagged.")
        ] = 1e-3,
        threshold: Annotated[
            Literal["empirical", "chi2"],
            typer.Option(help="empirical: from held-out scores; chi2: from the χ² distribution (rx, local-rx)."),
        ] = "empirical",
        shrinkage: Annotated[
            str,
            typer.Option(
                metavar="SHARE|auto", help="Share of the covariance that its diagonal replaces; auto estimates it."
            ),
        ] = "0",
        windows: Annotated[
            str, typer.Option(metavar="INNER,OUTER", help="Sides of the inner and outer square of local-rx, in pixels.")
        ] = "5,21",
        most: Annotated[int, typer.Option(min=1, max=10_000, help="List at most this many places.")] = 100,
        min_pixels: Annotated[int, typer.Option(min=1, help="List only places of at least this many pixels.")] = 1,
        seed: Annotated[int, typer.Option(min=0, help="Seed of all random draws.")] = 0,
        dask: Dask = None,
        memory: Memory = None,
    ) -> None:
        """Score every pixel by how unusual it is: scores, mask, ranked places with pictures, and a table of them.

        The data stream from block to block, so memory does not grow with the cube. A run that was stopped continues.
        """
        from cli.clustering import add_anomaly_files, open_workers
        from cli.progress import Reporter
        from jaxtrain.tasks.anomalies import AnomalyOptions, find_anomalies

        inner, outer = parse_windows(windows)
        options = AnomalyOptions(
            method=method, collection=collection, bands=bands or (), time=time, dates=dates, usual=usual,
            looks=looks, rate=false_alarms, threshold=threshold, shrinkage=parse_shrinkage(shrinkage), inner=inner,
            outer=outer, most=most, least_pixels=min_pixels, seed=seed,
        )  # fmt: skip
        with open_workers(session, dask, memory) as (workers, leads), Reporter(session, "anomaly") as progress:
            result = find_anomalies(
                data, out, options, run=run, workers=workers, leads=leads, finish=add_anomaly_files,
                on_progress=lambda step, done, total: progress.update(done, total, step),
            )  # fmt: skip
        if not leads:
            return
        for text in result.warnings:
            session.warn(text)
        session.say(
            f"{out}: {result.places_total:,} places, {result.flagged:,} of {result.pixels:,} rows above "
            f"{result.threshold:.6g} ({result.rule}), {result.seconds:.1f} s"
        )
        for place in result.places[:10]:
            where = place.name or f"{place.lat:.5f} {place.lon:.5f}"
            session.say(f"  #{place.rank:<3} {where:24} score {place.score:10.4g} {place.pixels:6} px  {place.date}")
        session.emit(result.to_dict())


def parse_shrinkage(text: str) -> float | None:
    """Read a share, or "auto" as None."""
    from zarr_store.errors import InvalidInput

    try:
        return None if text == "auto" else float(text)
    except ValueError as error:
        raise InvalidInput(f"--shrinkage {text!r}: expected a share from 0 to 1, or auto") from error


def parse_windows(text: str) -> tuple[int, int]:
    """Read "5,21"."""
    from zarr_store.errors import InvalidInput

    try:
        inner, outer = (int(part) for part in text.split(","))
    except ValueError as error:
        raise InvalidInput(f"--windows {text!r}: expected two odd numbers, such as 5,21") from error
    return inner, outer
