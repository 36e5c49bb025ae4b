"""Placements of a network with two branches: bytes sent, speed of branches that compute at once, and accuracy.

- `bytes`: two to four real processes on 127.0.0.1 train under each placement, in a network namespace of their own
  where the system allows it; the counters of the loopback interface are read as `planner_bytes.py` does, beside what
  the planner reads from the compiled programs.
- `speed`: two equal branches in one process and in two. Each process is bound to one core, as if it were a machine of
  its own; without that, one process computes on both cores.
- `accuracy`: equal batch and steps give equal networks under all placements; what differs is the number of updates in
  an epoch where each replica keeps its batch, and statistics of the batch that replicas do not share.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from harness import OUT, Row, publish
from planner_bytes import alone, lift_loopback

PLACE = OUT / "placements.json"
"""What was measured so far, so that an interruption loses one placement."""
PARTS = ("bytes", "speed", "accuracy")
"""Each is a result file of its own."""
S2, S1, CLASSES = 4, 2, 5
BRANCHES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "data parallel": ({"kind": "replicated", "parts": 2}, {}),
    "branches, fusion with s2": ({"kind": "branches", "groups": [["s2", "fusion"], ["s1"]]}, {}),
    "branches, fusion with s1": ({"kind": "branches", "groups": [["s2"], ["s1", "fusion"]]}, {}),
    "branches, fusion apart": ({"kind": "branches", "groups": [["s2"], ["s1"], ["fusion"]]}, {}),
    "layers in stages": ({"kind": "stages", "parts": 2}, {}),
    "filters split": ({"kind": "filters", "parts": 2}, {}),
    "branches × replicas": ({"kind": "branches", "groups": [["s2", "fusion"], ["s1"]]}, {"data": 2}),
}
AIM_BYTES, AIM_SPEED = 0.05, 1.5


# ---- A network and data, in memory


def make_program(
    placement: Mapping[str, Any], mesh: Mapping[str, Any], *, batch: int = 8, patch: int = 64, equal: bool = False,
    model: Mapping[str, Any] | None = None, optim: Mapping[str, Any] | None = None, devices: Any = None,
) -> Any:  # fmt: skip
    """The network of two modalities under a placement; `equal` gives both branches the same work."""
    import numpy as np

    from jaxtrain.config import TrainConfig
    from jaxtrain.learn.state import build_program
    from jaxtrain.models.modality import Modality
    from jaxtrain.parallel.mesh import make_mesh

    radar = S2 if equal else S1
    named = [f"b{i}" for i in range(S2)], [f"r{i}" for i in range(radar)]
    config = TrainConfig.model_validate({
        "data": {"cube": "none", "patch": patch, "augment": False, "modality_dropout": 0.0,
                 "modalities": {"s2": {"bands": named[0]}, "s1": {"collection": "s1", "bands": named[1]}}},
        "model": {"name": "multimodal", "width": 16, "depth": 2, "fusion": "late", **(model or {})},
        "optim": {"learning_rate": 3e-3, "warmup_steps": 5, **(optim or {})},
        "mesh": dict(mesh), "placement": dict(placement), "run": {"batch_size": batch, "steps": 400},
    })  # fmt: skip
    bands = S2 + radar
    return build_program(
        config, channels=bands, classes=CLASSES, mesh=make_mesh(config.mesh, devices), mean=np.full(bands, 2000.0),
        std=np.full(bands, 900.0), modalities=(Modality("s2", tuple(named[0])), Modality("s1", tuple(named[1]))),
    )  # fmt: skip


def make_data(count: int, patch: int, *, radar: int = S1, seed: int = 0, noise: float = 900.0) -> dict[str, Any]:
    """Windows of five classes: two look alike to one modality, two others to the other one."""
    import numpy as np

    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, CLASSES, (count, patch // 8, patch // 8))
    label = coarse.repeat(8, axis=1).repeat(8, axis=2).astype(np.uint8)
    fixed = np.random.default_rng(7)
    optical, backscatter = fixed.integers(800, 3800, (CLASSES, S2)), fixed.integers(800, 3800, (CLASSES, radar))
    optical[1], backscatter[3] = optical[0], backscatter[2]

    def seen(spectra: Any) -> Any:
        image = spectra[label] + rng.normal(0, noise, (*label.shape, spectra.shape[1]))
        return np.moveaxis(image.clip(1, 65535).astype(np.uint16), -1, 1)

    ones = np.ones(label.shape, np.uint8)
    return {"image_s2": seen(optical), "observed_s2": ones, "image_s1": seen(backscatter), "observed_s1": ones,
            "label": label}  # fmt: skip


def put(program: Any, arrays: Mapping[str, Any]) -> dict[str, Any]:
    from jaxtrain.data.arrays import local_rows, put_batch
    from jaxtrain.parallel.mesh import batch_sharding

    lies, size = batch_sharding(program.mesh), program.config.run.batch_size
    rows = local_rows(lies, size)
    return put_batch({name: array[rows] for name, array in arrays.items()}, lies, size)


# ---- Processes


def work(request: Mapping[str, Any]) -> None:
    """One of the processes: train under a placement; print what the interface carried and what a step took."""
    import jax

    from jaxtrain.learn.step import make_train_step
    from jaxtrain.parallel.processes import start_distributed, wait_for_all
    from jaxtrain.planner.placement_measurer import count_traffic, time_steps

    info = start_distributed(timeout_s=300)
    program = make_program(request["placement"], request["mesh"], batch=request["batch"], patch=request["patch"],
                           equal=request["equal"], model=request.get("model"))  # fmt: skip
    radar = S2 if request["equal"] else S1
    batch = put(program, make_data(request["batch"], request["patch"], radar=radar))
    step, state, key = make_train_step(program), program.init(jax.random.key(0)), jax.random.key(1)

    def train(steps: int) -> float:
        nonlocal state
        state, seconds = time_steps(step, state, batch, key, steps)
        return seconds

    train(2)
    found = count_traffic(train) if request["count"] else {}
    turns = []
    for _ in range(request["turns"]):
        wait_for_all("a turn begins")
        turns.append(train(request["steps"]) / request["steps"])
    if info.is_first:
        print(json.dumps(found | {"turns": turns}), flush=True)


def run_processes(processes: int, request: Mapping[str, Any], *, bound: bool = False, quick: bool = True) -> Any:
    """Run the processes of one placement, each on one device; with `bound` also each on a core of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = "--xla_force_host_platform_device_count=1" + (" --xla_backend_optimization_level=0" if quick else "")
    base = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "TERRASHARD_HEARTBEAT_S": "600"}
    if processes > 1:
        base |= {"TERRASHARD_COORDINATOR": f"127.0.0.1:{port}", "TERRASHARD_PROCESSES": str(processes)}
    cores = sorted(os.sched_getaffinity(0))
    started = []
    for i in range(processes):
        words = ["taskset", "-c", str(cores[i % len(cores)])] if bound else []
        own = {"TERRASHARD_PROCESS": str(i)} if processes > 1 else {}
        started.append(subprocess.Popen(
            [*words, sys.executable, __file__, "--part", "work", "--request", json.dumps(request)],
            env={**base, **own}, stdout=subprocess.PIPE, text=True,
        ))  # fmt: skip
    try:
        outputs = [one.communicate(timeout=900)[0] for one in started]
    finally:
        for one in started:
            one.kill()
            one.wait()
    if any(one.returncode for one in started):
        raise SystemExit(f"the processes ended with {[one.returncode for one in started]}")
    (line,) = [line for line in outputs[0].splitlines() if line.startswith("{")]
    return json.loads(line)


# ---- Bytes


def compare_bytes(kept: dict[str, Any], wanted: str | None) -> None:
    from jaxtrain.planner.collectives import Dialect
    from jaxtrain.planner.facts import compile_facts
    from jaxtrain.planner.framing import header_bytes
    from jaxtrain.planner.placements import sent_by_all

    words = alone()
    print(f"  {'a network namespace of their own' if words else 'the loopback interface that all programs share'}")
    for name, (placement, mesh) in BRANCHES.items():
        if wanted is not None and wanted != name:
            continue
        program = make_program(placement, mesh)
        facts = compile_facts(program, {}, Dialect())
        told = sent_by_all(facts) | {"headers": header_bytes(facts)}
        request = {"placement": placement, "mesh": mesh, "batch": 8, "patch": 64, "equal": False, "count": True,
                   "turns": 0, "steps": 1}  # fmt: skip
        command = [*words, sys.executable, __file__, "--part", "lifted" if words else "processes"]
        command += ["--request", json.dumps(request | {"processes": program.mesh.size})]
        seen = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
        total, sent = sum(told.values()), seen["bytes_step"]
        row = {"predicted": total, "by_kind": told, "measured": sent, "payload": total - told["headers"]}
        kept.setdefault("bytes", {})[name] = row | {"own_interface": bool(words)}
        print(
            f"  {name:26} predicted {total / 1e6:8.3f} MB, carried {sent / 1e6:8.3f} MB, {total / sent - 1:+.1%}; "
            f"payload alone {(total - told['headers']) / sent - 1:+.1%}",
            flush=True,
        )
        keep(kept)


# ---- Speed


def compare_speed(kept: dict[str, Any], batch: int, patch: int) -> None:
    """Two equal branches on two processes, and both on one."""
    model = {"width": 16, "depth": 2}
    base = {"mesh": {}, "batch": batch, "patch": patch, "equal": True, "count": False, "turns": 5, "steps": 4,
            "model": model}  # fmt: skip
    two = base | {"placement": {"kind": "branches", "groups": [["s2", "fusion"], ["s1"]]}}
    found: dict[str, Any] = {}
    for bound in (True, False):
        where = "one core each" if bound else "all cores"
        one_s, two_s = (
            statistics.median(run_processes(n, request, bound=bound, quick=False)["turns"])
            for n, request in ((1, base | {"placement": {}}), (2, two))
        )
        found[where] = {"one_s": one_s, "two_s": two_s, "ratio": one_s / two_s}
        print(f"  {where:14} one process {1e3 * one_s:7.1f} ms, two {1e3 * two_s:7.1f} ms: {one_s / two_s:.2f}×",
              flush=True)  # fmt: skip
        kept["speed"] = found
        keep(kept)


# ---- Accuracy


def learn(
    program: Any, steps: tuple[Any, Any], arrays: Mapping[str, Any], held: Mapping[str, Any], *, epochs: int, seed: int
) -> Any:
    """Train for some epochs; return updates, last loss and accuracy on the windows that were held out."""
    import jax
    import numpy as np

    size, count = program.config.run.batch_size, len(arrays["label"])
    (step, evaluate), state = steps, program.init(jax.random.key(seed))
    rng, updates, loss = np.random.default_rng(seed), 0, float("nan")
    for _ in range(epochs):
        order = rng.permutation(count)
        for first in range(0, count - size + 1, size):
            batch = {name: array[order[first : first + size]] for name, array in arrays.items()}
            state, metrics = step(state, batch, key=jax.random.key(updates))
            updates, loss = updates + 1, float(metrics["loss"])
    right = total = 0.0
    for first in range(0, len(held["label"]) - size + 1, size):
        sums = evaluate(state, {name: array[first : first + size] for name, array in held.items()})
        confusion = np.asarray(sums["confusion"], float)
        right, total = right + np.trace(confusion), total + confusion.sum()
    return {"updates": updates, "loss": loss, "accuracy": right / total}


def compare_accuracy(kept: dict[str, Any], epochs: int, seeds: int) -> None:
    """Equal batch and steps; equal batch of each replica; statistics of each replica."""
    from jaxtrain.learn.step import make_eval_step, make_train_step

    branches = {"kind": "branches", "groups": [["s2", "fusion"], ["s1"]]}
    runs: tuple[tuple[str, dict[str, Any], dict[str, Any], int, str], ...] = (
        ("one device, batch 8", {}, {}, 8, "group"),
        ("branches, batch 8", branches, {}, 8, "group"),
        ("layers in stages, batch 8", {"kind": "stages"}, {"microbatches": 2}, 8, "group"),
        ("4 replicas, batch 8 in all", {"kind": "replicated", "parts": 4}, {}, 8, "group"),
        ("4 replicas, batch 8 of each (32 in all)", {"kind": "replicated", "parts": 4}, {}, 32, "group"),
        ("one device, batch norm, batch 8", {}, {}, 8, "batch"),
        ("branches, batch norm, batch 8", branches, {}, 8, "batch"),
        ("4 replicas, norm over the batch of 8", {"kind": "replicated", "parts": 4}, {}, 8, "batch"),
        ("4 replicas, norm of the 2 windows of each", {"kind": "replicated", "parts": 4}, {}, 8, "local"),
    )
    arrays, held = make_data(256, 32, seed=1, noise=1500.0), make_data(128, 32, seed=2, noise=1500.0)
    for name, placement, mesh, batch, norm in runs:
        program = make_program(placement, mesh, batch=batch, patch=32, model={"width": 8, "depth": 1, "norm": norm})
        steps = make_train_step(program), make_eval_step(program)  # compiled once for all seeds
        found = [learn(program, steps, arrays, held, epochs=epochs, seed=seed) for seed in range(seeds)]
        scores = [one["accuracy"] for one in found]
        kept.setdefault("accuracy", {})[name] = {"updates": found[0]["updates"], "accuracy": scores,
                                                 "loss": [one["loss"] for one in found]}  # fmt: skip
        print(
            f"  {name:44} {found[0]['updates']:4d} updates, accuracy {statistics.mean(scores):.4f} "
            f"({', '.join(f'{score:.4f}' for score in scores)}), last loss {found[0]['loss']:.5f}",
            flush=True,
        )
        keep(kept)


def keep(kept: Mapping[str, Any]) -> None:
    PLACE.parent.mkdir(exist_ok=True)
    PLACE.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")


def figures(kept: Mapping[str, Any]) -> dict[str, list[Row]]:
    """Return the rows of each part."""
    rows = {}
    rows["bytes"] = [
        Row(f"bytes of {name}: prediction off by", abs(one["predicted"] / one["measured"] - 1), AIM_BYTES, at_most=True,
            note=f"predicted {one['predicted']:.0f}, carried {one['measured']:.0f} bytes; the payload alone "
                 f"{one['payload'] / one['measured'] - 1:+.1%}")
        for name, one in kept.get("bytes", {}).items()
    ]  # fmt: skip
    rows["speed"] = [
        Row(f"two equal branches on two processes, {where}", one["ratio"],
            AIM_SPEED if where == "one core each" else None, note="× one process")
        for where, one in kept.get("speed", {}).items()
    ]  # fmt: skip
    rows["accuracy"] = [
        Row(
            f"accuracy: {name}",
            statistics.mean(one["accuracy"]),
            note=f"{one['updates']} updates; "
            + ", ".join(f"{score:.4f}" for score in one["accuracy"])
            + f"; last loss {one['loss'][0]:.5f}",
        )
        for name, one in kept.get("accuracy", {}).items()
    ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--full", action="store_true", help="three seeds of the accuracy; else one")
    parser.add_argument("--part", choices=(*PARTS, "work", "lifted", "processes"))
    parser.add_argument("--only", help="only this placement")
    parser.add_argument("--request")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--patch", type=int, default=64)
    options = parser.parse_args()
    request = json.loads(options.request) if options.request else {}
    if options.part == "work":
        work(request)
        return
    if options.part in ("lifted", "processes"):
        if options.part == "lifted":
            lift_loopback()
        print(json.dumps(run_processes(request["processes"], request)))
        return
    # devices of one process for the planner's programs and for the accuracy
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
    kept = json.loads(PLACE.read_text()) if PLACE.exists() else {}
    parts = PARTS if options.part is None else (options.part,)
    if "bytes" in parts:
        compare_bytes(kept, options.only)
    if "speed" in parts:
        compare_speed(kept, options.batch, options.patch)
    if "accuracy" in parts:
        compare_accuracy(kept, options.epochs, 3 if options.full else 1)
    met = [publish(f"placements-{part}", figures(kept)[part], full=options.full) for part in parts]
    if not all(met):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
