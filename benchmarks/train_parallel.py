"""Every strategy compared with one device, in the same run: step time, bytes moved by kind, memory of a device.

Eight devices: those of the machine where it has so many accelerators, else a processor split into eight, whose cores
all devices share, so times show what a strategy costs there and not what it gains; bytes and memory are the compiler's,
and alike on any device. Of a pipeline also: its idle time by the schedule, and how equal its stages are.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from typing import Any

import numpy as np
from harness import Row, arguments, publish

DEVICES, CLASSES, BANDS = 8, 6, 4
STRATEGIES: tuple[dict[str, Any], ...] = (
    {},
    {"data": 8},
    {"data": 8, "zero": 1},
    {"data": 8, "zero": 3},
    {"model": 4},
    {"space": 8},
    {"space": [4, 2]},
    {"data": 2, "space": 2, "model": 2, "zero": 3},
    {"pipe": 2, "data": 4},
    {"pipe": 4, "data": 2, "schedule": "gpipe"},
    {"pipe": 2, "data": 2, "space": 2, "schedule": "interleaved"},
)


def make_program(mesh: dict[str, Any], patch: int, batch: int) -> Any:
    from jaxtrain.config import TrainConfig
    from jaxtrain.learn.state import build_program
    from jaxtrain.parallel.mesh import make_mesh

    config = TrainConfig.model_validate(
        {"data": {"cube": "none", "patch": patch, "augment": False}, "mesh": mesh, "run": {"batch_size": batch}}
    )
    return build_program(config, channels=BANDS, classes=CLASSES, mesh=make_mesh(config.mesh),
                         mean=np.full(BANDS, 2000.0), std=np.full(BANDS, 900.0))  # fmt: skip


def put(program: Any, patch: int, batch: int) -> Any:
    from jaxtrain.data.arrays import put_batch
    from jaxtrain.parallel.mesh import batch_sharding

    rng, shape = np.random.default_rng(0), (batch, patch, patch)
    host: dict[str, np.ndarray] = {
        "image": rng.integers(300, 4000, (shape[0], BANDS, *shape[1:])).astype(np.uint16),
        "label": rng.integers(0, CLASSES, shape).astype(np.uint8),
        "observed": np.ones(shape, np.uint8),
    }
    return put_batch(host, batch_sharding(program.mesh), batch)


def state_bytes(state: Any) -> int:
    """The most that one device holds of parameters, statistics and moments."""
    import jax

    held: dict[Any, int] = {}
    for leaf in jax.tree.leaves(state):
        for shard in leaf.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return max(held.values())


def carried_bytes(program: Any, patch: int, batch: int) -> int:
    """What crosses the cuts of a pipeline in a step, there and back, over all devices."""
    from functools import partial

    import jax
    import jax.numpy as jnp

    layout, size = program.layout, batch // program.config.mesh.microbatches
    carry: Any = (jax.ShapeDtypeStruct((size, patch, patch, BANDS), jnp.float32),)
    params = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf
              for path, leaf in jax.tree_util.tree_leaves_with_path(program.shapes.params)}  # fmt: skip
    total = 0
    for chunk in range(layout.chunks - 1):
        mine = {name: leaf for name, leaf in params.items() if layout.owner[name] == chunk}
        run = partial(program.apply_units, span=layout.span(chunk), train=True, key=jax.random.key(0))
        carry = jax.eval_shape(run, mine, {}, carry)[0]
        total += sum(leaf.dtype.itemsize * math.prod(leaf.shape) for leaf in carry)
    return 2 * total * int(program.config.mesh.microbatches)


def run(mesh: dict[str, Any], patch: int, batch: int, steps: int) -> tuple[float, float, str]:
    """Seconds of a step, the first loss, and what it moves and holds, in words."""
    import jax

    from jaxtrain.learn.step import make_train_step
    from jaxtrain.planner.collectives import find_collectives, wire_bytes

    program = make_program(mesh, patch, batch)
    step, state, data = make_train_step(program), program.init(jax.random.key(0)), put(program, patch, batch)
    held = f"state {state_bytes(state) / 2**20:.2f} MiB"
    if program.layout is None:
        compiled = step.jitted.lower(state, data, jax.random.key(0)).compile()
        axes = wire_bytes(find_collectives(compiled, dict(program.config.mesh.axes)))
        moved = {kind: sum(kinds.get(kind, 0.0) for kinds in axes.values())
                 for kind in {kind for kinds in axes.values() for kind in kinds}}  # fmt: skip
        held += f", temporary {compiled.memory_analysis().temp_size_in_bytes / 2**20:.0f} MiB"
    else:
        moved = {"copies between stages, all devices": carried_bytes(program, patch, batch)}
    seconds, losses = [], []
    for number in range(steps + 1):
        began = time.perf_counter()
        state, metrics = step(state, data, key=jax.random.key(number))
        losses.append(float(metrics["loss"]))
        jax.block_until_ready(state.step)
        seconds.append(time.perf_counter() - began)
    kinds = ", ".join(f"{kind} {size / 2**20:.2f} MiB" for kind, size in sorted(moved.items())) or "nothing moves"
    return statistics.median(seconds[1:]), losses[0], f"{held}; {kinds}"


def stages(patch: int, batch: int, parts: int) -> list[Row]:
    """How equal the stages of a measured cut are, timed again, and the idle time of their schedules."""
    import jax
    import jax.numpy as jnp

    from jaxtrain.parallel.schedule import bubble, order_of, trace
    from jaxtrain.parallel.stages import measure

    program = make_program({"pipe": parts, "balance": "measured"}, patch, batch)
    layout, microbatches = program.layout, program.config.mesh.microbatches
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf
             for path, leaf in jax.tree_util.tree_leaves_with_path(program.shapes.params)}  # fmt: skip
    carry: Any = (jax.ShapeDtypeStruct((batch // microbatches, patch, patch, BANDS), jnp.float32),)
    work = []
    for chunk in range(layout.chunks):
        mine = {name: leaf for name, leaf in named.items() if layout.owner[name] == chunk}

        def one(params: Any, carry: Any, chunk: int = chunk) -> Any:
            return program.apply_units(params, {}, carry, span=layout.span(chunk), train=True, key=jax.random.key(0))[0]

        work.append((one, mine, carry))
        carry = jax.eval_shape(one, mine, carry)
    # in turns, so that what else the machine does meets all stages
    turns = [[measure(one, mine, carry) for one, mine, carry in work] for _ in range(4)]
    seconds = np.min(turns, axis=0).tolist()
    rows = [Row(f"{parts} stages of the U-Net, measured cuts: slowest / mean", max(seconds) / float(np.mean(seconds)),
                1.2, at_most=True, note=", ".join(f"{s * 1e3:.0f} ms" for s in seconds))]  # fmt: skip
    theory = (parts - 1) / (microbatches + parts - 1)
    for order in ("gpipe", "1f1b"):
        idle = bubble(trace(order_of(order, groups=parts, chunks=parts, microbatches=microbatches), chunks=parts))
        rows.append(Row(f"{parts} stages, {order}: idle time / theory", idle / theory, 1.1, at_most=True))
    return rows


def main() -> int:
    args = arguments(__doc__ or "")
    import jax

    jax.config.update("jax_num_cpu_devices", DEVICES)
    found = jax.devices()
    if len(found) < DEVICES:
        print(
            f"  skipped: {len(found)} of {DEVICES} {found[0].platform} devices; JAX_PLATFORMS=cpu takes the processor"
        )
        return 0
    if found[0].platform == "cpu":
        print(f"  no accelerators here: {DEVICES} devices of the processor share its cores, GPU times are skipped")
    patch, batch = (128, 32) if args.full else (64, 32)
    rows, single, first = [], 0.0, 0.0
    for mesh in STRATEGIES:
        seconds, loss, note = run(mesh, patch, batch, args.repeats)
        single, first = single or seconds, first or loss
        name = " ".join(f"{key}={value}" for key, value in mesh.items()) or "one device"
        rows.append(Row(f"{name}: step, in steps of one device", seconds / single, note=f"{seconds:.3f} s; {note}"))
        rows.append(Row(f"{name}: loss beside that of one device", abs(loss - first), 1e-5, at_most=True))
        print(f"  {rows[-2].name}: {rows[-2].value:.2f}; {rows[-2].note}", flush=True)
    for parts in (2, 4):
        rows += stages(patch, batch, parts)
    return 0 if publish("train-parallel", rows, full=args.full) else 1


if __name__ == "__main__":
    sys.exit(main())
