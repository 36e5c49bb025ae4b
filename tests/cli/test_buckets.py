"""A cube in a bucket from the command line: ingest by workers, kill, resume, look, and no secret anywhere."""

from __future__ import annotations

import datetime as dt
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ingest.simulate import SimulateConfig, simulate

Run = Callable[..., Any]

URL = "s3://cubes/made/cube.zarr"
SHARDS = 12
SECRETS = ("canary+of/the/secret", "AKIDCANARY")
LEDGER = "made/cube.zarr/_terrashard/ledger/sentinel-2-l2a/"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dates = tuple(dt.date(2022, 4, 5) + dt.timedelta(5 * number) for number in range(SHARDS))
    config = SimulateConfig(tiles=1, tile_px=64, overlap_px=0, dates=dates, radar_dates=())
    return simulate(tmp_path_factory.mktemp("w") / "world", config).path


def contents(client: Any) -> dict[str, bytes]:
    found = client.list_objects_v2(Bucket="cubes").get("Contents", [])
    return {entry["Key"]: client.get_object(Bucket="cubes", Key=entry["Key"])["Body"].read() for entry in found}


def rows_of(client: Any) -> list[str]:
    """Keys of the ledger's rows; asked often, so nothing else is fetched: the run must still be under way after it."""
    return [entry["Key"] for entry in client.list_objects_v2(Bucket="cubes", Prefix=LEDGER).get("Contents", [])]


def command(world: Path, cube: str | Path) -> list[str]:
    selection = "--collection sentinel-2-l2a --bands red,nir,scl --mask scl --workers 1 --threads-per-worker 1"
    return ["ingest", str(world / "catalog.json"), str(cube), *selection.split()]


def test_killed_and_repeated_it_is_the_cube_that_a_folder_gets(
    run: Run, world: Path, bucket: Any, tmp_path: Path
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "cli.main", *command(world, URL)],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        end = time.monotonic() + 90
        while not (rows := rows_of(bucket)):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < end, "no shard was written in time"
            time.sleep(0.01)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    said = process.communicate(timeout=30)[0]
    assert process.returncode == -signal.SIGKILL
    assert "made/cube.zarr/_terrashard/lock.json" in contents(bucket), "the fault fired: a lock without a holder"
    before = rows_of(bucket)
    assert 0 < len(rows) <= len(before) < SHARDS

    status = run("status", URL, "--json")
    assert not any(secret in status.out + status.err for secret in SECRETS)
    again = run(*command(world, URL))
    assert again.code == 0, again.err
    assert f"{SHARDS - len(before)} shards written" in again.out
    assert f"{len(before)} were done before" in again.out
    assert "nothing to do" in run(*command(world, URL)).out

    folder = tmp_path / "cube.zarr"
    assert run(*command(world, folder)).code == 0
    here = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    there = {key.removeprefix("made/cube.zarr/"): data for key, data in contents(bucket).items()}
    assert there == here

    facts = run("info", URL, "--json").json["collections"]["sentinel-2-l2a"]
    assert (facts["complete"], facts["shards_done"]) == (True, SHARDS)
    labels = ("labels", URL, world / "truth.tif", "--name", "truth")
    for state in (True, False):
        made = run(*labels, "--json")
        assert (made.code, made.json["written"]) == (0, state), made.err
    assert run("info", URL, "--json").json["labels"]["truth"]["labelled"] == 64 * 64
    other = run(*labels, "--names", "1=water", "--replace")
    assert "a layer in a bucket cannot be replaced in one step" in other.error_line()
    assert run("verify", URL).code == 0
    assert run("quicklook", URL, tmp_path / "q.png").code == 0
    out = run("export", URL, tmp_path / "red.tif", "--time", "2022-04-10", "--bands", "red")
    assert out.code == 0, out.err

    assert not any(secret.encode() in data for secret in SECRETS for data in there.values())
    assert not any(secret in text for secret in SECRETS for text in (said, again.out, again.err, out.err))


def test_a_second_run_is_told_who_holds_the_bucket(run: Run, world: Path, bucket: Any) -> None:
    assert run(*command(world, URL), "--limit", "1").code == 0
    holder = {"host": "elsewhere", "pid": 7, "purpose": "ingest", "token": "t", "since": "2026-01-01"}
    bucket.put_object(Bucket="cubes", Key="made/cube.zarr/_terrashard/lock.json", Body=json.dumps(holder).encode())
    outcome = run(*command(world, URL))
    assert outcome.code == 5
    assert "host elsewhere, pid 7" in outcome.error_line()
    assert f"remove {URL}/_terrashard/lock.json" in outcome.error_line()


def test_refused_and_unreachable_end_with_eight(run: Run, bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = run("info", "s3://elsewhere/cube")
    assert (outcome.code, "no bucket elsewhere" in outcome.error_line()) == (8, True)
    monkeypatch.setattr("zarr_store.objects._RETRIES", 0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    outcome = run("info", URL)
    assert (outcome.code, "check endpoint" in outcome.error_line()) == (8, True)
    assert not any(secret in outcome.err for secret in SECRETS)
    outcome = run("info", "s3://key:hunter2@cubes/cube")
    assert (outcome.code, "hunter2" in outcome.err) == (2, False)
