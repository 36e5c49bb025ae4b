"""Measure this machine, so that a survey speaks of it: `python -m jaxtrain.planner.calibrate` prints a profile.

It measures convolutions as networks for Earth observation have them, memory traffic, arithmetic in the cache, the cost
of starting an instruction, how much several devices of one processor get done together, and an exchange between them.
Each number is the median of several, in turns. It takes less than thirty seconds.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain.planner.profile import Device, Link, Profile

__all__ = ["calibrate"]

REPEATS = 5
CHANNELS = (16, 32, 64)
SIDE, BATCH = 64, 8
FLOATS = 1 << 24
"""Numbers of an array that no cache holds: 64 MiB."""
CHAIN = 64
"""Instructions one after the other that do nearly nothing."""


def calibrate() -> Profile:
    """Measure the devices that JAX sees, and return their profile."""
    devices = jax.local_devices()
    first = devices[0]
    kind = {"cpu": "cpu", "gpu": "gpu", "tpu": "tpu"}.get(first.platform, "gpu")
    alone, together = _convolutions(devices)
    memory = _memory(first, len(devices))
    device: dict[str, Any] = {
        "kind": kind,
        "memory": memory,
        "bandwidth": _traffic(first),
        "peak": {"float32": _convolution(first, jnp.float32), "bfloat16": _convolution(first, jnp.bfloat16)},
        "elementwise": _elementwise(first),
        "reached": 1.0,
        "reached_bandwidth": 1.0,
        "launch": _launch(first),
        "together": together if kind == "cpu" else None,
    }
    device["peak"]["float32"] = max(device["peak"]["float32"], alone)
    bandwidth, latency = _exchange(devices)
    link = Link(name="between devices", devices=None, bandwidth=bandwidth, latency=latency)
    return Profile(
        name="this-machine",
        title=f"{platform.node()}: {len(devices)} × {first.device_kind}, measured",
        device=Device.model_validate(device),
        links=(link,),
        scatters=kind != "cpu",
        half=kind != "cpu",
        sources={"all": f"measured {time.strftime('%Y-%m-%d')}, JAX {jax.__version__}"},
    )


_wait: Callable[..., Any] = jax.block_until_ready
_spec: Callable[..., PartitionSpec] = PartitionSpec


def _median(run: Callable[[], Any]) -> float:
    run()
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _network(width: int, dtype: Any) -> tuple[Callable[..., Any], tuple[Any, Any], float]:
    """Return the gradient of two convolutions, its arguments, and its operations."""
    x = np.ones((BATCH, SIDE, SIDE, width), np.float32)
    k = np.full((3, 3, width, width), 0.01, np.float32)

    def loss(k: Any, x: Any) -> Any:
        for _ in range(2):
            x = jax.lax.conv_general_dilated(
                x.astype(dtype), k.astype(dtype), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        return jnp.square(x.astype(jnp.float32)).mean()

    operations = 2.0 * BATCH * SIDE * SIDE * 9 * width * width * 6  # two forward, each twice as much backward
    return jax.jit(jax.grad(loss, argnums=(0, 1))), (k, x), operations


def _convolution(device: Any, dtype: Any) -> float:
    rates = []
    for width in CHANNELS:
        run, arguments, operations = _network(width, dtype)
        placed = jax.device_put(arguments, device)
        rates.append(operations / _median(partial(_run, run, placed)))
    return statistics.geometric_mean(rates)


def _run(run: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    _wait(run(*arguments))


def _convolutions(devices: list[Any]) -> tuple[float, float]:
    """Return the rate of one device alone, and of all together in units of it."""
    run, arguments, operations = _network(CHANNELS[1], jnp.float32)
    places = [jax.device_put(arguments, device) for device in devices]
    alone = _median(lambda: _wait(run(*places[0])))
    every = _median(lambda: _wait([run(*place) for place in places]))
    return operations / alone, max(1.0, len(devices) * alone / every)


def _traffic(device: Any) -> float:
    x = jax.device_put(np.ones(FLOATS, np.float32), device)
    run = jax.jit(lambda x: x * 1.5 + 2.0)
    return 8.0 * FLOATS / _median(lambda: _wait(run(x)))


def _elementwise(device: Any) -> float:
    x = jax.device_put(np.ones(1 << 14, np.float32), device)

    def many(x: Any) -> Any:
        return jax.lax.fori_loop(0, 1000, lambda _, y: y * 0.999 + 0.001, x)

    run = jax.jit(many)
    return 2000.0 * (1 << 14) / _median(lambda: _wait(run(x)))


def _launch(device: Any) -> float:
    x = jax.device_put(np.ones((8, 8), np.float32), device)

    def chain(x: Any) -> Any:
        for _ in range(CHAIN):
            x = jax.lax.sort(x + x.sum())  # a sum and a sort are never joined
        return x

    run, empty = jax.jit(chain), jax.jit(lambda x: x + 1)
    spent = _median(lambda: _wait(run(x))) - _median(lambda: _wait(empty(x)))
    return max(spent, 0.0) / (3 * CHAIN)


def _exchange(devices: list[Any]) -> tuple[float, float]:
    """Return bandwidth on the wire and latency of a message of an all-reduce over all devices."""
    n = len(devices)
    if n == 1:
        return 1e12, 0.0
    mesh = Mesh(np.array(devices), ("data",))

    def time_of(count: int) -> float:
        x = jax.device_put(np.ones((n, count), np.float32), NamedSharding(mesh, _spec("data")))
        run = jax.jit(lambda x: x.sum(axis=0), out_shardings=NamedSharding(mesh, _spec()))
        return _median(lambda: _wait(run(x)))

    small, large = time_of(8), time_of(1 << 20)
    wire = 2 * (n - 1) / n * 4 * (1 << 20)
    return wire / max(large - small, 1e-6), small / (2 * (n - 1))


def _memory(device: Any, devices: int) -> float:
    found = device.memory_stats() or {}
    if "bytes_limit" in found:
        return float(found["bytes_limit"])
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / devices


if __name__ == "__main__":
    json.dump(calibrate().model_dump(mode="json"), sys.stdout)
