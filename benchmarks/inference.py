"""Maps of whole scenes: `predict`, Zarr to Zarr, compared with the forward pass alone and tiled inference in PyTorch.

- `--part rate`: windows that `predict` maps in a second, with opening, compiling, reading, blending and writing, beside
  those of the forward pass alone on batches that lie on the device. Both count the pixels of all windows, of which a
  blend sees each pixel 1.8 times. Beside them PyTorch: the same network and the same windows and weights of overlap, as
  tiled inference is commonly written: a loader of windows, sums of the whole scene in memory, one GeoTIFF at the end.
  Without torch that row is absent. The forward pass of both is measured in the same run. JAX has one device here, as in
  a call from Python; the command has one for each core.
- `--part memory`: peak of a process that maps a scene, of 10980² beside 2745²; of more dates; and of more classes.
- `--part scene`: one scene of 10980² × 4 bands by the command, from start to end, which has one device for each core;
  beside it the forward pass alone on as many devices, in a process of its own.
- `--part workers`: the same map by 1, 2 and 4 processes.

Scenes are simulated: smooth ground of three classes with noise, written shard by shard in the layout of `ingest`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from harness import BANDS, OUT, Row, arguments, medians, publish

COLLECTION = "sentinel-2-l2a"
PATCH, BATCH, CLASSES = 128, 16, 3
DEFAULT: dict[str, Any] = {"norm": "batch"}
"""The default U-Net: width 16, depth 3; with batch norms, so that PyTorch's is the same."""
SMALL: dict[str, Any] = {"norm": "batch", "width": 8, "depth": 1}


def make_scene(side: int, dates: int = 1) -> Path:
    """Write a scene shard by shard; each shard is one tile of texture, turned by its place."""
    from zarr_store.create import create_cube
    from zarr_store.grid import Grid
    from zarr_store.spec import LAYOUTS, STATUS_OBSERVED, BandSpec, CubeSpec
    from zarr_store.write import ShardWriter

    url = OUT / f"scene-{side}-{dates}.zarr"
    if (url / "_terrashard" / "whole").exists():
        return url
    shutil.rmtree(url, ignore_errors=True)
    rng = np.random.default_rng(0)
    step = LAYOUTS["train"].shard[1]
    cover = np.kron(rng.integers(4, 7, (step // 32, step // 32)), np.ones((32, 32), int)).astype(np.uint8)
    spectra = np.array([[400, 700, 500, 3200], [1100, 1400, 1800, 2500], [300, 350, 200, 120]])
    noise = rng.normal(0, 120, (len(BANDS), step, step)).astype(np.float32)
    tile = (spectra[cover - 4].transpose(2, 0, 1) + noise).clip(1, 65535).astype(np.uint16)
    stamps = tuple(f"2023-{1 + t // 28:02d}-{1 + t % 28:02d}T10:00:00" for t in range(dates))
    spec = CubeSpec(
        COLLECTION, "reflectance", tuple(BandSpec(name) for name in BANDS),
        Grid("EPSG:32633", (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_000_000.0), (side, side)), stamps, ("scl",),
        LAYOUTS["train"].fitted((dates, side, side)),
    )  # fmt: skip
    items = {COLLECTION: [{"id": f"item-{t}", "datetime": f"{stamp}Z"} for t, stamp in enumerate(stamps)]}
    create_cube(url, [spec], items=items, provenance={"made_by": "benchmark"})
    writer = ShardWriter(url, COLLECTION)
    for index, region in spec.shards().items():
        height, width = region.y1 - region.y0, region.x1 - region.x0
        shift = (37 * index[0] + 101 * index[1], 211 * index[2])
        layer = np.roll(cover, shift, (0, 1))[None, :height, :width]
        arrays = {
            "reflectance": np.roll(tile, shift, (1, 2))[None, :, :height, :width],
            "scl": layer,
            "status": np.full(layer.shape, STATUS_OBSERVED, np.uint8),
            "source_item": np.zeros(layer.shape, np.int16),
        }
        writer.write(region, {name: np.ascontiguousarray(a) for name, a in arrays.items()}, key="k", sources=())
    (url / "_terrashard" / "whole").touch()
    return url


def make_run(name: str, model: dict[str, Any], classes: int = CLASSES) -> Path:
    """Train a network for a few steps: how well it maps is of no matter here."""
    from jaxtrain import train
    from jaxtrain.config import TrainConfig

    out = OUT / f"run-{name}-{classes}"
    if (out / "checkpoints").exists():
        return out
    names = {"4": "vegetation", "5": "bare", "6": "water"} | {str(100 + i): f"c{i}" for i in range(classes - 3)}
    config = TrainConfig.model_validate({
        "data": {"cube": str(make_scene(1536)), "classes": names, "patch": PATCH, "split": {"block_m": 2560}},
        "model": model,
        "optim": {"warmup_steps": 1},
        "run": {"steps": 4, "batch_size": BATCH, "evaluate_every": 4, "checkpoint_every": 4, "log_every": 1},
    })  # fmt: skip
    train(config, out)
    return out


# ---- Rate


def forward_alone(run: Path, cube: Path, batches: int) -> Callable[[], float]:
    """A function that returns the seconds of the network on batches that lie on the devices."""
    from jaxtrain.inference.opening import open_scene
    from jaxtrain.inference.options import MapOptions

    scene = open_scene(run, cube, MapOptions()).scene()
    rows = np.array([(0, 96 * (i // 8), 96 * (i % 8)) for i in range(BATCH)], np.int32)
    there, _ = scene._inputs(scene.reader.read(rows))

    def once() -> float:
        scene.step.of_batch(scene.state, there).block_until_ready()
        began = time.perf_counter()
        for _ in range(batches):
            answer = scene.step.of_batch(scene.state, there)
        answer.block_until_ready()
        return time.perf_counter() - began

    return once


def mapped(run: Path, cube: Path, out: Path, **options: Any) -> Any:
    from jaxtrain import predict

    shutil.rmtree(out, ignore_errors=True)
    return predict(run, cube, out, **options)


def torch_sides(cube: Path, batches: int) -> dict[str, Callable[[], float]]:
    """The forward pass and the whole map in PyTorch, each in this process."""
    import rasterio
    import torch
    from torch_side import torch_unet

    from jaxtrain.inference.blend import taper, window_starts
    from zarr_store.read import open_cube
    from zarr_store.regions import Region

    network = torch_unet(len(BANDS), CLASSES, 16, 3, norm="batch").eval().to(memory_format=torch.channels_last)
    opened = open_cube(cube)
    _, side, _ = opened.spec(COLLECTION).shape
    tensors = torch.randint(300, 4000, (BATCH, len(BANDS), PATCH, PATCH), dtype=torch.int32)

    def look(pixels: Any) -> Any:
        x = ((pixels.float() - 1200.0) / 900.0).contiguous(memory_format=torch.channels_last)
        return torch.softmax(network(x), dim=1)

    class Tiles:
        def __init__(self) -> None:
            starts = window_starts(side, PATCH, PATCH // 4).tolist()
            self.places = [(y, x) for y in starts for x in starts]

        def __len__(self) -> int:
            return len(self.places)

        def __getitem__(self, number: int) -> Any:
            y, x = self.places[number]
            image = opened.read(COLLECTION, "reflectance", Region(0, 1, y, y + PATCH, x, x + PATCH))[0]
            return torch.from_numpy(image.astype(np.int32)), y, x

    def forward() -> float:
        with torch.inference_mode():
            look(tensors)
            began = time.perf_counter()
            for _ in range(batches):
                look(tensors)
            return time.perf_counter() - began

    def whole() -> float:
        began = time.perf_counter()
        weight = torch.from_numpy(np.maximum(np.outer(*[taper(PATCH, PATCH // 4)] * 2), 1e-4).astype(np.float32))
        total, seen = torch.zeros(CLASSES, side, side), torch.zeros(side, side)
        with torch.inference_mode():
            for pixels, ys, xs in torch.utils.data.DataLoader(Tiles(), batch_size=BATCH):
                for answer, y, x in zip(look(pixels), ys.tolist(), xs.tolist(), strict=True):
                    total[:, y : y + PATCH, x : x + PATCH] += answer * weight
                    seen[y : y + PATCH, x : x + PATCH] += weight
        share, chosen = (total / seen).max(dim=0)
        profile = {"driver": "GTiff", "height": side, "width": side, "count": 2, "dtype": "uint8", "tiled": True,
                   "compress": "zstd"}  # fmt: skip
        with rasterio.open(OUT / "torch-map.tif", "w", **profile) as file:
            file.write(chosen.to(torch.uint8).numpy(), 1)
            file.write((share * 100).round().to(torch.uint8).numpy(), 2)
        return time.perf_counter() - began

    return {"torch: forward": forward, "torch: map": whole}


def rate(full: bool, repeats: int) -> list[Row]:
    from jaxtrain.inference.blend import window_starts

    side = 5490 if full else 2745
    batches = 30 if full else 10
    run, cube, out = make_run("default", DEFAULT), make_scene(side), OUT / "rate-map.zarr"
    shares: list[float] = []

    def whole() -> float:
        made = mapped(run, cube, out)
        shares.append(made.forward_share)
        return float(made.seconds)

    sides: dict[str, Callable[[], float | None]] = {
        "ours: forward": forward_alone(run, cube, batches),
        "ours: map": whole,
    }
    if importlib.util.find_spec("torch"):
        sides |= torch_sides(cube, batches)
    seconds = medians(sides, repeats)
    windows = len(window_starts(side, PATCH, PATCH // 4)) ** 2
    bare = batches * BATCH / seconds["ours: forward"]
    ours = windows / seconds["ours: map"]
    rows = [
        Row("predict, share of the bare forward pass's rate", ours / bare, 0.85,
            note=f"{ours:.1f} of {bare:.1f} windows of {PATCH}² a second, with compiling; {side}²"),
        Row("million pixels of the scene a second", side**2 / seconds["ours: map"] / 1e6),
        Row("share of the time in which the devices ran the network", shares[-1]),
    ]  # fmt: skip
    if "torch: map" in seconds:
        theirs = windows / seconds["torch: map"]
        alone = batches * BATCH / seconds["torch: forward"]
        rows += [
            Row("predict beside tiled inference in PyTorch", ours / theirs, note=f"{theirs:.1f} windows/s there"),
            Row("bare forward pass beside PyTorch's", bare / alone, note=f"{alone:.1f} windows/s there"),
            Row("tiled inference in PyTorch, share of its bare forward pass", theirs / alone),
        ]
    return rows


# ---- Memory, whole scenes, processes


def command(run: Path, cube: Path, out: Path, *more: str) -> dict[str, Any]:
    """Run `terrashard predict` in a process of its own and return what it printed."""
    shutil.rmtree(out, ignore_errors=True)
    typed = [sys.executable, "-m", "cli.main", "predict", str(run), str(cube), str(out), "--json", "-q", *more]
    began = time.perf_counter()
    done = subprocess.run(typed, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    if done.returncode:
        raise SystemExit(f"{' '.join(typed)}: {done.stderr}")
    made: dict[str, Any] = json.loads(done.stdout)
    return made | {"wall_s": time.perf_counter() - began}


def memory(full: bool) -> list[Row]:
    few, many = (2745, 10980) if full else (1372, 5490)
    run, out = make_run("small", SMALL), OUT / "memory-map.zarr"
    peak = {side: command(run, make_scene(side), out)["peak_host_bytes"] for side in (few, many)}
    dates = 8 if full else 4
    several = command(run, make_scene(few, dates), out)["peak_host_bytes"]
    wide = make_run("small", SMALL, 60)
    classes = command(wide, make_scene(few), out)["peak_host_bytes"]
    note = f"{peak[few] / 2**20:.0f} MiB → "
    return [
        Row(f"peak of {many}² beside {few}²", peak[many] / peak[few], 1.1, True, f"{note}{peak[many] / 2**20:.0f} MiB"),
        Row(f"peak of {dates} dates beside 1", several / peak[few], 1.1, True, f"{note}{several / 2**20:.0f} MiB"),
        Row("peak of 60 classes beside 3", classes / peak[few], None, True, f"{note}{classes / 2**20:.0f} MiB"),
    ]


def bare_rate(run: Path, cube: Path, batches: int) -> float:
    """Windows a second of the forward pass alone, in a process with the devices of the command."""
    told = f"""
from pathlib import Path
from jaxtrain.inference.opening import share_processor
from inference import BATCH, forward_alone
share_processor(Path({str(run)!r}), None)
once = forward_alone(Path({str(run)!r}), Path({str(cube)!r}), {batches})
print({batches} * BATCH / sorted(once() for _ in range(3))[1])
"""
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, cwd=Path(__file__).parent)
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(done.stdout)


def scene(full: bool) -> list[Row]:
    from jaxtrain.inference.blend import window_starts

    side = 10980 if full else 2745
    run, cube = make_run("default", DEFAULT), make_scene(side)
    made = command(run, cube, OUT / "scene-map.zarr")
    bare = bare_rate(run, cube, 30 if full else 10)
    windows = len(window_starts(side, PATCH, PATCH // 4)) ** 2
    megapixels = side**2 / 1e6
    return [
        Row(f"minutes of {side}² × {len(BANDS)} bands", made["wall_s"] / 60, note="the default U-Net, float32"),
        Row(
            "the command, share of the bare forward pass's rate",
            windows / made["wall_s"] / bare,
            0.85,
            note=f"{windows / made['wall_s']:.1f} of {bare:.1f} windows/s, with its start and compiling",
        ),
        Row("the map alone, share of that rate", windows / made["seconds"] / bare),
        Row("million pixels a second", megapixels / made["wall_s"]),
        Row("share of the time in which the devices ran the network", made["forward_share"]),
        Row("peak, MiB", made["peak_host_bytes"] / 2**20),
    ]


def digest(folder: Path) -> str:
    """Digest of all files of a folder and their names."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        total.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return total.hexdigest()


def workers(full: bool) -> list[Row]:
    side = 5490 if full else 2745
    run, cube, out = make_run("small", SMALL), make_scene(side), OUT / "workers-map.zarr"
    digests, seconds = {}, {}
    for count in (1, 2, 4):
        seconds[count] = command(run, cube, out, "--workers", str(count))["wall_s"]
        digests[count] = digest(out)
    equal = len(set(digests.values()))
    return [
        Row("different maps of 1, 2 and 4 processes", equal, 1, True, f"{side}²"),
        *(Row(f"seconds of {count} processes", seconds[count], note=f"{os.cpu_count()} cores") for count in seconds),
    ]


def main() -> int:
    asked = arguments(__doc__.splitlines()[0], parts=("rate", "memory", "scene", "workers"))
    good = True
    for part in ("rate", "memory", "scene", "workers"):
        if asked.part in (None, part):
            rows = rate(asked.full, asked.repeats) if part == "rate" else globals()[part](asked.full)
            good &= publish(f"inference-{part}", rows, full=asked.full)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
