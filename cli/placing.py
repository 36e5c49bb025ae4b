"""Measure placements of a network in real processes, here or on the workers of a Dask cluster."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from cli.placement_tables import batch_table, measured_table, placement_table, placements_document
from cli.progress import Reporter
from cli.session import Session
from zarr_store.errors import AccessError, Preempted, TerrashardError

if TYPE_CHECKING:
    from jaxtrain.config import TrainConfig
    from jaxtrain.launching.places import Places
    from jaxtrain.launching.process import OnLine, Running
    from jaxtrain.planner.placements import Placed
    from jaxtrain.planner.profile import Profile
    from jaxtrain.planner.survey import Network

__all__ = ["measure_placements", "survey_branches"]

MOST_STEPS = 200
"""Steps that a measured placement trains at most, where the user names no epochs."""
_GRACE_S = 5.0
_FLAG = "--xla_force_host_platform_device_count"


def survey_branches(
    session: Session, network: Network, profile: Profile, *, measure: bool, dask: str | None, epochs: float | None
) -> None:
    """Compare the placements of a network with branches, and print and emit what was found.

    Args:
        session: The command.
        network: The run and its data.
        profile: The machine.
        measure: Whether to run each placement in real processes.
        dask: Address of a Dask scheduler on whose workers they run; None for this machine.
        epochs: Passes over the training part that each measured placement trains; None for one, or for `MOST_STEPS`
            steps where one has more.
    """
    from jaxtrain.planner.placements import survey_placements

    with Reporter(session, "survey", unit="programs") as progress:
        rows = survey_placements(network, profile, on_progress=progress.update)
    session.say_lines(placement_table(rows, network.windows))
    session.say_lines(batch_table(rows, network.windows))
    measured: dict[str, dict[str, Any]] = {}
    batch = network.config.run.batch_size
    if epochs is None:
        epochs = min(1.0, MOST_STEPS * batch / max(1, network.windows))
    if measure:
        placed = [row.placed for row in rows if row.facts is not None]
        digest = json.dumps(dict(network.card), sort_keys=True, default=str)
        measured = measure_placements(session, placed, dask=dask, epochs=epochs, data=digest)
        session.say_lines(measured_table(rows, measured, network.windows))
        steps = max(1, round(epochs * network.windows / batch)) if epochs else 0
        trained = f"{steps} steps of {batch} windows, with the same order and first weights"
        session.say(
            f"trained for {epochs:.3g} epoch(s), {trained}" if steps else "not trained (--epochs 0): no accuracy"
        )
    session.emit({
        "placements": placements_document(rows, network.windows, measured), "windows": network.windows,
        "batch_size": batch, "profile": profile.model_dump(mode="json"), "epochs": epochs if measure else None,
    })  # fmt: skip


def measure_placements(
    session: Session, placed: Sequence[Placed], *, dask: str | None = None, epochs: float = 1.0, data: str = ""
) -> dict[str, dict[str, Any]]:
    """Run placements with a process for each device, those with equally many devices in one start.

    Each row is kept once it is measured, so the same call continues after an interruption. If processes die, only the
    placement that they were measuring is lost: the others start again without it, and the next call tries it again.

    Args:
        session: The command.
        placed: The placements of a run; its data must be accessible to the processes.
        dask: Address of a Dask scheduler, on whose workers the processes run; None for this machine.
        epochs: Passes over the training part before the held-out part is scored.
        data: Description of the data: kept rows that were measured on other data are not used.

    Returns:
        What was measured, by the name of the placement.

    Raises:
        TerrashardError: The first processes failed; the message is the last line that they wrote. Later ones that fail
            have this reason in place of measurements.
        AccessError: The Dask cluster does not answer, or has no worker.
        Preempted: The command was stopped by SIGTERM.
    """
    from jaxtrain.planner.measured_rows import MeasuredRows

    kept = MeasuredRows({
        "epochs": epochs, "dask": dask or socket.gethostname(), "version": version("terrashard"), "data": data,
        "flags": os.environ.get("XLA_FLAGS", ""),
    })  # fmt: skip
    asked = {one.name: _request(one) for one in placed if one.candidate.config is not None}
    by_size: dict[int, list[Placed]] = defaultdict(list)
    found: dict[str, dict[str, Any]] = {}
    died: list[str] = []
    for one in placed:
        if one.name not in asked:
            continue
        by_size[one.devices].append(one)
        if (row := kept.take(asked[one.name])) is not None:
            found[one.name] = row
    if found:
        session.note(f"taken up from the measurement that was interrupted: {', '.join(found)}")
    with Reporter(session, "measure", unit="placements") as progress:

        def tell(name: str, row: dict[str, Any]) -> None:
            found[name] = row
            if "why_not" not in row:
                kept.keep(asked[name], row)
            progress.update(len(found), len(asked), name)

        for devices, several in sorted(by_size.items()):
            waiting = [one for one in several if one.name not in found]
            while waiting:
                progress.line(f"measuring {len(waiting)} placement(s) in {devices} process(es)")
                try:
                    for name, row in _measure(devices, waiting, dask, epochs, tell).items():
                        found.setdefault(name, row)
                except Preempted:
                    raise
                except TerrashardError as error:
                    if not any("why_not" not in row for row in found.values()):
                        raise
                    # rows took minutes and are kept; a cluster may have workers for the smaller placements only
                    left = [one for one in waiting if one.name not in found]
                    lost = left if isinstance(error, AccessError) else left[:1]
                    found |= {one.name: {"why_not": str(error)} for one in lost}
                    died += [] if isinstance(error, AccessError) else [one.name for one in lost]
                waiting = [one for one in waiting if one.name not in found]
    if died:
        session.warn(f"the processes of {' and of '.join(died)} died; the same command measures only what is missing")
    else:
        kept.forget()
    return found


def _request(one: Placed) -> dict[str, Any]:
    """Return the description of a placement that the processes get: its name and the configuration of the run."""
    assert one.candidate.config is not None
    config = _wherever(one.candidate.config)
    return {"name": one.name, "config": config.model_dump(mode="json", exclude_unset=True)}


def _measure(
    devices: int,
    several: Sequence[Placed],
    dask: str | None,
    epochs: float,
    tell: Callable[[str, dict[str, Any]], None],
) -> dict[str, dict[str, Any]]:
    """Measure placements on one number of devices; call `tell` with each row once all processes have measured it."""
    from jaxtrain.launch import LaunchConfig, launch_at
    from jaxtrain.launching.outcome import INTERRUPTED, PREEMPTED

    request = {"epochs": epochs, "placements": [_request(one) for one in several]}
    arguments = ["-P", "-m", "jaxtrain.planner.placement_measurer", json.dumps(request)]
    lines: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    last: dict[int, str] = {}
    telling = Lock()

    def on_line(number: int, stream: str, text: str) -> None:
        if stream == "stdout" and text.startswith("{"):
            line = json.loads(text)
            with telling:
                mine = lines[line["placement"]]
                mine[number] = line
                if len(mine) == devices:
                    tell(line["placement"], _together(list(mine.values())))
        elif text.strip():
            last[number] = text.strip()

    with _places(arguments, devices, dask) as places:
        # they have nothing to save when they are told to stop
        outcome = launch_at(places, LaunchConfig(devices, restarts=0, grace_s=_GRACE_S), on_line=on_line)
    if outcome.exit_code == INTERRUPTED:
        raise KeyboardInterrupt
    if outcome.exit_code == PREEMPTED:
        raise Preempted("stopped by SIGTERM; the same command continues with the placements that are missing")
    if outcome.exit_code:
        wrong = next((number for number, code in enumerate(outcome.codes) if code not in (0, None, -15)), 0)
        said = last.get(wrong) or next(iter(last.values()), "they wrote nothing")
        raise TerrashardError(f"placements on {devices} processes could not be measured: {said}")
    return {one.name: _together(list(lines[one.name].values())) for one in several}


def _wherever(config: TrainConfig) -> TrainConfig:
    """Return the configuration with absolute paths, as processes may start in another folder."""

    def whole(url: str) -> str:
        return url if not url or "://" in url else str(Path(url).absolute())

    cube, data = config.data.cube, config.data
    modalities = {
        name: one.model_copy(update={"cube": whole(one.cube)}) if one.cube else one
        for name, one in data.modalities.items()
    }
    cubes = whole(cube) if isinstance(cube, str) else tuple(whole(one) for one in cube)
    return config.model_copy(update={"data": data.model_copy(update={"cube": cubes, "modalities": modalities})})


@contextmanager
def _places(arguments: Sequence[str], devices: int, dask: str | None) -> Iterator[Places]:
    """Open places in which every process has one CPU device."""
    from jaxtrain.launching.places import ThisMachine

    if dask is None:
        yield _OneDeviceEach(ThisMachine([sys.executable, *arguments], devices))
        return
    from cli.dask_workers import dask_workers

    with dask_workers(dask, arguments, devices) as workers:
        yield _OneDeviceEach(workers)


class _OneDeviceEach:
    """Places in which every process sees one CPU device."""

    def __init__(self, inner: Places) -> None:
        self._inner = inner
        self.names = inner.names

    def meeting(self) -> str:
        """Return where the processes meet."""
        return self._inner.meeting()

    def start(self, number: int, environment: Mapping[str, str], on_line: OnLine) -> Running:
        """Start one process."""
        flags = [part for part in os.environ.get("XLA_FLAGS", "").split() if not part.startswith(_FLAG)]
        own = {"XLA_FLAGS": " ".join([*flags, f"{_FLAG}=1"]), "TERRASHARD_HEARTBEAT_S": "600"}
        return self._inner.start(number, {**own, **environment}, on_line)


def _together(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join the measurements of one placement: bytes once for each machine, times of the slowest process."""
    wrong = next((line["why_not"] for line in lines if "why_not" in line), None)
    if wrong is not None or not lines:
        return {"why_not": wrong or "it wrote nothing"}
    hosts = {line["host"]: line for line in lines}
    ordered = sorted(lines, key=lambda line: int(line["process"]))
    found: dict[str, Any] = dict(ordered[0])
    for name in ("bytes_step", "packets_step", "idle_bytes_s"):
        if name in found:
            found[name] = sum(line[name] for line in hosts.values())
    for name in ("step_s", "inference_s", "train_s"):
        if name in found:
            found[name] = max(line[name] for line in lines)
    found["busy"] = [line["busy"] for line in ordered]
    return {name: value for name, value in found.items() if name not in ("placement", "process", "host")}
