"""Measure this machine, so that a survey speaks of it: `python -m jaxtrain.planner.calibrate` prints a profile.

Convolutions, gradients of kernels, products, transpositions, sums and simple arithmetic are timed at several sizes, on
one device alone and on all at once, because devices of one processor share its cores and caches. Then each kind of
exchange, at several sizes. Each number is the median of several, and together they take less than thirty seconds. The
processes of one run measure themselves together, so exchanges between processes are those of that run.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain.parallel.heap import keep_freed_memory
from jaxtrain.parallel.processes import start_distributed, wait_for_all
from jaxtrain.planner.operations import KINDS
from jaxtrain.planner.profile import Curve, Device, Link, Profile

__all__ = ["calibrate"]

REPEATS = 7
CHANNELS = 32
SIDES = {8: (16, 64), 16: (16, 64), 32: (8, 16, 64), 64: (8, 32)}
"""Rows of the images by their channels, eight images of each on a device; few channels reach fewer operations."""
BATCH = 8
ROWS = (1 << 12, 1 << 15, 1 << 18)
"""Rows of 32 numbers of arrays for simple arithmetic, transpositions and sums: a cache's, the last one's, none's."""
LEAST_BYTES = 1 << 13
"""Bytes up to which simple arithmetic costs no more than its start."""
MESSAGES = (1 << 6, 1 << 16, 1 << 20, 1 << 23)
"""Bytes of the results of an exchange."""
LEAST_S = 1e-6
"""Least seconds of an exchange; shorter times cannot be distinguished from noise."""
CHAIN = 8
"""Exchanges one after the other; each waits for the work before it."""
TURNS = 4
"""Convolutions one after the other."""
TINY = 64
"""Instructions one after the other that do nearly nothing."""

Function = Callable[..., Any]
_wait: Callable[..., Any] = jax.block_until_ready
_spec: Callable[..., PartitionSpec] = PartitionSpec


def calibrate() -> Profile:
    """Measure the devices of all processes of this run, and return their profile; each process must call it."""
    devices = jax.devices()
    first, processes = devices[0], jax.process_count()
    kind = {"cpu": "cpu", "gpu": "gpu", "tpu": "tpu"}.get(first.platform, "gpu")
    every = Mesh(np.array(devices), ("data",))
    alone: dict[str, Curve] = {}
    if first.process_index == jax.process_index():
        mesh = Mesh(np.array([first]), ("data",))
        alone = _work(mesh)
        half = _median(*_convolution(mesh, 16, jnp.bfloat16)) / _median(*_convolution(mesh, 16, jnp.float32))
    wait_for_all("one device is measured")
    busy = _work(every) if len(devices) > 1 else {}
    exchanges = _exchanges(every) if len(devices) > 1 else {}
    if not alone:  # another process prints the profile
        alone, half = busy, 1.0
    rate = alone["convolution"].sizes[-1] / alone["convolution"].seconds[-1]
    largest = alone["elementwise"]
    device: dict[str, Any] = {
        "kind": kind,
        "memory": _memory(first, len(devices)),
        "bandwidth": largest.sizes[-1] / largest.seconds[-1],
        "peak": {"float32": rate, "bfloat16": rate / half},
        "elementwise": max(a / 12 / b for a, b in zip(largest.sizes, largest.seconds, strict=True)),
        "reached": 1.0,
        "reached_bandwidth": 1.0,
        "launch": largest.seconds[0],
        "together": _together(alone, busy, len(devices)) if kind == "cpu" else None,
        "measured": alone,
        "busy": busy,
        "sharing": len(devices),
    }
    bandwidth, latency = _link(exchanges, len(devices))
    return Profile(
        name="this-machine",
        title=f"{platform.node()}: {len(devices)} × {first.device_kind}, measured",
        device=Device.model_validate(device),
        links=(Link(name="between devices", devices=None, bandwidth=bandwidth, latency=latency),),
        scatters=kind != "cpu",
        half=kind != "cpu",
        exchanges=exchanges,
        processes=processes,
        sources={"all": f"measured {time.strftime('%Y-%m-%d')}, JAX {jax.__version__}"},
    )


def _together(alone: dict[str, Curve], busy: dict[str, Curve], devices: int) -> float:
    """Return what all devices together do in the time of one, over all kinds of work."""
    if not busy:
        return 1.0
    slower = [busy[kind].seconds[-1] / alone[kind].seconds[-1] for kind in KINDS]
    return max(1.0, devices / max(statistics.geometric_mean(slower), 1e-9))


def _link(exchanges: dict[str, Curve], devices: int) -> tuple[float, float]:
    """Return bandwidth on the wire and latency of a message, as the all-reduce shows them."""
    if not exchanges:
        return 1e12, 0.0
    curve = exchanges["all-reduce"]
    wire = 2 * (devices - 1) / devices * (curve.sizes[-1] - curve.sizes[0])
    seconds = curve.seconds[-1] - curve.seconds[0]
    return wire / max(seconds, 1e-6), curve.seconds[0] / (2 * (devices - 1))


# ---- Work on each device


def _work(mesh: Mesh) -> dict[str, Curve]:
    """Return the curve of each kind of work while all devices of a mesh do it at once."""
    idle = _median(*_on(mesh, lambda x: x + 1, [(64,)]))
    launch = max(1e-7, (_median(*_on(mesh, _tiny, [(8, 8)])) - idle) / (3 * TINY))

    def curve(points: list[tuple[float, float, int]]) -> Curve:
        kept: list[tuple[float, float]] = []
        for size, seconds, turns in points:
            least = kept[-1][1] if kept else launch
            kept.append((size, max((seconds - idle) / turns, least)))
        return Curve(sizes=tuple(size for size, _ in kept), seconds=tuple(seconds for _, seconds in kept))

    found = {}
    for kind, make, turns in (("convolution", _convolution, TURNS), ("gradient", _gradient, 1)):
        for channels, sides in SIDES.items():
            operations = 2.0 * BATCH * 9 * channels**2
            made = curve([(operations * side**2, _median(*make(mesh, side, jnp.float32, channels)), turns)
                          for side in sides])  # fmt: skip
            moved = 4.0 * (2 * BATCH * channels * sides[-1] ** 2 + 9 * channels**2)
            intensity = operations * sides[-1] ** 2 / moved
            name = kind if channels == CHANNELS else f"{kind}-{channels}"
            found[name] = made.model_copy(update={"intensity": intensity})
    size = 2.0 * BATCH * (3 * 2 - 2) * (3 * 3 - 2) * CHANNELS**2  # places of a window that meet a pixel of 2 × 3
    found["swapped"] = curve([(size, _median(*_small(mesh)), 1)])
    rows = (1 << 8, 1 << 12, 1 << 16)
    found["product"] = curve([
        (2.0 * n * CHANNELS**2, _median(*_on(mesh, jnp.matmul, [(n, CHANNELS), (CHANNELS, CHANNELS)])), 1)
        for n in rows
    ])  # fmt: skip
    for kind, run, arrays, parts in (
        ("elementwise", lambda x, y: x * 1.5 + y, 2, 3),
        ("transpose", _turn, 1, 2),
        ("reduce", lambda x: jnp.square(x).sum((0, 1)), 1, 1),
    ):
        points = [(float(LEAST_BYTES), 0.0, 1)]
        for n in ROWS:
            shape = (32, n // 32, 32)
            points.append((4.0 * parts * math.prod(shape), _median(*_on(mesh, run, [shape] * arrays)), 1))
        found[kind] = curve(points)
    return found


def _on(mesh: Mesh, run: Function, shapes: list[tuple[int, ...]], dtype: Any = jnp.float32) -> tuple[Function, Any]:
    """Compile a function that each device of a mesh runs on arrays of its own; return it and the arrays."""
    across = NamedSharding(mesh, _spec("data"))

    def mine(*arrays: Any) -> Any:
        return jax.tree.map(lambda y: y[None], run(*(x[0] for x in arrays)))

    over: Any = jax.shard_map(mine, mesh=mesh, in_specs=_spec("data"), out_specs=_spec("data"), check_vma=False)
    arrays = [_ones((mesh.size, *shape), dtype, across) for shape in shapes]
    return jax.jit(over), arrays


def _ones(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> Any:
    return jax.jit(lambda: jnp.full(shape, 0.01, dtype), out_shardings=sharding)()


def _convolve(x: Any, k: Any) -> Any:
    return jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _convolution(mesh: Mesh, side: int, dtype: Any, channels: int = CHANNELS) -> tuple[Function, Any]:
    def run(x: Any, k: Any) -> Any:
        for _ in range(TURNS):
            x = _convolve(x, k)
        return x

    return _on(mesh, run, [(BATCH, side, side, channels), (3, 3, channels, channels)], dtype)


def _small(mesh: Mesh) -> tuple[Function, Any]:
    """Return a convolution whose kernel is larger than its image."""
    return _on(mesh, _convolve, [(BATCH, 2, 3, CHANNELS), (3, 3, CHANNELS, CHANNELS)])


def _gradient(mesh: Mesh, side: int, dtype: Any, channels: int = CHANNELS) -> tuple[Function, Any]:
    def run(x: Any, dy: Any) -> Any:
        kernel = jnp.zeros((3, 3, channels, channels), dtype)
        return jax.vjp(partial(_convolve, x), kernel)[1](dy)[0]

    return _on(mesh, run, [(BATCH, side, side, channels)] * 2, dtype)


def _turn(x: Any) -> Any:
    """Normalise and turn images, as the gradient of a kernel needs them: the sum over all samples comes last."""
    return jnp.transpose(jnp.maximum((x - x[:, :1, :1]) * 1.5, 0.0), (2, 1, 0))


def _tiny(x: Any) -> Any:
    for _ in range(TINY):
        x = jax.lax.sort(x + x.sum())  # a sum and a sort are never joined
    return x


# ---- Exchanges


def _exchanges(mesh: Mesh) -> dict[str, Curve]:
    """Return the seconds of each kind of exchange over all devices of a mesh, by the bytes of its results."""
    n = mesh.size
    ring = [(i, (i + 1) % n) for i in range(n)]
    psum: Any = jax.lax.psum
    gather: Any = jax.lax.all_gather
    permute: Any = jax.lax.ppermute
    swap: Any = jax.lax.all_to_all
    kinds: dict[str, Function] = {
        "all-reduce": lambda x: psum(x, "data") * (1 / n),
        "all-gather": lambda x: gather(x[: x.shape[0] // n], "data", tiled=True) * 0.5,
        "collective-permute": lambda x: permute(x, "data", ring) * 0.5,
        "all-to-all": lambda x: swap(x, "data", 0, 0, tiled=True) * 0.5,
    }
    wanted = [(run, size) for run in kinds.values() for size in MESSAGES]
    runs = [_between(mesh, lambda x: x, MESSAGES[0]), *(_between(mesh, run, size) for run, size in wanted)]
    still, *spent = _medians(runs)
    # beside convolutions a few microseconds cannot be told from noise; alone they can, and no exchange costs less
    idle, *least = _medians([_chain(mesh, lambda x: x, MESSAGES[0]), *(_chain(mesh, *one) for one in wanted)])
    found = {}
    for number, kind in enumerate(kinds):
        seconds: list[float] = []
        for at in range(number * len(MESSAGES), (number + 1) * len(MESSAGES)):
            seconds.append(max((spent[at] - still) / CHAIN, (least[at] - idle) / CHAIN, *seconds, LEAST_S))
        found[kind] = Curve(sizes=tuple(map(float, MESSAGES)), seconds=tuple(seconds))
    return found


def _chain(mesh: Mesh, exchange: Function, size: int) -> tuple[Function, Any]:
    """Return exchanges one after the other, with nothing between them."""
    n = mesh.size

    def chain(x: Any) -> Any:
        for _ in range(CHAIN):
            x = exchange(x + 1.0)
        return x

    return _on(mesh, chain, [(max(size // 4 // n, 1) * n,)])


def _between(mesh: Mesh, exchange: Function, size: int) -> tuple[Function, Any]:
    """Return exchanges with a convolution between each two, as a network has them.

    Devices never work at quite the same speed. An exchange costs also that all wait for the last one.
    """
    n = mesh.size

    def chain(x: Any, image: Any, kernel: Any) -> Any:
        for _ in range(CHAIN):
            image = _convolve(image, kernel)
            x = exchange(x + image[0, 0, 0, 0])
            image = image + x[0]
        return x, image

    return _on(mesh, chain, [(max(size // 4 // n, 1) * n,), (BATCH, 16, 16, CHANNELS), (3, 3, CHANNELS, CHANNELS)])


def _median(run: Function, arguments: Any) -> float:
    return _medians([(run, arguments)])[0]


def _medians(runs: list[tuple[Function, Any]]) -> list[float]:
    """Return the median seconds of each function, which take turns."""
    seconds: list[list[float]] = [[] for _ in runs]
    for turn in range(REPEATS + 2):
        for number, (run, arguments) in enumerate(runs):
            began = time.perf_counter()
            _wait(run(*arguments))
            if turn > 1:  # compiled, and warm
                seconds[number].append(time.perf_counter() - began)
    return [statistics.median(several) for several in seconds]


def _memory(device: Any, devices: int) -> float:
    found = device.memory_stats() or {} if device.process_index == jax.process_index() else {}
    if "bytes_limit" in found:
        return float(found["bytes_limit"])
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / devices


if __name__ == "__main__":
    keep_freed_memory()  # as a run of training does
    # whatever a library prints must not stand before the profile
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    joined = start_distributed()
    measured = calibrate()
    if joined.is_first:
        json.dump(measured.model_dump(mode="json"), answer)
        answer.flush()
