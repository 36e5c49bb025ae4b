"""`terrashard launch` with unequal replicas: the one that leads is killed, and the run ends as it should."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import tomli_w

ROOT = Path(__file__).parents[2]
STEPS = 150


def wait_for(path: Path, text: str, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 150
    while not (path.exists() and text in path.read_text()):
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < until
        time.sleep(0.02)


def test_the_leader_is_killed_and_the_run_ends_with_every_sample_once(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT))
    try:
        from tests.jaxtrain.cube_factory import make_cube, tiny_config
    finally:
        sys.path.remove(str(ROOT))
    make_cube(tmp_path / "cube.zarr")
    run = {"steps": STEPS, "batch_size": 8, "evaluate_every": STEPS, "checkpoint_every": STEPS, "log_every": 5}
    config = tiny_config(tmp_path / "cube.zarr", run=run)
    (tmp_path / "run.toml").write_text(tomli_w.dumps(config.model_dump(mode="json", exclude_unset=True)))
    quick = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TERRASHARD_")} | {
        "XLA_FLAGS": " ".join([*quick, "--xla_force_host_platform_device_count=1"]), "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    out = tmp_path / "run"
    words = ["launch", "-n", "2", "--json", "--no-replace", "--", "train", str(tmp_path / "run.toml"), "--out"]
    words += [str(out), "--set", "hetero.enabled=true", "--set", "hetero.chunk=2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "cli.main", *words], env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        wait_for(out / "metrics.jsonl", '"step": 3,', process)
        leader = json.loads((out / "run.lock").read_text())["pid"]
        os.kill(leader, signal.SIGKILL)
        said, heard = process.communicate(timeout=150)
    finally:
        process.kill()
    assert process.returncode == 0, heard[-3000:]
    result = json.loads(said)["result"]
    assert (result["steps"], result["recompiles"]) == (STEPS, 0)
    assert list(result["shares"].values()) == [4]
    assert "leads the run from here on" in heard
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, STEPS + 1))
    recorded = [json.loads(line) for line in (out / "shares.jsonl").read_text().splitlines()]
    dropped = [line for line in recorded if line.get("event") == "dropped"]
    assert len(dropped) == 1
    shares = {line["step"]: line["shares"] for line in recorded if "shares" in line}
    assert sorted(shares) == list(range(STEPS))
    assert all(sorted(c for chunks in one.values() for c in chunks) == [0, 1, 2, 3] for one in shares.values())
    assert {len(one) for one in shares.values()} == {1, 2}
    assert (out / "report.html").exists()
    assert not (out / "run.lock").exists()
