"""A survey of a small network as it is typed, its choice, and what cannot be."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tomli_w

from cli.main import main
from jaxtrain.config import TrainConfig
from jaxtrain.parallel import processes
from jaxtrain.planner import children, choose, machine
from jaxtrain.planner.candidates import candidates, name_of, with_mesh
from jaxtrain.planner.page import write_page
from jaxtrain.planner.profile import Profile, read_profile
from jaxtrain.planner.survey import describe_network, survey_run
from jaxtrain.planner.words import gather_lines, table, verdict
from jaxtrain.settings import read_train_config
from zarr_store.errors import InvalidInput, TerrashardError

from ..cube_factory import make_cube, tiny_config

KEYS = {
    "mesh", "strategy", "fits", "why_not", "params_bytes_per_device", "optimizer_bytes_per_device",
    "activation_bytes_per_device", "peak_bytes_per_device", "flops_per_device", "flops_balance", "collective_bytes",
    "result_bytes", "bubble", "predicted_step_s", "compute_s", "memory_s", "collective_s", "measured_step_s",
}  # fmt: skip


@pytest.fixture(scope="module")
def typed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[int, str, str]]:
    """`typed(capfd, "--devices", "2")` is `terrashard survey CONFIG.toml --devices 2`; facts are kept between calls."""
    folder = tmp_path_factory.mktemp("survey")
    make_cube(folder / "cube.zarr")
    config = tiny_config(folder / "cube.zarr", model={"width": 4, "depth": 1}, run={"batch_size": 4})
    (folder / "run.toml").write_text(tomli_w.dumps(config.model_dump(mode="json", exclude_unset=True)))

    def run(capfd: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
            capfd.readouterr()
            code = main(["survey", str(folder / "run.toml"), *words])
        return (code, *capfd.readouterr())

    run.folder = folder  # type: ignore[attr-defined]  # where its files are
    return run


def test_a_survey_says_what_every_strategy_costs_and_which_to_take(
    typed: Any, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = typed.folder / "survey.html"
    code, out, err = typed(capfd, "--devices", "2", "--profile", "h100-ib", "--json", "--html", str(page))
    assert code == 0, err
    told = json.loads(out)
    assert {"strategies", "choice", "verdict", "profile", "calibration", "sensitivity"} <= set(told)
    rows = {row["strategy"]: row for row in told["strategies"] if row["predicted_step_s" if row["fits"] else "mesh"]}
    assert {"data", "zero-1", "zero-3", "filter", "spatial", "pipeline"} <= set(rows)
    for name, row in rows.items():
        assert set(row) >= KEYS, name
        parts = row["compute_s"] + row["memory_s"] + row["collective_s"] + row["idle_s"]
        if "pipeline" not in name:
            assert row["predicted_step_s"] == pytest.approx(parts), name
        assert row["peak_bytes_per_device"] >= row["params_bytes_per_device"] + row["optimizer_bytes_per_device"], name
        assert row["flops_balance"] >= 1
    gradient = rows["data"]["params_bytes_per_device"]
    assert gradient <= rows["data"]["collective_bytes"]["data"]["all-reduce"] <= gradient + 64  # 2 (n - 1) / n is 1
    assert "reduce-scatter" in rows["zero-1"]["collective_bytes"]["data"]
    assert "copy" in rows["pipeline"]["collective_bytes"]["pipe"]
    assert rows["filter"]["collective_bytes"]["model"]["all-reduce"] > gradient
    # what a processor's compiler made is beside what the target sends
    raw, zero = rows["zero-1"]["raw_bytes"]["data"], rows["zero-1"]["collective_bytes"]["data"]
    assert raw == pytest.approx(zero["all-gather"] + 2 * zero["reduce-scatter"] + zero.get("all-reduce", 0.0))
    assert rows["zero-1"]["corrected"] == ["all-reduce whose parts are kept"]
    assert rows["data"]["raw_bytes"]["data"] == rows["data"]["collective_bytes"]["data"]["all-reduce"]
    assert all(0 < row["efficiency"] < 1 for row in rows.values())
    for row in rows.values():  # all of them beside the same device
        alone = row["efficiency"] * row["predicted_step_s"]
        assert alone == pytest.approx(rows["data"]["efficiency"] * rows["data"]["predicted_step_s"])
    computing = rows["data"]["compute_s"] + rows["data"]["memory_s"]
    assert alone == pytest.approx(computing, rel=0.05), "a replica computes what one device alone would"
    best = min((row for row in rows.values() if row["fits"]), key=lambda row: row["predicted_step_s"])
    chosen = next(row for row in told["strategies"] if row["mesh"] == told["choice"])
    assert chosen["predicted_step_s"] <= best["predicted_step_s"] * 1.02
    assert told["verdict"].startswith("Take ")
    assert told["verdict"] in err
    text = page.read_text()
    assert "http://" not in text
    assert "https://" not in text
    assert text.count("data:image/png;base64,") == 4

    # what was compiled is kept, so the same survey again, and one for another machine, start no compiler
    monkeypatch.setattr(children, "_Compilers", lambda *_: pytest.fail("something was compiled again"))
    again = typed(capfd, "--devices", "2", "--profile", "a100")
    assert again[0] == 0, again[2]
    assert "step ms" in again[1]
    assert "raw MB" in again[1]
    assert "not as the programs were compiled here (raw MB): all-reduce whose parts are kept" in again[1]
    for word in ("raw, MB", "all-reduce whose parts are kept", "efficiency"):
        assert word in text


def test_a_gather_and_a_correction_are_named_in_the_table_the_verdict_the_page_and_the_document(
    typed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(typed.folder / "cache"))
    monkeypatch.setattr("jaxtrain.planner.survey.candidates", lambda config, devices: candidates(config, devices)[:2])
    network = describe_network(read_train_config([typed.folder / "run.toml"]))
    sound = survey_run(network, 2, read_profile("a100"))
    assert not any(gather_lines([row]) for row in sound.rows)
    assert "accidental" not in table(sound) + verdict(sound)
    row = next(row for row in sound.rows if row.corrected)
    assert row.facts is not None
    (program,) = row.facts.programs
    named = tuple(f"decoder/level{i}/conv1: f32[4,8,8,4] (jit(step)/sin)" for i in range(4))
    facts = replace(row.facts, programs=(replace(program, gathers=named),))
    bad = replace(sound, rows=(replace(row, facts=facts),))
    line = f"accidental gathers of data=2 zero=1: {'; '.join(named[:3])} and 1 more"
    assert line in table(bad).splitlines()
    assert line in verdict(bad)
    assert "MB as compiled here (all-reduce whose parts are kept)" in verdict(bad)
    assert line in html.unescape(write_page(tmp_path / "s.html", [bad]).read_text())
    (shown,) = bad.to_dict()["strategies"]
    assert shown["accidental_gathers"] == list(named)
    # of two rows whose names take two lines each, both keep the second line, though it is the same
    mesh = row.candidate.mesh.model_copy(update={"pipe": 2, "schedule": "interleaved"})
    config = row.candidate.config.model_copy(update={"mesh": mesh}) if row.candidate.config else None
    long = replace(row, candidate=replace(row.candidate, config=config))
    assert table(replace(sound, rows=(long, long))).count("schedule=interleaved") == 2
    # starting instructions costs the same for any number of windows
    assert "A larger run.batch_size would use the devices better: " in verdict(sound)


def test_curves_reach_to_machines_that_are_not_there(
    typed: Any, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # beside the curves, of all strategies for 1024 devices the plainest three, whose programs the curves need anyway
    monkeypatch.setattr("jaxtrain.planner.survey.candidates", lambda config, devices: candidates(config, devices)[:3])
    code, out, err = typed(capfd, "--devices", "1,1024", "--profile", "a100", "--scaling", "--json")
    assert code == 0, err
    curves = {curve["strategy"]: curve["points"] for curve in json.loads(out)["scaling"]}
    one, many = curves["data"]
    assert (one["devices"], one["efficiency"]) == (1, pytest.approx(1.0))
    assert (many["devices"], many["batch"]) == (1024, 1024 * one["batch"])
    assert 0 < many["efficiency"] < 1
    assert many["peak_bytes"] == pytest.approx(one["peak_bytes"], rel=0.2)
    assert curves["zero-1"][-1]["devices"] == 1024


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--profile", "h10"), r"no profile 'h10' \(nearest: h100\)"),
        (("--devices", "0"), "--devices must be whole numbers from 1"),
        (("--dask", "10.0.0.1"), "--dask 10.0.0.1: expected the address of a scheduler with its scheme"),
        (("--epochs", "-1"), "--epochs must be a number from 0, got -1.0"),
        (("--devices", "2,x"), "--devices must be whole numbers from 1"),
        (
            ("--devices", "11", "--profile", "l4"),
            r"no strategy fits 11 devices\. data: run\.batch_size 4 must",
        ),
        (("--devices", "2", "--profile", "l4", "--measure"), "--measure runs on this machine, and the profile is l4"),
        (("--set", "mesh=auto", "--set", "mesh.data=2"), "mesh is already 'auto'"),
    ],
)
def test_what_cannot_be_is_one_line(
    typed: Any, capfd: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    import re

    code, out, err = typed(capfd, *words)
    assert code == 2, out + err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert re.search(message, line), line


def test_a_number_that_nothing_fits_has_each_reason_once_and_what_would_fit(
    typed: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, err = typed(capfd, "--devices", "11", "--profile", "h100-ib", "--json")
    assert code == 2
    document = json.loads(out)
    assert document["choice"] is None
    assert all(not row["fits"] and row["why_not"] for row in document["strategies"])
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert document["verdict"] in line
    assert line.count("run.batch_size 4 must") == 1
    assert "(so zero-1, zero-3)" in line
    assert line.endswith("The batch of 4 is what 4 devices divide; 11 devices divide one of 11")
    # the other numbers of devices are answered all the same
    code, out, err = typed(capfd, "--devices", "2,11", "--profile", "h100-ib")
    assert code == 0
    assert "step ms" in out
    assert "error: no strategy fits 11 devices" in err


def test_devices_that_do_not_answer_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "SECONDS", 0.01)
    with pytest.raises(TerrashardError, match=r"no devices of this machine within 0\.01 s: give --devices"):
        machine.device_count()


def test_auto_takes_the_choice_and_says_why(typed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(typed.folder / "cache"))
    monkeypatch.setattr(choose, "device_count", lambda: 2)
    monkeypatch.setattr(choose, "this_machine", lambda _devices: read_profile("a100"))
    config = read_train_config([typed.folder / "run.toml"], ["mesh=auto"])
    assert config.mesh.auto
    told: list[str] = []
    chosen = choose.choose_mesh(config, told.append)
    assert chosen.mesh.size == 2
    assert not chosen.mesh.auto
    assert chosen.model_copy(update={"mesh": config.mesh}) == config
    (line,) = told
    assert line.startswith("mesh data=2")
    with pytest.raises(InvalidInput, match=r"mesh = 'auto' chooses the mesh, and mesh\.data is named too"):
        read_train_config([typed.folder / "run.toml"], ["mesh={auto = true, data = 2}"])


class _Coordinator:
    """What processes of a run leave for each other."""

    def __init__(self) -> None:
        self.kept: dict[str, str] = {}

    def key_value_set(self, name: str, value: str) -> None:
        assert name not in self.kept, "a name can be used once"
        self.kept[name] = value

    def blocking_key_value_get(self, name: str, _timeout_ms: int) -> str:
        return self.kept[name]


def test_of_several_processes_the_first_chooses_and_the_others_take_its_choice(
    typed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(typed.folder / "cache"))
    for name in [name for name in os.environ if name.startswith("TERRASHARD_PROCESS")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    asked: list[tuple[int, int]] = []

    def measured(devices: int, *, processes: int = 1) -> Profile:
        asked.append((devices, processes))
        return read_profile("a100")

    monkeypatch.setattr(choose, "this_machine", measured)
    monkeypatch.setattr(choose, "local_gpus", lambda *_: None)
    monkeypatch.setattr("jax.distributed.is_initialized", lambda: True)
    config = read_train_config([typed.folder / "run.toml"], ["mesh=auto"])

    def process(number: int, coordinator: _Coordinator, config: TrainConfig) -> tuple[TrainConfig, str]:
        state = SimpleNamespace(client=coordinator, process_id=number, num_processes=2)
        monkeypatch.setattr(choose, "global_state", state)
        monkeypatch.setattr(processes, "global_state", state)
        told: list[str] = []
        return choose.choose_mesh(config, told.append), told[0]

    meeting = _Coordinator()
    first, line = process(0, meeting, config)
    assert asked == [(2, 2)], "two devices, each in a process of its own"
    assert first.mesh.size == 2
    assert line.startswith("mesh data=2")
    with monkeypatch.context() as patch:
        patch.setattr(choose, "survey_run", lambda *_: pytest.fail("only the first process compares strategies"))
        assert process(1, meeting, config) == (first, line)

    # what is wrong for the first is wrong for all
    odd = config.model_copy(update={"run": config.run.model_copy(update={"batch_size": 3})})
    meeting = _Coordinator()
    monkeypatch.setattr(choose, "survey_run", lambda *_: (_ for _ in ()).throw(InvalidInput("no strategy fits")))
    with pytest.raises(InvalidInput, match="no strategy fits"):
        process(0, meeting, odd)
    with pytest.raises(InvalidInput, match="process 0 has no choice of a mesh: no strategy fits"):
        process(1, meeting, odd)


def test_a_network_that_fits_no_device_names_what_is_missing(typed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(typed.folder / "cache"))
    profile = read_profile("a100")
    tiny = profile.model_copy(update={"device": profile.device.model_copy(update={"memory": 1000.0})})
    monkeypatch.setattr("jaxtrain.planner.survey.candidates", lambda config, devices: candidates(config, devices)[:2])
    survey = survey_run(describe_network(read_train_config([typed.folder / "run.toml"])), 2, tiny)
    assert survey.choice is None
    assert all(not row.fits for row in survey.rows)
    assert any("GB too much" in row.why_not for row in survey.rows)
    assert any("remat" in row.candidate.strategy for row in survey.rows), "computing again was tried"


def test_candidates_are_named_and_each_is_possible_or_says_why() -> None:
    config = TrainConfig.model_validate({"data": {"cube": "x"}, "run": {"batch_size": 16}})
    found = candidates(config, 8)
    names = [one.strategy for one in found]
    assert names[:3] == ["data", "zero-1", "zero-3"]
    assert {"spatial", "data+spatial", "data+filter", "data+pipeline", "data+spatial+filter"} <= set(names)
    assert all((one.config is None) == bool(one.why_not) for one in found)
    assert all(one.config is None or one.mesh.size == 8 for one in found)
    many = candidates(TrainConfig.model_validate({"data": {"cube": "x"}, "run": {"batch_size": 1024}}), 1024)
    assert {"data", "zero-3", "data+spatial", "data+filter", "data+pipeline"} <= {one.strategy for one in many}
    assert all((one.config is None) == bool(one.why_not) for one in many)
    assert all(one.config is None or one.mesh.size == 1024 for one in many)
    assert name_of({"data": 2, "pipe": 2, "schedule": "1f1b"}) == "data+pipeline"
    why = with_mesh(config, {"data": 3})
    assert isinstance(why, str)
    assert "must be a multiple of mesh.data 3" in why
