"""What is unusual in real scenes: Zagreb's clouds for a model of the clear dates, and small classes of Indian Pines.

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
from anomaly_planted import METHODS, TRAINED
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


def score(url: Path, method: str, run: Path | None, **chosen: Any) -> npt.NDArray[np.float32]:
    """Scores of a cube by one method."""
    from jaxtrain.tasks.anomalies import AnomalyOptions, find_anomalies
    from jaxtrain.tasks.layers import open_layers

    trained = method in ("autoencoder", "embedding")
    chosen |= {"method": method}
    options = AnomalyOptions(bands=() if trained else BANDS, rate=0.01, **chosen)
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
            "model": {"name": "autoencoder", "width": 16, "depth": 2, "code": 4},
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


def pines() -> list[Row]:
    """Pixels of small classes, by methods on the principal components of the scene."""
    from jaxtrain.tasks.background import make_background, score_rows
    from jaxtrain.tasks.detectors import grow_forest
    from jaxtrain.tasks.local_rx import score_locally
    from jaxtrain.tasks.moments import Moments

    image = np.load(SHARED / "hyperspectral/Indian_pines_corrected.npy").astype(np.float64)
    truth = np.load(SHARED / "hyperspectral/Indian_pines_gt.npy")
    pixels = image.reshape(-1, image.shape[2])
    pixels = pixels - pixels.mean(axis=0)
    _, vectors = np.linalg.eigh(np.cov(pixels.T))
    parts = np.ascontiguousarray((pixels @ vectors[:, ::-1][:, :COMPONENTS]).T.astype(np.float32))
    names = [f"component {at}" for at in range(COMPONENTS)]
    background = make_background(Moments.of(parts), names)
    white = np.ascontiguousarray(background.whiten(parts).T)
    scores = {
        "rx": score_rows(parts, background),
        "local-rx": score_locally(parts.reshape(COMPONENTS, *truth.shape), background, inner=5, outer=21).ravel(),
        "isolation": -grow_forest(white, 0).score_samples(white),
    }
    values, counts = np.unique(truth[truth > 0], return_counts=True)
    small = [(int(value), int(count)) for value, count in zip(values, counts, strict=True) if count < SMALL]
    rows: list[Row] = []
    for method, found in scores.items():
        each = {value: figures(found, (truth == value).ravel()) for value, _ in small}
        words = (f"class {value} ({count} px) {each[value][0]:.3f} / {each[value][1]:.3f}" for value, count in small)
        limit, mean = rows[0].value if method in TRAINED else None, float(np.mean([one[0] for one in each.values()]))
        note = f"AP / AUC: {', '.join(words)}; 10 principal components"
        rows.append(Row(f"small classes of Indian Pines, {method}: mean average precision", mean, limit, note=note))
    return rows
