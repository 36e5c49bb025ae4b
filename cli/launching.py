"""Start the processes of a run, here or on Dask workers; `ingest.run.cluster` and `jaxtrain.launch` meet here."""

from __future__ import annotations

import itertools
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from cli.session import Session, speak
from jaxtrain.launch import LaunchConfig, OnLine, Outcome, Process, describe, first_cause, launch, restart_wanted
from zarr_store.errors import AccessError, InvalidInput

__all__ = ["run_launch"]

_POLL_S = 0.2
_GRACE_S = 30.0
_LAST_LINES_S = 10.0
_FORWARDED = ("XLA_FLAGS", "JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR", "TERRASHARD_HEARTBEAT_S")
"""Variables of the caller that decide how JAX computes; for all else a worker keeps its own environment."""


def run_launch(
    session: Session,
    words: Sequence[str],
    *,
    processes: int | None,
    dask: str | None,
    restarts: int,
    grace_s: float,
) -> int:
    """Run `terrashard WORDS` as several processes and return the exit code.

    Raises:
        InvalidInput: WORDS is not a training command, or neither a number nor a cluster is given.
        AccessError: The Dask cluster does not answer, or has too few workers.
    """
    words = list(words[1:] if words and words[0] == "terrashard" else words)
    if not words or words[0] != "train":
        raise InvalidInput(
            f"launch starts training runs, got {' '.join(words) or 'nothing'!r}: terrashard launch -n 2 -- train "
            "CONFIG.toml --out RUN"
        )
    if session.json and "--json" not in words:
        words.append("--json")
    said: list[str] = []
    show = _printer(session, raw="--json" in words, said=said)

    def on_restart(number: int, why: str) -> None:
        session.warn(f"{why}; all start again from the newest checkpoint (restart {number} of {restarts})")

    if dask is None:
        if processes is None:
            raise InvalidInput("give the number of processes with -n 2, or --dask ADDRESS for one on each worker")
        command = [sys.executable, "-P", "-m", "cli.main", *words]
        config = LaunchConfig(processes, restarts, grace_s)
        outcome = launch(command, config, on_line=show, on_restart=on_restart)
    else:
        outcome = _launch_on_dask(dask, words, processes, restarts, show, on_restart)
    if outcome.exit_code:
        session.fail(
            f"{describe(outcome.codes)}, after {outcome.restarts} restart(s); the same command continues from the "
            "newest checkpoint"
        )
    session.emit(
        {
            "exit_code": outcome.exit_code,
            "restarts": outcome.restarts,
            "codes": list(outcome.codes),
            "result": _document(said),
        }
    )
    return outcome.exit_code


def _printer(session: Session, *, raw: bool, said: list[str]) -> OnLine:
    """Return a function that shows lines with their process number; with --json, the first document is kept."""
    from zarr_store.printable import printable_json

    whole_lines = threading.Lock()

    def show(number: int, stream: str, line: str) -> None:
        with whole_lines:
            if raw and stream == "stdout":
                if number == 0:
                    said.append(line)
                    if not session.json:
                        sys.stdout.write(f"{printable_json(line)}\n")  # the first one's JSON, as it came
                return
            out = sys.stdout if stream == "stdout" and not session.json else sys.stderr
            speak(f"[{number}] {line}", out)

    return show


def _document(said: Sequence[str]) -> Any:
    """Return the JSON that a process wrote; Gloo, which connects processes, writes lines of its own before it."""
    try:
        return json.loads("\n".join(itertools.dropwhile(lambda line: line != "{", said)))
    except ValueError:
        return None


# ---- On the workers of a Dask cluster: one task holds one process.


def _launch_on_dask(
    address: str,
    words: Sequence[str],
    processes: int | None,
    restarts: int,
    show: OnLine,
    on_restart: Callable[[int, str], None],
) -> Outcome:
    from ingest.request.config import IngestConfig
    from ingest.run.cluster import open_cluster

    done = 0
    with open_cluster(IngestConfig(scheduler=address)) as client:
        while True:
            codes = _attempt_on_dask(client, words, processes, show)
            cause = first_cause(codes)
            if not restart_wanted(cause) or done == restarts:
                return Outcome(cause if cause >= 0 else 1, done, codes)
            done += 1
            on_restart(done, describe(codes))
            time.sleep(1.0)


def _attempt_on_dask(client: Any, words: Sequence[str], processes: int | None, show: OnLine) -> tuple[int, ...]:
    """Start all processes once; the first that fails ends the others. One worker holds one process."""
    import distributed

    wait: Callable[..., Any] = distributed.wait

    workers = sorted(client.scheduler_info(n_workers=-1)["workers"])
    wanted = len(workers) if processes is None else processes
    if not workers or wanted > len(workers):
        raise AccessError(
            f"{wanted or 'some'} processes need as many Dask workers, the cluster has {len(workers)}; start more, or "
            "give a smaller -n"
        )
    chosen = workers[:wanted]
    topic = f"terrashard-launch-{uuid.uuid4().hex[:12]}"
    coordinator = client.submit(_rendezvous, workers=[chosen[0]], allow_other_workers=False, pure=False).result()
    environment = {name: os.environ[name] for name in _FORWARDED if name in os.environ}
    environment |= {"TERRASHARD_COORDINATOR": coordinator, "TERRASHARD_PROCESSES": str(wanted)}
    with _lines_of(client, topic, show) as heard:
        futures = [
            client.submit(
                _hold_process, list(words), number, environment, topic, key=f"{topic}-{number}", workers=[worker],
                allow_other_workers=False, pure=False, retries=0, priority=100,
            )
            for number, worker in enumerate(chosen)
        ]  # fmt: skip
        codes: dict[int, int] = {}
        pending = set(futures)
        try:
            while pending and not any(codes.values()):
                ended, pending = wait(pending, return_when="FIRST_COMPLETED")
                for future in ended:
                    codes[futures.index(future)] = _code_of(future)
            # processes that report the cause themselves get a moment for it
            if pending:
                wait(pending, timeout=3.0)
        except TimeoutError:
            pass
        finally:
            client.cancel([future for future in futures if not future.done()])
        for number, future in enumerate(futures):
            if number not in codes:
                codes[number] = _code_of(future) if future.done() and not future.cancelled() else -15
        _hear_out(futures, heard)
    return tuple(codes[number] for number in range(wanted))


def _code_of(future: Any) -> int:
    """Return the exit code of the task; 1 where its worker died with it."""
    return int(future.result()[0]) if future.status == "finished" else 1


def _hear_out(futures: Sequence[Any], heard: Counter[int]) -> None:
    """Wait for the last lines of ended processes: they arrive separately from the result, and later."""
    told = {number: int(f.result()[1]) for number, f in enumerate(futures) if f.status == "finished"}
    until = time.monotonic() + _LAST_LINES_S
    while any(heard[number] < lines for number, lines in told.items()) and time.monotonic() < until:
        time.sleep(_POLL_S)


@contextmanager
def _lines_of(client: Any, topic: str, show: OnLine) -> Iterator[Counter[int]]:
    """Show the lines of the processes; yields how many lines of each have arrived."""
    heard: Counter[int] = Counter()

    def receive(event: tuple[float, Mapping[str, Any]]) -> None:
        _, line = event
        show(int(line["process"]), str(line["stream"]), str(line["text"]))
        heard[int(line["process"])] += 1

    client.subscribe_topic(topic, receive)
    try:
        yield heard
    finally:
        client.unsubscribe_topic(topic)


def _rendezvous() -> str:
    """Return the address of this worker, as the others see it, and a free port. Runs on the first worker."""
    from distributed import get_worker

    host = get_worker().address.rpartition("://")[2].rpartition(":")[0].strip("[]")
    with socket.socket() as probe:
        probe.bind((host, 0))
        return f"{host}:{probe.getsockname()[1]}"


def _hold_process(words: list[str], number: int, environment: dict[str, str], topic: str) -> tuple[int, int]:
    """Run one process to its end on a worker; return its exit code and how many lines it wrote.

    The process ends with the worker, and when the client cancels the task.
    """
    import distributed

    worker = distributed.get_worker()
    key = f"{topic}-{number}"
    leave_pool: Callable[[], None] = distributed.secede
    leave_pool()  # a task of hours is no measure of other tasks, and must not keep a thread of the pool from them

    counting = threading.Lock()
    lines = 0

    def on_line(process: int, stream: str, text: str) -> None:
        nonlocal lines
        with counting:
            lines += 1
        worker.log_event(topic, {"process": process, "stream": stream, "text": text})

    command = [sys.executable, "-P", "-m", "cli.main", *words]
    process = Process(command, number, environment | {"TERRASHARD_PROCESS": str(number)}, on_line)
    try:
        while process.code() is None:
            task = worker.state.tasks.get(key)
            if task is None or task.state not in ("executing", "long-running"):
                break
            time.sleep(_POLL_S)
        if process.code() is None:  # cancelled: it saves first, as after any SIGTERM
            process.stop()
            until = time.monotonic() + _GRACE_S
            while process.code() is None and time.monotonic() < until:
                time.sleep(_POLL_S)
    finally:
        process.stop(at_once=True)
        code = process.finish()
    return code, lines
