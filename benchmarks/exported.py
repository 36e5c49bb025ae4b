"""Exported networks on real windows: ONNX, StableHLO and safetensors compared with the network in JAX.

    benchmarks/exported.py --cube zagreb.zarr --store eurosat.zarr

Four networks are trained for some steps and exported: a U-Net, a temporal network and one of two modalities on scenes
near Zagreb, and a ResNet on EuroSAT. ONNX Runtime and the deserialised StableHLO answer for the windows of the test
part; a window counts once. It needs the extra `export`, whose translator needs an older orbax than the pinned one: run
it in an environment of its own.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from harness import OUT, Row, publish

CLASSES = {"4": "vegetation", "5": "not vegetated", "6": "water", "8": "cloud", "9": "cloud", "10": "cloud"}
ZAGREB: dict[str, Any] = {
    "collection": "sentinel-2-l2a", "bands": ["blue", "green", "red", "nir"], "label": "scl", "classes": CLASSES,
    "learn_masked": True, "patch": 64, "min_labelled": 0.3, "split": {"block_m": 15360},
}  # fmt: skip
RUN = {"batch_size": 8, "evaluate_every": 1000, "checkpoint_every": 1000}
BATCH = 8


def networks(cube: Path, store: Path, steps: int) -> dict[str, dict[str, Any]]:
    """Return the configuration of each network by name."""
    run = {**RUN, "steps": steps}
    zagreb = {**ZAGREB, "cube": str(cube)}
    several = {name: value for name, value in zagreb.items() if name != "bands"}
    return {
        "U-Net, Zagreb": {
            "data": zagreb, "model": {"name": "unet", "width": 16, "depth": 2, "dropout": 0.1}, "run": run,
        },
        "temporal, Zagreb, 2 dates": {
            "data": {**zagreb, "dates": 2}, "model": {"name": "temporal", "width": 16, "dropout": 0.1}, "run": run,
        },
        "multimodal, Zagreb, 2 branches": {
            "data": {**several, "modalities": {
                "visible": {"collection": "sentinel-2-l2a", "bands": ["blue", "green", "red"]},
                "infrared": {"collection": "sentinel-2-l2a", "bands": ["nir"]},
            }},
            "model": {"name": "multimodal", "width": 8}, "run": run,
        },
        "ResNet, EuroSAT": {
            "data": {"cube": str(store), "split": {"cell_deg": 0.5}},
            "model": {"name": "resnet", "width": 16, "blocks": [1, 1, 1, 1], "norm": "batch", "turns": True},
            "run": {**run, "batch_size": 32},
        },
    }  # fmt: skip


def compare(name: str, config: dict[str, Any], most: int) -> list[Row]:
    """Train and export one network, and compare the answers of the exported files with its own."""
    import onnxruntime
    from safetensors.numpy import load_file

    from jaxtrain import TrainConfig, train
    from jaxtrain.data.opening import open_training_data
    from jaxtrain.evaluation.scores import restore_model, select_data
    from jaxtrain.inference.exported import export_model, exported_function
    from jaxtrain.runs.rundir import load_card

    folder = OUT / f"exported-{name.split(',', maxsplit=1)[0].lower()}"
    shutil.rmtree(folder, ignore_errors=True)
    train(TrainConfig.model_validate(config), folder / "run")
    made = export_model(folder / "run", folder / "model", batch=BATCH)
    card = load_card(folder / "run")
    chosen = select_data(card, open_training_data(card.cube), part="test")
    program, state, _, _ = restore_model(folder / "run", card)
    function, weights = exported_function(program, state)
    ours = jax.jit(function)
    session = onnxruntime.InferenceSession(str(folder / "model" / "model.onnx"))
    hlo: Any = jax.export.deserialize(bytearray((folder / "model" / "model.stablehlo").read_bytes()))
    types = {one.name: np.int32 if "int32" in one.type else np.float32 for one in session.get_inputs()}
    far, far_hlo, equal, count = 0.0, 0.0, 0, 0
    rows = chosen.windows.rows[:most]
    for start in range(0, len(rows) - BATCH + 1, BATCH):
        batch = chosen.reader.read(rows[start : start + BATCH])
        arrays = {key: np.ascontiguousarray(batch[key]).astype(types[key]) for key in made.inputs}
        expected = np.asarray(ours(*arrays.values()))
        (found,) = session.run(None, arrays)
        far = max(far, float(np.abs(found - expected).max()))
        answered = np.asarray(hlo.call(*arrays.values()))
        far_hlo = max(far_hlo, float(np.abs(answered - expected).max()))
        same = found.argmax(axis=-1) == expected.argmax(axis=-1)
        equal, count = equal + int(same.sum()), count + same.size
    read = load_file(folder / "model" / "model.safetensors")
    kept = all(np.array_equal(read[key], value) for key, value in weights.items())
    windows = len(rows) // BATCH * BATCH
    note = f"{windows} windows, {count:,} answers, {made.parameters:,} parameters"
    return [
        Row(f"{name}: ONNX, largest difference of a probability", far, 1e-4, at_most=True, note=note),
        Row(f"{name}: ONNX, share of answers with the same class", equal / count, 0.9999),
        Row(f"{name}: StableHLO, largest difference", far_hlo, 1e-4, at_most=True),
        Row(f"{name}: safetensors, all arrays equal", float(kept and read.keys() == weights.keys()), 1.0),
    ]


def main() -> int:
    """Compare all networks; the exit status says whether every limit holds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cube", type=Path, required=True, help="cube of examples/zagreb_scl.toml")
    parser.add_argument("--store", type=Path, required=True, help="sample store of EuroSAT")
    parser.add_argument("--steps", type=int, default=60, help="steps of training")
    parser.add_argument("--windows", type=int, default=256, help="most windows of each network")
    given = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for name, config in networks(given.cube.absolute(), given.store.absolute(), given.steps).items():
        rows += compare(name, config, given.windows)
    return 0 if publish("exported", rows, full=True) else 1


if __name__ == "__main__":
    raise SystemExit(main())
