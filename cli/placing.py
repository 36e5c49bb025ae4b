"""Measure placements of a network in real processes, here or on the workers of a Dask cluster, and print the tables."""

from __future__ import annotations

import io
import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.progress import Reporter
from cli.session import Session
from zarr_store.errors import TerrashardError

if TYPE_CHECKING:
    from jaxtrain.config import TrainConfig
    from jaxtrain.launching.places import Places
    from jaxtrain.launching.process import OnLine, Running
    from jaxtrain.planner.placements import Placed, PlacementRow
    from jaxtrain.planner.profile import Profile
    from jaxtrain.planner.survey import Network

__all__ = ["measure_placements", "measured_table", "placement_table", "placements_document", "survey_branches"]

WIDTH = 132
_FLAG = "--xla_force_host_platform_device_count"


def survey_branches(
    session: Session, network: Network, profile: Profile, *, measure: bool, dask: str | None, epochs: float
) -> None:
    """Compare the placements of a network with branches, and print and emit what was found.

    Args:
        session: The command.
        network: The run and its data.
        profile: The machine.
        measure: Whether to run each placement in real processes.
        dask: Address of a Dask scheduler on whose workers they run; None for this machine.
        epochs: Passes over the training part that each measured placement trains.
    """
    from jaxtrain.planner.placements import survey_placements

    with Reporter(session, "survey", unit="programs") as progress:
        rows = survey_placements(network, profile, on_progress=progress.update)
    session.say_lines(placement_table(rows, network.windows))
    measured: dict[str, dict[str, Any]] = {}
    if measure:
        placed = [row.placed for row in rows if row.facts is not None]
        measured = measure_placements(session, placed, dask=dask, epochs=epochs)
        session.say_lines(measured_table(rows, measured))
    session.emit({
        "placements": placements_document(rows, network.windows, measured), "windows": network.windows,
        "batch_size": network.config.run.batch_size, "profile": profile.model_dump(mode="json"),
    })  # fmt: skip


def measure_placements(
    session: Session, placed: Sequence[Placed], *, dask: str | None = None, epochs: float = 1.0
) -> dict[str, dict[str, Any]]:
    """Run placements with a process for each device, those with equally many devices in one start.

    Args:
        session: The command.
        placed: The placements of a run, which must find its data from where the processes run.
        dask: Address of a Dask scheduler, on whose workers the processes run; None for this machine.
        epochs: Passes over the training part before the held-out part is scored.

    Returns:
        What was measured, by the name of the placement.

    Raises:
        TerrashardError: The first processes failed; the message is the last line that they wrote. Later ones that fail
            have this reason in place of measurements.
        AccessError: The Dask cluster does not answer, or has no worker.
    """
    by_size: dict[int, list[Placed]] = defaultdict(list)
    for one in placed:
        if one.candidate.config is not None:
            by_size[one.devices].append(one)
    found: dict[str, dict[str, Any]] = {}
    for devices, several in sorted(by_size.items()):
        session.note(f"measuring {len(several)} placement(s) in {devices} process(es)")
        try:
            found |= _measure(devices, several, dask, epochs)
        except TerrashardError as error:
            if not found:
                raise
            # what was measured is worth its minutes; a cluster may have workers for the smaller placements only
            found |= {one.name: {"why_not": str(error)} for one in several}
    return found


def _measure(devices: int, several: Sequence[Placed], dask: str | None, epochs: float) -> dict[str, dict[str, Any]]:
    from jaxtrain.launch import LaunchConfig, launch_at

    request = {
        "epochs": epochs,
        "placements": [
            {"name": one.name, "config": _wherever(one.candidate.config).model_dump(mode="json", exclude_unset=True)}
            for one in several
            if one.candidate.config is not None
        ],
    }
    arguments = ["-P", "-m", "jaxtrain.planner.placement_measurer", json.dumps(request)]
    lines: dict[int, list[dict[str, Any]]] = defaultdict(list)
    last: dict[int, str] = {}

    def on_line(number: int, stream: str, text: str) -> None:
        if stream == "stdout" and text.startswith("{"):
            lines[number].append(json.loads(text))
        elif text.strip():
            last[number] = text.strip()

    with _places(arguments, devices, dask) as places:
        outcome = launch_at(places, LaunchConfig(devices, restarts=0), on_line=on_line)
    if outcome.exit_code:
        wrong = next((number for number, code in enumerate(outcome.codes) if code not in (0, None, -15)), 0)
        said = last.get(wrong) or next(iter(last.values()), "they wrote nothing")
        raise TerrashardError(f"placements on {devices} processes could not be measured: {said}")
    return {one.name: _together([line for mine in lines.values() for line in mine if line["placement"] == one.name])
            for one in several}  # fmt: skip


def _wherever(config: TrainConfig) -> TrainConfig:
    """Return the run with whole paths, as processes may start in another folder."""

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
    """Open places in which every process has one device of the processor."""
    from jaxtrain.launching.places import ThisMachine

    if dask is None:
        yield _OneDeviceEach(ThisMachine([sys.executable, *arguments], devices))
        return
    from cli.dask_workers import dask_workers

    with dask_workers(dask, arguments, devices) as workers:
        yield _OneDeviceEach(workers)


class _OneDeviceEach:
    """Places in which every process sees one device of the processor."""

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
    """Join what the processes of one placement measured: bytes once for each machine, the slowest process's times."""
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


# ---- Words


def placement_table(rows: Sequence[PlacementRow], windows: int) -> str:
    """Return what the planner says of each placement as a table.

    Args:
        rows: The placements.
        windows: Windows of an epoch.
    """
    lines, wrong = [], []
    for row in rows:
        values = row.to_dict()
        if "why_not" in values:
            wrong.append(f"cannot be: {row.placed.name}: {row.why_not}")
            continue
        steps = max(1, round(windows / values["batch"]))
        lines.append([
            row.placed.name, str(row.placed.devices), _mega(values["bytes_step"]), _mega(values["bytes_step"] * steps),
            _mega(values["bytes_fixed"]), _kilo(values["bytes_window"]),
            " ".join(f"{flops / 1e9:.2f}" for flops in values["flops_devices"]),
            " ".join(f"{share:.0%}" for share in values["busy_devices"]),
            f"{values['peak_bytes_device'] / 1e6:.0f}", f"{1e3 * values['predicted_step_s']:.1f}",
        ])  # fmt: skip
    names = ("placement", "devices", "MB/step", "MB/epoch", "of it fixed", "kB/window", "GFLOP of each", "busy",
             "peak MB", "step ms")  # fmt: skip
    return "\n".join([_drawn("placements, predicted", names, lines), *wrong])


def measured_table(rows: Sequence[PlacementRow], measured: Mapping[str, Mapping[str, Any]]) -> str:
    """Return what was measured of each placement as a table, with the planner's bytes beside it."""
    lines, wrong = [], []
    for row in rows:
        seen = measured.get(row.placed.name)
        if seen is None or "why_not" in seen:
            if seen is not None:
                wrong.append(f"not measured: {row.placed.name}: {seen['why_not']}")
            continue
        values = row.to_dict()
        told, sent = values["bytes_step"] + values["header_bytes"], seen.get("bytes_step")
        lines.append([
            row.placed.name, _mega(told), "" if sent is None else _mega(sent), _off(told, sent),
            f"{1e3 * seen['step_s']:.1f}", " ".join(f"{share:.0%}" for share in seen["busy"]),
            f"{1e3 * seen['inference_s']:.1f}", f"{seen['train_s']:.1f}" if "train_s" in seen else "",
            _score(seen), f"{seen['train_loss']:.5f}" if "train_loss" in seen else "",
        ])  # fmt: skip
    names = ("placement", "with headers", "carried", "off", "step ms", "processor", "inference ms",
             "epochs s", "accuracy", "last loss")  # fmt: skip
    return "\n".join([_drawn("placements, measured", names, lines), *wrong])


def placements_document(
    rows: Sequence[PlacementRow], windows: int, measured: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return predictions and measurements as JSON."""
    found = []
    for row in rows:
        one = row.to_dict()
        if "batch" in one:
            one["bytes_epoch"] = one["bytes_step"] * max(1, round(windows / one["batch"]))
        seen = measured.get(row.placed.name)
        found.append(one | ({} if seen is None else {"measured": dict(seen)}))
    return found


def _off(told: float, seen: float | None) -> str:
    return "" if not seen or not told else f"{told / seen - 1:+.1%}"


def _score(seen: Mapping[str, Any]) -> str:
    score = seen.get("accuracy", seen.get("r2"))
    return "" if score is None else f"{score:.4f}"


def _mega(size: float) -> str:
    return f"{size / 1e6:.3f}"


def _kilo(size: float) -> str:
    return f"{size / 1e3:.1f}"


def _drawn(title: str, names: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    from rich.console import Console
    from rich.table import Table

    made = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in names:
        made.add_column(name, justify="left" if name == "placement" else "right", no_wrap=name == "placement")
    for line in lines:
        made.add_row(*line)
    out = io.StringIO()
    Console(file=out, width=WIDTH, color_system=None).print(made)
    return out.getvalue().rstrip()
