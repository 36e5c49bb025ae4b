"""Bytes that two real processes send, and memory of a device, compared with the planner's predictions.

Bytes: two processes on 127.0.0.1 train with every strategy, and the counters of the loopback interface are read before
and after. Where the system allows it, both live in a network namespace of their own, so nothing else uses that
interface. The bytes of a step are the difference between a long and a short run, divided by the steps between them,
less what the interface carries in the same seconds without training; so the start and the meeting of the processes
cancel. The interface counts each byte once on its way out, with the headers of TCP and IP and those of Gloo, which
`jaxtrain.planner.framing` predicts from the rules of these protocols.

Memory: the peak that the planner names, beside the arrays that exist on the fullest device, in one process with fake
devices. What a program needs besides while it runs is the compiler's analysis, as a processor reports no peak. The
programs of a pipeline are run one by one in the order of their schedule, and the arrays are summed after each.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from harness import OUT, RESULTS, Row, publish

PROCESSES, SHORT, LONG, IDLE_S = 2, 2, 8, 4.0
BANDS, CLASSES = 4, 6
UNET: dict[str, Any] = {"name": "unet", "width": 16, "depth": 3}
RESNET: dict[str, Any] = {"name": "resnet", "width": 16, "blocks": [2, 2, 2, 2]}
SENDING: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    ("data", UNET, {"data": 2}),
    ("ZeRO-1", UNET, {"data": 2, "zero": 1}),
    ("ZeRO-3", UNET, {"data": 2, "zero": 3}),
    ("filter", UNET, {"model": 2}),
    ("spatial", UNET, {"space": 2}),
    ("pipeline", UNET, {"pipe": 2}),
    ("pipeline, interleaved", UNET, {"pipe": 2, "schedule": "interleaved"}),
    ("data", RESNET, {"data": 2}),
    ("ZeRO-3", RESNET, {"data": 2, "zero": 3}),
    ("filter", RESNET, {"model": 2}),
    ("pipeline", RESNET, {"pipe": 2}),
)
AIM = 0.05


def make_program(
    model: Mapping[str, Any], mesh: Mapping[str, Any], *, patch: int = 64, batch: int = 8, dates: int = 1
) -> Any:
    import numpy as np

    from jaxtrain.config import TrainConfig
    from jaxtrain.learn.state import build_program
    from jaxtrain.parallel.mesh import make_mesh

    data = {"cube": "none", "patch": 64, "augment": False, "dates": dates}
    config = TrainConfig.model_validate(
        {"data": data, "model": dict(model), "mesh": dict(mesh), "run": {"batch_size": 8}}
    )
    return build_program(config, channels=BANDS, classes=CLASSES, mesh=make_mesh(config.mesh),
                         mean=np.full(BANDS, 2000.0), std=np.full(BANDS, 900.0))  # fmt: skip


def facts_of(model: Mapping[str, Any], mesh: Mapping[str, Any], **sizes: int) -> Any:
    """What the planner knows of a step, for processors: their way of collectives, nothing corrected."""
    from jaxtrain.planner.collectives import Dialect
    from jaxtrain.planner.facts import compile_facts

    return compile_facts(make_program(model, mesh, **sizes), {"image": "uint16"}, Dialect())


# ---- The processes that train


def counters() -> tuple[int, int]:
    """Bytes and packets that the loopback interface sent."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, values = line.partition(":")
        if name.strip() == "lo":
            numbers = values.split()
            return int(numbers[8]), int(numbers[9])
    raise SystemExit("/proc/net/dev lists no loopback interface")


class Meter:
    """Counters of the interface at moments when all processes stand still."""

    def __init__(self) -> None:
        from jaxtrain.parallel.processes import wait_for_all

        self._wait, self._last = wait_for_all, (0, 0, 0.0)

    def start(self) -> None:
        self._wait("before the count")
        self._last = (*counters(), time.perf_counter())
        self._wait("counted")

    def read(self) -> tuple[int, int, float]:
        """Bytes, packets and seconds since the last reading."""
        before = self._last
        self._wait("before the count")
        now = (*counters(), time.perf_counter())
        self._wait("counted")
        self._last = (*counters(), time.perf_counter())
        return now[0] - before[0], now[1] - before[1], now[2] - before[2]


def work(number: int) -> None:
    """Train with one strategy and print what the interface carried; one of the processes."""
    import jax

    from jaxtrain.learn.step import make_train_step
    from jaxtrain.parallel.processes import start_distributed

    info = start_distributed(timeout_s=300)
    meter = Meter()
    _, model, mesh = SENDING[number]
    program = make_program(model, mesh)
    step, state, batch = make_train_step(program), program.init(jax.random.key(0)), batch_of(program)

    def train(steps: int, state: Any) -> Any:
        for index in range(steps):
            state, metrics = step(state, batch, key=jax.random.key(index))
        jax.block_until_ready(jax.tree.leaves((state, metrics)))
        return state

    state = train(2, state)
    meter.start()
    time.sleep(IDLE_S)
    size, packets, seconds = meter.read()
    idle = (size / seconds, packets / seconds)
    found = []
    for steps in (SHORT, LONG):
        state = train(steps, state)
        found.append(meter.read())
    one, many = found
    seconds = many[2] - one[2]
    sent = [(many[i] - one[i] - idle[i] * seconds) / (LONG - SHORT) for i in range(2)]
    if info.is_first:
        print(json.dumps({"bytes": sent[0], "packets": sent[1], "idle_bytes_per_s": idle[0]}), flush=True)


def batch_of(program: Any) -> dict[str, Any]:
    from jaxtrain.data.arrays import local_rows, put_batch
    from jaxtrain.parallel.mesh import batch_sharding
    from jaxtrain.planner.facts import batch_shapes
    from jaxtrain.planner.measurer import random_batch

    lies, size = batch_sharding(program.mesh), program.config.run.batch_size
    whole = random_batch(batch_shapes(program, {"image": "uint16"}), program.classes)
    rows = local_rows(lies, size)
    return put_batch({name: array[rows] for name, array in whole.items()}, lies, size)


def run_processes(number: int) -> dict[str, Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # machine code is made quickly: what is exchanged was decided before that. Some results of such code are wrong, and
    # nothing here looks at them
    flags = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"
    base = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "TERRASHARD_HEARTBEAT_S": "600",
            "TERRASHARD_COORDINATOR": f"127.0.0.1:{port}", "TERRASHARD_PROCESSES": str(PROCESSES)}  # fmt: skip
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, "--part", "work", "--number", str(number)],
            env={**base, "TERRASHARD_PROCESS": str(i)}, stdout=subprocess.PIPE, text=True,
        )
        for i in range(PROCESSES)
    ]  # fmt: skip
    try:
        outputs = [worker.communicate(timeout=1500)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    if any(worker.returncode for worker in workers):
        raise SystemExit(f"the processes ended with {[worker.returncode for worker in workers]}")
    (line,) = [line for line in outputs[0].splitlines() if line.startswith("{")]
    answer: dict[str, Any] = json.loads(line)
    return answer


# ---- An interface of their own


def alone() -> list[str]:
    """The words that start a command in a network namespace of its own; none where the system does not allow it."""
    words = ["unshare", "--map-root-user", "--net"]
    if shutil.which("unshare") is None or subprocess.run([*words, "true"], capture_output=True, check=False).returncode:
        return []
    return words


def lift_loopback() -> None:
    """Switch the loopback interface of a new namespace on."""
    get, put, is_up = 0x8913, 0x8914, 1  # SIOCGIFFLAGS, SIOCSIFFLAGS and IFF_UP of linux/sockios.h and linux/if.h
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        flags = struct.unpack("16sh14x", fcntl.ioctl(control, get, struct.pack("16sh14x", b"lo", 0)))[1]
        fcntl.ioctl(control, put, struct.pack("16sh14x", b"lo", flags | is_up))


# ---- What the planner says


def sent_by_all(facts: Any) -> dict[str, float]:
    """Bytes that all devices send in a step, by kind, from the planner's facts."""
    total: dict[str, float] = {}
    for one in facts.programs:
        for collective in one.collectives:
            total[collective.kind] = total.get(collective.kind, 0.0) + one.runs * collective.total_bytes
    inside = [size for name, size in facts.mesh.items() if name != "pipe"]
    devices = 1
    for size in inside:
        devices *= size
    handed = sum(one.bytes for one in facts.handovers if one.source != one.target)
    if handed:
        total["copy"] = 2.0 * devices * facts.microbatches * handed
    return {kind: size for kind, size in total.items() if size}


def compare_bytes(rows: list[dict[str, Any]], wanted: str | None) -> None:
    """Measure each strategy beside its prediction; rows that exist are replaced."""
    from jaxtrain.planner.framing import header_bytes

    words = alone()
    print(f"  {'a network namespace of their own' if words else 'the loopback interface that all programs share'}")
    for number, (name, model, mesh) in enumerate(SENDING):
        if wanted is not None and wanted != name:
            continue
        facts = facts_of(model, mesh)
        expected = sent_by_all(facts) | {"headers": header_bytes(facts)}
        command = [*words, sys.executable, __file__, "--part", "lifted" if words else "processes"]
        seen = json.loads(
            subprocess.run([*command, "--number", str(number)], stdout=subprocess.PIPE, text=True, check=True).stdout
        )
        total = sum(expected.values())
        row = {"network": model["name"], "strategy": name, "mesh": mesh, "predicted": total, "by_kind": expected,
               "measured": seen["bytes"], "packets": seen["packets"],
               "payload": total - expected["headers"],
               "idle_bytes_per_s": seen["idle_bytes_per_s"], "own_interface": bool(words),
               "error": total / seen["bytes"] - 1}  # fmt: skip
        rows[:] = [one for one in rows if (one["network"], one["mesh"]) != (row["network"], row["mesh"])] + [row]
        print(f"  {model['name']:9} {name:22} predicted {total / 1e6:9.3f} MB, carried {seen['bytes'] / 1e6:9.3f} MB "
              f"({seen['packets']:.0f} packets), {row['error']:+.1%}", flush=True)  # fmt: skip
        keep_rows(rows)


# ---- Memory


HOLDING: tuple[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]], ...] = (
    ("one device", UNET, {}, {}),
    ("one device, remat", UNET | {"remat": True}, {}, {}),
    ("one device", RESNET, {}, {}),
    ("one device", {"name": "temporal"}, {}, {"dates": 4}),
    ("data", UNET, {"data": 2}, {}),
    ("ZeRO-1", UNET, {"data": 2, "zero": 1}, {}),
    ("ZeRO-3", UNET, {"data": 2, "zero": 3}, {}),
    ("filter", UNET, {"model": 2}, {}),
    ("spatial", UNET, {"space": 2}, {}),
    ("pipeline", UNET, {"pipe": 2}, {}),
    ("pipeline of replicas", UNET, {"pipe": 2, "data": 2}, {}),
    ("pipeline, gpipe", UNET, {"pipe": 2, "data": 2, "schedule": "gpipe"}, {}),
)


def held_bytes() -> dict[Any, int]:
    """Bytes of all arrays that exist now, by device; two arrays that share their memory count once."""
    import jax

    held: dict[Any, dict[int, int]] = {}
    for array in jax.live_arrays():
        for shard in array.addressable_shards:
            place = held.setdefault(shard.device, {})
            place[shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
    return {device: sum(sizes.values()) for device, sizes in held.items()}


def measured_peak(program: Any) -> int:
    """The most that a device holds in a step: arrays that exist, and what the program that runs needs besides."""
    import jax

    from jaxtrain.learn.step import make_train_step

    step, state, batch = make_train_step(program), program.init(jax.random.key(0)), batch_of(program)
    key, most = jax.random.key(1), 0
    before = held_bytes()
    if program.layout is None:
        memory = step.jitted.lower(state, batch, key).compile().memory_analysis()
        new = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        return int(max(before.values()) + new)
    pipeline = step.jitted.__self__

    def watched(function: Any, devices: Any) -> Any:
        def run(*args: Any) -> Any:
            nonlocal most
            memory = function.lower(*args).compile().memory_analysis()
            results = function(*args)
            jax.block_until_ready(results)
            held = held_bytes()  # with the results of this program
            most = max([most, *(held.get(device, 0) + memory.temp_size_in_bytes for device in devices)])
            return results

        return run

    from dataclasses import replace

    for k, stage in enumerate(pipeline.stages):
        devices = list(pipeline.layout.mesh(k).devices.flat)
        names = ("forward", "backward", "update", *(("total",) if stage.total is not None else ()))
        pipeline.stages[k] = replace(stage, **{name: watched(getattr(stage, name), devices) for name in names})
    step(state, batch, key=key)
    return most


def compare_memory(rows: list[dict[str, Any]], wanted: str | None) -> None:
    import gc

    import jax

    from jaxtrain.planner.cost import peak_bytes

    for name, model, mesh, data in HOLDING:
        if wanted is not None and wanted != name:
            continue
        predicted = peak_bytes(facts_of(model, mesh, **data))
        gc.collect()
        measured = measured_peak(make_program(model, mesh, **data))
        row = {"network": model["name"], "strategy": name, "mesh": mesh, "predicted": predicted, "measured": measured,
               "device_reports": jax.devices()[0].memory_stats(), "error": predicted / measured - 1}  # fmt: skip
        rows[:] = [one for one in rows if (one["network"], one["strategy"]) != (row["network"], name)] + [row]
        print(f"  {model['name']:9} {name:22} predicted {predicted / 1e6:9.3f} MB, held {measured / 1e6:9.3f} MB, "
              f"{row['error']:+.1%}", flush=True)  # fmt: skip
        keep_rows(rows, "memory")


PLACE = OUT / "planner-bytes.json"
"""What was measured so far, so that an interruption loses one strategy."""


def keep_rows(rows: list[dict[str, Any]], part: str = "bytes") -> None:
    document = json.loads(PLACE.read_text()) if PLACE.exists() else {}
    PLACE.parent.mkdir(exist_ok=True)
    PLACE.write_text(json.dumps(document | {part: rows}, indent=1, ensure_ascii=False) + "\n")


def published(*starts: str) -> list[Row]:
    """The rows of the result file whose names start with one of some words."""
    place = RESULTS / "planner-bytes-full.json"
    rows = json.loads(place.read_text())["rows"] if place.exists() else []
    names = [one.name for one in fields(Row)]
    return [Row(**{name: row[name] for name in names if name in row}) for row in rows if row["name"].startswith(starts)]


def publish_kept() -> bool:
    """Publish all that is kept: errors of the bytes with headers and of the payload alone, and of the memory.

    Rows of a part that is not kept here stay as they were published.
    """
    known = json.loads(PLACE.read_text())
    rows = [] if known.get("bytes") else published("bytes of a step", "payload alone")
    for one in known.get("bytes", []):
        name = f"{one['network']}, {one['strategy']}"
        bare = one["payload"] / one["measured"] - 1
        note = f"predicted {one['predicted']:.0f}, carried {one['measured']:.0f} bytes in {one['packets']:.0f} packets"
        rows.append(Row(f"bytes of a step, {name}", abs(one["error"]), 0.05, at_most=True, note=note))
        rows.append(Row(f"payload alone beside what was carried, {name}", abs(bare), note=f"{bare:+.2%}"))
    rows += [] if known.get("memory") else published("memory, ")
    for one in known.get("memory", []):
        note = f"predicted {one['predicted']:.0f}, held {one['measured']:.0f} bytes"
        name = f"memory, {one['network']}, {one['strategy']}"
        rows.append(Row(name, abs(one["error"]), 0.05, at_most=True, note=note))
    return publish("planner-bytes", rows, full=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=("bytes", "memory", "lifted", "processes", "work"))
    parser.add_argument("--only", help="this strategy alone")
    parser.add_argument("--number", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part == "work":
        work(args.number)
        return 0
    if args.part in ("lifted", "processes"):
        if args.part == "lifted":
            lift_loopback()
        json.dump(run_processes(args.number), sys.stdout)
        return 0
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    known = json.loads(PLACE.read_text()) if PLACE.exists() else {}
    if args.part in (None, "bytes"):
        compare_bytes(known.get("bytes", []), args.only)
    if args.part in (None, "memory"):
        compare_memory(known.get("memory", []), args.only)
    return 0 if publish_kept() else 1


if __name__ == "__main__":
    sys.exit(main())
