"""Two equal replicas compared with ordinary data parallelism of two processes, in turns on the same two cores.

The sides differ in one thing at a time. The ordinary run computes its windows in one piece, and a replica in chunks of
8, which stay in the caches; so the ordinary run is measured in three ways:

- `whole`: as a user has it by default, a half of the batch at once;
- `accumulated`: with `optim.accumulate`, 8 windows at a time in each process; it adds up gradients over the network
  after each of them, since to accumulate is to join batches;
- `once`: the two programs of a replica, and one sum over the network a step by JAX's own collective. This is like for
  like: only the exchange, and the group around it, are not the same.

Rates of all turns are kept in `out/`, since a machine stays quiet for some minutes only.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from harness import OUT, Row
from hetero_crew import CHUNK, Crew, make_config, make_program, make_ready, rate

SIDES = {
    "whole": "as it is, a half of the batch at once",
    "accumulated": "in pieces of 8 by optim.accumulate",
    "once": "in pieces of 8, one sum a step by JAX's collective",
}
PROCESSES = 2
STEPS, WARM = 18, 6
FEW, FEW_WARM = 5, 1
"""Steps of `accumulated`, which adds up over the network so often that one takes seconds."""

Times = list[dict[str, float]]


def measure_ordinary(batch: int, turns: int, *, full: bool) -> list[Row]:
    """Measure some more turns; return the rows of all turns so far."""
    kept = OUT / f"hetero-ordinary-{'full' if full else 'quick'}.jsonl"
    with Crew("unet", PROCESSES, batch) as crew, data_parallel(batch) as ask:
        for _ in range(turns):
            steps = crew.run(range(PROCESSES), STEPS)
            waits = statistics.median(min(line["waiting"].values()) for line in steps[WARM:])
            found = {"replicas": rate(steps, batch, WARM)} | {side: ask(side) for side in SIDES}
            with kept.open("a") as file:
                file.write(json.dumps(found | {"waits": waits}) + "\n")
            print("  " + ", ".join(f"{name} {own:.0f}" for name, own in found.items()) + " windows/s", flush=True)
    return make_rows([json.loads(text) for text in kept.read_text().splitlines()], batch)


def make_rows(turns: list[dict[str, float]], batch: int) -> list[Row]:
    """Return the rows of all turns; sides of one turn ran one after the other, so ratios are taken turn by turn."""
    rows = []
    for side, what in SIDES.items():
        ratios = [turn["replicas"] / turn[side] for turn in turns]
        rates = "; ".join(f"{name} {', '.join(f'{turn[name]:.0f}' for turn in turns)}" for name in ("replicas", side))
        # in one piece it is another computation: no aim, as a figure far above 1 shows
        limit = None if side == "whole" else 0.99
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        rows.append(
            Row(f"1:1 beside ordinary data parallelism, {what}", statistics.median(ratios), limit,
                note=f"{len(turns)} turns, {spread}; windows/s: {rates}")
        )  # fmt: skip
    step_s = batch / statistics.median(turn["replicas"] for turn in turns)
    waits = statistics.median(turn["waits"] for turn in turns)
    rows.append(
        Row("1:1: part of a step in which the busiest replica waits", waits / step_s,
            note=f"{1000 * waits:.1f} of {1000 * step_s:.0f} ms: what overlap could save at most")
    )  # fmt: skip
    return rows


@contextmanager
def data_parallel(batch: int) -> Iterator[Callable[[str], float]]:
    """Start the processes of the ordinary run; yields what asks them for the windows a second of a side."""
    from jaxtrain.launching.places import free_port

    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1",
                   "JAX_COMPILATION_CACHE_DIR": str(OUT / "compiled")}  # fmt: skip
    address = f"127.0.0.1:{free_port()}"
    started = [
        subprocess.Popen([sys.executable, __file__, address, str(number), str(batch)], stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE, text=True, env=environment)
        for number in range(PROCESSES)
    ]  # fmt: skip

    def answers() -> list[str]:
        found = []
        for process in started:
            assert process.stdout is not None
            while not (line := process.stdout.readline()).startswith("> "):
                if not line:
                    raise RuntimeError("a process of the ordinary run has ended early")
            found.append(line[2:].strip())
        return found

    def ask(side: str) -> float:
        for process in started:
            assert process.stdin is not None
            process.stdin.write(side + "\n")
            process.stdin.flush()
        return float(answers()[0])

    try:
        answers()
        yield ask
    finally:
        for process in started:
            process.kill()
            process.wait()


class Ordinary:
    """One process of the ordinary run, with the same batches from memory as a replica, on a core of its own."""

    def __init__(self, address: str, number: int, batch: int) -> None:
        os.sched_setaffinity(0, {min(number, (os.cpu_count() or 1) - 1)})

        import jax

        # a process that waits for its turn, on a busy machine, is not dead
        jax.distributed.initialize(address, PROCESSES, number, heartbeat_timeout_seconds=600)
        self.number, self.batch, self.ready = number, batch, make_ready("unet")
        self.order = self.ready.order(None)
        self.sides = {
            "whole": self.make_side(batch, 1),
            "accumulated": self.make_side(PROCESSES * CHUNK, batch // (PROCESSES * CHUNK)),
            "once": self.make_once(),
        }

    def rows(self, step: int, part: int, parts: int) -> Any:
        """Return the windows of this process in one of the parts of a step: its parts are one half of the batch."""
        size = self.batch // PROCESSES // parts
        first = step * self.batch + (self.number * parts + part) * size
        return self.ready.plan.parts["train"].rows[self.order.indices(first, size)]

    def make_side(self, batch: int, every: int) -> Callable[[int], Times]:
        """Return the ordinary run in batches of which `every` make an update."""
        import jax

        from jaxtrain.config import TrainConfig
        from jaxtrain.data.arrays import put_batch
        from jaxtrain.learn.step import make_train_step
        from jaxtrain.parallel.mesh import batch_sharding

        values = make_config("unet", self.batch).model_dump(exclude_unset=True)
        values["run"] |= {"batch_size": batch, "steps": 1000 * every}
        values |= {"mesh": {"data": PROCESSES}, "hetero": {"enabled": False}, "optim": {"accumulate": every}}
        program = make_program(TrainConfig.model_validate(values))
        step, sharding = make_train_step(program), batch_sharding(program.mesh)

        def run(steps: int) -> Times:
            state, times, before = program.init(jax.random.key(0)), [], None
            for number in range(steps):
                for part in range(every):
                    key = jax.random.fold_in(jax.random.key(0), number * every + part)
                    arrays = put_batch(self.ready.reader.read(self.rows(number, part, every)), sharding, batch)
                    state, metrics = step(state, arrays, key=key)
                    # as in training: the metrics of the batch before are read once this one is under way
                    if before is not None:
                        float(before["loss"])
                    before = metrics
                assert before is not None
                float(before["loss"])
                before = None
                times.append({"at": time.time()})
            return times

        return run

    def make_once(self) -> Callable[[int], Times]:
        """Return the programs of a replica, whose sums JAX adds up once a step."""
        import jax
        import numpy as np
        from jax.sharding import Mesh, NamedSharding, PartitionSpec

        from jaxtrain.data.arrays import put_batch
        from jaxtrain.hetero.chunks import SUMS, make_chunk_programs
        from jaxtrain.parallel.mesh import batch_sharding, make_mesh

        config = make_config("unet", self.batch)
        program = make_program(config, make_mesh(config.mesh, jax.local_devices()[:1]))
        programs, sharding = make_chunk_programs(program), batch_sharding(program.mesh)
        everybody = Mesh(np.array(jax.devices()), ("process",))
        split = NamedSharding(everybody, PartitionSpec("process"))
        add_up = jax.jit(lambda all: all.sum(axis=0), out_shardings=NamedSharding(everybody, PartitionSpec()))
        chunks = self.batch // CHUNK
        own = chunks // PROCESSES

        def everywhere(values: np.ndarray) -> np.ndarray:
            """Return the sum of the values of all processes."""
            placed = jax.make_array_from_process_local_data(split, values[None])
            return np.asarray(add_up(placed).addressable_data(0))

        def run(steps: int) -> Times:
            state, vector, times = program.init(jax.random.key(0)), programs.zeros(), []
            for number in range(steps):
                key, sums, before = jax.random.fold_in(jax.random.key(0), number), np.zeros(len(SUMS)), None
                for part in range(own):
                    read = self.ready.reader.read(self.rows(number, part, own))
                    chunk = put_batch(read, sharding, CHUNK)
                    vector, found = programs.add_chunk(
                        vector, state, chunk, key=key, number=self.number * own + part, first=part == 0
                    )
                    # as a replica does it: the next chunk is under way before the one before is waited for
                    if before is not None:
                        sums += [float(before[name]) for name in SUMS]
                    before = found
                assert before is not None
                sums += [float(before[name]) for name in SUMS]
                total = everywhere(np.array(vector))
                numbers = everywhere(sums.astype(np.float32))
                named = dict(zip(SUMS, map(float, numbers), strict=True))
                state, metrics = programs.apply(state, total, named, chunks)
                float(metrics["loss"])
                times.append({"at": time.time()})
            return times

        return run


def serve(address: str, number: int, batch: int) -> None:
    """Run the sides that are asked for on the standard input."""
    run = Ordinary(address, number, batch)
    for side in SIDES:
        run.sides[side](2)  # compiles
    print("> ready", flush=True)
    for text in sys.stdin:
        side = text.strip()
        steps, warm = (FEW, FEW_WARM) if side == "accumulated" else (STEPS, WARM)
        print(f"> {rate(run.sides[side](steps), batch, warm)}", flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
