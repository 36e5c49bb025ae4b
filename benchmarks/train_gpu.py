"""Training on one GPU compared with `torch.compile`: U-Net (256²), ResNet-18 (64², 13 bands), ResNet-50 (224²).

The default U-Net (128², float32) is measured without PyTorch beside it. Each side of each network is a process of its
own, so that neither meets the other's memory; they take turns. PyTorch is in channels_last, with static shapes. Both
time the kernels of a convolution and take the fastest, also such as sum in an order that changes; what
`run.deterministic`, the default of a training, costs is measured beside it.

- MFU: operations of the step, as XLA counts them before it compiles for a processor, per second, over the GPU's peak.
- Input wait: the share of their time that steps wait for batches, read from a sample store or a cube on this machine's
  disk that is larger than what is kept of it in memory.

Where there is no GPU, or torch and torchvision are not installed, it says so and measures nothing.
"""

from __future__ import annotations

import importlib.util
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from harness import OUT, Row, arguments, publish
from torch_side import torch_resnet, torch_step, torch_unet

CLASSES = 6
STEPS = 20
PEAKS = {"H100": 989e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
"""Dense bfloat16 operations a second by device kind, of their makers' data sheets."""


@dataclass(frozen=True)
class Case:
    """One network: patches of `patch`² with `bands`, one answer per image (`scene`) or per pixel."""

    name: str
    model: tuple[tuple[str, Any], ...]
    patch: int
    bands: int
    batch: int
    scene: bool
    wait: float | None = None
    """Most input wait."""
    precision: str = "bfloat16"
    norm: str = "batch"
    alone: bool = False
    """Without a twin in PyTorch."""

    def twin(self) -> Any:
        model = dict(self.model)
        if self.scene:
            return torch_resnet(model["depth"], self.bands, CLASSES, small=model["stem"] == "small")
        return torch_unet(self.bands, CLASSES, model["width"], model["depth"], norm="batch")


CASES = (
    Case("U-Net 256²", (("name", "unet"), ("width", 32), ("depth", 4)), 256, 4, 64, False, wait=0.05),
    Case("ResNet-18 64², 13 bands", (("name", "resnet"), ("depth", 18), ("width", 64), ("stem", "small")), 64, 13, 512,
         True),
    Case("ResNet-50 224²", (("name", "resnet"), ("depth", 50), ("width", 64), ("stem", "large")), 224, 3, 128, True),
    Case("default U-Net 128², float32", (("name", "unet"),), 128, 4, 32, False, wait=0.05, precision="float32",
         norm="group", alone=True),
)  # fmt: skip

_SIDES: dict[str, Any] = {}
"""What this process has prepared."""


def prepare_torch(case: Case) -> None:
    _SIDES["run"] = torch_step(case.twin(), case.patch, case.bands, case.batch, classes=CLASSES, scene=case.scene,
                               device="cuda", steps=STEPS)  # fmt: skip
    _SIDES["run"]()


def prepare_ours(case: Case, deterministic: bool) -> tuple[str, float]:
    """Compile; returns the kind of the device, and the seconds that compiling took."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # all processes share the device
    import jax

    from jaxtrain.runs.repeat import repeat_exactly

    if deterministic:
        repeat_exactly()
    lower(case)
    began = time.perf_counter()
    _SIDES["compiled"] = _SIDES.pop("lowered").compile()
    spent = time.perf_counter() - began
    run_ours()
    return str(jax.devices()[0].device_kind), spent


def count_operations(case: Case) -> float:
    """Of one step; in a process that has no GPU, for which XLA does not count before it compiles."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    lower(case)
    return float((_SIDES.pop("lowered").cost_analysis() or {}).get("flops", math.nan))


def lower(case: Case) -> None:
    """Build the program, and lower its step for this process's device."""
    import jax

    from jaxtrain.config import TrainConfig
    from jaxtrain.data.arrays import put_batch
    from jaxtrain.learn.state import build_program
    from jaxtrain.learn.step import make_train_step
    from jaxtrain.parallel.mesh import batch_sharding, make_mesh

    model = dict(case.model) | {"precision": case.precision, "norm": case.norm}
    data = {"cube": "none", "patch": case.patch, "augment": False}
    config = TrainConfig.model_validate({"data": data, "model": model, "run": {"batch_size": case.batch}})
    program = build_program(config, channels=case.bands, classes=CLASSES, mesh=make_mesh(config.mesh),
                            mean=np.full(case.bands, 2000.0), std=np.full(case.bands, 900.0))  # fmt: skip
    step = make_train_step(program)
    rng = np.random.default_rng(0)
    square = (case.batch, case.patch, case.patch)
    host: dict[str, np.ndarray] = {
        "image": rng.integers(300, 4000, (case.batch, case.bands, *square[1:])).astype(np.uint16),
        "label": rng.integers(0, CLASSES, square[:1] if case.scene else square).astype(np.uint8),
        "observed": np.ones(square, np.uint8),
    }
    batch = put_batch(host, batch_sharding(program.mesh), case.batch)
    given = {name: batch[name] for name in step.names or batch}
    state = program.init(jax.random.key(0))
    lowered = step.jitted.lower(state, given, jax.random.key(0))
    _SIDES.update(program=program, step=step, state=state, batch=given, lowered=lowered)


def run_ours() -> float:
    import jax

    compiled, state, key = _SIDES["compiled"], _SIDES["state"], jax.random.key(1)
    began = time.perf_counter()
    for _ in range(STEPS):
        state, metrics = compiled(state, _SIDES["batch"], key)
    jax.block_until_ready(metrics)
    _SIDES["state"] = state
    return (time.perf_counter() - began) / STEPS


def run_torch() -> float:
    seconds: float = _SIDES["run"]()
    return seconds


def memory_ours() -> float:
    """GiB at the peak of a step: what lies on the device, and what the step computes with."""
    import jax

    told = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", math.nan)
    return float(told) / 2**30


def memory_torch() -> float:
    import torch

    return float(torch.cuda.max_memory_allocated()) / 2**30


def make_store(case: Case) -> str:
    """A cube or a sample store on disk, larger than what a reader keeps."""
    from train_input import make_stores

    if not case.scene:
        return str(make_stores(True)[0])
    from zarr_store.samples import Sample, SampleSpec, write_samples

    url = OUT / f"samples-{case.patch}-{case.bands}.zarr"
    if Path(url).exists():
        return str(url)
    shape = (case.bands, case.patch, case.patch)
    count = 1 + (640 << 20) // (2 * math.prod(shape))
    spec = SampleSpec(count, tuple(f"B{i:02}" for i in range(case.bands)), shape[1:], "uint16",
                      tuple(f"class {i}" for i in range(CLASSES)))  # fmt: skip
    rng = np.random.default_rng(0)
    grain = rng.normal(0, 60, (16, *shape))

    def samples() -> Iterator[Sample]:
        for number in range(count):
            coarse = (
                rng.integers(300, 3000, (case.bands, case.patch // 16, case.patch // 16)).repeat(16, 1).repeat(16, 2)
            )
            image = (coarse + grain[number % 16]).clip(1, 65535).astype(np.uint16)
            yield Sample(image, np.asarray(number % CLASSES, np.uint8), math.nan, math.nan, str(number))

    return write_samples(url, spec, samples()) and str(url)


def wait_ours(case: Case, url: str, steps: int) -> tuple[float, float]:
    """Share of the time of some steps that they waited for batches, by the clock of a run, and images/s meanwhile."""
    import jax

    from jaxtrain.config import RunConfig
    from jaxtrain.data.batches import BatchStream
    from jaxtrain.data.order import SampleOrder
    from jaxtrain.data.shuffle import ChunkOrder, chunk_numbers
    from jaxtrain.parallel.mesh import batch_sharding
    from jaxtrain.runs.clock import Clock

    reader, windows = _open(case, url)
    order: Any = SampleOrder(0, len(windows))
    if not case.scene:
        order = ChunkOrder(0, chunk_numbers(windows.rows, case.patch, reader.cube.spec("sentinel-2-l2a").layout.chunk),
                           case.batch)  # fmt: skip
    run, sharding, clock = RunConfig(), batch_sharding(_SIDES["program"].mesh), Clock(case.batch)
    state, pending = _SIDES["state"], None
    with BatchStream(reader, windows, size=case.batch, sharding=sharding, order=order, last=steps,
                     threads=run.read_threads, prefetch=run.prefetch, place=True) as batches:  # fmt: skip
        for number, _, batch in clock.waiting(iter(batches)):
            given = {name: batch[name] for name in _SIDES["step"].names or batch}
            state, metrics = _SIDES["compiled"](state, given, jax.random.key(number))
            if pending is not None:
                float(pending["loss"])
                if number > 3:  # the first ones fill the queue
                    clock.tick()
                else:
                    clock.pause()
            pending = metrics
    _SIDES["state"] = state
    return clock.input_wait() or math.nan, clock.rate() or math.nan


def _open(case: Case, url: str) -> tuple[Any, Any]:
    from jaxtrain.config import DataConfig
    from jaxtrain.data.windows import Windows

    if case.scene:
        from jaxtrain.data.samples import SampleReader, sample_classes
        from zarr_store.samples import open_samples

        store = open_samples(url)
        config = DataConfig.model_validate({"cube": url, "patch": case.patch})
        rows = np.zeros((store.spec.count, 3), np.int32)
        rows[:, 0] = np.arange(store.spec.count)
        return SampleReader.of(store, config, sample_classes(config, store)), Windows(case.patch, rows)
    from train_input import COLLECTION, small_cache

    from jaxtrain.data.classes import Classes
    from jaxtrain.data.reader import WindowReader
    from zarr_store.read import open_cube

    small_cache()
    names = {str(4 + i): f"class {i}" for i in range(CLASSES)}
    config = DataConfig.model_validate({"cube": url, "classes": names, "patch": case.patch})
    cube = open_cube(url)
    times, height, width = cube.spec(COLLECTION).shape
    t, y, x = (v.ravel() for v in np.mgrid[:times, : height // case.patch, : width // case.patch])
    rows = np.stack([t, y * case.patch, x * case.patch], axis=1).astype(np.int32)
    return WindowReader.of(cube, config, Classes.of(config)), Windows(case.patch, rows)


@dataclass(frozen=True)
class Sides:
    """The processes of one network."""

    ours: ProcessPoolExecutor
    fixed: ProcessPoolExecutor
    """Ours, with kernels that sum in a fixed order."""
    torch: ProcessPoolExecutor
    host: ProcessPoolExecutor
    """What needs no GPU."""

    @classmethod
    def start(cls) -> Sides:
        return cls(*(ProcessPoolExecutor(1, mp_context=get_context("spawn")) for _ in range(4)))

    def stop(self) -> None:
        for pool in (self.ours, self.fixed, self.torch, self.host):
            pool.shutdown(cancel_futures=True)


def measure(case: Case, sides: Sides, kind: str, compiling_s: float, url: str, repeats: int) -> list[Row]:
    """The rows of one network, whose sides are prepared: every figure of docs/training-speed.md."""
    runs = {
        "ours": lambda: sides.ours.submit(run_ours).result(),
        "deterministic": lambda: sides.fixed.submit(run_ours).result(),
        "torch.compile": lambda: sides.torch.submit(run_torch).result(),
    }
    if case.alone:
        del runs["torch.compile"]
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            spent = run()
            if turn:
                seconds[name].append(spent)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"  {case.name}: ms { ({name: [round(1e3 * v, 2) for v in values] for name, values in seconds.items()}) }")
    rows = [
        Row(f"{case.name}: images/s", case.batch / middle["ours"], note=f"batch {case.batch}, {kind}"),
        Row(f"{case.name}: deterministic: images/s", case.batch / middle["deterministic"]),
        Row(f"{case.name}: deterministic / ours, images/s", middle["ours"] / middle["deterministic"]),
        Row(f"{case.name}: memory, GiB", sides.ours.submit(memory_ours).result()),
        Row(f"{case.name}: deterministic: memory, GiB", sides.fixed.submit(memory_ours).result()),
        Row(f"{case.name}: compiling, s", compiling_s),
    ]
    if not case.alone:
        theirs = middle["torch.compile"]
        rows += [
            Row(f"{case.name}: images/s of torch.compile", case.batch / theirs),
            Row(f"{case.name}: ours / torch.compile", theirs / middle["ours"], 1.0),
            Row(f"{case.name}: deterministic / torch.compile", theirs / middle["deterministic"]),
            Row(f"{case.name}: memory of torch.compile, GiB", sides.torch.submit(memory_torch).result()),
        ]
    peak = max((rate for name, rate in PEAKS.items() if name in kind), default=None)
    if peak is not None and case.precision == "bfloat16":
        operations = sides.host.submit(count_operations, case).result()
        note = f"{operations / 1e12:.2f} TFLOP a step, peak {peak / 1e12:.0f} TFLOP/s"
        rows.append(Row(f"{case.name}: MFU in bfloat16", operations / middle["ours"] / peak, note=note))
    for name, side in (("", sides.ours), ("deterministic: ", sides.fixed)):
        wait, rate = side.submit(wait_ours, case, url, 60).result()
        note = f"fed at {rate:.0f} images/s"
        limit = case.wait if side is sides.fixed else None  # a training is deterministic unless it is told otherwise
        rows.append(Row(f"{case.name}: {name}input wait, share of its steps", wait, limit, at_most=True, note=note))
    return rows


def missing() -> str | None:
    """Why nothing can be measured here."""
    for name in ("torch", "torchvision"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
    import torch

    if not torch.cuda.is_available():
        return "PyTorch sees no GPU"
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        found = pool.submit(_platform).result()
    return None if found == "gpu" else f"JAX sees {found} devices only"


def _platform() -> str:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    return str(jax.default_backend())


def main() -> int:
    args = arguments(__doc__ or "")
    why = missing()
    if why:
        print(f"  skipped: {why}")
        return 0
    rows: list[Row] = []
    passed = False
    networks = {case: Sides.start() for case in CASES}
    try:
        # compiling takes a minute for each: PyTorch's and the stores together, ours, which times kernels, in order
        theirs = [sides.torch.submit(prepare_torch, case) for case, sides in networks.items() if not case.alone]
        stores = [sides.host.submit(make_store, case) for case, sides in networks.items()]
        compiling: list[float] = []
        for case, sides in networks.items():
            kind, _ = sides.ours.submit(prepare_ours, case, False).result()
            compiling.append(sides.fixed.submit(prepare_ours, case, True).result()[1])
        for waiting in theirs:
            waiting.result()
        urls = [store.result() for store in stores]
        for (case, sides), url, spent in zip(networks.items(), urls, compiling, strict=True):
            rows += measure(case, sides, kind, spent, url, args.repeats)
            passed = publish("train-gpu", rows, full=args.full)  # so that what is cut short leaves what it measured
    finally:
        for sides in networks.values():
            sides.stop()
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
