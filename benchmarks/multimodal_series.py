"""Cropland of a real series: several modalities, each of them alone, and a random forest on the same pixels.

Twelve monthly composites of Sentinel-2 and Sentinel-1 of one square kilometre (WorldCereal, in the shared data) become
a cube by the commands that a user types; `examples/multimodal_series.toml` is trained on it, with both modalities and
with each alone. The forest of scikit-learn gets the series of each pixel as features, of the same training windows, and
is scored on the same test blocks. Seeds choose the blocks, too. Without the data it reports that and passes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from accuracy import EXAMPLES, SHARED
from harness import OUT, Row, publish
from multimodal import keep, kept, typed

from jaxtrain import TrainConfig, evaluate, read_train_config, train
from jaxtrain.data.opening import open_training_data

FOLDER = SHARED / "series" / "monthly_s1s2"
EXAMPLE = EXAMPLES / "multimodal_series.toml"
WORK = OUT / "multimodal-series"
S2 = "S2-L2A-B02,S2-L2A-B03,S2-L2A-B04,S2-L2A-B05,S2-L2A-B06,S2-L2A-B07,S2-L2A-B08,S2-L2A-B11,S2-L2A-B12"
NETWORKS: dict[str, tuple[str, ...]] = {"S2 alone": ("s2",), "S1 alone": ("s1",), "fused": ("s2", "s1")}
TREES = 300
FULL, QUICK = 3, 1
"""Seeds."""


def make_cube() -> Path:
    """Return the cube, made by typed commands."""
    cube, done = WORK / "monthly.zarr", WORK / "done"
    if done.exists():
        return cube
    WORK.mkdir(parents=True, exist_ok=True)
    inputs, label = (str(FOLDER / f"worldcereal_{name}.nc") for name in
                     ("preprocessed_inputs", "cropland_classification"))  # fmt: skip
    typed("import", inputs, str(cube), "--collection", "s2", "--nodata", "65535", "--bands", S2)
    typed("import", inputs, str(cube), "--collection", "s1", "--kind", "backscatter", "--decibel", "20,-83",
          "--bands", "S1-SIGMA0-VV,S1-SIGMA0-VH", "--nodata", "65535")  # fmt: skip
    typed("import", label, str(cube), "--labels", "cropland", "--bands", "classification", "--nodata", "none",
          "--crs", "EPSG:32631", "--names", "0=other,1=cropland")  # fmt: skip
    done.touch()
    return cube


def config_of(cube: Path, modalities: Sequence[str], seed: int) -> TrainConfig:
    """Return the example with some of its modalities, another split and another seed."""
    settings = [f"data.cube={cube}", f"data.split.seed={seed}", f"run.seed={seed}"]
    config = read_train_config([EXAMPLE], settings)
    chosen = {name: config.data.modalities[name] for name in modalities}
    return config.model_copy(update={"data": config.data.model_copy(update={"modalities": chosen})})


def samples(cube: Path, modalities: Sequence[str], seed: int, part: str) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return the series of every labelled pixel of a part of the split, and its class."""
    ready = open_training_data(str(cube)).prepare(config_of(cube, modalities, seed), None, None)
    batch = ready.reader.read(ready.plan.parts[part].rows)  # type: ignore[index]
    known = batch["label"] < len(ready.classes)
    features = []
    for name in modalities:
        image = np.moveaxis(batch[f"image_{name}"].astype(np.float32), (1, 2), (-2, -1))  # (B, H, W, T, C)
        seen = np.moveaxis(batch[f"observed_{name}"], 1, -1) == 1
        features.append(np.where(seen[..., None], image, np.nan)[known].reshape(known.sum(), -1))
    return np.concatenate(features, axis=1), batch["label"][known]


def grow_forest(cube: Path, modalities: Sequence[str], seed: int) -> dict[str, Any]:
    """Train a random forest on the training pixels and score it on the test pixels."""
    from sklearn.ensemble import RandomForestClassifier

    forest = RandomForestClassifier(TREES, n_jobs=2, random_state=seed)
    forest.fit(*samples(cube, modalities, seed, "train"))
    features, truth = samples(cube, modalities, seed, "test")
    return {"accuracy": float((forest.predict(features) == truth).mean()), "pixels": len(truth)}


def train_network(cube: Path, modalities: Sequence[str], seed: int) -> dict[str, Any]:
    """Train the example and score it on the test pixels."""
    out = WORK / f"{'-'.join(modalities)}-{seed}"
    train(config_of(cube, modalities, seed), out)
    report = evaluate(out)
    return {"accuracy": float(report.accuracy or 0.0), "miou": float(report.miou or 0.0), "pixels": report.pixels}


def measure(seeds: Sequence[int], networks: Sequence[str], all_seeds: int) -> list[Row] | None:
    """Train networks and forests; return the rows once all of them are there."""
    cube, places = make_cube(), {}
    for name, modalities in NETWORKS.items():
        for side, run in (("network", train_network), ("forest", grow_forest)):
            for seed in range(all_seeds):
                place = places[name, side, seed] = f"series, {side}, {name}, seed {seed}"
                if place not in kept() and name in networks and seed in seeds:
                    found = run(cube, modalities, seed)
                    keep(place, found)
                    print(f"  {place}: {100 * found['accuracy']:.2f} % of {found['pixels']} pixels", flush=True)
    known = kept()
    if any(place not in known for place in places.values()):
        return None
    return rows_of({key: known[place] for key, place in places.items()}, all_seeds)


def rows_of(scores: Mapping[tuple[str, str, int], Any], seeds: int) -> list[Row]:
    """Return a row for each network and forest, and the aims."""
    rows, mean = [], {}
    for name in NETWORKS:
        for side in ("network", "forest"):
            several = [scores[name, side, seed] for seed in range(seeds)]
            accuracy = [100 * one["accuracy"] for one in several]
            mean[name, side] = statistics.fmean(accuracy)
            note = f"seeds {', '.join(f'{one:.2f}' for one in accuracy)}; {several[0]['pixels']} pixels"
            rows.append(Row(f"cropland, {name}, {side}: accuracy, %", mean[name, side], note=note))
    for name in NETWORKS:
        gain = mean[name, "network"] - mean[name, "forest"]
        rows.append(Row(f"cropland, {name}: network beside the forest, points", gain, limit=0.0))
    return rows


def main() -> int:
    """Run the networks and seeds that were asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--full", action="store_true", help="three seeds; else one")
    parser.add_argument("--network", choices=tuple(NETWORKS), help="only these modalities")
    parser.add_argument("--seed", type=int, help="only this seed")
    options = parser.parse_args()
    if not FOLDER.exists():
        print(f"  skipped, no real data at {SHARED}; set TERRASHARD_SHARED_DATA")
        return 0
    count = FULL if options.full else QUICK
    seeds = range(count) if options.seed is None else (options.seed,)
    rows = measure(seeds, (options.network,) if options.network else tuple(NETWORKS), count)
    if rows is None:
        print("  networks or seeds are missing: nothing is published yet")
        return 0
    return 0 if publish("multimodal-series", rows, full=options.full) else 1


if __name__ == "__main__":
    sys.exit(main())
