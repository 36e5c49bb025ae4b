"""Files that are replaced under the same name after shards were made from them: seen, said, and taken in."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio

import ingest.run.task as making
from ingest.plan.probe import probe_scenes
from ingest.plan.stored import kept_plan
from ingest.raster.download import stream_whole
from ingest.raster.faults import TransientError
from ingest.raster.limits import Access
from ingest.request.config import IngestConfig
from ingest.run.loop import run
from ingest.scenes.scene import Scene
from ingest.scenes.search import SearchResult
from ingest.upkeep.audit import compare, replaced_files
from ingest.upkeep.checksums import parse_multihash, verify_files
from zarr_store.ledger import LedgerRow, SourceOutcome
from zarr_store.read import open_cube

from ..growing import CONFIG, NAME, extend_with, plan_of, scene, tree


def rewrite(one: Scene, band: str, value: int) -> None:
    with rasterio.open(one.assets[band].href, "r+") as dataset:
        dataset.write(np.full(dataset.shape, value, dataset.dtypes[0]), 1)


def test_a_file_that_was_replaced_is_seen_and_its_shards_are_made_again(
    tmp_path: Path, local_client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenes = [scene(tmp_path / "s", day) for day in (10, 12)]
    cube = tmp_path / "cube.zarr"
    run(plan_of(scenes), cube, client=local_client)
    found, plan = SearchResult(tuple(scenes)), kept_plan(cube)
    assert replaced_files(cube, plan, found, CONFIG, source="") == {}
    assert extend_with(cube, scenes, local_client, refresh=True).written == ()
    before = open_cube(cube).dataset(NAME).load()
    rewrite(scenes[1], "red", 4321)
    replaced = replaced_files(cube, plan, found, CONFIG, source="")
    assert replaced == {(NAME, scenes[1].id): ("red",)}
    assert compare(plan, found, replaced).replaced == replaced
    assert replaced_files(cube, plan, SearchResult((scenes[0],)), CONFIG, source="") == {}, "only what was asked for"

    report = extend_with(cube, scenes, local_client, refresh=True)
    assert (report.exit_code, {row.index[0] for row in report.written}) == (0, {1})
    after = open_cube(cube).dataset(NAME)
    np.testing.assert_array_equal(after.reflectance[0], before.reflectance[0])
    assert set(np.unique(after.reflectance[1])) == {0, 4321}
    rows = open_cube(cube).items(NAME)
    assert [row["id"] for row in rows] == [scenes[0].id, scenes[1].id, scenes[1].id]
    assert rows[1]["superseded_by"] == scenes[1].id
    assert "superseded_by" not in rows[2]
    kept = tree(cube)
    monkeypatch.setattr(making, "fill_shard", lambda *_, **__: pytest.fail("a pixel was read"))
    assert extend_with(cube, scenes, local_client, refresh=True).written == ()
    assert tree(cube) == kept


def test_a_file_that_is_gone_or_whose_server_is_silent_is_not_called_replaced(
    tmp_path: Path, local_client: Any
) -> None:
    one = scene(tmp_path / "s", 10)
    cube = tmp_path / "cube.zarr"
    run(plan_of([one]), cube, client=local_client)
    Path(one.assets["red"].href).unlink()
    assert replaced_files(cube, kept_plan(cube), SearchResult((one,)), CONFIG, source="") == {}


def test_other_checksums_or_sizes_in_the_catalogue_are_another_file(tmp_path: Path) -> None:
    def stating(**what: Any) -> Scene:
        one = scene(tmp_path / "s", 10)
        return replace(one, assets={**one.assets, "red": replace(one.assets["red"], **what)})

    plan = plan_of([stating(checksum="1220" + "ab" * 32, size_bytes=None)])
    same = compare(plan, SearchResult((stating(checksum="1220" + "ab" * 32, size_bytes=7),)))
    assert (dict(same.superseded), dict(same.replaced)) == ({}, {}), "what was not stated before does not count"
    for what in ({"checksum": "1220" + "cd" * 32}, {"checksum": None}):
        news = compare(plan, SearchResult((stating(**what),)))
        expected = {(NAME, stating().id): ("red",)} if what["checksum"] else {}
        assert news.replaced == expected
        assert set(news.superseded) == set(expected)
    assert plan.digest != plan_of([stating(checksum="1220" + "cd" * 32)]).digest, (
        "a plan pins the files it was made for"
    )


def test_a_file_of_another_size_than_its_item_states_is_said(tmp_path: Path) -> None:
    one = scene(tmp_path / "s", 10)
    size = Path(one.assets["red"].href).stat().st_size
    for stated, said in ((size, False), (size + 1, True), (None, False)):
        told = replace(one, assets={**one.assets, "red": replace(one.assets["red"], size_bytes=stated)})
        sentences = probe_scenes([told], IngestConfig())[one.key].discrepancies
        assert any(f"red: item says {stated} bytes, file has {size}" in text for text in sentences) == said


def test_rows_written_before_versions_were_kept_are_read(tmp_path: Path, local_client: Any) -> None:
    one = scene(tmp_path / "s", 10)
    cube = tmp_path / "cube.zarr"
    run(plan_of([one]), cube, client=local_client)
    ledger = open_cube(cube).ledger(NAME)
    row = next(iter(ledger.rows().values()))
    assert [key for key, _ in row.sources[0].versions] == ["red", "scl"]
    text = row.to_json().decode()
    assert LedgerRow.from_json(text.encode()) == row
    assert SourceOutcome.from_dict({"item": 0, "item_id": "x", "state": "read"}).versions == ()


@pytest.mark.parametrize("name", ["sha256", "sha1", "sha512", "md5", "sha3_256", "blake2b"])
def test_multihashes_of_hashlib(name: str) -> None:
    codes = {"sha256": "12", "sha1": "11", "sha512": "13", "md5": "d501", "sha3_256": "16", "blake2b": "c0e402"}
    digest = hashlib.new(name, b"x").digest()
    assert parse_multihash(f"{codes[name]}{len(digest):02x}{digest.hex()}") == (name, digest)
    for text in ("", "zz", codes[name], f"{codes[name]}05{digest.hex()}", f"7f20{digest.hex()}", "80808080"):
        assert parse_multihash(text) is None


@pytest.mark.parametrize("change", ["another tag", "another size", "nothing"])
def test_a_file_that_is_replaced_while_it_is_hashed_is_unread_not_different(make_server: Any, change: str) -> None:
    """Its head is of one file and its body of another: a hash of that says nothing about either."""
    server, data = make_server(), b"II*\x00" + bytes(range(256)) * 40
    shorter = data[:-100] if change == "another size" else data

    def answer(request: Any) -> Any:
        asked = request.headers.get("Range")
        if asked is None:
            return 200, {"ETag": '"second"' if change == "another tag" else '"first"'}, shorter
        start, stop = (int(part) for part in asked.removeprefix("bytes=").split("-"))
        body = data[start : stop + 1]
        span = f"bytes {start}-{start + len(body) - 1}/{len(data)}"
        return 206, {"Content-Range": span, "ETag": '"first"'}, body

    server.answer["/a.tif"] = answer
    access = Access(attempts=1, backoff_s=0.01)
    taken = hashlib.sha256()
    if change == "nothing":
        stream_whole(f"{server.url}/a.tif", access, taken.update)
        assert taken.digest() == hashlib.sha256(data).digest()
        return
    words = "replaced while it was read" if change == "another tag" else "broke off after"
    with pytest.raises(TransientError, match=words):
        stream_whole(f"{server.url}/a.tif", access, taken.update)
    assert [bool(one.headers.get("Range")) for one in server.requests] == [True, False], "it was asked for as a whole"


@pytest.mark.parametrize("remote", [False, True])
def test_whole_files_are_compared_with_what_their_items_state(
    tmp_path: Path, local_client: Any, make_server: Any, remote: bool
) -> None:
    one = scene(tmp_path / "s", 10)
    files = {band: Path(asset.href) for band, asset in one.assets.items()}
    server = make_server() if remote else None

    def answer(request: Any) -> Any:
        data = files[request.path.strip("/").partition(".")[0]].read_bytes()
        asked = request.headers.get("Range")
        if asked is None:
            return 200, {}, data
        start, stop = (int(part) for part in asked.removeprefix("bytes=").split("-"))
        body = data[start : stop + 1]
        return 206, {"Content-Range": f"bytes {start}-{start + len(body) - 1}/{len(data)}"}, body

    digest = hashlib.sha256(files["red"].read_bytes()).hexdigest()
    assets = {"red": replace(one.assets["red"], checksum=f"1220{digest}"), "scl": one.assets["scl"]}
    if server is not None:
        for band in files:
            server.answer[f"/{band}.tif"] = answer
        assets = {band: replace(asset, href=f"{server.url}/{band}.tif") for band, asset in assets.items()}
    config = CONFIG.model_copy(update={"allow_private_hosts": True, "allow_local": (str(tmp_path),), "retries": 0,
                                       "allow_hosts": ("127.0.0.1",)})  # fmt: skip
    cube = tmp_path / "cube.zarr"
    run(plan_of([replace(one, assets=assets)], config=config), cube, client=local_client, config=config)
    found = verify_files(cube, config)
    assert (found.checked, found.unstated, found.different, found.unread) == (1, 1, (), ())
    data = bytearray(files["red"].read_bytes())
    data[-1] ^= 1
    files["red"].write_bytes(data)
    (said,) = verify_files(cube, config).different
    assert "asset red" in said
    assert "does not have the sha256 that its item states" in said
    files["red"].unlink()
    if server is not None:
        server.answer.clear()
    assert len(verify_files(cube, config).unread) == 1
