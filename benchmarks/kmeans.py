"""k-means compared with scikit-learn: speed with reading, inertia, memory, equal labels, agreement with known classes.

    python benchmarks/kmeans.py --part speed           # 10 million pixels of four bands
    python benchmarks/kmeans.py --part large           # 100 million, which scikit-learn must hold at once
    python benchmarks/kmeans.py --part memory [--full] # 1 to 100 million pixels; --full: to 1,000 million
    python benchmarks/kmeans.py --part labels          # on 1, 2 and 8 devices and in two processes
    python benchmarks/kmeans.py --part truth           # the simulator's ground, and the scene classes of Zagreb

Each part keeps its own result. Both sides start from the same eight centres, end by the same tolerance, and count the
time from opening the cube to labels in memory; scikit-learn gets the pixels from `Cube.dataset`. Needs scikit-learn.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from harness import OUT, Row, publish
from pixel_cube import COLLECTION, pixel_cube

from jaxtrain.parallel.heap import process_peak_bytes
from jaxtrain.tasks.cluster_model import ClusterModel
from jaxtrain.tasks.clusters import ClusterOptions, cluster
from jaxtrain.tasks.kmeans import Fit, fit_kmeans, sample_of
from jaxtrain.tasks.labelling import LabelJob
from jaxtrain.tasks.moments import table_moments
from jaxtrain.tasks.scaling import make_scaling
from jaxtrain.tasks.table import Block
from jaxtrain.tasks.tables import CubeTable, open_table
from jaxtrain.tasks.work import LocalWorkers, TableRef, keep_blocks
from zarr_store import open_cube

K = 8
PARTS = ("speed", "large", "memory", "labels", "truth")
SIDES = {"speed": (3200, 3136), "large": (10_000, 10_000)}
COMMAND = str(Path(sys.executable).with_name("terrashard"))


def first_centres(url: Path) -> npt.NDArray[np.float64]:
    """Eight pixels drawn at random, as physical numbers: a start that leaves much to do."""
    table = open_table(str(url))
    scaling, _ = make_scaling(table_moments(table, LocalWorkers()))
    return scaling.invert(sample_of(table, scaling, K, 1, LocalWorkers()))


def ours(url: Path, start: npt.NDArray[np.float64]) -> dict[str, Any]:
    """Fit and label by blocks; nothing is kept from an earlier run."""
    keep_blocks(4 << 30)
    began, spent = time.perf_counter(), time.process_time()
    workers = LocalWorkers()
    table = open_table(str(url))
    moments = table_moments(table, workers)
    scaling, _ = make_scaling(moments)
    fit = fit_kmeans(table, scaling, Fit(scaling.apply(start.T).T), moments, workers)
    model = ClusterModel(table.kind, table.features, "mean", scaling, fit.centres)
    inertia, labels = 0.0, []
    for found in workers.map(LabelJob(TableRef.of(table), model), range(len(table))):
        labels.append(found["labels"])
        inertia += found["inertia"]
    return {"seconds": time.perf_counter() - began, "processor": time.process_time() - spent,
            "iterations": fit.iterations, "inertia": inertia}  # fmt: skip


def theirs(url: Path, start: npt.NDArray[np.float64], dtype: type = np.float32) -> dict[str, Any]:
    """Read all pixels and fit by scikit-learn."""
    from sklearn.cluster import KMeans

    began, spent = time.perf_counter(), time.process_time()
    values = open_cube(str(url)).dataset(COLLECTION, scaled=True, masked=True).reflectance.values[0]
    rows: npt.NDArray[Any] = np.ascontiguousarray(values.reshape(len(values), -1).T, dtype)
    del values
    read = time.perf_counter() - began
    found = KMeans(K, init=start.astype(rows.dtype), n_init=1, algorithm="lloyd", copy_x=False).fit(rows)
    return {"seconds": time.perf_counter() - began, "processor": time.process_time() - spent, "read": read,
            "iterations": found.n_iter_, "inertia": float(found.inertia_)}  # fmt: skip


def theirs_in_float64(url: Path, start: npt.NDArray[np.float64]) -> float:
    """Inertia that scikit-learn reaches from the same start in float64: its sums in float32 are off by a thousandth."""
    from sklearn.cluster import KMeans

    table = open_table(str(url))
    rows = np.concatenate([table.read(number).values for number in range(len(table))], axis=1).T.astype(np.float64)
    return float(KMeans(K, init=start, n_init=1, algorithm="lloyd").fit(rows).inertia_)


def speed(part: str, repeats: int) -> list[Row]:
    url = pixel_cube(*SIDES[part])
    start = first_centres(url)
    ours(pixel_cube(512, 512), start)  # compiles
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "scikit-learn": []}
    for _ in range(repeats):
        for name, run in (("ours", ours), ("scikit-learn", theirs)):
            runs[name].append(run(url, start))
            print(name, runs[name][-1], flush=True)
    seconds = {name: statistics.median(one["seconds"] for one in those) for name, those in runs.items()}
    processor = {name: statistics.median(one["processor"] for one in those) for name, those in runs.items()}
    mine, other = runs["ours"][0], runs["scikit-learn"][0]
    pixels = f"{SIDES[part][0] * SIDES[part][1] / 1e6:.0f} M pixels"
    note = (f"{seconds['ours']:.2f} s beside {seconds['scikit-learn']:.2f} s, of the processor "
            f"{processor['ours']:.2f} and {processor['scikit-learn']:.2f} s; passes {mine['iterations']} and "
            f"{other['iterations']}; {repeats} runs of each in turns")  # fmt: skip
    exact = theirs_in_float64(url, start) if part == "speed" else float("nan")
    if part == "large":  # float32 is what scikit-learn is given by default; there its sums stall, see the inertia
        wide = theirs(url, start, np.float64)
        print("scikit-learn in float64", wide, flush=True)
    rows = [
        Row(f"{pixels}: rate over scikit-learn, reading included", seconds["scikit-learn"] / seconds["ours"],
            1.0 if part == "speed" else 5.0, note=note),
        Row(f"{pixels}: processor time of scikit-learn over ours", processor["scikit-learn"] / processor["ours"]),
    ]  # fmt: skip
    if part == "large":
        passes = {"float32": seconds["scikit-learn"] - other["read"], "float64": wide["seconds"] - wide["read"]}
        both = f"{mine['iterations']} and {wide['iterations']} passes"
        note = f"{seconds['ours']:.1f} s beside {wide['seconds']:.1f} s; {both}"
        rows += [
            Row(f"{pixels}: rate over scikit-learn in float64, reading included", wide["seconds"] / seconds["ours"],
                note=note),
            Row(f"{pixels}: seconds of a pass of scikit-learn in float32", passes["float32"] / other["iterations"]),
            Row(f"{pixels}: seconds of a pass of scikit-learn in float64", passes["float64"] / wide["iterations"]),
            Row(f"{pixels}: inertia apart from scikit-learn in float64, %",
                100 * abs(mine["inertia"] / wide["inertia"] - 1), 0.1, at_most=True,
                note=f"{mine['inertia']:.1f} and {wide['inertia']:.1f}; in float32 it says {other['inertia']:.1f}"),
        ]  # fmt: skip
    if part == "speed":
        off = 100 * abs(mine["inertia"] / exact - 1)
        note = f"{mine['inertia']:.3f} and {exact:.3f}; in float32 it says {other['inertia']:.3f}"
        name = f"{pixels}: inertia apart from scikit-learn in float64, %"
        rows.append(Row(name, off, 0.1, at_most=True, note=note))
    return rows


class Repeated(CubeTable):
    """The pixels of a cube several times over, as blocks of their own that are read again."""

    def __init__(self, url: Path, times: int) -> None:
        super().__init__(open_table(str(url)).reader)  # type: ignore[attr-defined]
        self.times = times

    def __len__(self) -> int:
        return self.times * len(self.reader.boxes)

    def read(self, number: int) -> Block:
        return super().read(number % len(self.reader.boxes))


def memory(full: bool) -> list[Row]:
    """Peak memory of a process that fits and labels, with 64 MB of blocks kept."""
    pixel_cube(*SIDES["speed"])
    rows, peaks = [], {}
    for millions in (1, 10, 100, 1000) if full else (1, 10, 100):
        done = subprocess.run([sys.executable, __file__, "--child", str(millions)], check=True, capture_output=True,
                              text=True)  # fmt: skip
        found = json.loads(done.stdout.splitlines()[-1])
        peaks[millions] = found["peak_mb"]
        rows.append(Row(f"{millions} M pixels: peak, MB", found["peak_mb"], note=f"{found['seconds']:.0f} s, 2 passes"))
        print(rows[-1], flush=True)
    rows.append(Row("largest over 10 M pixels", peaks[max(peaks)] / peaks[10], 1.15, at_most=True,
                    note="blocks that are kept and blocks at work, no matter how many pixels"))  # fmt: skip
    return rows


def child(millions: int) -> None:
    keep_blocks(64 << 20)
    url = pixel_cube(1024, 1024) if millions == 1 else pixel_cube(*SIDES["speed"])
    table, workers = Repeated(url, max(1, millions // 10)), LocalWorkers()
    began = time.perf_counter()
    moments = table_moments(table, workers)
    scaling, _ = make_scaling(moments)
    start = scaling.apply(table.read(0).values[:, :: 1 << 16][:, :K]).T
    fit = fit_kmeans(table, scaling, Fit(start), moments, workers, iterations=2)
    assert fit.count is not None
    peak = process_peak_bytes() / 2**20
    print(json.dumps({"pixels": int(fit.count.sum()), "peak_mb": round(peak), "seconds": time.perf_counter() - began}))


def labels() -> list[Row]:
    """Labels and model of the command on 1, 2 and 8 devices of the processor, and in two processes."""
    url = pixel_cube(1024, 1024)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for devices in (1, 2, 8):
            out = Path(folder, str(devices))
            _run(["kmeans", str(url), str(out), "-k", str(K)], devices)
            found[f"{devices} devices"] = _digest(out)
        out = Path(folder, "two")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        apart = {"TERRASHARD_COORDINATOR": f"127.0.0.1:{port}", "TERRASHARD_PROCESSES": "2"}
        both = [
            subprocess.Popen([COMMAND, "kmeans", str(url), str(out), "-k", str(K)], stdout=subprocess.DEVNULL,
                             env={**os.environ, **apart, "TERRASHARD_PROCESS": str(at)})
            for at in range(2)
        ]  # fmt: skip
        if any(one.wait(timeout=200) for one in both):
            raise SystemExit("two processes failed")
        found["2 processes"] = _digest(out)
    same = [name for name, digest in found.items() if digest == found["1 devices"]]
    return [Row("ways to run with the labels and centres of one device", len(same), len(found), note=", ".join(same))]


def _run(arguments: list[str], devices: int) -> None:
    env = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    subprocess.run([COMMAND, *arguments], check=True, stdout=subprocess.DEVNULL, env=env)


def _digest(out: Path) -> str:
    digest = hashlib.sha256((out / "model.json").read_bytes())
    for path in sorted(path for path in (out / "clusters.zarr").rglob("*") if "/c/" in str(path) and path.is_file()):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def truth() -> list[Row]:
    """Adjusted Rand index of clusters and known classes, beside scikit-learn on the same pixels, standardised."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score

    from jaxtrain.inference.maps import open_map

    rows = []
    for name, make, k in (("simulated ground", _simulated, 8), ("scene classes of Zagreb", _zagreb, 6)):
        made = make()
        if made is None:
            print(f"{name}: the shared data are not there")
            continue
        url, time_, classes = made
        with tempfile.TemporaryDirectory() as folder:
            found = cluster(url, Path(folder, "out"), ClusterOptions(k=(k,), standardise=True, time=time_))
            mine = np.asarray(open_map(Path(folder, "out/clusters.zarr")).read())
        table = open_table(str(url), time=time_)
        blocks = [table.read(number) for number in range(len(table))]
        values = np.concatenate([block.values for block in blocks], axis=1).T.astype(np.float64)
        at = np.concatenate([block.ids for block in blocks]).astype(np.int64)
        scaled = (values - values.mean(axis=0)) / values.std(axis=0)
        other = min((KMeans(k, n_init=4, random_state=seed).fit(scaled) for seed in (0,)), key=lambda one: one.inertia_)
        known = classes.ravel()[at]
        chosen = known > 0
        scores = [adjusted_rand_score(known[chosen], labels[chosen]) for labels in (mine.ravel()[at], other.labels_)]
        rows.append(Row(f"{name}: adjusted Rand index", scores[0], scores[1] - 0.02,
                        note=f"scikit-learn {scores[1]:.3f}; {chosen.sum():,} pixels, k = {k}"))  # fmt: skip
        rows.append(Row(f"{name}: inertia over the best of 4 of scikit-learn", found.inertia / other.inertia_, 1.001,
                        at_most=True, note=f"{found.inertia:.1f} and {other.inertia_:.1f}"))  # fmt: skip
    return rows


def _ingest(source: Path, url: Path, *more: str) -> Path:
    if not url.exists():
        call = [COMMAND, "ingest", str(source), str(url), "--collection", COLLECTION, "--mask", "scl", *more]
        subprocess.run(call, check=True, stdout=subprocess.DEVNULL)
    return url


def _simulated() -> tuple[Path, str | None, npt.NDArray[np.uint8]]:
    import datetime as dt

    import rasterio

    from ingest.simulate import SimulateConfig, simulate

    folder = OUT / "kmeans-world"
    if not folder.exists():
        dates = (dt.date(2022, 5, 1), dt.date(2022, 6, 16), dt.date(2022, 7, 24), dt.date(2022, 9, 1))
        simulate(folder, SimulateConfig(tiles=1, tile_px=512, overlap_px=0, dates=dates, radar_dates=(), clouds=0.0))
    url = _ingest(folder / "catalog.json", OUT / "kmeans-world.zarr", "--bands", "blue,green,red,nir,scl")
    with rasterio.open(folder / "truth.tif") as file:
        return url, None, file.read(1)


def _zagreb() -> tuple[Path, str | None, npt.NDArray[np.uint8]] | None:
    from accuracy import SHARED

    source = SHARED / "scenes" / "zagreb" / "catalog.json"
    if not source.exists():
        return None
    url = _ingest(source, OUT / "zagreb.zarr", "--bands", "blue,green,red,nir,scl")
    dataset = open_cube(str(url)).dataset(COLLECTION)
    number = int((dataset.status.values == 1).sum(axis=(1, 2)).argmax())  # the clearest date
    scl = dataset.scl.values[number]
    return url, str(number), np.where(np.isin(scl, (4, 5, 6)), scl, 0)  # vegetation, not vegetated, water


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        child(asked.child)
        return 0
    run: dict[str, Callable[[], list[Row]]] = {
        "speed": lambda: speed("speed", asked.repeats), "large": lambda: speed("large", 1),
        "memory": lambda: memory(asked.full), "labels": labels, "truth": truth,
    }  # fmt: skip
    parts = [asked.part] if asked.part else [part for part in PARTS if asked.full or part != "large"]
    passed = [publish(f"kmeans-{part}", run[part](), full=asked.full) for part in parts]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
