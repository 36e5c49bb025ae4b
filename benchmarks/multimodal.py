"""Where fusion pays: accuracy by cloud share of one modality alone and of several, on simulated ground.

The simulated world with Sentinel-2 and Sentinel-1. Networks are trained on Sentinel-2 alone, Sentinel-1
alone, both with each fusion, and both without cloudy pairs. Held-out clear windows are then scored with 0, 25, 50, 75
and 100 % of Sentinel-2 masked; every pixel is scored in all cases. What is masked is a smooth random field cut at its
quantile, the same for every network of a seed.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from harness import OUT, Row, arguments, publish

from jaxtrain import TrainConfig, train
from jaxtrain.data.arrays import put_batch
from jaxtrain.data.opening import open_training_data
from jaxtrain.evaluation.scores import restore_model
from jaxtrain.learn.metrics import counts_for
from jaxtrain.learn.step import make_predict_step
from jaxtrain.parallel.mesh import batch_sharding
from jaxtrain.runs.rundir import load_card

SHARES = (0, 25, 50, 75, 100)
S2 = {"s2": {"bands": ["blue", "green", "red", "nir"]}}
S1 = {"s1": {"collection": "sentinel-1-rtc", "bands": ["vv", "vh"], "decibel": True, "most_days": 3}}
VARIANTS: dict[str, tuple[dict[str, Any], str]] = {
    "S2 alone": (S2, "late"), "S1 alone": (S1, "late"), "late": (S2 | S1, "late"), "middle": (S2 | S1, "middle"),
    "early": (S2 | S1, "early"), "late, clear pairs only": (S2 | S1, "late"),
}  # fmt: skip
DATES = ("2022-04-20", "2022-06-16", "2022-07-24", "2022-08-08")
PASSES = ("2022-04-18", "2022-06-15", "2022-07-23", "2022-08-07")


def make_world(folder: Path, side: int) -> Path:
    """Return a cube of both sensors with the truth as labels; it is made once."""
    cube = folder / f"multimodal-{side}.zarr"
    if cube.exists():
        return cube
    import subprocess

    command = str(Path(sys.executable).with_name("terrashard"))
    world = folder / f"multimodal-{side}-world"
    listed = {"dates": list(DATES), "radar_dates": list(PASSES)}
    sets = [f"tiles=1 tile_px={side} overlap_px=0 clouds=0.5".split(), *[[f"{k}={v}"] for k, v in listed.items()]]
    options = [word for group in sets for one in group for word in ("--set", one.replace("'", '"'))]
    subprocess.run([command, "simulate", str(world), *options], check=True)
    subprocess.run([command, "ingest", str(world / "catalog.json"), str(cube), "--collection", "sentinel-2-l2a",
                    "--collection", "sentinel-1-rtc", "--bands", "blue,green,red,nir,scl,vv,vh", "--mask", "scl",
                    "--workers", "1"], check=True)  # fmt: skip
    subprocess.run([command, "labels", str(cube), str(world / "truth.tif"), "--name", "truth", "--names",
                    "1=water,2=wetland,3=forest,4=grassland,5=cropland,6=bare,7=built"], check=True)  # fmt: skip
    return cube


def config_of(cube: Path, name: str, seed: int, steps: int) -> TrainConfig:
    """Return the configuration of one network."""
    modalities, fusion = VARIANTS[name]
    data = {"cube": str(cube), "collection": "sentinel-2-l2a", "label": "truth", "patch": 32, "modalities": modalities,
            "split": {"block_m": 640, "validation": 0.0, "test": 0.25}}  # fmt: skip
    return TrainConfig.model_validate({
        "data": data,
        "model": {"name": "multimodal", "width": 8, "depth": 2, "fusion": fusion},
        "optim": {"learning_rate": 5e-3},
        "run": {"steps": steps, "batch_size": 16, "seed": seed, "evaluate_every": steps, "checkpoint_every": steps},
    })  # fmt: skip


def masks(count: int, side: int, share: int, seed: int) -> npt.NDArray[np.bool_]:
    """Return smooth random masks (count, side, side) that hide `share` per cent of each window."""
    if share in (0, 100):
        return np.full((count, side, side), share == 100)
    rng = np.random.default_rng((seed, 7))
    field = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(count, side, side))) * _smooth(side), s=(side, side))
    cut = np.quantile(field.reshape(count, -1), share / 100, axis=1)
    return np.asarray(field < cut[:, None, None])


def _smooth(side: int) -> npt.NDArray[np.float64]:
    y, x = np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :]
    return np.asarray(np.exp(-(y**2 + x**2) * side * 8))


def score(run: Path, reader: Any, rows: npt.NDArray[np.int32], share: int, seed: int) -> tuple[float, float]:
    """Return accuracy and mIoU on windows whose Sentinel-2 is masked by `share` per cent."""
    card = load_card(run)
    program, state, _, _ = restore_model(run, card)
    step, size = make_predict_step(program), 16
    counts = counts_for(card.classes.names, several=False, values=False)
    hidden = masks(len(rows), card.config.data.patch, share, seed)
    classes, total = len(card.classes), np.zeros((len(card.classes),) * 2, np.int64)
    for start in range(0, len(rows) - size + 1, size):
        batch = reader.read(rows[start : start + size])
        label = batch.pop("label")
        if "observed_s2" in batch:
            batch["observed_s2"] = batch["observed_s2"] * ~hidden[start : start + size]
        there = put_batch({name: batch[name] for name in step.names or ()}, batch_sharding(program.mesh), size)
        guess = np.asarray(step.of_batch(state, there)).argmax(axis=-1)
        known = label < classes
        total += np.bincount(label[known].astype(int) * classes + guess[known], minlength=classes**2).reshape(
            classes, classes
        )
    counts.add_sums({"confusion": total})
    found = counts.to_dict()
    return float(found["accuracy"]), float(found["miou"])


def measure_sim(full: bool) -> list[Row]:
    """Train and score all variants on the simulated world."""
    seeds, steps, side = (range(3), 300, 512) if full else (range(1), 120, 512)
    cube = make_world(OUT, side)
    fused = config_of(cube, "late", 0, steps)
    ready = open_training_data(str(cube)).prepare(fused, None, None)
    # windows that Sentinel-2 saw whole, so that the share that is masked is exact
    test = ready.plan.parts["test"].rows
    clear = np.array([bool((ready.reader.read(row[None])["observed_s2"] == 1).all()) for row in test])
    rows = test[clear][: len(test[clear]) // 16 * 16]
    scores: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for name in VARIANTS:
        scores[name] = {share: [] for share in SHARES}
        for seed in seeds:
            out = OUT / f"multimodal-{name.replace(' ', '-').replace(',', '')}-{seed}-{steps}"
            config = config_of(cube, name, seed, steps)
            if name.endswith("clear pairs only"):
                train_clear(config, out)
            else:
                train(config, out)
            for share in SHARES:
                scores[name][share].append(score(out, ready.reader, rows, share, seed))
    return rows_of(scores, len(rows))


def train_clear(config: TrainConfig, out: Path) -> None:
    """Train with cloudy pairs left out: only windows of which Sentinel-2 saw every pixel."""
    from dataclasses import replace
    from unittest.mock import patch

    from jaxtrain.data import cube_data, multimodal_data
    from jaxtrain.data.windows import Windows

    plain = multimodal_data.prepare_modalities

    def prepare(*given: Any) -> Any:
        ready = plain(*given)
        windows = ready.plan.parts["train"]
        whole = np.array([bool((ready.reader.read(row[None])["observed_s2"] == 1).all()) for row in windows.rows])
        parts = {**ready.plan.parts, "train": Windows(windows.patch, windows.rows[whole])}
        return replace(ready, plan=replace(ready.plan, parts=parts))

    with patch.object(cube_data, "prepare_modalities", prepare):
        train(config.model_copy(update={"data": config.data.model_copy(update={"modality_dropout": 0.0})}), out)


def rows_of(scores: Mapping[str, Mapping[int, list[tuple[float, float]]]], windows: int) -> list[Row]:
    """Return a row for each network and cloud share, and the aims."""
    rows, mean = [], {}
    for name, by_share in scores.items():
        for share, found in by_share.items():
            accuracy = [100 * one for one, _ in found]
            mean[name, share] = statistics.fmean(accuracy)
            miou = 100 * statistics.fmean(one for _, one in found)
            spread = f"{min(accuracy):.1f} … {max(accuracy):.1f}, {len(found)} seeds" if len(found) > 1 else "1 seed"
            rows.append(Row(f"{name}, {share} % cloud: accuracy, %", mean[name, share],
                            note=f"mIoU {miou:.1f} %; {spread}; {windows} windows"))  # fmt: skip
    best = {share: max(mean["S2 alone", share], mean["S1 alone", share]) for share in SHARES}
    least = min(SHARES, key=lambda share: mean["late", share] - best[share])
    rows.append(Row("late beside the best single modality, least, points", mean["late", least] - best[least],
                    limit=-0.2, note=f"at {least} % cloud"))  # fmt: skip
    for share in (75, 100):
        gain = mean["late", share] - mean["S2 alone", share]
        rows.append(Row(f"late beside S2 alone at {share} % cloud, points", gain, limit=10.0))
    return rows


def main() -> int:
    """Run the parts that were asked for."""
    options = arguments(__doc__ or "", parts=("sim",))
    return 0 if publish("multimodal-sim", measure_sim(options.full), full=options.full) else 1


if __name__ == "__main__":
    sys.exit(main())
