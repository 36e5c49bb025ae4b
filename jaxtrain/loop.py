"""`train` is the training run as one document: data → program → resume → steps → report.

A run is a folder (see `rundir`). The same call on the same folder continues where the newest undamaged checkpoint was
made, bit for bit on the same mesh: the state holds model and optimiser, and data order, augmentation and dropout are
functions of (seed, step). How a step is settled, validated and saved is in `session.py`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtrain.config import TrainConfig
from jaxtrain.data.arrays import Rows
from jaxtrain.data.batches import BatchStream
from jaxtrain.data.keeping import Keeping, choose_keeping, keep_on_host
from jaxtrain.data.kept import KeptBatches
from jaxtrain.data.opening import open_training_data
from jaxtrain.data.training_data import TrainingData, TrainingSet
from jaxtrain.evaluation.own_data import find_moved
from jaxtrain.evaluation.report import collect_examples, write_report
from jaxtrain.hetero.chunks import make_chunk_programs
from jaxtrain.hetero.replica import Replica, expect_group, join_group
from jaxtrain.learn.state import Program, TrainState
from jaxtrain.learn.step import make_eval_step, make_predict_step, make_train_step
from jaxtrain.parallel.mesh import batch_sharding
from jaxtrain.parallel.processes import Agreement, abandon, peer_lost
from jaxtrain.prepare import absent_classes, check_same_run, dates_left_out, prepare
from jaxtrain.runs.checkpoint import CheckpointStore
from jaxtrain.runs.clock import Clock
from jaxtrain.runs.evaluations import read_evaluations
from jaxtrain.runs.events import OnEvent, Teller, TrainingResult
from jaxtrain.runs.incidents import Incidents, file_part
from jaxtrain.runs.log import read_metrics
from jaxtrain.runs.progress import show_steps
from jaxtrain.runs.repeat import programs_kept
from jaxtrain.runs.rundir import LOCK_KEY, ModelCard, clear_run, find_card, load_card, program_of, write_run
from jaxtrain.runs.track import check_trackers
from jaxtrain.runs.watchdog import Watchdog
from jaxtrain.session import Dispatched, TrainingSession, check_monitor, newest_step, rehearse, resume_run, show_score
from jaxtrain.shared import Sharing
from jaxtrain.writer import RunWriter
from zarr_store.errors import NotACube, Preempted
from zarr_store.lock import CubeLock

__all__ = ["train"]


def train(
    config: TrainConfig,
    out: str | PathLike[str],
    *,
    resume: bool = True,
    on_event: OnEvent | None = None,
    environment: Mapping[str, str] | None = None,
    progress: bool | None = None,
    shared: Sharing | None = None,
    report: bool = True,
    until: int | None = None,
) -> TrainingResult:
    """Train a network, or continue where an earlier call stopped.

    In a run of several processes each calls this with the same arguments; the others notice when one ends.

    Args:
        config: Settings of the run. `config.data.cube` is opened as it is; a relative path is relative to the
            working directory.
        out: The run directory: new, empty, or of the same run.
        resume: False refuses a folder that already holds a run.
        on_event: Called with each `TrainEvent`, in the thread of the caller; warnings also from threads that read.
        environment: Replaces `os.environ`, in which unequal replicas (`hetero.enabled`) find their group.
        progress: Whether to show a bar; None shows it in a terminal and in a notebook.
        shared: Data and compiled steps that this run shares with others of this process.
        report: Whether to write RUN/report.html.
        until: Step after which this call validates, saves and returns; None for the last step of the run. A run that
            has come further returns at once.

    Returns:
        Steps, metrics, validation scores, rates and the path of the report.

    Raises:
        InvalidInput: Configuration, cube, mesh and folder do not fit together; a loss that is not finite.
        NothingFound: No window has anything to learn.
        Locked: Another process trains in this folder.
        Preempted: SIGTERM came; the state is saved and the same call continues.
        IntegrityError: All checkpoints are damaged, or a shard of the cube is.
        NoSpace: A checkpoint could not be saved; the one before is as it was.
        AccessError: Another process of the run has ended.

    Example:
        >>> data = {"cube": "zagreb.zarr", "patch": 32, "classes": {"4": "vegetation", "6": "water"}}
        >>> data["split"] = {"block_m": 320}
        >>> small = {"model": {"width": 4, "depth": 1}, "run": {"steps": 2, "batch_size": 8}}
        >>> result = train(TrainConfig.model_validate({"data": data, **small}), "runs/first")
        >>> result.steps, result.windows["train"] > 0
        (2, True)
    """
    environment = os.environ if environment is None else environment
    try:
        try:
            with show_steps(progress, on_event) as tell:
                return _train(config, Path(out), resume, tell, environment, shared, report, until)
        except jax.errors.JaxRuntimeError as error:
            lost = peer_lost(error, Path(out))
            if lost is None:
                raise
            raise lost from error
    except Preempted:
        raise
    except BaseException as error:
        abandon(getattr(error, "exit_code", 130 if isinstance(error, KeyboardInterrupt) else 1))
        raise


def _train(
    config: TrainConfig, out: Path, resume: bool, on_event: OnEvent | None, environment: Mapping[str, str],
    shared: Sharing | None, report: bool, until: int | None,
) -> TrainingResult:  # fmt: skip
    began = time.monotonic()
    run, tell = config.run, Teller(config.run.steps, on_event)
    group = expect_group(environment) if config.hetero.enabled else None

    # ---- The folder: new, or of this very run. Nothing is written before everything is known to fit.
    earlier = find_card(out)
    if earlier is not None and not CheckpointStore(out / "checkpoints").steps():
        earlier = None  # nothing was learned, so nothing is lost: the run starts again, with what is asked for now
    if earlier is not None:
        check_same_run(out, earlier, config, resume)

    # ---- Data: windows and statistics, all from the training index where that is possible.
    data = _open_data(config, earlier, out) if shared is None else shared.open(config.data.cube)
    own_name = jax.process_index() if group is None else group.name
    incidents = Incidents(out, run, process=own_name, on_warning=lambda line: tell("warning", 0, line))
    card, ready = prepare(config, data, earlier, on_unreadable=incidents.unreadable)

    # ---- The network on the mesh.
    if shared is None:
        program = program_of(card, config)
        train_step, eval_step, new = make_train_step(program), make_eval_step(program), True
    else:
        parts = shared.parts_of(card, config)
        program, train_step, eval_step, new = parts.program, parts.train, parts.evaluate, parts.new
    parameters = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(program.shapes.params))
    check_monitor(config, program.objective.task, ready.plan.counts())
    if earlier is None and new:
        rehearse(program, train_step, eval_step, ready)
    keeping = choose_keeping(config, ready.reader, ready.plan.parts["train"].rows, program.mesh)
    keep = partial(keep_on_host, keeping, ready.reader, ready.plan.parts)
    ready = replace(
        ready, reader=keep() if shared is None or keeping.place != "host" else shared.kept(ready, config, keep)
    )
    if jax.process_index() == 0:
        check_trackers(run.track)

    with contextlib.ExitStack() as held, programs_kept(card.key), _watch_for_sigterm(shared) as told_to_stop:
        # ---- Unequal replicas wait here for each other; the one that leads writes for all.
        replica = None
        if group is not None:
            newest = newest_step(out, tell)
            programs = make_chunk_programs(program)
            replica = held.enter_context(join_group(group, config, ready, programs, out, state_step=newest))
        lead = jax.process_index() == 0 if replica is None else replica.leads
        tell.quiet = replica is not None and not lead
        if lead:
            held.enter_context(CubeLock(out, "train", key=LOCK_KEY))
        if lead and earlier is None:
            if CheckpointStore(out / "checkpoints").steps():  # another process trained here in the meantime
                check_same_run(out, load_card(out), config, resume)
            clear_run(out)
            write_run(out, card)
        tell("start", 0, _describe(card, ready, parameters, program, keeping), windows=ready.plan.counts(),
             parameters=parameters, cache=keeping.place)  # fmt: skip
        for line in (*absent_classes(card), *dates_left_out(card)) if lead and earlier is None else ():
            tell("warning", 0, line)

        # ---- Resume.
        resumed = resume_run(config, out, program, incidents, tell, replica)
        state, first = resumed.state, resumed.step
        last = first if resumed.best.ended else min(run.steps, until or run.steps)
        on_devices = None
        if keeping.place == "device" and first < last:
            on_devices = KeptBatches(ready.reader, ready.plan.parts["train"].rows, program.mesh)

        # ---- Steps: dispatch one, then read the numbers of the one before, so that the device never waits for Python.
        key = jax.random.key(np.uint32(run.seed % (1 << 32)) ^ np.uint32(0x5EED))
        pending: Dispatched | None = None
        with (
            Watchdog(run.hang_s, out / f"hang-{file_part(str(own_name))}.txt") as watchdog,
            resumed.store.saving(),
            _steps_of(config, ready, program, replica, on_devices, state, first, last) as steps,
        ):
            writer = RunWriter(config=config, out=out, card=card, store=resumed.store, best=resumed.best, tell=tell,
                               replica=replica, held=held)  # fmt: skip
            session = TrainingSession(
                config=config, out=out, card=card, ready=ready, program=program, eval_step=eval_step,
                store=resumed.store, best=resumed.best, incidents=incidents, tell=tell,
                clock=Clock(run.batch_size), agreement=Agreement(program.mesh), writer=writer, watchdog=watchdog,
                reached=first, replica=replica,
            )  # fmt: skip
            if lead:
                writer.lead(first)
            if replica is not None:
                replica.position = lambda: session.position(session.reached)
                replica.wishes_to_stop = told_to_stop.is_set
            with session.kept():
                # what the devices hold is not waited for: to dispatch it may wait for the step before, on a processor
                counted = replica is None and on_devices is None
                for number, rows, batch in session.clock.waiting(steps) if counted else steps:
                    step = number + 1
                    watchdog.beat(f"step {step}")
                    session.store.check()
                    if replica is None:
                        session.reached = step
                        state, metrics = train_step(state, batch, key=jax.random.fold_in(key, number))
                        wish = session.agreement.ask(told_to_stop.is_set())
                        if pending is not None:
                            session.settle(pending)
                        pending = Dispatched(step, rows, metrics, wish)
                        # a single process knows its own request to stop, without the others' answer a step later
                        session.stopping = session.stopping or (session.agreement.alone and told_to_stop.is_set())
                    else:
                        state = session.train_step(state, batch, rows, key=jax.random.fold_in(key, number))
                    final = step == last
                    validating = final or step % run.evaluate_every == 0
                    saving = final or session.stopping or step % run.checkpoint_every == 0
                    if pending is not None and (validating or saving):
                        session.settle_before_use(pending)
                        pending = None

                    # ---- Validation, on held-out blocks.
                    if validating and len(ready.plan.parts["validation"]):
                        saving = session.validate(step, state) or saving

                    # ---- Checkpoint: after the numbers were seen to be finite, never before.
                    if saving or session.stopping:
                        session.save(step, state)
                    if session.best.ended:
                        break
                    if session.stopping and not final:
                        session.leave(step)
                if replica is not None:
                    replica.finish(lambda: session.save_last(state))

        # ---- What came out.
        if report and writer.leads and (session.validation or not (out / "report.html").exists()):
            _write_report(session, state)
        result = _result(session, first, parameters, time.monotonic() - began)
        early = f" of {run.steps}, as {run.monitor} did not improve further" if result.stopped_early else ""
        best = session.best
        kept = "" if best.step is None else f"; best {run.monitor} {show_score(best.value)} at step {best.step}"
        written = f"; report: {result.report}" if report else ""
        tell("done", result.steps, f"{out}: {result.steps} steps{early}{kept}{written}",
             **result.validation)  # fmt: skip
        return result


def _steps_of(
    config: TrainConfig, ready: TrainingSet, program: Program, replica: Replica | None, on_devices: KeptBatches | None,
    state: TrainState, first: int, last: int,
) -> contextlib.AbstractContextManager[Iterator[tuple[int, Rows, Any]]]:  # fmt: skip
    """Return the steps of a run: whole batches, or the assignments of a replica, whose state newcomers may need."""
    if replica is not None:
        return contextlib.closing(replica.steps(state, first, last))
    run = config.run
    if on_devices is not None:
        return on_devices.iterated(ready.order(run), size=run.batch_size, first=first, last=last)
    stream = BatchStream(
        ready.reader, ready.plan.parts["train"], size=run.batch_size, sharding=batch_sharding(program.mesh),
        order=ready.order(run), first=first, last=last, threads=run.read_threads, prefetch=run.prefetch, place=True,
    )  # fmt: skip
    return stream.iterated()


def _open_data(config: TrainConfig, earlier: ModelCard | None, out: Path) -> TrainingData:
    """Open the data of the configuration; those of a run that continues also where they were moved together with it."""
    try:
        return open_training_data(config.data.cube)
    except NotACube:
        moved = None if earlier is None else find_moved(earlier, out)
        if moved is None:
            raise
        return moved


def _write_report(session: TrainingSession, state: TrainState) -> None:
    """Write RUN/report.html with examples of the test part, or of the validation part if there is no test part."""
    parts, program = session.ready.plan.parts, session.program
    aside = parts["test"] if len(parts["test"]) else parts["validation"]
    predict, names = make_predict_step(program), session.card.classes.names
    examples = collect_examples(program, predict, state, session.ready.reader, aside, names)
    write_report(
        session.out, session.card, examples=examples, evaluation=session.validation,
        evaluations=read_evaluations(session.out),
    )  # fmt: skip


def _result(session: TrainingSession, first: int, parameters: int, seconds: float) -> TrainingResult:
    history = read_metrics(session.out)
    steps = [line for line in history if line["kind"] == "train"]
    validations = [line for line in history if line["kind"] == "validation"]
    best, incidents, reached = session.best, session.incidents, session.reached
    return TrainingResult(
        run=str(session.out),
        steps=reached,
        resumed_from=first,
        train=session.last or (_numbers(steps[-1]) if steps else {}),
        validation=_numbers(validations[-1]) if validations else {},
        windows=session.ready.plan.counts(),
        parameters=parameters,
        seconds=round(seconds, 3),
        samples_per_second=session.clock.rate(),
        report=str(session.out / "report.html"),
        input_wait=session.clock.input_wait(),
        skipped_steps=incidents.skipped,
        empty_batches=incidents.empty,
        quarantined_windows=incidents.quarantined,
        best_step=best.step,
        best_score=best.value,
        stopped_early=best.ended and reached < session.config.run.steps,
        unit=session.card.unit,
        **session.shared_out(),
    )


@contextlib.contextmanager
def _watch_for_sigterm(shared: Sharing | None) -> Iterator[threading.Event]:
    """Yield an event that SIGTERM sets, so that the step under way ends first; only the main thread can listen."""
    stop_asked = threading.Event() if shared is None else shared.stop
    if threading.current_thread() is not threading.main_thread():
        yield stop_asked
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stop_asked.set())
    try:
        yield stop_asked
    finally:
        signal.signal(signal.SIGTERM, before)


def _describe(card: ModelCard, ready: TrainingSet, parameters: int, program: Program, keeping: Keeping) -> str:
    windows = ", ".join(f"{count} {part}" for part, count in ready.plan.counts().items())
    blocks = ", ".join(f"{count} {part}" for part, count in ready.plan.split.counts().items())
    axes = " × ".join(f"{name} {size}" for name, size in program.mesh.shape.items())
    return (
        f"{card.config.model.name} with {parameters:,} parameters learns {_learned(card)} from "
        f"{len(card.bands)} bands; {card.unit}: {windows}; blocks: {blocks}; mesh: {axes}{keeping.told}"
    )


def _learned(card: ModelCard) -> str:
    if card.task.rebuild:
        return "to give images back, without labels,"
    return f"values of {card.classes.names[0]}" if card.task.values else f"{len(card.classes)} classes"


def _numbers(line: dict[str, Any]) -> dict[str, Any]:
    others = ("kind", "step", "seconds", "input_wait_s", "shares", "rates", "waiting", "efficiency")
    return {name: value for name, value in line.items() if name not in others}
