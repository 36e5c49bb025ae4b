"""`terrashard kmeans` groups the pixels of a cube, or samples and vectors, into clusters without labels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cli.reading import Bands, Collection, Dask, DateRule, Dates, Memory, Standardise
from cli.session import Session, command

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    @command(
        app,
        examples=(
            "terrashard kmeans zagreb.zarr zagreb_clusters -k 8",
            "terrashard kmeans zagreb.zarr zagreb_clusters -k 2..16 --standardise",
            "terrashard kmeans other.zarr other_clusters --model zagreb_clusters",
        ),
    )
    def kmeans(
        session: Session,
        data: Annotated[
            str, typer.Argument(metavar="CUBE|STORE|EMBEDDING", help="Cube, sample store or vectors to cluster.")
        ],
        out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the results.")],
        k: Annotated[
            str,
            typer.Option(
                "-k", "--clusters", metavar="N|A..B", help="Number of clusters; of a range, the suggested one is taken."
            ),
        ] = "8",
        model: Annotated[
            Path | None, typer.Option(metavar="OUT", help="Label with the clusters of this result; fit nothing.")
        ] = None,
        collection: Collection = None,
        bands: Bands = None,
        time: Dates = None,
        dates: DateRule = "mean",
        standardise: Standardise = False,
        pca: Annotated[
            int | None, typer.Option(min=1, metavar="N", help="Cluster this number of principal components.")
        ] = None,
        seeding: Annotated[
            Literal["k-means++", "k-means||"],
            typer.Option(help="First centres: from a sample, or from passes over all pixels."),
        ] = "k-means++",
        sample: Annotated[
            int | None, typer.Option(min=2, metavar="N", help="Fit on N pixels drawn at random, and label all.")
        ] = None,
        mini_batch: Annotated[
            bool, typer.Option("--mini-batch", help="Move the centres after every few blocks.")
        ] = False,
        iterations: Annotated[int, typer.Option(min=1, help="Largest number of passes over the data.")] = 300,
        tolerance: Annotated[
            float,
            typer.Option(min=0.0, help="Stop when the squared shift of the centres is below this many mean variances."),
        ] = 1e-4,
        seed: Annotated[int, typer.Option(min=0, help="Seed of all random draws.")] = 0,
        dask: Dask = None,
        memory: Memory = None,
    ) -> None:
        """Group pixels by their spectra, without labels: a map, a table of the clusters, and a model for other cubes.

        The data stream from block to block, so memory does not grow with the cube. A run that was stopped continues.
        """
        from cli.clustering import add_map_files, open_workers
        from cli.progress import Reporter
        from jaxtrain.tasks.clusters import ClusterOptions, cluster, parse_k

        options = ClusterOptions(
            k=parse_k(k), collection=collection, bands=bands or (), time=time, dates=dates, standardise=standardise,
            components=pca, seeding=seeding, sample=sample, mini_batch=mini_batch, iterations=iterations,
            tolerance=tolerance, seed=seed,
        )  # fmt: skip
        with open_workers(session, dask, memory) as (workers, leads), Reporter(session, "kmeans") as progress:
            result = cluster(
                data, out, options, model=model, workers=workers, leads=leads,
                finish=lambda folder, _: add_map_files(folder, "clusters"),
                on_progress=lambda step, done, total: progress.update(done, total, step),
            )  # fmt: skip
        if not leads:
            return
        for text in result.warnings:
            session.warn(text)
        if result.choice is not None:
            session.say(f"suggested: {result.choice.reason}")
        session.say(
            f"{out}: {result.k} clusters of {result.pixels:,} rows, inertia {result.inertia:.6g}, "
            f"{result.iterations} passes, {result.seconds:.1f} s"
        )
        for at, name in enumerate(result.names):
            area = "" if result.area_m2 is None else f" {result.area_m2[at] / 10_000:10.1f} ha"
            session.say(f"  {name:12} {result.sizes[at] / max(result.pixels, 1):6.1%}{area}")
        session.emit(result.to_dict())
