"""`terrashard launch` as typed: what it refuses, which job files it writes, and a run on another host."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cli.launching import TrainWords, _bind, _document, _printer
from cli.session import Session
from jaxtrain.hetero.membership import RunFinished
from jaxtrain.launching.outcome import Outcome
from zarr_store.errors import InvalidInput

TRAIN = ("--", "train", "run.toml", "--out", "runs/zagreb")
HETERO = (*TRAIN, "--set", "hetero.enabled=true")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--hosts", "a,b", "--dask", "tcp://x:1", *TRAIN), "--hosts and --dask are different ways to start one run"),
        (("--emit", "sbatch", "--hosts", "a", *TRAIN), "--hosts and --emit are different ways"),
        (("--hosts", "a,a", *TRAIN), "names a twice"),
        (("--hosts", "a,b", "-n", "3", *TRAIN), "-n 3 with 2 hosts: one process runs on each host"),
        (("--dask", "10.0.0.1:8786", *TRAIN), "with its scheme, such as tcp://10.0.0.1:8786"),
        (("-n", "2", "--min-processes", "2", *TRAIN), "--min-processes is for runs whose processes may come and go"),
        (("-n", "2", "--join", "h:1", *TRAIN), "--join is for runs whose processes may come and go"),
        (("-n", "4", "--min-processes", "3", "--max-processes", "2", *HETERO), "--min-processes 3 is more than --max"),
        (("-n", "4", "--max-processes", "2", *HETERO), "4 processes are more than --max-processes 2"),
        (("-n", "2", "--min-processes", "3", *HETERO), "--min-processes 3 is more than the 2 processes"),
        (("--join", "h:1", "--listen", "h", *HETERO), "leave --listen out"),
        (("--join", "somewhere", *HETERO), "expected HOST:PORT"),
        (("-n", "2", "--listen", "h:port", *HETERO), "--listen h:port: expected HOST or HOST:PORT"),
        (("--emit", "sbatch", *TRAIN), "needs the number of processes: -n 16"),
        (("--emit", "sbatch", "-n", "2", "--", "train", "run.toml"), "needs the whole command"),
        (("--emit", "jobset", "-n", "2", *TRAIN), "needs --cluster-option image="),
        (("--emit", "sbatch", "-n", "2", "--cluster-option", "queue", *TRAIN), "expects KEY=VALUE"),
        (("-n", "2", "--to", "job", *TRAIN), "--to names the job file of --emit"),
        (("-n", "2", "--cluster-option", "a=b", *TRAIN), "--cluster-option is for --hosts and --emit"),
        (TRAIN, "or --hosts A,B for one on each host"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(
    words: tuple[str, ...], message: str, run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = run("launch", *words)
    assert outcome.code == 2
    assert message in outcome.error_line()
    assert list(tmp_path.iterdir()) == []  # nothing was written or started


@pytest.mark.parametrize("way", [("-n", "2"), ("--hosts", "a,b"), ("--dask", "tcp://127.0.0.1:1")], ids=str)
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("hetero.enabled=true", "hetero.chunk=3"), "hetero.chunk 3 must divide run.batch_size 16 into whole chunks"),
        (("hetero.enabled=true", "model.norm=batch"), "needs the whole batch at once"),
        (("hetero.enabled=true", "mesh.pipe=2"), "mesh.pipe = 2 with hetero.enabled"),
        (("model.widths=8",), "model.width"),
        (("run.steps=none",), "run.steps"),
    ],
)  # fmt: skip
def test_settings_that_no_process_could_use_start_nothing_and_are_reported_once(
    way: tuple[str, ...], words: tuple[str, ...], message: str, run: Callable[..., Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text("[data]\ncube = 'c.zarr'\npatch = 32\n")
    outcome = run("launch", *way, *TRAIN, *(word for text in words for word in ("--set", text)))
    assert outcome.code == 2
    assert message in outcome.error_line()
    assert [path.name for path in tmp_path.iterdir()] == ["run.toml"]


def test_an_absent_file_is_reported_once(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (TRAIN, HETERO):
        outcome = run("launch", "-n", "2", *words)
        assert outcome.code == 2
        assert "run.toml" in outcome.error_line()
        assert list(tmp_path.iterdir()) == []


def test_job_files_are_written_and_nothing_starts(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = run("launch", "--emit", "sbatch", "-n", "16", "--cluster-option", "gpus=1", *TRAIN)
    assert (outcome.code, outcome.out) == (0, "wrote zagreb.sbatch; start it with: sbatch zagreb.sbatch\n")
    script = (tmp_path / "zagreb.sbatch").read_text()
    assert "#SBATCH --gpus-per-task=1" in script
    assert f"{sys.executable} -P -m cli.main train run.toml --out runs/zagreb\n" in script
    (tmp_path / "run.toml").write_text("[data]\ncube = 'c.zarr'\n[hetero]\nenabled = true\n")
    words = ("--cluster-option", "image=r/t:1", *TRAIN)
    outcome = run("launch", "--emit", "trainjob", "-n", "4", "--max-processes", "8", "--json", *words)
    assert outcome.json["file"] == "zagreb.yaml"
    assert "TERRASHARD_HETERO_MAX" in (tmp_path / "zagreb.yaml").read_text()
    printed = run("launch", "--emit", "jobset", "-n", "4", "--to", "-", *words)
    assert printed.out.startswith("# Written by terrashard launch --emit jobset")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.toml", "zagreb.sbatch", "zagreb.yaml"]
    (tmp_path / "zagreb.yaml").write_text("mine")
    assert "--to FILE" in run("launch", "--emit", "jobset", "-n", "4", *words).error_line()
    assert (tmp_path / "zagreb.yaml").read_text() == "mine"


def test_the_parts_of_a_training_command_are_found(tmp_path: Path) -> None:
    config, more = tmp_path / "run.toml", tmp_path / "more.toml"
    config.write_text("[hetero]\nenabled = true\n")
    more.write_text("[hetero]\nenabled = false\n")
    words = TrainWords.parse(["terrashard", "train", "-v", str(config), "--out=runs/a", "--set", "run.steps=5"])
    assert (words.files, words.out, words.overrides) == ((str(config),), "runs/a", ("run.steps=5",))
    assert words.has_replicas()
    assert not TrainWords.parse([*words.words, "--config", str(more)]).has_replicas()
    assert TrainWords.parse([*words.words, "--config", str(more), "--set=hetero.enabled=true"]).has_replicas()
    assert not TrainWords.parse(["train", "elsewhere.toml", "--out", "b"]).has_replicas()
    for bad in ([], ["ingest", "x"]):
        with pytest.raises(InvalidInput, match="launch starts training runs"):
            TrainWords.parse(bad)
    assert _bind("fe80::1", "") == "[fe80::1]:0"


def test_the_line_for_further_machines_is_the_command_as_it_was_typed(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher's own --json is not in it, and a name with a space stays one word."""
    started: list[list[str]] = []

    def launched(places: Any, *_: Any, **__: Any) -> Outcome:
        started.append(places._command)
        return Outcome(0, 0, (0,))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("jaxtrain.launching.replicas.launch_replicas", launched)
    (tmp_path / "my run.toml").write_text("[data]\ncube = 'c.zarr'\n")
    words = ("--", "train", "my run.toml", "--out", "runs/zagreb", "--set", "hetero.enabled=true")
    outcome = run("launch", "-n", "1", "--json", *words)
    assert outcome.code == 0, outcome.err
    assert started[0][-1] == "--json"
    assert outcome.err.startswith("group of 1 process at 127.0.0.1:")
    hint = outcome.err.partition("more are added with: ")[2].splitlines()[0]
    assert re.fullmatch(
        r"terrashard launch --join 127\.0\.0\.1:\d+ -- train 'my run\.toml' --out runs/zagreb --set "
        r"hetero\.enabled=true", hint
    )  # fmt: skip


def test_lines_have_the_name_of_their_host_and_the_document_is_that_of_the_writer(
    capfd: pytest.CaptureFixture[str],
) -> None:
    said: dict[int, list[str]] = {0: [], 1: []}
    show = _printer(Session(), ["gpu-a", "gpu-b"], raw=True, replicas=True, said=said)
    for line in ("[Gloo] connected", "{", '  "half": 1', "[Gloo] connected", "{", '  "steps": 5', "}"):
        show(1, "stdout", line)
    show(0, "stderr", "step 1")
    assert _document(said) == {"steps": 5}  # the first start was killed while it wrote
    assert "[gpu-a] step 1\n" in capfd.readouterr().err
    assert _document({}) is None


def test_a_run_on_another_host_fails_there_with_its_line_and_code(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command runs as typed, in the folder where it is typed; here `train` refuses the cube, which is not there."""
    pytest.importorskip("asyncssh")
    from ..jaxtrain.ssh_host import ssh_host

    (tmp_path / "keys").mkdir()
    monkeypatch.chdir(tmp_path)
    with ssh_host(tmp_path / "keys", ports=1) as (host,):
        options = [part for name, value in host.options().items() for part in ("--cluster-option", f"{name}={value}")]
        name = f"127.0.0.1:{host.port}"
        absent = run("launch", "--hosts", name, *options, *TRAIN)
        assert (absent.code, len(host.commands)) == (2, 1)
        assert f"{name} has no run.toml" in absent.error_line()
        (tmp_path / "run.toml").write_text("[data]\ncube = 'c.zarr'\npatch = 32\n")
        outcome = run("launch", "--hosts", name, *options, "--json", *TRAIN)
    assert outcome.code == 2, outcome.err
    assert re.search(rf"^\[{name}\] error: .*c\.zarr", outcome.err, re.MULTILINE), outcome.err
    assert f"process {name} ended with code 2, after 0 restart(s); correct what it reports" in outcome.err
    assert {key: outcome.json[key] for key in ("exit_code", "restarts", "codes")} == {
        "exit_code": 2, "restarts": 0, "codes": [2]
    }  # fmt: skip
    assert "error" in json.dumps(outcome.json["result"]) or outcome.json["result"] is None


def test_a_replica_that_comes_after_the_end_has_no_error(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends with 0 and one plain line, and writes no document beside that of the replica that leads."""

    def finished(*_: Any, **__: Any) -> None:
        raise RunFinished("the run has reached its end")

    monkeypatch.setattr("cli.training.run_training", finished)
    monkeypatch.setattr("jaxtrain.parallel.processes.start_replica", lambda: None)
    (tmp_path / "run.toml").write_text("[data]\ncube = 'c.zarr'\npatch = 32\n[hetero]\nenabled = true\n")
    outcome = run("train", tmp_path / "run.toml", "--out", tmp_path / "run", "--json")
    assert (outcome.code, outcome.out, outcome.err) == (0, "", "the run has reached its end\n")


@pytest.mark.parametrize(
    ("worker", "family", "meeting"),
    [
        ("tcp://10.0.0.5:40123", socket.AF_INET, "10.0.0.5:7"),
        ("tls://[2001:db8::7]:40123", socket.AF_INET6, "[2001:db8::7]:7"),
    ],
)
def test_workers_of_dask_meet_at_an_address_of_either_kind(
    worker: str, family: int, meeting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JAX reads host:port from the end, so an IPv6 address needs its brackets."""
    from cli.dask_workers import _rendezvous

    bound: list[tuple[int, str]] = []

    class Probe(contextlib.nullcontext[Any]):
        def __init__(self, kind: int = socket.AF_INET) -> None:
            super().__init__(self)
            self.kind = kind

        def bind(self, address: tuple[str, int]) -> None:
            bound.append((self.kind, address[0]))

        def getsockname(self) -> tuple[str, int]:
            return bound[0][1], 7

    monkeypatch.setattr("distributed.get_worker", lambda: SimpleNamespace(address=worker))
    monkeypatch.setattr("socket.socket", Probe)
    assert _rendezvous() == meeting
    assert bound == [(family, meeting.rpartition(":")[0].strip("[]"))]
