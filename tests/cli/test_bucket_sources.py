"""Scenes in a bucket from the command line: read with keys of their own, and known by their version."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio

from ingest.plan.stored import kept_plan
from ingest.simulate import SimulateConfig, simulate
from zarr_store.read import open_cube

Run = Callable[..., Any]

NAME = "sentinel-2-l2a"
PROVIDER = """
name = "archive"
marks = ["terrashard:"]
hosts = ["cubes"]
buckets = ["cubes"]
endpoint = "{endpoint}"
key_prefix = "ARCHIVE"
offset = {{ "*" = "flag" }}
flag = "earthsearch:boa_offset_applied"
"""


@pytest.fixture
def archive(bucket: Any, s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A catalogue whose files are in the bucket alone, and the file of its provider."""
    config = SimulateConfig(
        tiles=1, tile_px=512, overlap_px=0, dates=(dt.date(2022, 4, 5), dt.date(2022, 4, 10)), radar_dates=()
    )
    made = simulate(tmp_path / "world", config)
    for path in made.path.rglob("*.json"):
        item = json.loads(path.read_text())
        if item.get("type") != "Feature":
            continue
        for asset in item["assets"].values():
            file = (path.parent / asset["href"]).resolve()
            asset["file:checksum"] = f"1220{hashlib.sha256(file.read_bytes()).hexdigest()}"
            key = f"scenes/{file.relative_to(made.path.resolve())}"
            bucket.put_object(Bucket="cubes", Key=key, Body=file.read_bytes())
            asset["href"] = f"s3://cubes/{key}"
            file.unlink()
        path.write_text(json.dumps(item))
    provider = tmp_path / "archive.toml"
    provider.write_text(PROVIDER.format(endpoint=s3_server))
    monkeypatch.setenv("ARCHIVE_ACCESS_KEY_ID", "ARCHIVEKEY")
    monkeypatch.setenv("ARCHIVE_SECRET_ACCESS_KEY", "canary-of-the-archive")
    return made.catalog, provider


def test_scenes_of_a_bucket_are_read_and_a_replaced_one_is_found(
    run: Run, archive: tuple[Path, Path], bucket: Any, tmp_path: Path
) -> None:
    catalog, provider = archive
    cube = tmp_path / "cube.zarr"
    options = ("--provider-file", provider, "--allow-host", "cubes", "--workers", 1)
    made = run("ingest", catalog, cube, "--collection", NAME, "--bands", "red,scl", "--mask", "scl", *options)
    assert made.code == 0, made.err
    assert "0 failed" in made.out
    assert open_cube(cube).dataset(NAME).reflectance.values.any()
    kept = "".join(path.read_text(errors="replace") for path in cube.rglob("*") if path.is_file())
    said = made.out + made.err
    assert not any(word in kept + said for word in ("canary-of-the-archive", "ARCHIVEKEY", "X-Amz"))
    assert run("audit", cube, "--source", catalog, *options[:4]).code == 0
    whole = run("verify", cube, "--checksums", "--json", *options[:4])
    assert whole.code == 0, whole.err
    assert whole.json["checksums"] == {"checked": 4, "different": [], "unread": [], "unstated": 0}

    hrefs = [a.href for task in kept_plan(cube).tasks for s in task.sources for a in s.assets if a.band == "red"]
    assert all(href.startswith("s3://cubes/scenes/") for href in hrefs)
    key = hrefs[0].removeprefix("s3://cubes/")
    file = tmp_path / "one.tif"
    file.write_bytes(bucket.get_object(Bucket="cubes", Key=key)["Body"].read())
    with rasterio.open(file, "r+", IGNORE_COG_LAYOUT_BREAK="YES") as dataset:
        dataset.write(np.full(dataset.shape, 4321, "uint16"), 1)
    bucket.put_object(Bucket="cubes", Key=key, Body=file.read_bytes())
    assert run("audit", cube, "--source", catalog, "--no-files", *options[:4]).code == 0, (
        "the catalogue says nothing of it"
    )
    spoilt = run("verify", cube, "--checksums", *options[:4])
    assert spoilt.code == 6, spoilt.err
    assert "1 files are not what their items state; first: scene" in spoilt.error_line()
    assert f"(s3://cubes/{key}) does not have the sha256 that its item states" in spoilt.error_line()
    found = run("audit", cube, "--source", catalog, "--json", *options[:4])
    assert (found.code, [row["assets"] for row in found.json["replaced"]]) == (3, [["red"]]), found.err
    fresh = run("ingest", catalog, cube, "--refresh", "--json", *options)
    assert (fresh.code, len(fresh.json["written"])) == (0, 1), fresh.err
    assert 4321 in open_cube(cube).dataset(NAME).reflectance.values
    assert run("audit", cube, "--source", catalog, *options[:4]).code == 0


def test_a_bucket_that_refuses_is_named_without_its_signature(
    run: Run, archive: tuple[Path, Path], bucket: Any, tmp_path: Path
) -> None:
    catalog, provider = archive
    for entry in bucket.list_objects_v2(Bucket="cubes")["Contents"]:
        bucket.delete_object(Bucket="cubes", Key=entry["Key"])
    options = ("--provider-file", provider, "--allow-host", "cubes", "--workers", 1, "--set", "retries=0")
    selected = ("--collection", NAME, "--bands", "red", "--mask", "none")
    outcome = run("ingest", catalog, tmp_path / "cube.zarr", *selected, *options)
    assert outcome.code != 0
    assert "HTTP 404" in outcome.out + outcome.err
    assert "X-Amz" not in outcome.out + outcome.err
