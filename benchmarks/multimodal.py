"""Benefit of fusion: accuracy by cloud share of one modality alone and of several.

The simulated world has Sentinel-2 and Sentinel-1. Networks are trained on Sentinel-2 alone, Sentinel-1 alone, both with
each fusion, both without cloudy pairs, and both with each modality asked alone in every step. Held-out clear windows
are then scored with 0, 25, 50, 75 and 100 % of Sentinel-2 masked; every pixel is scored in all cases. What is masked is
a smooth random field cut at its quantile, the same for every network of a seed.

What was measured is kept for each network and seed, so that a call continues where the last one stopped; `--network`
and `--seed` measure one of them. The rows of a topic are published when all of them are there; `--publish` takes what
is there, and each row tells of how many seeds it is. `multimodal-alone` compares the way in which
examples/multimodal.toml trains with single modalities, `multimodal-sim` compares fusions with hidden modalities.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from harness import OUT, Row, publish

from jaxtrain import TrainConfig, train
from jaxtrain.data.arrays import put_batch
from jaxtrain.data.modality_reader import hide
from jaxtrain.data.opening import open_training_data
from jaxtrain.evaluation.scores import restore_model
from jaxtrain.learn.metrics import counts_for
from jaxtrain.learn.step import make_predict_step
from jaxtrain.parallel.mesh import batch_sharding
from jaxtrain.runs.rundir import load_card

KEPT = OUT / "multimodal"
SHARES = (0, 25, 50, 75, 100)
S2 = {"s2": {"bands": ["blue", "green", "red", "nir"]}}
S1 = {"s1": {"collection": "sentinel-1-rtc", "bands": ["vv", "vh"], "decibel": True, "most_days": 3}}
CLEAR = {"s2": {**S2["s2"], "min_observed": 1.0}}
FUSIONS = ("late", "middle", "early")
CLEAR_ONLY = "late, clear pairs only"
ASKED = "late, each asked alone"
"""Each modality is asked alone in every step, in place of hiding whole modalities at random."""


@dataclass(frozen=True)
class Variant:
    """One network: its modalities, where they meet, and how they are taught to do without each other.

    Attributes:
        modalities: As `data.modalities`.
        fusion: As `model.fusion`.
        alone: As `model.alone`.
        dropout: As `data.modality_dropout`.
    """

    modalities: dict[str, Any]
    fusion: str = "late"
    alone: float = 0.0
    dropout: float = 0.3


VARIANTS = {
    "S2 alone": Variant(S2, dropout=0.0),
    "S1 alone": Variant(S1, dropout=0.0),
    **{fusion: Variant(S2 | S1, fusion) for fusion in FUSIONS},
    ASKED: Variant(S2 | S1, alone=0.5, dropout=0.0),
    CLEAR_ONLY: Variant(CLEAR | S1, dropout=0.0),
}
SINGLE = ("S2 alone", "S1 alone")
TOPICS: dict[str, tuple[str, ...]] = {
    "multimodal-alone": (*SINGLE, ASKED),
    "multimodal-sim": (*SINGLE, *FUSIONS, CLEAR_ONLY),
}
"""Networks of each result."""
DATES = ("2022-04-20", "2022-06-16", "2022-07-24", "2022-08-08")
PASSES = ("2022-04-18", "2022-06-15", "2022-07-23", "2022-08-07")
BATCH = 16


@dataclass(frozen=True)
class Size:
    """How much is trained: seeds, steps of each network, side of the world in pixels."""

    seeds: int
    steps: int
    side: int = 512


QUICK, FULL = Size(1, 120), Size(3, 1200)


# ---- The world


def make_world(folder: Path, side: int) -> Path:
    """Return a cube of both sensors with the truth as labels; it is made once."""
    cube, done = folder / f"multimodal-{side}.zarr", folder / f"multimodal-{side}.done"
    if done.exists():
        return cube
    world = folder / f"multimodal-{side}-world"
    listed = {"dates": list(DATES), "radar_dates": list(PASSES)}
    settings = ["tiles=1", f"tile_px={side}", "overlap_px=0", "clouds=0.5"]
    settings += [f"{name}={json.dumps(value)}" for name, value in listed.items()]
    typed("simulate", str(world), *[word for one in settings for word in ("--set", one)])
    typed("ingest", str(world / "catalog.json"), str(cube), "--collection", "sentinel-2-l2a", "--collection",
          "sentinel-1-rtc", "--bands", "blue,green,red,nir,scl,vv,vh", "--mask", "scl", "--workers", "1")  # fmt: skip
    typed("labels", str(cube), str(world / "truth.tif"), "--name", "truth", "--names",
          "1=water,2=wetland,3=forest,4=grassland,5=cropland,6=bare,7=built")  # fmt: skip
    done.touch()
    return cube


def typed(*words: str) -> str:
    """Run a command of `terrashard` and return what it printed."""
    command = str(Path(sys.executable).with_name("terrashard"))
    return subprocess.run([command, *words], check=True, stdout=subprocess.PIPE, text=True).stdout


def config_of(cube: Path, name: str, seed: int, steps: int) -> TrainConfig:
    """Return the configuration of one network."""
    variant = VARIANTS[name]
    data = {"cube": str(cube), "collection": "sentinel-2-l2a", "label": "truth", "patch": 32,
            "modalities": variant.modalities, "modality_dropout": variant.dropout,
            "split": {"block_m": 640, "validation": 0.0, "test": 0.25}}  # fmt: skip
    return TrainConfig.model_validate({
        "data": data,
        "model": {"name": "multimodal", "width": 8, "depth": 2, "fusion": variant.fusion, "alone": variant.alone},
        "optim": {"learning_rate": 5e-3},
        "run": {"steps": steps, "batch_size": BATCH, "seed": seed, "evaluate_every": steps, "checkpoint_every": steps},
    })  # fmt: skip


# ---- Scores


def masks(count: int, side: int, share: int, seed: int) -> npt.NDArray[np.bool_]:
    """Return smooth random masks (count, side, side) that hide `share` per cent of each window."""
    if share in (0, 100):
        return np.full((count, side, side), share == 100)
    rng = np.random.default_rng((seed, 7))
    y, x = np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :]
    smooth = np.exp(-(y**2 + x**2) * side * 8)
    field = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(count, side, side))) * smooth, s=(side, side))
    cut = np.quantile(field.reshape(count, -1), share / 100, axis=1)
    return np.asarray(field < cut[:, None, None])


def score(
    run: Path, reader: Any, rows: npt.NDArray[np.int32], shares: Sequence[int], seed: int
) -> dict[str, dict[str, float]]:
    """Return accuracy and mIoU of a run on windows whose Sentinel-2 is masked by each of `shares` per cent."""
    card = load_card(run)
    program, state, _, _ = restore_model(run, card)
    step, classes = make_predict_step(program), len(card.classes)
    found = {}
    for share in shares:
        hidden = masks(len(rows), card.config.data.patch, share, seed)
        counts, total = counts_for(card.classes.names), np.zeros((classes, classes), np.int64)
        for start in range(0, len(rows) - BATCH + 1, BATCH):
            batch = reader.read(rows[start : start + BATCH])
            label = batch.pop("label")
            batch["observed_s2"] = batch["observed_s2"] * ~hidden[start : start + BATCH]
            there = put_batch({name: batch[name] for name in step.names or ()}, batch_sharding(program.mesh), BATCH)
            guess = np.asarray(step.of_batch(state, there)).argmax(axis=-1)
            known = label < classes
            pairs = np.bincount(label[known].astype(int) * classes + guess[known], minlength=classes**2)
            total += pairs.reshape(classes, classes)
        counts.add_sums({"confusion": total})
        scores = counts.to_dict()
        found[str(share)] = {"accuracy": float(scores["accuracy"]), "miou": float(scores["miou"])}
    return found


def clear_windows(cube: Path) -> tuple[Any, npt.NDArray[Any]]:
    """Return a reader of both modalities, and the test windows that Sentinel-2 saw whole: their masks are exact."""
    data = open_training_data(str(cube))
    ready, *others = (data.prepare(config_of(cube, name, 0, 1), None, None) for name in ("late", *VARIANTS))
    blocks = ready.plan.blocks.to_dict()
    if any(other.plan.blocks.to_dict() != blocks for other in others):
        raise SystemExit("the networks have different test blocks: windows of one would be trained on by another")
    test = ready.plan.parts["test"].rows
    whole = np.array([bool((ready.reader.read(row[None])["observed_s2"] == 1).all()) for row in test])
    return ready.reader, test[whole][: whole.sum() // BATCH * BATCH]


def measure_sim(size: Size, networks: Sequence[str], seeds: Sequence[int]) -> int:
    """Train and score networks on the simulated world, where they were not; return the number of test windows."""
    cube = make_world(OUT, size.side)
    reader, rows = clear_windows(cube)
    for seed in seeds:
        for name in networks:
            place = f"{name}, seed {seed}, {size.steps} steps"
            if place in kept():
                continue
            out = OUT / f"multimodal-{name.replace(' ', '-').replace(',', '')}-{seed}-{size.steps}"
            train(config_of(cube, name, seed, size.steps), out)
            found: dict[str, Any] = {"by_share": score(out, reader, rows, SHARES, seed)}
            if len(VARIANTS[name].modalities) > 1:
                found["without_s1"] = score(out, hide(reader, ["s1"]), rows, (0,), seed)["0"]
            keep(place, found)
            shown = ", ".join(f"{share} %: {100 * one['accuracy']:.1f}" for share, one in found["by_share"].items())
            print(f"  {place}: {shown}", flush=True)
    return len(rows)


def collect(topic: str, size: Size, windows: int, *, some: bool) -> list[Row] | None:
    """Return the rows of a topic once all, or `some`, of its seeds are there."""
    scores = {
        name: [kept().get(f"{name}, seed {seed}, {size.steps} steps") for seed in range(size.seeds)]
        for name in TOPICS[topic]
    }
    there = {name: [one for one in several if one is not None] for name, several in scores.items() if any(several)}
    if not {*SINGLE, TOPICS[topic][2]} <= set(there) or (there != scores and not some):
        return None
    return rows_of(there, windows)


def rows_of(scores: Mapping[str, Sequence[Any]], windows: int) -> list[Row]:
    """Return a row for each network and cloud share, and the aims."""
    rows, mean = [], {}
    for name, runs in scores.items():
        for share in SHARES:
            of_seeds = [one["by_share"][str(share)] for one in runs]
            accuracy = [100 * one["accuracy"] for one in of_seeds]
            mean[name, share] = statistics.fmean(accuracy)
            miou = 100 * statistics.fmean(one["miou"] for one in of_seeds)
            note = f"mIoU {miou:.1f} %; {min(accuracy):.1f} … {max(accuracy):.1f} in {len(runs)} seed(s); "
            rows.append(Row(f"{name}, {share} % cloud: accuracy, %", mean[name, share],
                            note=note + f"{windows} windows"))  # fmt: skip
    best = {share: max(mean["S2 alone", share], mean["S1 alone", share]) for share in SHARES}
    for name in (one for one in (*FUSIONS, ASKED) if one in scores):
        # the aims are those of late fusion; the other fusions are beside it for comparison
        aimed = name in (FUSIONS[0], ASKED)
        least = min(SHARES, key=lambda share, name=name: mean[name, share] - best[share])  # type: ignore[misc]
        rows.append(Row(f"{name} beside the best single modality, least, points", mean[name, least] - best[least],
                        limit=-0.2 if aimed else None, note=f"at {least} % cloud"))  # fmt: skip
        for share in (75, 100):
            gain = mean[name, share] - mean["S2 alone", share]
            rows.append(Row(f"{name} beside S2 alone at {share} % cloud, points", gain, limit=10.0 if aimed else None))
        if aimed:
            # what the other modality adds under a clear sky cannot stay without it
            rows.append(Row(f"{name} beside S2 alone at 0 % cloud, points", mean[name, 0] - mean["S2 alone", 0]))
        lost = [100 * (one["by_share"]["0"]["accuracy"] - one["without_s1"]["accuracy"]) for one in scores[name]]
        rows.append(Row(f"{name}: lost without S1 on clear pixels, points", statistics.fmean(lost), at_most=True,
                        limit=1.0 if aimed else None, note=f"{min(lost):.2f} … {max(lost):.2f}"))  # fmt: skip
        rest = [100 * one["without_s1"]["accuracy"] for one in scores[name]]
        rows.append(Row(f"{name}, without S1 on clear pixels: accuracy, %", statistics.fmean(rest)))
    for share in (50, 100) if CLEAR_ONLY in scores else ():
        lost = mean[CLEAR_ONLY, 0] - mean[CLEAR_ONLY, share]  # type: ignore[assignment]
        rows.append(Row(f"{CLEAR_ONLY}: lost from 0 to {share} % cloud, points", lost))  # type: ignore[arg-type]
    return rows


# ---- What was measured so far


def kept() -> dict[str, Any]:
    return {file.stem: json.loads(file.read_text()) for file in KEPT.glob("*.json")}


def keep(place: str, found: Mapping[str, Any]) -> None:
    """Keep what was measured in a file of its own, so that two calls may measure at the same time."""
    KEPT.mkdir(parents=True, exist_ok=True)
    (KEPT / f"{place}.json").write_text(json.dumps(found, indent=1) + "\n")


def main() -> int:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--full", action="store_true", help="the sizes of the published figures; takes long")
    parser.add_argument("--network", choices=tuple(VARIANTS), help="only this network")
    parser.add_argument("--seed", type=int, help="only this seed")
    parser.add_argument("--publish", action="store_true", help="publish the seeds that are there; train nothing")
    options = parser.parse_args()
    size = FULL if options.full else QUICK
    networks = (options.network,) if options.network else tuple(VARIANTS)
    seeds = range(size.seeds) if options.seed is None else (options.seed,)
    windows = measure_sim(size, networks, () if options.publish else seeds)
    code = 0
    for topic in TOPICS:
        rows = collect(topic, size, windows, some=options.publish)
        if rows is None:
            print(f"  {topic}: networks or seeds are missing, nothing is published yet")
        elif not publish(topic, rows, full=options.full):
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main())
