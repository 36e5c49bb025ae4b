"""`cluster` fits k-means to a cube, sample store or embedding, and writes map, table, curves and model into a folder.

OUT/clusters.zarr    map of a cube (class, confidence), or labels of samples or vectors
OUT/clusters.json    table: rows, share, area, mean and spread of each cluster; and the curves of several k
OUT/clusters.png     spectrum and seasonal course of each cluster
OUT/model.json       what labels another cube
"""

from __future__ import annotations

import json
import time as clock
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain.config import DataConfig
from jaxtrain.data.classes import Classes
from jaxtrain.display import result_table
from jaxtrain.tasks.choice import Choice, choose_k
from jaxtrain.tasks.cluster_figure import draw_clusters
from jaxtrain.tasks.cluster_model import MODEL, ClusterModel, load_cluster_model
from jaxtrain.tasks.folder import TaskFolder
from jaxtrain.tasks.kmeans import (
    MOST_CLUSTERS,
    Fit,
    Seeding,
    check_distinct,
    fit_kmeans,
    fit_of,
    sample_of,
    seed_centres,
)
from jaxtrain.tasks.labelling import Labelled, label_table
from jaxtrain.tasks.moments import table_moments
from jaxtrain.tasks.scaling import Scaling, make_scaling
from jaxtrain.tasks.seeding import fit_sample
from jaxtrain.tasks.table import Table
from jaxtrain.tasks.tables import CubeTable, Dates, open_table
from jaxtrain.tasks.work import LocalWorkers, Workers
from zarr_store.errors import InvalidInput, NothingFound

__all__ = ["ClusterOptions", "ClusterResult", "cluster", "parse_k"]

_SEED_ROWS = 1 << 16
"""Rows of the sample on which centres are seeded, unless told otherwise."""


@dataclass(frozen=True)
class ClusterOptions:
    """Options that determine clusters, besides the data.

    Attributes:
        k: Numbers of clusters; of several, the suggested one is fitted.
        collection, bands, time, dates: Selection of the data; see `open_table`.
        standardise: Divide each feature by its standard deviation.
        components: Cluster this number of principal components; None clusters the features.
        seeding: Rule for the first centres.
        sample: Fit on this number of rows drawn at random, and only label the others; None fits on all rows.
        mini_batch: Move centres after every few blocks.
        iterations: Most passes.
        tolerance: Squared shift at which the fit ends, in mean variances of the features.
        seed: Seed of all draws.
    """

    k: tuple[int, ...] = (8,)
    collection: str | None = None
    bands: str | tuple[str, ...] = ()
    time: str | None = None
    dates: Dates = "mean"
    standardise: bool = False
    components: int | None = None
    seeding: Seeding = "k-means++"
    sample: int | None = None
    mini_batch: bool = False
    iterations: int = 300
    tolerance: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.k or list(self.k) != sorted(set(self.k)) or not 2 <= self.k[0] <= self.k[-1] <= MOST_CLUSTERS:
            raise InvalidInput(
                f"-k {','.join(map(str, self.k))}: expected numbers from 2 to {MOST_CLUSTERS}, ascending"
            )
        for name, value, least in (("--pca", self.components, 1), ("--sample", self.sample, 2)):
            if value is not None and value < least:
                raise InvalidInput(f"{name} {value}: expected at least {least}")


def parse_k(text: str) -> tuple[int, ...]:
    """Read "8" or "2..16".

    >>> parse_k("8"), parse_k("2..4")
    ((8,), (2, 3, 4))
    """
    low, dots, high = text.partition("..")
    try:
        numbers = tuple(range(int(low), int(high) + 1)) if dots else (int(low),)
    except ValueError:
        numbers = ()
    if not numbers:
        raise InvalidInput(f"-k {text!r}: expected a number such as 8, or a range such as 2..16")
    return numbers


@dataclass(frozen=True, repr=False)
class ClusterResult:
    """The result of `cluster`.

    Attributes:
        out: Folder of the results.
        k: Number of clusters.
        inertia: Sum of squared scaled distances of all rows to their centres.
        iterations: Passes over the data.
        sizes: Rows of each cluster, the largest first.
        centres: Mean of each cluster in each feature, physical.
        features: The features.
        pixels: Rows that have a cluster.
        area_m2: Area of each cluster, of a cube.
        names, colours: Name and colour of each cluster.
        choice: The curves of several k; None for one.
        seconds: Wall time.
        warnings: Warnings about limits of the result.
    """

    out: str
    k: int
    inertia: float
    iterations: int
    sizes: tuple[int, ...]
    centres: tuple[tuple[float, ...], ...]
    features: tuple[str, ...]
    pixels: int
    area_m2: tuple[float, ...] | None
    names: tuple[str, ...]
    colours: tuple[str, ...]
    choice: Choice | None
    seconds: float
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)

    def __repr__(self) -> str:
        return f"<ClusterResult {self.out}: {self.k} clusters of {self.pixels:,} rows>"

    def _repr_html_(self) -> str:
        """Return a table for notebooks."""
        rows = {name: f"{count / max(self.pixels, 1):.1%}" for name, count in zip(self.names, self.sizes, strict=True)}
        return result_table(f"Clusters {self.out}", rows)


def cluster(
    data: str | PathLike[str],
    out: str | PathLike[str],
    options: ClusterOptions | None = None,
    *,
    model: str | PathLike[str] | None = None,
    workers: Workers | None = None,
    leads: bool = True,
    finish: Callable[[Path, ClusterResult], None] | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> ClusterResult:
    """Cluster the rows of a cube, a sample store or an embedding.

    Args:
        data: The data.
        out: Folder of the results; it appears when they are complete. An earlier result of k-means is replaced.
        options: Selection of the data, and settings of k-means.
        model: Folder of an earlier result: its clusters label the data, and nothing is fitted.
        workers: Workers that compute; None takes all cores and devices of this process.
        leads: Whether this process writes the results; only one process of a run does.
        finish: Adds files to the folder before it appears; called with the folder and the result.
        on_progress: Called with (step, done, in all).

    Returns:
        The clusters, the largest first.

    Raises:
        InvalidInput: The data cannot be clustered so, or something else is at `out`.
        NothingFound: Nothing was observed.

    Example:
        >>> found = cluster("zagreb.zarr", "zagreb_clusters", ClusterOptions(k=(4,)))
        >>> found.k
        4
    """
    began = clock.monotonic()
    options, workers = options or ClusterOptions(), workers or LocalWorkers()
    fitted = load_cluster_model(Path(model)) if model is not None else None
    dates: Dates = options.dates if fitted is None else ("stack" if fitted.dates == "stack" else "mean")
    bands = options.bands or (() if fitted is None else tuple(dict.fromkeys(one.name for one in fitted.features)))
    if fitted is not None and fitted.kind == "vectors":
        bands = ()
    table = open_table(str(data), collection=options.collection, bands=bands, time=options.time, dates=dates)
    if fitted is not None:
        fitted.check_table(table, str(model))
    elif options.components is not None and options.components > len(table.features):
        raise InvalidInput(
            f"--pca {options.components}: {table.url} has {len(table.features)} features; give at most that number"
        )
    report = on_progress or (lambda step, done, total: None)
    request = {"data": table.digest, "options": asdict(options), "model": None if fitted is None else fitted.to_dict()}
    folder = TaskFolder(str(out), "kmeans", request) if leads else None
    with _entered(folder):
        state: dict[str, Any] = workers.share(folder.state if folder else {})
        choice: Choice | None = None
        if fitted is not None:
            found, iterations = fitted, 0
        else:
            found, iterations, choice = _fit(table, options, workers, folder, state, report)
        classes = _classes(found.k)
        attributes = {"run": str(out), "step": iterations, "cube": table.url, "made_by": "terrashard kmeans"}
        path = folder.path / "clusters.zarr" if folder else None
        if path is not None and path.exists():
            _remove(path)
        labelled = label_table(table, found, classes, path, workers, attributes=attributes,
                               on_block=lambda done, total: report("label", done, total))  # fmt: skip
        if not labelled.count.any():
            raise NothingFound(
                f"{table.url} has no row with a number in each of {len(table.features)} features, so none gets a "
                "cluster: see its dates and masks; nothing was replaced"
            )
        result = _result(str(out), table, found, labelled, classes, iterations, choice)
        result = replace(result, seconds=round(clock.monotonic() - began, 3))
        if folder:
            _write(folder.path, result, found, labelled, table)
            if finish:
                finish(folder.path, result)
            folder.publish({"k": result.k, "data": table.url})
    return result


def _fit(
    table: Table, options: ClusterOptions, workers: Workers, folder: TaskFolder | None, state: dict[str, Any],
    report: Callable[[str, int, int], None],
) -> tuple[ClusterModel, int, Choice | None]:  # fmt: skip
    """Fit clusters, or continue a fit; they come out by size, the largest first."""
    moments = table_moments(table, workers, on_block=lambda done, total: report("read", done, total))
    scaling, _ = make_scaling(moments, standardise=options.standardise, components=options.components)
    sample = sample_of(table, scaling, options.sample or _SEED_ROWS, options.seed, workers)
    choice, k = None, options.k[0]
    if len(options.k) > 1:
        check_distinct(sample, options.k[-1], moments.count, table.url)
        choice = choose_k(sample, options.k, options.seed, on_k=lambda done, total: report("choose k", done, total))
        k = choice.suggested
    if state.get("fit"):
        fit, scaling = Fit.from_dict(state["fit"]), Scaling.from_dict(state["scaling"])
    else:
        start = seed_centres(table, scaling, sample, k, rows=moments.count, seed=options.seed,
                             seeding=options.seeding, workers=workers)  # fmt: skip
        fit = Fit(start)

    def keep(done: Fit) -> None:
        if folder:
            folder.keep({"fit": done.to_dict(), "scaling": scaling.to_dict()})
        report("iterate", done.iterations, options.iterations)

    if options.sample is not None:
        fit = fit_of(fit_sample(sample, fit.centres, iterations=options.iterations, tolerance=options.tolerance))
    else:
        fit = fit_kmeans(table, scaling, fit, moments, workers, iterations=options.iterations,
                         tolerance=options.tolerance, mini_batch=options.mini_batch, seed=options.seed,
                         on_iteration=keep)  # fmt: skip
    count = np.zeros(k, np.int64) if fit.count is None else fit.count
    centres = fit.centres[np.lexsort((np.arange(k), -count))]
    dates = table.dates if isinstance(table, CubeTable) else "mean"
    return ClusterModel(table.kind, table.features, dates, scaling, centres), fit.iterations, choice


def _result(
    out: str, table: Table, model: ClusterModel, labelled: Labelled, classes: Classes, iterations: int,
    choice: Choice | None,
) -> ClusterResult:  # fmt: skip
    area = None
    if isinstance(table, CubeTable):
        grid = table.reader.spec.grid
        pixel = abs(grid.resolution[0] * grid.resolution[1]) / grid.units_per_metre**2
        area = tuple(float(count) * pixel for count in labelled.count)
    centres = np.where(np.isfinite(labelled.mean), labelled.mean, model.scaling.invert(model.centres))
    return ClusterResult(
        out=out, k=model.k, inertia=labelled.inertia, iterations=iterations,
        sizes=tuple(int(count) for count in labelled.count),
        centres=tuple(tuple(float(value) for value in row) for row in centres),
        features=tuple(one.label for one in table.features), pixels=int(labelled.count.sum()), area_m2=area,
        names=classes.names, colours=classes.colours, choice=choice, seconds=0.0, warnings=table.warnings,
    )  # fmt: skip


def _write(path: Path, result: ClusterResult, model: ClusterModel, labelled: Labelled, table: Table) -> None:
    rows = [
        {
            "cluster": at + 1, "name": result.names[at], "colour": result.colours[at], "pixels": result.sizes[at],
            "share": result.sizes[at] / max(result.pixels, 1),
            "area_ha": None if result.area_m2 is None else result.area_m2[at] / 10_000,
            "mean": dict(zip(result.features, result.centres[at], strict=True)),
            "std": dict(zip(result.features, _numbers(labelled.std[at]), strict=True)),
            "season": _season(table, labelled, at),
        }
        for at in range(result.k)
    ]  # fmt: skip
    about = {"clusters": rows, "inertia": result.inertia, "iterations": result.iterations,
             "choice": None if result.choice is None else result.choice.to_dict()}  # fmt: skip
    (path / "clusters.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    (path / MODEL).write_text(json.dumps(model.to_dict(), indent=1) + "\n", encoding="utf-8")
    times = table.reader.times if isinstance(table, CubeTable) else ()
    bands = table.reader.features if isinstance(table, CubeTable) else ()
    draw_clusters(path / "clusters.png", _classes(result.k), result.choice, table.features, labelled, times, bands)


def _season(table: Table, labelled: Labelled, at: int) -> dict[str, dict[str, float | None]] | None:
    if not labelled.season.size or not isinstance(table, CubeTable):
        return None
    return {
        time: dict(zip(table.reader.names, _numbers(row), strict=True))
        for time, row in zip(table.reader.times, labelled.season[at], strict=True)
    }


def _numbers(row: Any) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in row]


def _classes(k: int) -> Classes:
    return Classes.of(DataConfig(cube="", classes={str(at): f"cluster {at + 1}" for at in range(k)}))


def _remove(path: Path) -> None:
    from zarr_store.temporary import remove_folder

    remove_folder(path)


def _entered(folder: TaskFolder | None) -> Any:
    from contextlib import nullcontext

    return folder if folder is not None else nullcontext()
