"""Anomalies in real scenes: Zagreb's clouds for a model of the clear dates, and small classes of Indian Pines.

Clouds: the cube is ingested without a mask. Methods are fitted to the two clearest dates, and the autoencoder is
trained on them; the truth of the other dates is the scene classification, clouds (8, 9, 10) against clear land and
water (4, 5, 6). Indian Pines: each class of fewer than 100 pixels is an anomaly beside all other pixels.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from accuracy import SHARED, call
from anomaly_planted import AUTOENCODER, METHODS, TRAINED
from harness import OUT, Row

COLLECTION = "sentinel-2-l2a"
BANDS = ("blue", "green", "red", "nir")
AROUND = "15.6,45.6,16.2,46.0"
CLOUDS, CLEAR = (8, 9, 10), (4, 5, 6)
SMALL = 100
"""Pixels below which a class of Indian Pines is small."""
COMPONENTS = 10
"""Principal components of Indian Pines: rings of local RX have too few pixels for 200 bands."""


def scenes() -> list[Row]:
    """Rows of both scenes; of those whose data are there."""
    found = []
    for name, needed, rows in (("Zagreb", "scenes/zagreb/catalog.json", clouds),
                               ("Indian Pines", "hyperspectral/Indian_pines_corrected.npy", pines)):  # fmt: skip
        if (SHARED / needed).exists():
            found += rows()
        else:
            print(f"  {name} skipped: no data at {SHARED}; set TERRASHARD_SHARED_DATA")
    return found


def figures(scores: npt.NDArray[Any], truth: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """Average precision and area under the curve."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    there = np.isfinite(scores)
    return (float(average_precision_score(truth[there], scores[there])),
            float(roc_auc_score(truth[there], scores[there])))  # fmt: skip


def score(
    url: Path, method: str, run: Path | None, *, bands: tuple[str, ...] = BANDS, rate: float = 0.01, **chosen: Any
) -> npt.NDArray[np.float32]:
    """Scores of a cube by one method."""
    from jaxtrain.tasks.anomalies import AnomalyOptions, find_anomalies
    from jaxtrain.tasks.layers import open_layers

    trained = method in ("autoencoder", "embedding")
    chosen |= {"method": method}
    options = AnomalyOptions(bands=() if trained else bands, rate=rate, **chosen)
    with tempfile.TemporaryDirectory() as folder:
        find_anomalies(url, Path(folder, "out"), options, run=run if trained else None)
        return np.asarray(open_layers(Path(folder, "out/anomalies.zarr"))["score"])


def clouds() -> list[Row]:
    from jaxtrain import train
    from jaxtrain.config import TrainConfig
    from zarr_store.read import open_cube

    url, run = OUT / "anomaly-zagreb.zarr", OUT / "anomaly-zagreb-run"
    if not url.exists():
        call("ingest", str(SHARED / "scenes/zagreb/catalog.json"), str(url), "--collection", COLLECTION, "--bands",
             ",".join((*BANDS, "scl")), "--mask", "none", "--bbox", AROUND)  # fmt: skip
    dataset = open_cube(str(url)).dataset(COLLECTION)
    scl = dataset.scl.values
    times = open_cube(str(url)).spec(COLLECTION).times
    cloudy = np.isin(scl, CLOUDS)
    share = [float(cloudy[at].sum() / max(1, (scl[at] > 0).sum())) for at in range(len(times))]
    order = np.argsort(share)
    clear, others = [int(at) for at in order[:2]], [int(at) for at in order[2:] if share[at] > 0.01]
    if not (run / "model.json").exists():
        train(TrainConfig.model_validate({
            "data": {"cube": str(url), "collection": COLLECTION, "bands": BANDS, "patch": 32,
                     "split": {"test_dates": [times[int(at)] for at in order[2:]], "block_m": 7680}},
            "model": AUTOENCODER,
            "optim": {"loss": "mse", "learning_rate": 3e-3},
            "run": {"steps": 200, "batch_size": 16, "evaluate_every": 200, "checkpoint_every": 200},
        }), run)  # fmt: skip
    rows: list[Row] = []
    usual = ",".join(times[at] for at in clear)
    for method in METHODS:
        found = []
        for at in others:
            scores = score(url, method, run, time=times[at], usual=usual)
            known = cloudy[at] | np.isin(scl[at], CLEAR)
            found.append(figures(np.where(known, scores, np.nan), cloudy[at]))
        precision, area = (float(np.mean([one[number] for one in found])) for number in (0, 1))
        dates = "; ".join(
            f"{times[at][:10]} ({share[at]:.0%} cloud) {one[0]:.3f} / {one[1]:.3f}"
            for at, one in zip(others, found, strict=True)
        )
        limit = rows[0].value if method in TRAINED else None
        rows.append(Row(f"clouds of Zagreb, {method}: mean average precision", precision, limit,
                        note=f"AUC {area:.3f}; AP / AUC: {dates}; fitted to {usual}"))  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def pines_cube() -> Path:
    """The first principal components of Indian Pines as bands of a cube of one date; made once."""
    from zarr_store.create import create_cube
    from zarr_store.grid import Grid
    from zarr_store.spec import BandSpec, CubeSpec, Layout
    from zarr_store.write import ShardWriter

    url = OUT / "anomaly-pines.zarr"
    if url.exists():
        return url
    image = np.load(SHARED / "hyperspectral/Indian_pines_corrected.npy").astype(np.float64)
    pixels = image.reshape(-1, image.shape[2])
    pixels = pixels - pixels.mean(axis=0)
    _, vectors = np.linalg.eigh(np.cov(pixels.T))
    parts = (pixels @ vectors[:, ::-1][:, :COMPONENTS]).T.reshape(COMPONENTS, *image.shape[:2])
    least = parts.min(axis=(1, 2))
    step = (parts.max(axis=(1, 2)) - least) / 65_534
    stored = 1 + np.rint((parts - least[:, None, None]) / step[:, None, None]).astype(np.uint16)
    bands = tuple(BandSpec(f"component{at}", nodata=0, scale=float(step[at]), offset=float(least[at] - step[at]))
                  for at in range(COMPONENTS))  # fmt: skip
    grid = Grid("EPSG:32616", (20.0, 0.0, 500_000.0, 0.0, -20.0, 4_480_000.0), image.shape[:2])
    spec = CubeSpec(COLLECTION, "reflectance", bands, grid, ("1992-06-12T00:00:00",), (),
                    Layout("pines", (1, 160, 160), (1, 160, 160)))  # fmt: skip
    create_cube(url, [spec], items={COLLECTION: [{"id": "pines"}]}, provenance={"made_by": "benchmarks"})
    for region in spec.shards().values():
        arrays: dict[str, Any] = {"reflectance": stored[None], "status": np.ones(region.shape, np.uint8),
                                  "source_item": np.zeros(region.shape, np.int16)}  # fmt: skip
        ShardWriter(url, COLLECTION).write(region, arrays, key="k", sources=())
    return url


def pines() -> list[Row]:
    """Pixels of small classes, by all methods on the principal components of the scene."""
    from jaxtrain import train
    from jaxtrain.config import TrainConfig

    url, run = pines_cube(), OUT / "anomaly-pines-run"
    truth = np.load(SHARED / "hyperspectral/Indian_pines_gt.npy")
    bands = tuple(f"component{at}" for at in range(COMPONENTS))
    if not (run / "model.json").exists():
        train(TrainConfig.model_validate({
            "data": {"cube": str(url), "bands": bands, "patch": 32, "split": {"block_m": 640}},
            "model": AUTOENCODER,
            "optim": {"loss": "mse", "learning_rate": 3e-3},
            "run": {"steps": 200, "batch_size": 16, "evaluate_every": 200, "checkpoint_every": 200},
        }), run)  # fmt: skip
    values, counts = np.unique(truth[truth > 0], return_counts=True)
    small = [(int(value), int(count)) for value, count in zip(values, counts, strict=True) if count < SMALL]
    rows: list[Row] = []
    for method in METHODS:
        found = score(url, method, run, bands=bands, rate=0.05)
        each = {value: figures(found.ravel(), (truth == value).ravel()) for value, _ in small}
        words = (f"class {value} ({count} px) {each[value][0]:.3f} / {each[value][1]:.3f}" for value, count in small)
        limit, mean = rows[0].value if method in TRAINED else None, float(np.mean([one[0] for one in each.values()]))
        note = f"AP / AUC: {', '.join(words)}; {COMPONENTS} principal components"
        rows.append(Row(f"small classes of Indian Pines, {method}: mean average precision", mean, limit, note=note))
        print(rows[-1], flush=True)
    return rows
