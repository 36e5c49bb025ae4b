"""The processes that measure placements: `python -m jaxtrain.planner.placement_measurer REQUEST`.

Each process has one device and opens the data of the run itself, as in training. For every placement of the request the
processes take steps on one batch and read the counters of the network interfaces before and after, train for equal
epochs, score the held-out part and predict. Each prints one line of JSON for each placement.

What an interface carried in a step is the difference between a long and a short run divided by the steps between them,
less what it carries in the same time without training; so meeting and start cancel. The counters include the headers of
messages and packets (`framing`), and whatever else uses the interface.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtrain.config import TrainConfig
from jaxtrain.data.arrays import local_rows, put_batch
from jaxtrain.data.batches import BatchStream
from jaxtrain.data.opening import open_training_data
from jaxtrain.data.training_data import TrainingSet
from jaxtrain.evaluation.scores import score_windows
from jaxtrain.learn.optim import evaluation_params
from jaxtrain.learn.state import Program, TrainState
from jaxtrain.learn.step import EvalStep, TrainStep, make_eval_step, make_train_step
from jaxtrain.parallel.heap import keep_freed_memory
from jaxtrain.parallel.mesh import batch_sharding
from jaxtrain.parallel.processes import start_distributed, wait_for_all
from jaxtrain.prepare import prepare
from jaxtrain.runs.repeat import programs_kept
from jaxtrain.runs.rundir import ModelCard, program_of
from zarr_store.errors import TerrashardError

__all__ = ["count_traffic", "measure_placement", "time_steps"]

SHORT, LONG, IDLE_S, WARM = 2, 8, 2.0, 2


class Meter:
    """Counters of all interfaces of this machine, at moments when all processes stand still."""

    def __init__(self) -> None:
        self._last = (0, 0, 0.0, 0.0)

    def start(self) -> None:
        """Begin to count."""
        wait_for_all("before the count")
        self._last = (*_sent(), time.perf_counter(), time.process_time())
        wait_for_all("counted")

    def read(self) -> tuple[int, int, float, float]:
        """Return bytes and packets of the machine, seconds, and processor seconds of this process, since the start."""
        before = self._last
        own = time.process_time()
        wait_for_all("before the count")
        now = (*_sent(), time.perf_counter(), own)
        wait_for_all("counted")
        self._last = (*_sent(), time.perf_counter(), time.process_time())
        return now[0] - before[0], now[1] - before[1], now[2] - before[2], now[3] - before[3]


def _sent() -> tuple[int, int]:
    """Return the bytes and packets that the interfaces of this machine have sent; zeros where none are counted."""
    size = packets = 0
    table = Path("/proc/net/dev")
    for line in table.read_text(encoding="ascii").splitlines()[2:] if table.exists() else ():
        numbers = line.partition(":")[2].split()
        size, packets = size + int(numbers[8]), packets + int(numbers[9])
    return size, packets


def measure_placement(
    card: ModelCard, ready: TrainingSet, config: TrainConfig, *, epochs: float, traffic: bool = True
) -> dict[str, Any]:
    """Measure one placement, together with the other processes of the run.

    Args:
        card: Description of the run.
        ready: Its data.
        config: The run with the placement.
        epochs: Passes over the training part before the held-out part is scored; 0 scores nothing.
        traffic: Whether to count what the interfaces carry.
    """
    program = program_of(card, config)
    step, evaluate = make_train_step(program), make_eval_step(program)
    state, key, batch = program.init(jax.random.key(0)), jax.random.key(1), _first_batch(program, ready)
    found: dict[str, Any] = {}
    if program.layout is None:  # a pipeline does the same by itself
        _compile(step, evaluate, state, batch, key)

    def train(steps: int) -> float:
        nonlocal state
        state, seconds = time_steps(step, state, batch, key, steps)
        return seconds

    train(WARM)
    if traffic:
        found |= count_traffic(train)
    wait_for_all("steps are timed")
    before = time.process_time()
    seconds = train(LONG)
    found |= {"step_s": seconds / LONG, "busy": (time.process_time() - before) / seconds}
    found["inference_s"] = _inference(evaluate, state, batch)
    if epochs:
        found |= _accuracy(card, ready, config, program, (step, evaluate), epochs)
    return found


def _compile(step: TrainStep, evaluate: EvalStep, state: TrainState, batch: Mapping[str, Any], key: jax.Array) -> None:
    """Compile both programs, and wait until all processes have done so.

    One process may take longer than another, and the link between them (Gloo: 30 s) gives up.
    """
    step.jitted.lower(state, {name: batch[name] for name in step.names or batch}, key).compile()
    given = {name: batch[name] for name in evaluate.names or batch}
    evaluate.jitted.lower(evaluation_params(state.params, state.opt_state), state.model_state, given).compile()
    wait_for_all("the programs of a placement are compiled")


def time_steps(
    step: Any, state: TrainState, batch: Mapping[str, Any], key: jax.Array, steps: int
) -> tuple[TrainState, float]:
    """Take steps on one batch; return the state after them and the seconds that they took."""
    began = time.perf_counter()
    for number in range(steps):
        state, metrics = step(state, batch, key=jax.random.fold_in(key, number))
    _wait((jax.tree.leaves(state.params), metrics))
    return state, time.perf_counter() - began


def _wait(arrays: Any) -> None:
    wait: Callable[..., Any] = jax.block_until_ready
    wait(arrays)


def count_traffic(train: Callable[[int], float]) -> dict[str, Any]:
    """Return what all interfaces of this machine carry in a step, beyond what they carry without training.

    Args:
        train: Takes so many steps, together with the other processes of the run.
    """
    meter = Meter()
    meter.start()
    time.sleep(IDLE_S)
    idle = meter.read()
    seen = []
    for steps in (SHORT, LONG):
        train(steps)
        seen.append(meter.read())
    one, many = seen
    seconds = many[2] - one[2]
    sent = [(many[i] - one[i] - idle[i] / idle[2] * seconds) / (LONG - SHORT) for i in (0, 1)]
    return {"bytes_step": sent[0], "packets_step": sent[1], "idle_bytes_s": idle[0] / idle[2]}


def _first_batch(program: Program, ready: TrainingSet) -> dict[str, Any]:
    """Return the first windows of the training part as a batch of the program's mesh."""
    size, lies = program.config.run.batch_size, batch_sharding(program.mesh)
    rows = np.resize(ready.plan.parts["train"].rows, (size, *ready.plan.parts["train"].rows.shape[1:]))
    whole = ready.reader.read(rows)
    mine = local_rows(lies, size)
    return put_batch({name: array[mine] for name, array in whole.items()}, lies, size)


def _inference(evaluate: EvalStep, state: TrainState, batch: Mapping[str, Any]) -> float:
    """Return the seconds of the evaluation of one batch, the smallest of several."""
    _wait(evaluate(state, batch))
    seconds = []
    for _ in range(5):
        wait_for_all("inference is timed")
        began = time.perf_counter()
        _wait(evaluate(state, batch))
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _accuracy(
    card: ModelCard,
    ready: TrainingSet,
    config: TrainConfig,
    program: Program,
    programs: tuple[TrainStep, EvalStep],
    epochs: float,
) -> dict[str, Any]:
    """Train a new state for equal epochs, as a run does, and score the validation part, or the test part without."""
    run, windows, (step, evaluate) = config.run, ready.plan.parts["train"], programs
    steps = max(1, round(epochs * len(windows) / run.batch_size))
    state = program.init(jax.random.key(np.uint32(run.seed % (1 << 32))))
    key = jax.random.key(np.uint32(run.seed % (1 << 32)) ^ np.uint32(0x5EED))
    stream = BatchStream(
        ready.reader, windows, size=run.batch_size, sharding=batch_sharding(program.mesh), order=ready.order(run),
        first=0, last=steps, threads=run.read_threads, prefetch=run.prefetch, place=True,
    )  # fmt: skip
    wait_for_all("epochs begin")
    began = time.perf_counter()
    with stream.iterated() as batches:
        for number, _, batch in batches:
            state, metrics = step(state, batch, key=jax.random.fold_in(key, number))
        _wait(metrics)
    seconds = time.perf_counter() - began
    aside = ready.plan.parts["validation"] if len(ready.plan.parts["validation"]) else ready.plan.parts["test"]
    counts, loss = score_windows(program, evaluate, state, ready.reader, aside, card.classes.names)
    scores = counts.to_dict()
    return {"steps": steps, "train_s": seconds, "loss": loss, "train_loss": float(metrics["loss"]),
            **{name: scores[name] for name in ("accuracy", "miou", "r2", "rmse") if name in scores}}  # fmt: skip


def main(text: str) -> None:
    """Measure all placements of a request and print a line for each."""
    request = json.loads(text)
    keep_freed_memory()  # as a run of training does
    # whatever a library prints must not stand between the answers
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    start_distributed(timeout_s=300)
    first = TrainConfig.model_validate(request["placements"][0]["config"])
    card, ready = prepare(first, open_training_data(first.data.cube), None)
    place = {"process": jax.process_index(), "host": socket.gethostname()}
    with programs_kept(card.key):  # a measurement that is repeated, here or by workers, does not wait for the compiler
        for one in request["placements"]:
            config, line = TrainConfig.model_validate(one["config"]), {"placement": one["name"], **place}
            try:
                several = jax.process_count() > 1
                line |= measure_placement(card, ready, config, epochs=request["epochs"], traffic=several)
            except TerrashardError as error:
                line["why_not"] = str(error)
            out.write(json.dumps(line) + "\n")
            out.flush()
            forget: Callable[[], None] = jax.clear_caches
            forget()


if __name__ == "__main__":
    main(sys.argv[1])
