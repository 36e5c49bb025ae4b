"""The training run, as one document: cube → windows → statistics → program → resume → steps → report.

    python -m jaxtrain.train CONFIG.toml --out RUN

A run is a folder (see `rundir`). The same call on the same folder continues where the newest undamaged checkpoint was
made, bit for bit on the same mesh: the state holds model and optimiser, and data order, augmentation and dropout are
functions of (seed, step).
"""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jaxtrain.best import Best
from jaxtrain.checkpoint import CheckpointStore, target_of
from jaxtrain.clock import Clock
from jaxtrain.config import TrainConfig
from jaxtrain.data.arrays import Rows
from jaxtrain.data.batches import BatchStream
from jaxtrain.data.order import SampleOrder
from jaxtrain.data.shuffle import ChunkOrder, chunk_numbers
from jaxtrain.data.windows import WindowPlan
from jaxtrain.evaluate import judge
from jaxtrain.incidents import Incidents
from jaxtrain.log import RunLog, read_metrics
from jaxtrain.parallel.mesh import batch_sharding
from jaxtrain.parallel.processes import Agreement, abandon
from jaxtrain.prepare import Source, check_same_run, open_source, prepare
from jaxtrain.repeat import programs_kept
from jaxtrain.report import collect_examples, write_report
from jaxtrain.rundir import LOCK_KEY, ModelCard, find_card, program_of, write_run
from jaxtrain.state import Program
from jaxtrain.step import make_eval_step, make_predict_step, make_train_step
from jaxtrain.track import check_trackers, start_trackers
from jaxtrain.watchdog import Watchdog
from zarr_store.errors import Preempted
from zarr_store.lock import CubeLock
from zarr_store.samples import SampleStore

__all__ = ["TrainEvent", "TrainResult", "train"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainEvent:
    """Progress of a run, for who watches it.

    Attributes:
        kind: start (data and network are known) · resume · step · validation · checkpoint · warning · done.
        step: Steps done.
        steps: Steps in all.
        message: One line of text.
        metrics: Numbers of a step or validation; facts of the run at the start.
    """

    kind: Literal["start", "resume", "step", "validation", "checkpoint", "warning", "done"]
    step: int
    steps: int
    message: str
    metrics: dict[str, Any]


OnEvent = Callable[[TrainEvent], None]


@dataclass(frozen=True)
class TrainResult:
    """What a run has come to.

    Attributes:
        run: The run directory.
        steps: Steps done in all.
        resumed_from: The step this call began at; 0 for a new run.
        train: Metrics of the last step.
        validation: loss, accuracy, macro_f1, miou (of values r2, rmse, mae, bias) and pixels of the last validation.
        windows: Windows of each part.
        parameters: Numbers that are learnt.
        seconds: Wall time of this call.
        samples_per_second: Windows per second of training in this call, reading included, without the first step
            (which compiles); None where this call took fewer than two steps.
        report: Path of the report.
        input_wait: Share of the training time that was spent waiting for batches; None as above.
        skipped_steps: Steps of the run whose loss was not finite, and which changed nothing.
        empty_batches: Steps of the run without one labelled pixel.
        quarantined_windows: Windows that this process found unreadable.
        best_step, best_score: The best validation by `run.monitor`, whose checkpoint is judged and used; None without.
        stopped_early: Whether `run.patience` ended the run before its last step.
    """

    run: str
    steps: int
    resumed_from: int
    train: dict[str, float]
    validation: dict[str, float | None]
    windows: dict[str, int]
    parameters: int
    seconds: float
    samples_per_second: float | None
    report: str
    input_wait: float | None = None
    skipped_steps: int = 0
    empty_batches: int = 0
    quarantined_windows: int = 0
    best_step: int | None = None
    best_score: float | None = None
    stopped_early: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


def train(config: TrainConfig, out: str | Path, *, resume: bool = True, on_event: OnEvent | None = None) -> TrainResult:
    """Train a network, or continue where an earlier call stopped.

    Args:
        config: The run. `config.data.cube` is opened as it is: who reads it from a file resolves it.
        out: The run directory: new, empty, or of the same run.
        resume: False refuses a folder that already holds a run.
        on_event: Called with each `TrainEvent`, in the thread of the caller; warnings also from threads that read.

    Of several processes, each calls this with the same arguments; one that fails lets the others know by ending.

    Raises:
        InvalidInput: Configuration, cube, mesh and folder do not fit together; a loss that is not finite.
        NothingFound: No window has anything to learn.
        Locked: Another process trains in this folder.
        Preempted: SIGTERM came; the state is saved and the same call continues.
        IntegrityError: All checkpoints are damaged, or a shard of the cube is.
        NoSpace: A checkpoint could not be saved; the one before is as it was.
    """
    try:
        return _train(config, out, resume, on_event)
    except Preempted:
        raise
    except BaseException as error:
        abandon(getattr(error, "exit_code", 130 if isinstance(error, KeyboardInterrupt) else 1))
        raise


def _train(config: TrainConfig, out: str | Path, resume: bool, on_event: OnEvent | None) -> TrainResult:
    began = time.monotonic()
    out, run = Path(out), config.run

    def tell(kind: Any, step: int, message: str, **metrics: Any) -> None:
        _log.info("%s", message)
        if on_event:
            on_event(TrainEvent(kind, step, run.steps, message, metrics))

    # ---- The folder: new, or of this very run. Nothing is written before everything is known to fit.
    earlier = find_card(out)
    if earlier is not None:
        check_same_run(out, earlier, config, resume)

    # ---- Cube → windows → statistics, all from the index where that is possible.
    source = open_source(config.data.cube)
    incidents = Incidents(out, run, process=jax.process_index(), on_warning=lambda line: tell("warning", 0, line))
    card, plan, reader = prepare(config, source, earlier, on_unreadable=incidents.unreadable)

    # ---- The network on the mesh.
    program = program_of(card, config)
    train_step, eval_step = make_train_step(program), make_eval_step(program)
    sharding = batch_sharding(program.mesh)
    parameters = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(program.shapes.params))
    lead = jax.process_index() == 0
    trackers = check_trackers(run.track) if lead else {}
    lock = CubeLock(out, "train", key=LOCK_KEY) if lead else contextlib.nullcontext()

    with lock, programs_kept(card.key), _watch_for_sigterm() as told_to_stop:
        if lead and earlier is None:
            write_run(out, card)
        tell("start", 0, _describe(card, plan, parameters, program), windows=plan.counts(), parameters=parameters)

        # ---- Resume: the newest checkpoint that is whole, on whatever mesh it was made.
        store = CheckpointStore(out / "checkpoints", keep=run.keep_checkpoints)
        store.clear_partial()
        restored = store.restore(target_of(program))
        first = 0 if restored is None else restored.step
        best = Best(run, {} if restored is None else restored.extra.get("best"))
        store.protected = best.step
        incidents.begin({} if restored is None else restored.extra.get("incidents", {}))
        for line in restored.passed_over if restored else ():
            tell("warning", first, line)
        if restored is None:
            state = program.init(jax.random.key(run.seed))
        else:
            state = program.of_saved(restored.state)
            tell("resume", first, f"continuing {out} from step {first} of {run.steps}")

        # ---- Steps: dispatch one, then read the numbers of the one before, so that the device never waits for Python.
        key = jax.random.key(np.uint32(run.seed % (1 << 32)) ^ np.uint32(0x5EED))
        order = _order(config, source, plan)
        size = run.batch_size
        reached, last_step = first, first if best.ended else run.steps
        last: dict[str, float] = {}
        judged: dict[str, Any] | None = None
        pending: tuple[int, Rows, dict[str, jax.Array], Any] | None = None
        clock, agreement, stopping = Clock(size), Agreement(program.mesh), False
        with (
            (_log_of(config, out, first, trackers) if lead else contextlib.nullcontext()) as log,
            Watchdog(run.hang_s, out / f"hang-{jax.process_index()}.txt") as watchdog,
            store.saving(),
            BatchStream(
                reader, plan.parts["train"], size=size, sharding=sharding, order=order, first=first, last=last_step,
                threads=run.read_threads, prefetch=run.prefetch, place=True,
            ) as batches,
        ):  # fmt: skip

            def settle(step: int, rows: Rows, metrics: dict[str, jax.Array], wish: Any) -> None:
                nonlocal last, stopping
                numbers = {name: float(value) for name, value in metrics.items() if name != "finite"}
                stopping = agreement.answer(wish)
                seconds, waited = clock.tick()
                finite = math.isfinite(numbers["loss"]) and math.isfinite(numbers["gradient_norm"])
                if finite:
                    last = numbers
                else:
                    incidents.not_finite(step, rows, numbers, store.steps())
                if not numbers["labelled"]:
                    incidents.no_labels(step, rows)
                if log:
                    shown = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
                    log.write("train", step, {**shown, "seconds": seconds, "input_wait_s": waited})
                if finite and (step % run.log_every == 0 or step == run.steps):
                    rate = clock.rate()
                    name = program.objective.score
                    tell("step", step, f"step {step}/{run.steps}: loss {last['loss']:.4f}, {name} "
                         f"{last[name]:.3f}{f', {rate:.0f} windows/s' if rate else ''}", **last,
                         samples_per_second=rate, input_wait=clock.input_wait())  # fmt: skip

            for number, rows, batch in clock.waiting(iter(batches)):
                step = reached = number + 1
                watchdog.beat(f"step {step}")
                store.check()
                state, metrics = train_step(state, batch, key=jax.random.fold_in(key, number))
                wish = agreement.ask(told_to_stop.is_set())
                if pending is not None:
                    settle(*pending)
                pending = (step, rows, metrics, wish)
                final = step == run.steps
                # alone, a process need not hear of its own wish from the others a step later
                stopping = stopping or (agreement.alone and told_to_stop.is_set())
                validating = final or step % run.evaluate_every == 0
                saving = final or stopping or step % run.checkpoint_every == 0
                if validating or saving:
                    leaving = stopping
                    settle(*pending)
                    pending, stopping = None, leaving or stopping

                # ---- Validation, on blocks that are not learnt.
                if validating and len(plan.parts["validation"]):
                    clock.pause()
                    watchdog.beat(f"validation at step {step}")
                    matrix, loss = judge(
                        program, eval_step, state, reader, plan.parts["validation"], card.classes.names,
                        on_batch=lambda done, _: watchdog.beat(f"validation batch {done}"),
                    )  # fmt: skip
                    judged = {**matrix.to_dict(), "split": "validation", "step": step,
                              "samples": len(plan.parts["validation"])}  # fmt: skip
                    scores = _scores(judged, loss)
                    if log:
                        log.write("validation", step, scores)
                    shown = ", ".join(f"{name} {_show(scores[name])}" for name in scores if name != "pixels")
                    improved = best.see(step, scores)
                    tell(
                        "validation",
                        step,
                        f"validation at step {step}: {shown}{' (best)' if improved else ''}",
                        **scores,
                    )
                    if improved:
                        store.protected = step
                    # the best is saved at once; so is what a run ends with, for the next call to find it ended
                    saving = saving or improved or best.ended

                # ---- Checkpoint: after the numbers were seen to be finite, never before; written in the background.
                if saving or stopping:
                    clock.pause()
                    watchdog.beat(f"checkpoint at step {step}")
                    store.begin(step, program.to_save(state), _position(config, card, step, incidents, best))
                    tell("checkpoint", step, f"checkpoint at step {step}")
                if best.ended:
                    break
                if stopping and not final:
                    store.wait()
                    raise Preempted(
                        f"told to stop: {out} is saved at step {step} of {run.steps}; the same command continues"
                    )

        # ---- What came out.
        report = out / "report.html"
        if lead and (judged or not report.exists()):
            aside = plan.parts["test"] if len(plan.parts["test"]) else plan.parts["validation"]
            examples = collect_examples(program, make_predict_step(program), state, reader, aside, card.classes.names)
            write_report(out, card, examples=examples, evaluation=judged)
        history = read_metrics(out)
        validations = [line for line in history if line["kind"] == "validation"]
        result = TrainResult(
            run=str(out),
            steps=reached,
            resumed_from=first,
            train=last or _numbers(next((line for line in reversed(history) if line["kind"] == "train"), {})),
            validation=_numbers(validations[-1]) if validations else {},
            windows=plan.counts(),
            parameters=parameters,
            seconds=round(time.monotonic() - began, 3),
            samples_per_second=clock.rate(),
            report=str(report),
            input_wait=clock.input_wait(),
            skipped_steps=incidents.skipped,
            empty_batches=incidents.empty,
            quarantined_windows=incidents.quarantined,
            best_step=best.step,
            best_score=best.value,
            stopped_early=best.ended and reached < run.steps,
        )
        early = f" of {run.steps}, as {run.monitor} did not improve further" if result.stopped_early else ""
        kept = "" if best.step is None else f"; best {run.monitor} {_show(best.value)} at step {best.step}"
        tell("done", result.steps, f"{out}: {result.steps} steps{early}{kept}; report: {report}", **result.validation)
        return result


def _log_of(config: TrainConfig, out: Path, first: int, trackers: dict[str, Any]) -> RunLog:
    started = start_trackers(trackers, out, config.model_dump(mode="json"))
    return RunLog(out, step=first, tensorboard_every=config.run.log_every, trackers=started)


def _order(config: TrainConfig, source: Source, plan: WindowPlan) -> SampleOrder | ChunkOrder:
    """Which window is the n-th sample of the run."""
    run, rows = config.run, plan.parts["train"].rows
    if run.shuffle == "windows" or not len(rows) or isinstance(source, SampleStore):
        return SampleOrder(run.seed, len(rows))
    first = source[0] if isinstance(source, tuple) else source
    chunk = first.spec(config.data.collection).layout.chunk
    return ChunkOrder(run.seed, chunk_numbers(rows, config.data.patch, chunk), run.batch_size, run.mixed_chunks)


def _position(config: TrainConfig, card: ModelCard, step: int, incidents: Incidents, best: Best) -> dict[str, Any]:
    """Where the data stands: the next sample of the global order."""
    return {
        "next_sample": step * config.run.batch_size,
        "seed": config.run.seed,
        "train_windows": card.windows["train"],
        "cube_digest": card.cube_digest,
        "config": config.model_dump(mode="json"),
        "incidents": incidents.to_dict(),
        "best": best.to_dict(),
    }


@contextlib.contextmanager
def _watch_for_sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, so that the step under way ends first; only a main thread may listen."""
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield told
        return
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        yield told
    finally:
        signal.signal(signal.SIGTERM, before)


def _describe(card: ModelCard, plan: WindowPlan, parameters: int, program: Program) -> str:
    windows = ", ".join(f"{count} {part}" for part, count in plan.counts().items())
    blocks = ", ".join(f"{count} {part}" for part, count in plan.split.counts().items())
    axes = " × ".join(f"{name} {size}" for name, size in program.mesh.shape.items())
    return (
        f"{card.config.model.name} with {parameters:,} parameters learns {_learnt(card)} from "
        f"{len(card.bands)} bands; windows: {windows}; blocks: {blocks}; mesh: {axes}"
    )


def _learnt(card: ModelCard) -> str:
    if card.task.rebuild:
        return "to give images back, without labels,"
    return f"values of {card.classes.names[0]}" if card.task.values else f"{len(card.classes)} classes"


def _scores(result: dict[str, Any], loss: float) -> dict[str, float | None]:
    names = ("r2", "rmse", "mae", "bias") if "rmse" in result else ("accuracy", "macro_f1", "miou")
    scores: dict[str, float | None] = {"loss": loss if math.isfinite(loss) else None}
    return scores | {name: result[name] for name in names} | {"pixels": result["pixels"]}


def _numbers(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in ("kind", "step", "seconds", "input_wait_s")}


def _show(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


if __name__ == "__main__":
    import sys

    from jaxtrain.script import main

    sys.exit(main())
