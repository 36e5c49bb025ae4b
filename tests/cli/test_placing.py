"""Measurements of placements: what the processes are asked, how their lines are joined, and the tables."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cli import placing
from cli.placement_tables import batch_table, measured_table, placement_table, placements_document
from cli.placing import measure_placements
from cli.session import Session
from jaxtrain.planner import measured_rows
from jaxtrain.planner.facts import HandOver
from jaxtrain.planner.placements import Placed, PlacementRow, list_placements
from tests.jaxtrain.planner.test_cost import exchange, facts, program
from tests.jaxtrain.planner.test_placements import config_of
from zarr_store.errors import AccessError, Preempted, TerrashardError

QUIET = Session(verbosity=-1)


def line_of(request: Mapping[str, Any], number: int, **more: Any) -> list[str]:
    """What process `number` prints for each placement of a request."""
    return [
        json.dumps({"placement": one["name"], "process": number, "host": f"host{number % 2}", "bytes_step": 100.0,
                    "packets_step": 2.0, "idle_bytes_s": 5.0, "step_s": 0.1 * (number + 1), "busy": 0.5 + number / 10,
                    "inference_s": 0.01, "accuracy": 0.9, "train_s": 2.0, "train_loss": 0.3, **more})
        for one in request["placements"]
    ]  # fmt: skip


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> list[tuple[int, dict[str, Any]]]:
    """Stands for the start of processes: each prints its lines, and a word of a library beside."""
    requests: list[tuple[int, dict[str, Any]]] = []

    @contextmanager
    def places(arguments: list[str], devices: int, dask: str | None) -> Iterator[Any]:
        if dask is not None and devices > 2:
            raise AccessError(f"{devices} processes need as many Dask workers, the cluster has 2; start more")
        yield SimpleNamespace(arguments=arguments)

    def launch_at(made: Any, config: Any, *, on_line: Any) -> Any:
        request = json.loads(made.arguments[-1])
        requests.append((config.processes, request))
        for number in range(config.processes):
            on_line(number, "stderr", "a library speaks")
            for text in line_of(request, number):
                on_line(number, "stdout", text)
        return SimpleNamespace(exit_code=0, codes=[0] * config.processes)

    monkeypatch.setattr(placing, "_places", places)
    monkeypatch.setattr("jaxtrain.launch.launch_at", launch_at)
    return requests


def test_placements_of_equally_many_devices_share_one_start(launched):
    placed = list_placements(config_of())
    found = measure_placements(QUIET, placed, epochs=0.5)
    assert [(devices, len(request["placements"])) for devices, request in launched] == [(1, 1), (2, 5), (3, 1), (4, 2)]
    assert all(request["epochs"] == 0.5 for _, request in launched)
    assert set(found) == {one.name for one in placed}
    three = found["branches, fusion apart"]
    # processes 0 and 2 share a machine, whose bytes count once; the slowest process decides
    assert (three["bytes_step"], three["packets_step"]) == (200.0, 4.0)
    assert three["step_s"] == pytest.approx(0.3)
    assert three["busy"] == pytest.approx([0.5, 0.6, 0.7])


def test_processes_find_the_data_from_any_folder(launched, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    modalities = {"s2": {"collection": "s2"}, "s1": {"cube": "other.zarr", "collection": "s1"}, "dem": {"layer": "dem"}}
    data = {"cube": "cube.zarr", "patch": 16, "modalities": modalities}
    measure_placements(QUIET, list_placements(config_of(data=data))[:1])
    asked = launched[0][1]["placements"][0]["config"]["data"]
    assert asked["cube"] == str(tmp_path / "cube.zarr")
    assert asked["modalities"]["s1"]["cube"] == str(tmp_path / "other.zarr")
    assert asked["modalities"]["s2"]["cube"] == ""
    measure_placements(QUIET, list_placements(config_of(data=data | {"cube": "s3://bucket/cube.zarr"}))[:1])
    assert launched[1][1]["placements"][0]["config"]["data"]["cube"] == "s3://bucket/cube.zarr"


def test_a_cluster_with_two_workers_measures_what_it_can(launched):
    placed = list_placements(config_of())
    found = measure_placements(QUIET, placed, dask="tcp://127.0.0.1:1")
    assert "need as many Dask workers, the cluster has 2" in found["branches, fusion apart"]["why_not"]
    assert found["layers in stages"]["accuracy"] == 0.9
    four = [one for one in placed if one.devices == 4]
    with pytest.raises(AccessError, match="4 processes need"):
        measure_placements(QUIET, four, dask="tcp://127.0.0.1:1")


def test_processes_that_fail_are_one_line(launched, monkeypatch):
    def launch_at(_places: Any, config: Any, *, on_line: Any) -> Any:
        on_line(1, "stderr", "error: no such cube")
        return SimpleNamespace(exit_code=5, codes=[-15, 5][: config.processes])

    monkeypatch.setattr("jaxtrain.launch.launch_at", launch_at)
    (placed,) = [one for one in list_placements(config_of()) if one.name == "filters split"]
    with pytest.raises(TerrashardError, match="placements on 2 processes could not be measured: error: no such cube"):
        measure_placements(QUIET, [placed])


def test_processes_that_fail_lose_nothing_of_what_was_measured(launched, monkeypatch):
    works = placing._measure

    def fails_with_three(devices: int, *others: Any) -> Any:
        if devices == 3:
            raise TerrashardError("placements on 3 processes could not be measured: killed")
        return works(devices, *others)

    monkeypatch.setattr(placing, "_measure", fails_with_three)
    found = measure_placements(QUIET, list_placements(config_of()))
    assert found["branches, fusion apart"] == {"why_not": "placements on 3 processes could not be measured: killed"}
    assert found["branches × filters"]["accuracy"] == found["one device"]["accuracy"] == 0.9


def test_a_placement_whose_processes_die_is_left_out_of_the_next_start(launched, own_cache, monkeypatch):
    from jaxtrain import launch

    works, asked = launch.launch_at, []

    def dies_at_the_second(made: Any, config: Any, *, on_line: Any) -> Any:
        request = json.loads(made.arguments[-1])
        names = [one["name"] for one in request["placements"]]
        asked.append(names)
        dies = config.processes == 2 and "layers in stages" in names
        for number in range(config.processes):
            for name, text in zip(names, line_of(request, number), strict=True):
                if dies and name == "layers in stages":
                    break
                on_line(number, "stdout", text)
        on_line(0, "stderr", "killed for its memory")
        return SimpleNamespace(exit_code=int(dies), codes=[int(dies)] * config.processes)

    monkeypatch.setattr("jaxtrain.launch.launch_at", dies_at_the_second)
    found = measure_placements(QUIET, list_placements(config_of()))
    two = [names for names in asked if "filters split" in names]
    assert [names[0] for names in two] == ["data parallel", "filters split"]
    assert "layers in stages" not in two[1]
    assert found["layers in stages"]["why_not"].endswith("could not be measured: killed for its memory")
    assert sum("why_not" in row for row in found.values()) == 1
    # the same measurement tries it again, and nothing else
    asked.clear()
    monkeypatch.setattr("jaxtrain.launch.launch_at", works)
    again = measure_placements(QUIET, list_placements(config_of()))
    assert [[one["name"] for one in request["placements"]] for _, request in launched] == [["layers in stages"]]
    assert again["layers in stages"]["accuracy"] == 0.9
    assert not list(own_cache.rglob("measured-*"))


def test_a_measurement_that_was_interrupted_is_taken_up_once(launched, own_cache, monkeypatch):
    from jaxtrain import launch

    works = launch.launch_at

    def told_to_stop(made: Any, config: Any, *, on_line: Any) -> Any:
        request = json.loads(made.arguments[-1])
        if config.processes == 1:
            return works(made, config, on_line=on_line)
        for number in range(config.processes):  # the first of them is complete, of the second one line is missing
            first, second, *_ = line_of(request, number)
            on_line(number, "stdout", first)
            if number == 0:
                on_line(number, "stdout", second)
        return SimpleNamespace(exit_code=75, codes=[75] * config.processes)

    placed = list_placements(config_of())
    monkeypatch.setattr("jaxtrain.launch.launch_at", told_to_stop)
    with pytest.raises(Preempted, match="the same command continues with the placements that are missing"):
        measure_placements(QUIET, placed, epochs=0.5)
    monkeypatch.setattr("jaxtrain.launch.launch_at", works)
    launched.clear()
    other = measure_placements(QUIET, placed, epochs=2)
    assert [(devices, len(request["placements"])) for devices, request in launched] == [(1, 1), (2, 5), (3, 1), (4, 2)]
    launched.clear()
    measure_placements(QUIET, placed, epochs=0.5, data="another cube at the same place")
    assert [(devices, len(request["placements"])) for devices, request in launched] == [(1, 1), (2, 5), (3, 1), (4, 2)]
    launched.clear()
    found = measure_placements(QUIET, placed, epochs=0.5)
    assert [(devices, len(request["placements"])) for devices, request in launched] == [(2, 4), (3, 1), (4, 2)]
    assert "data parallel" not in [one["name"] for one in launched[0][1]["placements"]]
    assert found == other
    # a table that is complete leaves nothing: the next measurement measures
    assert not list(own_cache.rglob("measured-*"))


def test_a_full_disk_costs_the_kept_rows_and_not_the_measurement(launched, own_cache, monkeypatch):
    written: list[Path] = []

    def full(path: Path, _: bytes) -> None:
        written.append(path)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(measured_rows, "write_file", full)
    found = measure_placements(QUIET, list_placements(config_of()))
    assert written, "nothing was kept: the test shows nothing"
    assert all("why_not" not in row for row in found.values())


def rows() -> list[PlacementRow]:
    made = {one.name: one for one in list_placements(config_of())}
    gradient = facts({"data": 2}, program(collectives=(exchange(("data",), 1e6, 2),)))
    handed = facts({"pipe": 2, "data": 1}, program(), program(stage=1), handovers=(HandOver(0, 1, 500_000),))
    return [
        PlacementRow(made["data parallel"], gradient, "", 0.02, (0.7,), 2e6, 0.0),
        PlacementRow(made["branches, fusion with s2"], handed, "", 0.01, (1.0, 0.8), 0.0, 125e3),
        PlacementRow(Placed("as configured", made["filters split"].candidate), None, "needs 16 devices"),
    ]


def test_the_predicted_table_has_a_line_for_each_placement_and_the_reasons_below():
    text = placement_table(rows(), 64)
    lines = {line.split("  ")[0].strip(): line.split() for line in text.splitlines()}
    assert lines["data parallel"][2:7] == ["2", "2.000", "16.000", "2.000", "0.0"]
    assert lines["branches, fusion with s2"][4:9] == ["2", "1.000", "8.000", "0.000", "125.0"]
    assert lines["branches, fusion with s2"][-4:] == ["100%", "80%", "0", "10.0"]
    assert "cannot be: as configured: needs 16 devices" in text


def test_the_measured_table_compares_bytes_with_their_headers():
    several = rows()
    told = several[1].to_dict()
    sent = told["bytes_step"] + told["header_bytes"]
    seen = {"bytes_step": sent / 1.02, "packets_step": 9.0, "step_s": 0.012, "busy": [0.9, 0.8], "inference_s": 0.004,
            "train_s": 3.0, "accuracy": 0.9494, "train_loss": 0.14265}  # fmt: skip
    measured: dict[str, dict[str, Any]] = {"branches, fusion with s2": seen, "data parallel": {"why_not": "too few"}}
    text = measured_table(several, measured, 64)
    assert "+2.0%" in text
    assert f"{8 * sent / 1.02 / 1e6:.3f}" in text  # of an epoch of eight steps
    assert "0.9494" in text
    assert "not measured: data parallel: too few" in text
    document = placements_document(several, 64, measured)
    assert document[1]["measured"] == seen
    assert document[1]["bytes_epoch"] == 8 * document[1]["bytes_step"]
    assert document[2] == {"placement": "as configured", "devices": 2, "why_not": "needs 16 devices",
                           "settings": document[2]["settings"]}  # fmt: skip
    assert json.loads(json.dumps(document)) == document


def test_the_batch_moves_the_bytes_of_data_parallel_and_not_those_of_branches():
    text = batch_table(rows(), 64)
    lines = {line.split("  ")[0].strip(): line.split() for line in text.splitlines()}
    assert text.splitlines()[1].split()[1:] == ["batch", "4", "batch", "8", "batch", "16", "batch", "32"]
    assert lines["data parallel"][2:] == ["32.000", "16.000", "8.000", "4.000"]
    assert lines["branches, fusion with s2"][4:] == ["8.000"] * 4
    document = placements_document(rows(), 64, {})
    assert document[0]["bytes_epoch_of_batch"] == {"4": 32e6, "8": 16e6, "16": 8e6, "32": 4e6}


def test_every_process_sees_one_device(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4 --xla_dump_to=x")
    started: list[Mapping[str, str]] = []
    inner = SimpleNamespace(names=["0"], meeting=lambda: "127.0.0.1:9",
                            start=lambda _number, environment, _on_line: started.append(environment))  # fmt: skip
    made = placing._OneDeviceEach(inner)
    made.start(0, {"TERRASHARD_PROCESS": "0"}, lambda *_: None)
    assert made.meeting() == "127.0.0.1:9"
    assert started[0]["XLA_FLAGS"].split() == ["--xla_dump_to=x", "--xla_force_host_platform_device_count=1"]
    assert started[0]["TERRASHARD_PROCESS"] == "0"
