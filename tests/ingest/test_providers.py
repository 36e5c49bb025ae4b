"""Providers as data: the user's own file, S3 buckets with keys from the environment, and real recorded answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ingest.buckets import BucketRule, bucket_options
from ingest.config import IngestConfig
from ingest.providers import PROVIDERS, find_provider, load_provider_file
from ingest.read import Access, read_on_grid
from ingest.scene import AssetRef
from ingest.search import search
from ingest.testing import write_raster
from zarr_store.errors import AssetUnreadable, InvalidInput, UnknownName
from zarr_store.grid import Grid

GRID = Grid("EPSG:32633", (10.0, 0.0, 0.0, 0.0, -10.0, 0.0), (40, 40))
OWN = """
name = "my-archive"
hosts = ["stac.example.org", "*.files.example.org"]
marks = ["mine:"]
offset = { "*" = "baseline" }
rate_limit = 8
"""


def test_a_file_adds_a_provider(tmp_path: Path, save: Callable[..., Path], make_item: Callable[..., Any]) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(OWN)
    item = make_item(mine__quality="good", earthsearch__boa_offset_applied=True)
    for asset in item["assets"].values():
        asset["href"] = f"https://a.files.example.org/{asset['href']}"
    path = save(item)
    config = IngestConfig(providers=str(file))  # type: ignore[arg-type]
    (scene,) = search(str(path), config)
    assert scene.provider == "my-archive"
    assert scene.dn_offset == -1000  # by the baseline: its rule, not the flag's
    assert scene.assets["red"].href == "https://a.files.example.org/B04.tif"
    assert IngestConfig.model_validate_json(config.model_dump_json()) == config
    with pytest.raises(InvalidInput, match="--allow-host"):
        search(str(path), IngestConfig())


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (OWN + "rate_limt = 3", UnknownName, "did you mean 'rate_limit'"),
        (OWN + 'token_url = "http://evil.example/t"', InvalidInput, "expected https"),
        (OWN + 'token_url = "https://u:canary@h/t"', InvalidInput, "without user name"),
        (OWN + 'key_prefix = "a b"', InvalidInput, "key_prefix"),
        ("name = 3", InvalidInput, "name"),
        ("hosts = []", InvalidInput, "name: Field required"),
        ("name = ", InvalidInput, "not TOML"),
    ],
)
def test_a_file_is_strict(tmp_path: Path, text: str, error: type[Exception], message: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(error) as caught:
        load_provider_file(file)
    assert message in str(caught.value)
    assert "canary" not in str(caught.value)
    with pytest.raises(InvalidInput, match="cannot read"):
        load_provider_file(tmp_path / "absent.toml")


def test_own_rules_come_first() -> None:
    own = PROVIDERS[2].model_copy(update={"name": "mirror"})
    item = {"properties": {"earthsearch:payload_id": "x"}}
    assert find_provider(item).name == "earth-search"
    assert find_provider(item, "", [own]).name == "mirror"


# S3


@pytest.fixture
def bucket(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An S3 endpoint that bills its readers, and a way to read through it."""
    data = write_raster(tmp_path / "a.tif", GRID, np.full(GRID.shape, 7, np.uint16)).read_bytes()

    def file(request: Any) -> Any:
        start, _, stop = request.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        body = data[int(start) : int(stop or len(data)) + 1]
        where = f"bytes {start}-{int(start) + len(body) - 1}/{len(data)}"
        return (206 if "Range" in request.headers else 200), {"Content-Range": where}, body

    server.answer["/box/a.tif"] = file
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "BOX_ACCESS_KEY_ID", "BOX_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)

    def use(*, pays: bool) -> np.ndarray:
        rules = (BucketRule(("box",), server.url, pays, "BOX"),)
        asset = AssetRef(band="red", key="B04", href="s3://box/a.tif", nodata=0)
        access = Access(attempts=1, timeout_s=5, low_speed_s=1, bucket_rules=rules)
        return read_on_grid(asset, GRID, GRID, "nearest", scene="S", access=access)

    return use


def test_keys_come_from_the_environment_and_sign_the_request(
    bucket: Any, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "OTHERKEY")  # another provider's
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "other")
    monkeypatch.setenv("BOX_ACCESS_KEY_ID", "BOXKEY")
    monkeypatch.setenv("BOX_SECRET_ACCESS_KEY", "canary-secret")
    assert (bucket(pays=True) == 7).all()
    asked = [request.headers for request in server.requests if request.path == "/box/a.tif"]
    assert asked
    assert all("Credential=BOXKEY/" in headers["Authorization"] for headers in asked)
    assert all(headers["x-amz-request-payer"] == "requester" for headers in asked)
    assert "canary-secret" not in str(asked)
    assert "canary-secret" not in repr(bucket_options("s3://box/a", ())[1])


def test_without_keys_nothing_is_signed_and_nobody_is_asked_for_some(bucket: Any, server: Any) -> None:
    assert (bucket(pays=False) == 7).all()
    assert not any("Authorization" in request.headers for request in server.requests)
    count = len(server.requests)
    with pytest.raises(AssetUnreadable, match="BOX_ACCESS_KEY_ID and BOX_SECRET_ACCESS_KEY"):
        bucket(pays=True)
    assert len(server.requests) == count


def test_copernicus_keys_are_its_own() -> None:
    rules = Access().bucket_rules
    environment = {"AWS_ACCESS_KEY_ID": "A", "AWS_SECRET_ACCESS_KEY": "a"}
    options, keys = bucket_options("s3://eodata/Sentinel-2/x.jp2", rules, environment)
    assert options["AWS_S3_ENDPOINT"] == "eodata.dataspace.copernicus.eu"
    assert options["AWS_NO_SIGN_REQUEST"] == "YES"
    assert keys.get_credential_options() == {}
    environment |= {"CDSE_S3_ACCESS_KEY_ID": "C", "CDSE_S3_SECRET_ACCESS_KEY": "c"}
    options, keys = bucket_options("s3://eodata/Sentinel-2/x.jp2", rules, environment)
    assert keys.get_credential_options() == {"AWS_ACCESS_KEY_ID": "C", "AWS_SECRET_ACCESS_KEY": "c"}
    assert "AWS_NO_SIGN_REQUEST" not in options


# Recorded answers of real APIs, replayed by a server


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "collection", "provider", "offsets"),
    [
        ("earth-search_sentinel-2-c1-l2a_10items_01.json", "sentinel-2-c1-l2a", "earth-search", {-1000}),
        ("earth-search_v0_sentinel-s2-l2a-cogs_1items_02.json", "sentinel-s2-l2a-cogs", "earth-search-v0", None),
        ("planetarycomputer_sentinel-2-l2a_33items_03.json", "sentinel-2-l2a", "planetary-computer", None),
    ],
)
def test_recorded_answers_go_through_an_api(
    shared_data: Path, server: Any, name: str, collection: str, provider: str, offsets: set[int] | None
) -> None:
    recorded = json.loads((shared_data / "stac" / "responses" / name).read_text())
    items = [item for item in recorded["features"] if item["collection"] == collection]
    assert items
    core = "https://api.stacspec.org/v1.0.0/"
    link = {"rel": "search", "href": f"{server.url}/search", "type": "application/geo+json", "method": "POST"}
    server.json("/", {"type": "Catalog", "id": "replay", "stac_version": "1.0.0", "description": "",
                      "conformsTo": [core + "core", core + "item-search"], "links": [link]})  # fmt: skip
    server.json(f"/collections/{collection}", {"type": "Collection", "id": collection, "links": []})
    half = max(1, len(items) // 2)

    def page(request: Any) -> Any:
        start = int((request.body or {}).get("token", 0))
        more = [{"rel": "next", "href": f"{server.url}/search", "method": "POST", "body": {"token": half}}]
        # the pages overlap by one item, as real ones do when items arrive in between
        features = items[max(0, start - 1) : start + half] if start == 0 else items[start - 1 :]
        return 200, {}, {**recorded, "features": features, "links": [] if start or half >= len(items) else more}

    server.answer["/search"] = page
    scenes = search(f"{server.url}/", IngestConfig(collections=(collection,), bands=("red",), mask="none"))
    ids = [item["id"] for item in items]
    assert {scene.id for scene in scenes} <= set(ids)
    assert len({scene.id for scene in scenes}) == len(scenes)
    assert {scene.provider for scene in scenes} == {provider}
    for scene in scenes:
        asset = scene.assets["red"]
        assert asset.href.startswith(("https://", "s3://"))
        assert "sig=" not in asset.href
        assert scene.tile
        if scene.baseline and scene.baseline < "04.00":
            assert scene.dn_offset == 0
        if provider == "planetary-computer":
            assert scene.dn_offset == (-1000 if scene.baseline >= "04.00" else 0)
    if offsets is not None:
        assert {scene.dn_offset for scene in scenes if scene.baseline >= "04.00"} <= offsets
