"""Planted anomalies: average precision and AUC of each method and kind in simulated worlds, optical and radar.

A world has six kinds of anomaly, which appear before its last date. Methods see the last date, fitted to the earlier
ones (`--usual`), or what changed on it (`--dates change`). The autoencoder is trained on the earlier dates.
"""

from __future__ import annotations

import datetime as dt
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from harness import OUT, Row

COMMAND = str(Path(sys.executable).with_name("terrashard"))
SIDE, COUNT = 288, 2
OPTICAL, RADAR = "sentinel-2-l2a", "sentinel-1-rtc"
BANDS = ("blue", "green", "red", "rededge2", "nir", "swir16", "swir22")
POLARISATIONS = ("vv", "vh")
DATES = tuple(dt.date(2022, *day) for day in ((6, 14), (7, 4), (7, 14), (7, 24)))
PASSES = tuple(dt.date(2022, *day) for day in ((6, 12), (6, 24), (7, 6), (7, 12), (7, 18), (7, 23)))
APPEARS = dt.date(2022, 7, 20)
KINDS = ("building", "clear-cut", "flood", "burn", "ship", "cloud")
AUTOENCODER = {"name": "autoencoder", "width": 16, "depth": 1, "code": 4}
"""A cell of the code is 2 × 2 pixels: 20 m, as wide as the narrowest of what is planted, a ship of 24 m."""
RING = 6
"""Pixels from an anomaly to which its light reaches in the code of that network: two 3 × 3 filters on each level."""
METHODS = ("rx", "local-rx", "isolation", "autoencoder", "embedding")
TRAINED = ("isolation", "autoencoder", "embedding")


def make_world(seed: int) -> tuple[Path, Path]:
    """A world with anomalies, and its cube of both collections; made once."""
    world, cube = OUT / f"planted-{seed}", OUT / f"planted-{seed}.zarr"
    if not world.exists():
        text = "".join(
            f'[[anomaly]]\nkind = "{kind}"\ndate = {DATES[-1] if kind == "cloud" else APPEARS}\ncount = {COUNT}\n'
            for kind in KINDS
        )
        with tempfile.TemporaryDirectory() as folder:
            planted = Path(folder, "planted.toml")
            planted.write_text(text)
            days = [str([day.isoformat() for day in days]) for days in (DATES, PASSES)]
            chosen = {"seed": seed, "tiles": 1, "tile_px": SIDE, "overlap_px": 0, "clouds": 0.0, "dates": days[0],
                      "radar_dates": days[1]}  # fmt: skip
            sets = [part for name, value in chosen.items() for part in ("--set", f"{name}={value}")]
            _run("simulate", world, "--anomalies", planted, *sets)
    if not cube.exists():
        _run("ingest", world / "catalog.json", cube, "--collection", OPTICAL, "--collection", RADAR, "--mask", "scl",
             "--resolution", 10, "--bands", ",".join((*BANDS, "scl", *POLARISATIONS)))  # fmt: skip
    return world, cube


def _run(*arguments: object) -> None:
    done = subprocess.run([COMMAND, *map(str, arguments)], check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, arguments))}: {done.stderr[-2000:]}")


def kinds_of(world: Path) -> npt.NDArray[np.str_]:
    """Kind of each pixel, "" for none."""
    import pyarrow.parquet as pq
    import rasterio

    table = pq.read_table(world / "anomalies.parquet", columns=["number", "kind"]).to_pydict()
    names = np.array(["", *(kind for _, kind in sorted(zip(table["number"], table["kind"], strict=True)))])
    with rasterio.open(world / "anomalies.tif") as file:
        found: npt.NDArray[np.str_] = names[file.read(1)]
    return found


def train_autoencoder(cube: Path, collection: str, bands: Sequence[str], last: str, seed: int) -> Path:
    """Train on all dates but the last one."""
    from jaxtrain import train
    from jaxtrain.config import TrainConfig

    run = OUT / f"planted-run-{collection}-{seed}"
    if (run / "model.json").exists():
        return run
    config = TrainConfig.model_validate({
        "data": {"cube": str(cube), "collection": collection, "bands": bands, "patch": 32,
                 "split": {"test_dates": [last], "block_m": 640}},
        "model": AUTOENCODER,
        "optim": {"loss": "mse", "learning_rate": 3e-3},
        "run": {"steps": 150, "batch_size": 16, "evaluate_every": 150, "checkpoint_every": 150, "seed": seed},
    })  # fmt: skip
    train(config, run)
    return run


def score_map(cube: Path, collection: str, bands: Sequence[str], method: str, rule: str, run: Path | None, times: Any
              ) -> tuple[npt.NDArray[np.float32], float]:  # fmt: skip
    """Scores of one method and the seconds that it took: of the last date, or of its change from those before."""
    from jaxtrain.tasks.anomalies import AnomalyOptions, find_anomalies
    from jaxtrain.tasks.layers import open_layers

    trained = method in ("autoencoder", "embedding")
    chosen: dict[str, Any] = {"method": method, "dates": rule}
    options = AnomalyOptions(
        **chosen,
        collection=collection,
        bands=() if trained else tuple(bands),
        rate=1e-2,
        time=times[-1] if rule == "mean" else None,
        usual=",".join(times[:-1]) if rule == "mean" else None,
    )
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        find_anomalies(cube, Path(folder, "out"), options, run=run if trained else None)
        seconds = time.perf_counter() - began
        return np.asarray(open_layers(Path(folder, "out/anomalies.zarr"))["score"]), seconds


def evaluate(scores: npt.NDArray[np.float32], kinds: npt.NDArray[np.str_], wanted: Sequence[str]
             ) -> Iterator[tuple[str, float, float]]:  # fmt: skip
    """Yield (kind, average precision, area under the curve), each kind against the ground without anomalies."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    for kind in wanted:
        chosen = ((kinds == kind) | (kinds == "")) & np.isfinite(scores)
        truth, found = kinds[chosen] == kind, scores[chosen]
        yield kind, float(average_precision_score(truth, found)), float(roc_auc_score(truth, found))


def one_world(seed: int) -> None:
    """Print a line of JSON for each collection, rule and method of one world."""
    from scipy.ndimage import binary_dilation

    from zarr_store.read import open_cube

    world, cube = make_world(seed)
    kinds = kinds_of(world)
    beside = binary_dilation(kinds != "", iterations=RING) & (kinds == "")
    for collection, bands in ((OPTICAL, BANDS), (RADAR, POLARISATIONS)):
        times = open_cube(str(cube)).spec(collection).times
        run = train_autoencoder(cube, collection, bands, times[-1], seed)
        for rule in ("mean", "change"):
            for method in METHODS:
                scores, spent = score_map(cube, collection, bands, method, rule, run, times)
                wanted = KINDS if collection == OPTICAL else KINDS[:-1]
                found = evaluate(scores, kinds, wanted)
                apart = [one for _, one, _ in evaluate(np.where(beside, np.nan, scores), kinds, wanted)]
                kept = {"collection": collection, "rule": rule, "method": method, "seconds": spent,
                        "kinds": {kind: (precision, area) for kind, precision, area in found},
                        "apart": statistics.mean(apart)}  # fmt: skip
                print(json.dumps(kept), flush=True)


def planted(seeds: Sequence[int]) -> list[Row]:
    """Mean average precision of each method over kinds and seeds; those that are trained beside RX."""
    figures: dict[tuple[str, str, str], dict[str, list[tuple[float, float]]]] = {}
    seconds: dict[tuple[str, str, str], list[float]] = {}
    apart: dict[tuple[str, str, str], list[float]] = {}
    # a process for each world, all at once
    running = [subprocess.Popen([sys.executable, __file__, str(seed)], stdout=subprocess.PIPE, text=True)
               for seed in seeds]  # fmt: skip
    for seed, one in zip(seeds, running, strict=True):
        lines, _ = one.communicate()
        if one.returncode:
            raise SystemExit(f"the world of seed {seed} failed")
        for found in map(json.loads, filter(lambda line: line.startswith("{"), lines.splitlines())):
            key = (found["collection"], found["rule"], found["method"])
            seconds.setdefault(key, []).append(found["seconds"])
            apart.setdefault(key, []).append(found["apart"])
            for kind, pair in found["kinds"].items():
                figures.setdefault(key, {}).setdefault(kind, []).append(tuple(pair))
    rows = []
    for (collection, rule, method), by_kind in figures.items():
        where = f"{'optical' if collection == OPTICAL else 'radar'}, {'one date' if rule == 'mean' else 'change'}"
        notes = [f"{kind} {_mean(several, 0):.2f} / {_mean(several, 1):.3f}" for kind, several in by_kind.items()]
        precision, area = (_mean([one for several in by_kind.values() for one in several], at) for at in (0, 1))
        usual = figures[collection, rule, "rx"]
        limit = _mean([one for several in usual.values() for one in several], 0) if method in TRAINED else None
        key = (collection, rule, method)
        note = (
            f"AUC {area:.3f}; AP / AUC: {', '.join(notes)}; {statistics.mean(apart[key]):.3f} without the ground "
            f"within {RING} pixels of an anomaly; {statistics.mean(seconds[key]):.1f} s"
        )
        rows.append(Row(f"{where}, {method}: mean average precision", precision, limit, note=note))
    return rows


def _mean(several: Sequence[tuple[float, float]], at: int) -> float:
    return statistics.mean(one[at] for one in several)


if __name__ == "__main__":
    one_world(int(sys.argv[1]))
