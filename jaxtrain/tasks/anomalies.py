"""`find_anomalies` scores every pixel, sample or vector by how unusual it is, and writes scores, mask and places.

OUT/anomalies.zarr   scores and mask
OUT/anomalies.json   ranked places, threshold, and how it was found
OUT/gallery.html     the places as pictures

Scores are written block by block; a run that is stopped or killed continues with the next block, and the bytes are
those of a run that was never stopped.
"""

from __future__ import annotations

import json
import time as clock
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from jaxtrain.display import result_table
from jaxtrain.tasks.background import Background, make_background
from jaxtrain.tasks.date_change import LOOKS
from jaxtrain.tasks.detectors import Detector, Forest, LocalRx, Method, Neighbours, Rx, grow_forest
from jaxtrain.tasks.folder import TaskFolder
from jaxtrain.tasks.held_out import HELD_OUT, Fitted, ScoreCounts, held_out
from jaxtrain.tasks.local_rx import check_windows
from jaxtrain.tasks.moments import Moments
from jaxtrain.tasks.network_reader import NetworkReader, Shows
from jaxtrain.tasks.place_gallery import write_gallery
from jaxtrain.tasks.places import Place, find_places
from jaxtrain.tasks.row_places import place_rows
from jaxtrain.tasks.sampling import sample_rows
from jaxtrain.tasks.score_store import ScoreStore
from jaxtrain.tasks.table import Table, check_features
from jaxtrain.tasks.tables import CubeTable, Dates, VectorTable, is_embedding, open_table
from jaxtrain.tasks.work import LocalWorkers, TableRef, Workers
from zarr_store.crash import crashpoint
from zarr_store.errors import InvalidInput
from zarr_store.samples import is_sample_store, open_samples

__all__ = ["AnomalyOptions", "AnomalyResult", "find_anomalies"]

_SAMPLE = {"isolation": 65_536, "embedding": 2048}
"""Rows that a method keeps or learns from."""


@dataclass(frozen=True)
class AnomalyOptions:
    """Options that determine anomalies, besides the data.

    Attributes:
        method: Method that scores the rows.
        collection, bands, time, dates: Selection of the data; see `open_table`.
        usual: Dates of the cube that show what is usual; the method is fitted to them, and so is the threshold. None
            takes those that are scored.
        looks: Equivalent number of looks of radar, for the change of its last date.
        rate: Share of usual rows that may be flagged.
        threshold: "empirical" takes the quantile of the scores of held-out ground; "chi2" that of the χ² distribution,
            for methods of RX alone.
        shrinkage: Share of the diagonal in the covariance; None estimates it.
        inner, outer: Sides of the squares of local RX, pixels.
        most: Most places that are listed.
        least_pixels: Smallest place.
        seed: Seed of all draws.
    """

    method: Method = "rx"
    collection: str | None = None
    bands: str | tuple[str, ...] = ()
    time: str | None = None
    dates: Dates = "mean"
    usual: str | None = None
    looks: float = LOOKS
    rate: float = 1e-3
    threshold: Literal["empirical", "chi2"] = "empirical"
    shrinkage: float | None = 0.0
    inner: int = 5
    outer: int = 21
    most: int = 100
    least_pixels: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.rate < 0.5:
            raise InvalidInput(f"--false-alarms {self.rate:g}: expected a share above 0 and below 0.5, such as 0.001")
        if not 0.5 <= self.looks <= 1000:
            raise InvalidInput(f"--looks {self.looks:g}: expected 0.5 to 1000; Sentinel-1 IW GRD has {LOOKS:g}")
        if self.shrinkage is not None and not 0 <= self.shrinkage <= 1:
            raise InvalidInput(f"--shrinkage {self.shrinkage:g}: expected 0 to 1, or auto")
        if self.threshold == "chi2" and self.method not in ("rx", "local-rx"):
            raise InvalidInput(
                f"--threshold chi2 is for scores of RX, which follow χ²; those of {self.method} follow no known "
                "distribution: leave it out"
            )


@dataclass(frozen=True, repr=False)
class AnomalyResult:
    """The result of `find_anomalies`.

    Attributes:
        out: Folder of the results.
        method: Method that scored the rows.
        threshold: Score above which a row is flagged.
        rule: Rule that gave the threshold.
        false_alarms: The stated rate.
        flagged: Number of flagged rows.
        pixels: Number of scored rows.
        held_out: Number of rows that were held out of the fit.
        places: The places, the most unusual first.
        places_total: Number of all places, listed or not.
        features: The features.
        dates: Dates that were looked at.
        shrinkage: Share of the diagonal in the covariance; nan of a method without one.
        seconds: Wall time.
        warnings: Warnings about limits of the result.
    """

    out: str
    method: str
    threshold: float
    rule: str
    false_alarms: float
    flagged: int
    pixels: int
    held_out: int
    places: tuple[Place, ...]
    places_total: int
    features: tuple[str, ...]
    dates: str
    shrinkage: float
    seconds: float
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {**asdict(self), "places": [one.to_dict() for one in self.places]}

    def __repr__(self) -> str:
        return f"<AnomalyResult {self.out}: {self.places_total} places, {self.flagged:,} of {self.pixels:,} rows>"

    def _repr_html_(self) -> str:
        """Return a table for notebooks."""
        rows = {f"#{one.rank}": f"score {one.score:.4g}, {one.pixels} px" for one in self.places[:10]}
        return result_table(f"Anomalies {self.out}", rows)


Report = Callable[[str, int, int], None]


def find_anomalies(
    data: str | PathLike[str],
    out: str | PathLike[str],
    options: AnomalyOptions | None = None,
    *,
    run: str | PathLike[str] | None = None,
    workers: Workers | None = None,
    leads: bool = True,
    finish: Callable[[Path, AnomalyResult], None] | None = None,
    on_progress: Report | None = None,
) -> AnomalyResult:
    """Find what is unusual in a cube, a sample store, or vectors.

    Args:
        data: The data.
        out: Folder of the results; it appears when they are complete. An earlier result of this task is replaced.
        options: Method, selection of the data, threshold and draws.
        run: Run directory of an autoencoder, for the methods "autoencoder" and, of a cube or store, "embedding".
        workers: Workers that compute; None takes all cores and devices of this process.
        leads: Whether this process writes the results; only one process of a run does.
        finish: Adds files to the folder before it appears; called with the folder and the result.
        on_progress: Called with (step, done, in all).

    Raises:
        InvalidInput: The data cannot be scored so, or something else is at `out`.
        NothingFound: Nothing was observed.

    Example:
        >>> found = find_anomalies("zagreb.zarr", "zagreb_odd", AnomalyOptions(threshold="chi2"))
        >>> found.method
        'rx'
    """
    began = clock.monotonic()
    options, workers = options or AnomalyOptions(), workers or LocalWorkers()
    report = on_progress or (lambda step, done, total: None)
    url = str(data)
    _check_run(options, url, run)
    table: Table | None = None
    if options.method == "embedding" and run is not None and is_sample_store(url):
        digest = f"{url} {open_samples(url).digest} {Path(run).absolute()} {_newest(run)}"
    else:
        table = _open(url, options, run)
        digest = table.digest
    usual = table if options.usual is None else _open_usual(table, url, options, run)
    request = {"data": digest, "options": _determining(options), "run": run and str(Path(run).absolute())}
    folder = TaskFolder(str(out), "anomaly", request) if leads else None
    with folder if folder is not None else nullcontext():
        if table is None:
            assert folder is not None
            assert run is not None
            usual = table = _embed(run, url, folder.path / "vectors.zarr", report)
        assert usual is not None
        state: dict[str, Any] = workers.share(folder.state if folder else {})
        detector, fitted = _fit(table, usual, options, workers, state, report)
        done = int(state.get("done", 0))
        blocks = workers.map(detector, range(done, len(table)))
        if folder is None:
            for _ in blocks:
                pass
            if usual is not table:
                _usual_counts(usual, detector, options, workers)
            return _empty(str(out), options)
        made = ScoreStore(folder.path / "anomalies.zarr", table, {"data": table.url, "method": options.method})
        for number, scores in zip(range(done, len(table)), blocks, strict=True):
            made.write(number, scores)
            crashpoint(f"anomaly block written {number}")
            folder.keep({"fit": fitted, "done": number + 1})
            crashpoint(f"anomaly block kept {number}")
            report("score", number + 1, len(table))
        held = None if usual is table else _usual_counts(usual, detector, options, workers)
        result = replace(_result(str(out), table, made, options, fitted, held),
                         seconds=round(clock.monotonic() - began, 3))  # fmt: skip
        # without path and time, so that the same request gives the same bytes
        about = {name: value for name, value in result.to_dict().items() if name not in ("out", "seconds")}
        text = json.dumps(_finite(about), indent=1) + "\n"
        (folder.path / "anomalies.json").write_text(text, encoding="utf-8")
        write_gallery(folder.path, _pictured(table), result.places, f"{options.method} on {table.url}")
        if finish:
            finish(folder.path, result)
        folder.publish({"method": options.method, "data": table.url, "flagged": result.flagged})
    return result


def _check_run(options: AnomalyOptions, url: str, run: str | PathLike[str] | None) -> None:
    if options.method == "autoencoder" and run is None:
        raise InvalidInput("--method autoencoder needs --run RUN, the run directory of a trained autoencoder")
    if options.method == "embedding" and run is None and not is_embedding(url):
        raise InvalidInput(
            f"--method embedding scores vectors, and {url} holds none: give vectors of `terrashard embed`, or "
            "--run RUN to make them with an autoencoder"
        )
    if run is not None and options.method not in ("autoencoder", "embedding"):
        raise InvalidInput(f"--run is for the methods autoencoder and embedding, not for {options.method}")
    if run is not None and is_embedding(url):
        raise InvalidInput(f"{url} holds vectors already, and --run would make them: leave it out")
    if options.usual is not None and (is_embedding(url) or is_sample_store(url)):
        raise InvalidInput(f"{url} is not a cube: --usual, which chooses dates, does not apply to it; leave it out")


def _determining(options: AnomalyOptions) -> dict[str, Any]:
    """Return the options as a request names them; one without later options is that of earlier releases."""
    later = {"usual": None, "looks": LOOKS}
    found = {name: value for name, value in asdict(options).items() if name not in later or value != later[name]}
    if options.usual is not None:
        found["usual_rows"] = "each"  # earlier releases took the mean of several usual dates
    # scores of these are other numbers than those of earlier releases, whose beginnings are not continued
    release = {"isolation": 3, "autoencoder": 2, "embedding": 2}
    return {**found, "scores": release[options.method]} if options.method in release else found


def _open(
    url: str, options: AnomalyOptions, run: str | PathLike[str] | None, *, time: str | None = None, each: bool = False
) -> Table:  # fmt: skip
    if options.method == "autoencoder" and (is_embedding(url) or is_sample_store(url)):
        raise InvalidInput(f"--method autoencoder maps a cube, and {url} is none: use --method embedding with --run")
    table = open_table(
        url, collection=options.collection, bands=options.bands, time=time or options.time,
        dates="each" if each else options.dates, looks=options.looks,
        run=None if run is None else str(Path(run).absolute()), shows=_shown(options),
    )  # fmt: skip
    if options.method == "local-rx":
        if isinstance(table, VectorTable):
            raise InvalidInput(f"{url} holds vectors, which have no neighbours in space: use --method rx or embedding")
        check_windows(options.inner, options.outer, len(table.features))
    return table


def _open_usual(
    table: Table | None, url: str, options: AnomalyOptions, run: str | PathLike[str] | None
) -> Table:  # fmt: skip
    """Open the usual dates as rows that are spread as those of the scored ones are.

    A mean over several dates has less speckle and less weather than one date, which would lie far outside of it.
    """
    one = isinstance(table, CubeTable) and len(table.reader.dates) == 1
    return _open(url, options, run, time=options.usual, each=options.dates == "mean" and one)


def _shown(options: AnomalyOptions) -> Shows:
    """Return which output of a network is scored: the residual of its reconstruction, or its code."""
    # of a change, most is reconstructed; the code has it without the noise of single pixels
    return "residual" if options.method == "autoencoder" and options.dates != "change" else "code"


def _pictured(table: Table) -> Table:
    """Return the table of the bands that a network reads; any other table as it is."""
    if isinstance(table, CubeTable) and isinstance(table.reader, NetworkReader):
        return CubeTable(table.reader.plain, table.dates)
    return table


def _newest(run: str | PathLike[str]) -> str:
    """Return the digest of the newest checkpoint of a run; empty where it has none, which embedding reports."""
    from jaxtrain.runs.checkpoint import CheckpointStore

    store = CheckpointStore(Path(run) / "checkpoints")
    try:
        return store.digest(store.steps()[-1])
    except (IndexError, OSError, InvalidInput):
        return ""


def _embed(run: str | PathLike[str], url: str, made: Path, report: Report) -> Table:
    from jaxtrain.inference.embedding import embed

    if not made.exists():
        embed(run, url, made, on_batch=lambda done, total: report("embed", done, total))
    return open_table(str(made))


@dataclass(frozen=True)
class _FitJob:
    """Moments of the rows of a block that are not held out."""

    ref: TableRef
    holds: bool
    seed: int

    def __call__(self, number: int) -> tuple[Moments, npt.NDArray[np.int64], int, int]:
        block = self.ref.block(number)
        if not self.holds:
            return Moments.of(block.values), block.finite, block.observed, 0
        kept = ~held_out(self.ref.table, block.ids, self.seed)
        return Moments.of(block.values[:, kept]), block.finite, block.observed, int((~kept).sum())


def _fit(
    table: Table, usual: Table, options: AnomalyOptions, workers: Workers, state: dict[str, Any], report: Report
) -> tuple[Detector, dict[str, Any]]:
    """Fit the detector of a table to what is usual, or take it from what an earlier run has left."""
    if len(usual.features) != len(table.features):
        raise InvalidInput(
            f"--usual has {len(usual.features)} features and --time {len(table.features)}: with --dates stack both "
            "need as many dates; choose as many, or another rule"
        )
    ref = TableRef.of(table)
    labels = [one.label for one in table.features]
    about: dict[str, Any] = state.get("fit") or {}
    if not about:
        moments, held = _moments(usual, options, workers, report)
        background = make_background(
            moments, labels, shrinkage=options.shrinkage, where=table.url, remedy=table.remedy
        )  # fmt: skip
        about = {"background": background.to_dict(), "held_out": held}
    background = Background.from_dict(about["background"])
    if options.method in ("rx", "autoencoder"):
        return Rx(ref, background), about
    if options.method == "local-rx":
        share = options.shrinkage or None
        return LocalRx(ref, background, options.inner, options.outer, share), about
    sample = sample_rows(usual, _SAMPLE[options.method], options.seed, workers, choose=Fitted(options.seed))
    rows = np.ascontiguousarray(background.whiten(sample.T).T)
    if options.method == "isolation":
        return Forest(ref, background, grow_forest(rows, options.seed)), about
    return Neighbours(ref, background, rows), about


def _moments(table: Table, options: AnomalyOptions, workers: Workers, report: Report) -> tuple[Moments, int]:
    found = Moments.of(np.zeros((len(table.features), 0), np.float32))
    finite, observed, held = np.zeros(len(table.features), np.int64), 0, 0
    job = _FitJob(TableRef.of(table), options.threshold == "empirical", options.seed)
    for number, (moments, numbers, seen, out) in enumerate(workers.map(job, range(len(table)))):
        found, finite, observed, held = found.join(moments), finite + numbers, observed + seen, held + out
        report("read", number + 1, len(table))
    check_features(table, found.count + held, finite, observed)
    if not found.count:
        raise InvalidInput(
            f"{table.url}: all {held:,} rows lie on held-out ground, so nothing is left to fit; give --threshold chi2, "
            "another --seed, or more ground"
        )
    return found, held


@dataclass(frozen=True)
class _HeldOutJob:
    """Scores of the held-out rows of a block."""

    detector: Detector
    seed: int

    def __call__(self, number: int) -> npt.NDArray[np.float32]:
        block, scores = self.detector.ref.block(number), self.detector(number)
        return scores.ravel()[block.at][held_out(self.detector.ref.table, block.ids, self.seed)]


def _usual_counts(usual: Table, detector: Detector, options: AnomalyOptions, workers: Workers) -> ScoreCounts:
    """Count the scores of held-out ground on the usual dates."""
    counts = ScoreCounts()
    if options.threshold == "empirical":
        there: Any = replace(detector, ref=TableRef.of(usual))  # type: ignore[type-var]
        for scores in workers.map(_HeldOutJob(there, options.seed), range(len(usual))):
            counts.add(scores)
    return counts


def _result(
    out: str, table: Table, made: ScoreStore, options: AnomalyOptions, about: dict[str, Any], counts: ScoreCounts | None
) -> AnomalyResult:  # fmt: skip
    threshold, rule, held = _threshold(table, made, options, counts)
    flagged, scored = made.flag(threshold)
    date = _dates(table)
    if isinstance(table, CubeTable):
        places, total = find_places(
            table.reader.spec.grid, made.read, date=date, most=options.most, least_pixels=options.least_pixels
        )
    else:
        places, total = place_rows(table, made, most=options.most, least_pixels=options.least_pixels)
    return AnomalyResult(
        out=out, method=options.method, threshold=threshold, rule=rule, false_alarms=options.rate, flagged=flagged,
        pixels=scored, held_out=held, places=places, places_total=total,
        features=tuple(one.label for one in table.features), dates=date,
        shrinkage=float(about["background"]["shrinkage"]) if "background" in about else float("nan"),
        seconds=0.0, warnings=table.warnings,
    )  # fmt: skip


def _threshold(
    table: Table, made: ScoreStore, options: AnomalyOptions, counts: ScoreCounts | None
) -> tuple[float, str, int]:
    if options.threshold == "chi2":
        from scipy.stats import chi2

        degrees = len(table.features)
        return float(chi2.isf(options.rate, degrees)), f"χ² with {degrees} degrees of freedom", 0
    share = f"{HELD_OUT:.0%} of the ground" if isinstance(table, CubeTable) else f"{HELD_OUT:.0%} of the data"
    when = "" if counts is None else f", on {options.usual}"
    if counts is None:
        counts = ScoreCounts()
        for _, scores, ids in made.strips():
            counts.add(scores[held_out(table, ids.ravel(), options.seed).reshape(ids.shape)])
    rule = f"quantile of held-out scores ({share}{when})"
    return counts.threshold(options.rate, where=table.url), rule, counts.total


def _dates(table: Table) -> str:
    if not isinstance(table, CubeTable):
        return ""
    times = [time[:10] for time in table.reader.times]
    return times[-1] if table.dates == "change" or len(times) == 1 else f"{times[0]}/{times[-1]}"


def _empty(out: str, options: AnomalyOptions) -> AnomalyResult:
    """Return the result of a process that only helps another one: it has no numbers of its own."""
    return AnomalyResult(out, options.method, float("nan"), "", options.rate, 0, 0, 0, (), 0, (), "", float("nan"),
                         0.0, ())  # fmt: skip


def _finite(value: Any) -> Any:
    """Return JSON with null in place of numbers that JSON does not have."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
