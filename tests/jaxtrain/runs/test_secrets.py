"""No shape of a secret comes out of a training: not printed, not logged, not in the run's folder."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w

from cli.main import main
from jaxtrain import TrainEvent, script
from jaxtrain.config import RunConfig
from jaxtrain.runs.incidents import Incidents
from zarr_store.errors import CorruptShard, InvalidInput

from ...zarr_store.secret_shapes import CANARY, TEXTS, assert_nowhere
from ..cube_factory import shared_cube, tiny_config


@pytest.fixture
def everything(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], str]:
    """All that was printed and logged; the environment holds secrets, too."""
    for name in ("AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, f"{CANARY}-{name}")
    caplog.set_level(logging.DEBUG)
    return lambda: "".join([*capfd.readouterr(), caplog.text])


def write_config(path: Path, **sections: dict[str, Any]) -> Path:
    config = tiny_config(shared_cube(), **sections)
    path.write_text(tomli_w.dumps(config.model_dump(mode="json", exclude_unset=True)))
    return path


def test_a_quarantined_window_is_written_down_without_secrets(tmp_path: Path) -> None:
    lines: list[str] = []
    incidents = Incidents(
        tmp_path, RunConfig(on_corrupt="quarantine", max_quarantined=len(TEXTS)), on_warning=lines.append
    )
    incidents.begin({})
    for number, text in enumerate(TEXTS.values()):
        incidents.unreadable(np.array([number, 0, 0], np.int32), CorruptShard(text))
    assert (tmp_path / "incidents.jsonl").read_text().count("cannot read it") == len(lines) == len(TEXTS)
    assert assert_nowhere("\n".join(lines), tmp_path) == 1


def test_a_run_holds_no_secret_of_its_environment(tmp_path: Path, everything: Callable[[], str]) -> None:
    config = write_config(tmp_path / "run.toml")
    assert main(["train", str(config), "--out", str(tmp_path / "run"), "--json", "-v"]) == 0
    printed = everything()
    names = {path.name for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert {"config.toml", "model.json", "metrics.jsonl", "report.html"} <= names
    assert assert_nowhere(printed, tmp_path) > 10
    # an address with a key is refused before there is a folder that could keep it
    for url in (f"s3://AKIA:{CANARY}@bucket/c.zarr", f"https://me:{CANARY}@127.0.0.1:9/c.zarr?sig={CANARY}"):
        text = config.read_text().replace(str(shared_cube()), url)
        (tmp_path / "refused.toml").write_text(text)
        for call in (main, script.main):
            words = [str(tmp_path / "refused.toml"), "--out", str(tmp_path / "refused")]
            assert call(["train", *words, "--debug"] if call is main else words) == 2
    assert not (tmp_path / "refused").exists()
    assert_nowhere(everything())


def test_no_shape_comes_out_of_events_logs_and_errors(
    tmp_path: Path, everything: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    raised: list[Exception] = [RuntimeError("warm up")]

    def train(*_: Any, on_event: Callable[[TrainEvent], None] | None = None, **__: Any) -> None:
        for text in TEXTS.values():
            for name in ("jaxtrain.train", "absl", "orbax", "tensorboardX"):
                logging.getLogger(name).warning("%s", text)
            if on_event is not None:
                on_event(TrainEvent("warning", 1, 2, text, {}))
                on_event(TrainEvent("validation", 1, 2, text, {}))
        raise raised[0]

    monkeypatch.setattr("jaxtrain.train", train)
    monkeypatch.setattr("jaxtrain.loop.train", train)
    words = [str(write_config(tmp_path / "run.toml")), "--out", str(tmp_path / "run")]
    parts = []
    for number, text in enumerate(TEXTS.values()):
        for kind, code in ((InvalidInput, 2), (RuntimeError, 1)):
            raised[0] = kind(text)
            assert main(["train", *words, "--json", "--debug"]) == code
            assert script.main(words) == code
            parts.append(everything())
            if number == 0:
                assert parts[-1].count("cannot read it") > 6 * len(TEXTS)
    assert_nowhere("\n".join(parts))
