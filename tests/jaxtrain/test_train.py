"""A run that is stopped, killed or moved goes on as if nothing had happened."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w

from jaxtrain import TrainEvent, train
from jaxtrain.config import TrainConfig
from jaxtrain.learn.state import Program
from jaxtrain.learn.step import make_train_step
from jaxtrain.runs.checkpoint import CheckpointStore, name_leaves, target_of
from jaxtrain.runs.log import RunLog, read_metrics
from jaxtrain.runs.rundir import load_card, program_of
from jaxtrain.script import main
from jaxtrain.settings import read_train_config
from zarr_store.errors import InvalidInput, Locked, NotACube, Preempted, UnknownName
from zarr_store.lock import CubeLock
from zarr_store.regions import Region
from zarr_store.write import ShardWriter

from .cube_factory import COLLECTION, make_cube, shared_cube, shared_run, tiny_config

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("shared_programs")


class Stop(Exception):
    """Stands for whatever ends a process between two steps."""


def params_of(run: Path) -> dict[str, np.ndarray]:
    card = load_card(run)
    restored = CheckpointStore(run / "checkpoints").restore(target_of(program_of(card, card.config)))
    assert restored is not None
    assert restored.step == card.config.run.steps
    return {name: np.asarray(leaf) for name, leaf in name_leaves(restored.state).items()}


def history(run: Path) -> list[dict[str, Any]]:
    """Metrics without clock readings."""
    clock = ("seconds", "input_wait_s")
    return [{k: v for k, v in line.items() if k not in clock} for line in read_metrics(run)]


def assert_same_run(a: Path, b: Path) -> None:
    left, right = params_of(a), params_of(b)
    assert left.keys() == right.keys()
    for name, leaf in left.items():
        assert leaf.tobytes() == right[name].tobytes(), f"{name} differs"
    assert history(a) == history(b)


def stop_at(step: int) -> Any:
    def on_event(event: TrainEvent) -> None:
        if event.kind == "step" and event.step == step:
            raise Stop

    return on_event


def test_stopped_and_continued_is_bit_equal(tmp_path: Path) -> None:
    """12 steps against 5 + stop + 7: parameters, optimiser, statistics and the history."""
    config = tiny_config(shared_cube())
    with pytest.raises(Stop):
        train(config, tmp_path / "run", on_event=stop_at(8))
    assert CheckpointStore(tmp_path / "run" / "checkpoints").steps() == [5]
    assert [line["step"] for line in read_metrics(tmp_path / "run") if line["kind"] == "train"] == list(range(1, 9))
    events: list[TrainEvent] = []
    result = train(config, tmp_path / "run", on_event=events.append)
    assert result.resumed_from == 5
    assert [e.step for e in events if e.kind == "step"] == list(range(6, 13))
    assert_same_run(shared_run(), tmp_path / "run")


def test_programs_of_a_run_are_kept_under_its_key_from_before_the_first_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[Any] = []

    @contextlib.contextmanager
    def kept(key: str) -> Iterator[None]:
        order.append(key)
        yield
        order.append("given back")

    def init(program: Program, key: Any) -> Any:
        order.append("compiled")
        return compile_and_init(program, key)

    compile_and_init = Program.init
    monkeypatch.setattr("jaxtrain.loop.programs_kept", kept)
    monkeypatch.setattr(Program, "init", init)
    train(tiny_config(shared_cube(), run={"steps": 1}), tmp_path / "run")
    assert order == [load_card(tmp_path / "run").key, "compiled", "given back"]


def test_a_run_has_everything_that_the_contract_names() -> None:
    run = shared_run()
    card = load_card(run)
    again = TrainConfig.model_validate(tomllib.loads((run / "config.toml").read_text()))
    assert again == card.config
    for name in ("model.json", "metrics.jsonl", "report.html", "checkpoints/00000012/manifest.json"):
        assert (run / name).exists(), name
    assert list((run / "tensorboard").glob("events*"))
    assert not (run / "run.lock").exists()
    lines = history(run)
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 13))
    assert [line["step"] for line in lines if line["kind"] == "validation"] == [6, 12]
    assert set(lines[0]) == {"kind", "step", "loss", "accuracy", "gradient_norm", "learning_rate", "labelled"}
    model = json.loads((run / "model.json").read_bytes())
    assert model["bands"] == ["blue", "green", "red", "nir"]
    assert [c["name"] for c in model["classes"]] == ["vegetation", "not vegetated", "water"]
    assert len(model["mean"]) == len(model["std"]) == 4
    assert len(model["cube"]["digest"]) == 64
    assert model["grid"]["shape"] == [192, 160]
    position = CheckpointStore(run / "checkpoints").contents(12)["extra"]
    assert position["next_sample"] == 12 * 8
    assert TrainConfig.model_validate(position["config"]) == card.config


def test_it_learns(tmp_path: Path) -> None:
    """Twelve steps on easy ground beat always saying the commonest class by far, on blocks kept aside."""
    lines = history(shared_run())
    train_lines = [line for line in lines if line["kind"] == "train"]
    validation = [line for line in lines if line["kind"] == "validation"]
    assert train_lines[-1]["loss"] < 0.75 * train_lines[0]["loss"]
    assert validation[-1]["accuracy"] > 0.7


def test_a_finished_run_is_left_as_it_is() -> None:
    run = shared_run()
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and "tensorboard" not in str(p)}
    events: list[TrainEvent] = []
    result = train(tiny_config(shared_cube()), run, on_event=events.append)
    assert result.resumed_from == result.steps == 12
    assert result.validation["accuracy"] == history(run)[-1]["accuracy"]
    assert not [e for e in events if e.kind == "step"]
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and "tensorboard" not in str(p)}


def test_sigterm_saves_and_the_same_call_continues(tmp_path: Path) -> None:
    config = tiny_config(shared_cube())

    def terminate(event: TrainEvent) -> None:
        if event.kind == "step" and event.step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match=r"saved at step \d+ of 12; the same command continues") as caught:
        train(config, tmp_path / "run", on_event=terminate)
    assert caught.value.exit_code == 75
    assert signal.getsignal(signal.SIGTERM) == before
    saved = CheckpointStore(tmp_path / "run" / "checkpoints").steps()[-1]
    assert 7 < saved < 12
    assert saved % 5
    assert train(config, tmp_path / "run").resumed_from == saved
    assert_same_run(shared_run(), tmp_path / "run")


@pytest.mark.slow
def test_sigkill_and_the_same_command_again(tmp_path: Path) -> None:
    """The training script is killed between two checkpoints; the same command ends bit-equal to a run left alone."""
    config = tiny_config(shared_cube(), run={"steps": 80, "checkpoint_every": 20, "evaluate_every": 80})
    file = tmp_path / "run.toml"
    values = config.model_dump(mode="json")
    file.write_text(tomli_w.dumps(values))
    command = [sys.executable, "-m", "jaxtrain.train", str(file), "--out", str(tmp_path / "killed")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if line.startswith("step 65/80"):
                process.kill()
                break
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
    assert process.returncode == -signal.SIGKILL
    killed = tmp_path / "killed"
    done = [line["step"] for line in read_metrics(killed)]
    assert 65 <= done[-1] < 80, "the run was not killed midway"
    assert (killed / "run.lock").exists()
    latest = CheckpointStore(killed / "checkpoints").steps()[-1]
    assert latest in (40, 60)  # that of 40 was awaited before that of 60 began in the background
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert f"from step {latest} of 80" in again.stderr
    train(config, tmp_path / "whole")
    assert_same_run(tmp_path / "whole", killed)


@pytest.mark.parametrize(("data", "model"), [(2, 1)])
def test_a_run_goes_on_on_another_mesh(tmp_path: Path, data: int, model: int) -> None:
    """Same samples, same model up to rounding, and nothing is doubled or skipped."""
    shutil.copytree(shared_run(), tmp_path / "moved")
    for step in (10, 12):
        shutil.rmtree(tmp_path / "moved" / "checkpoints" / f"{step:08d}")
    wide = tiny_config(shared_cube(), mesh={"data": data, "model": model})
    result = train(wide, tmp_path / "moved")
    assert result.resumed_from == 5
    # Adam divides by the root of tiny squares, so rounding shows in parameters sooner than in what they do
    alone, moved = history(shared_run()), history(tmp_path / "moved")
    assert [(line["kind"], line["step"]) for line in alone] == [(line["kind"], line["step"]) for line in moved]
    for a, b in zip(alone, moved, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-4), a
        assert a.get("labelled") == b.get("labelled")


def test_damage_to_the_newest_checkpoint_costs_one_interval(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(shared_run(), run)
    victim = max((run / "checkpoints/00000012/state").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 4
    victim.write_bytes(data)
    events: list[TrainEvent] = []
    result = train(tiny_config(shared_cube()), run, on_event=events.append)
    assert result.resumed_from == 10
    assert any("00000012 is damaged and was passed over" in e.message for e in events if e.kind == "warning")
    assert_same_run(shared_run(), run)


def test_another_configuration_in_the_folder_is_refused_with_the_difference() -> None:
    config = tiny_config(shared_cube(), optim={"learning_rate": 0.5}, model={"width": 8})
    with pytest.raises(InvalidInput, match=r"model\.width: 4 → 8; optim\.learning_rate: 0\.01 → 0\.5\. Give another"):
        train(config, shared_run())
    with pytest.raises(InvalidInput, match="already holds a run"):
        train(tiny_config(shared_cube()), shared_run(), resume=False)


def test_what_does_not_change_the_learning_may_change(tmp_path: Path) -> None:
    config = tiny_config(shared_cube(), run={"log_every": 5, "read_threads": 1, "prefetch": 1, "keep_checkpoints": 2})
    assert train(config, shared_run()).resumed_from == 12


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InvalidInput, match=r"is not a training run \(no model\.json, but thesis\.tex\)"):
        train(tiny_config(shared_cube()), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_two_runs_in_one_folder_are_one_too_many() -> None:
    with CubeLock(shared_run(), "train", key="run.lock"), pytest.raises(Locked, match="held by train"):
        train(tiny_config(shared_cube()), shared_run())


@pytest.mark.parametrize(
    ("sections", "error", "message"),
    [
        ({"data": {"cube": "absent.zarr"}}, NotACube, r"absent\.zarr does not exist"),
        ({"data": {"bands": ["nirr"]}}, UnknownName, "did you mean 'nir'"),
        ({"data": {"collection": "sentinel-2"}}, UnknownName, "did you mean 'sentinel-2-l2a'"),
        ({"mesh": {"data": 8, "model": 4}}, InvalidInput, r"mesh data=8 × model=4 needs 32 devices, JAX sees 8"),
        ({"data": {"split": {"block_m": 100_000}}}, InvalidInput, "too few for training"),
        ({"model": {"name": "unett"}}, UnknownName, "did you mean 'unet'"),
    ],
)
def test_bad_input_leaves_nothing_behind(
    tmp_path: Path, sections: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        train(tiny_config(shared_cube(), **sections), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_changed_cube_is_refused(tmp_path: Path) -> None:
    cube = make_cube(tmp_path / "c.zarr")
    run = tmp_path / "run"
    shutil.copytree(shared_run(), run)
    config = tiny_config(tmp_path / "c.zarr")
    assert train(config, run).resumed_from == 12  # a copy with the same bytes elsewhere is the same cube
    region = Region(0, 1, 0, 64, 0, 64)
    arrays = {a.name: cube.read(COLLECTION, a.name, region) for a in cube.spec(COLLECTION).arrays()}
    arrays["reflectance"][0, 0, 0, 0] += 1
    ShardWriter(tmp_path / "c.zarr", COLLECTION).write(region, arrays, key="k", sources=())
    with pytest.raises(InvalidInput, match="is not the cube that the run began with, or has changed"):
        train(config, run)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_windows(tmp_path: Path) -> None:
    config = tiny_config(
        shared_cube(),
        optim={"name": "sgd", "learning_rate": 1e30, "schedule": "constant", "clip_norm": None, "warmup_steps": 0},
        run={"checkpoint_every": 1},
    )
    with pytest.raises(
        InvalidInput, match=r"step \d+: loss .*expected finite.*\(time \d, y \d+, x \d+\).*learning_rate"
    ):
        train(config, tmp_path / "run")
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    assert all(store.problems(step) == [] for step in store.steps())
    assert all(np.isfinite(line["loss"]) for line in read_metrics(tmp_path / "run"))
    # no clipping is written in a way that TOML can hold and that means the same
    assert tomllib.loads((tmp_path / "run" / "config.toml").read_text())["optim"]["clip_norm"] == float("inf")


def test_nothing_is_traced_or_compiled_twice(tmp_path: Path) -> None:
    from jaxtrain import loop as module
    from jaxtrain.learn import step as steps_of

    steps: list[Any] = []
    traced: list[Any] = []
    make, real = make_train_step, steps_of.differentiate

    def trace(*arguments: Any, **more: Any) -> Any:
        traced.append(arguments)
        return real(*arguments, **more)

    def remember(program: Any) -> Any:
        steps.append(make(program))
        return steps[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "make_train_step", remember)
        patch.setattr(steps_of, "differentiate", trace)
        train(tiny_config(shared_cube(), run={"evaluate_every": 2}), tmp_path / "run")
    assert steps[0].jitted._cache_size() == 1
    assert len(traced) == 1, "what the rehearsal has traced is what runs"


def test_history_has_each_step_once_and_survives_a_cut_line(tmp_path: Path) -> None:
    with RunLog(tmp_path, step=0) as log:
        for step in range(1, 8):
            log.write("train", step, {"loss": 1.0 / step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 8, "lo')
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 8))
    with RunLog(tmp_path, step=5) as log:
        log.write("train", 6, {"loss": 0.5})
        log.write("validation", 6, {"accuracy": None})
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 6]
    assert lines[5]["loss"] == 0.5


def test_the_script_reads_toml_and_ends_with_the_right_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "configs"
    folder.mkdir()
    file = folder / "a.toml"
    text = '[data]\ncube = "../cube.zarr"\n[data.classes]\n"4" = "vegetation"\n'
    file.write_text(text)
    monkeypatch.chdir(tmp_path)
    assert read_train_config([file]).data.cube == str(tmp_path / "cube.zarr")
    assert main([str(file), "--out", "run"]) == 2
    assert "cube.zarr does not exist" in capsys.readouterr().err
    for bad, message in (
        (text + "[run]\nstep = 3\n", "unknown key 'run.step': did you mean 'run.steps'?"),
        (text + "[run]\nsteps = -3\n", "run.steps: input should be greater than 0, got -3"),
        ("[data", "a.toml is not TOML"),
        ("[data]\npatch = 4\n", "key 'data.cube' is needed and absent"),
    ):
        file.write_text(bad)
        assert main([str(file), "--out", "run"]) == 2
        assert message in capsys.readouterr().err
    assert main([str(tmp_path / "none.toml"), "--out", "run"]) == 2
    assert "did you mean" not in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_time_is_measured() -> None:
    lines = [line for line in read_metrics(shared_run()) if line["kind"] == "train"]
    assert lines[0]["seconds"] is None  # compiling is not a step's time
    assert all(0 < line["seconds"] < 60 for line in lines[1:5])
