"""Providers as data: the user's own file, S3 buckets with keys from the environment, and real recorded answers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import parse_qs

import numpy as np
import pytest
import urllib3
from urllib3 import PoolManager

from ingest.raster.asset_file import file_version
from ingest.raster.limits import Access
from ingest.raster.read import read_on_grid
from ingest.request.config import IngestConfig
from ingest.request.settings import make_config
from ingest.scenes.scene import AssetRef
from ingest.scenes.search import find_scenes
from ingest.testing import write_raster
from ingest.trust.buckets import BucketRule, bucket_url
from ingest.trust.providers import PROVIDERS, ProviderRule, find_provider, load_provider_file
from ingest.worker.rates import limit_of
from zarr_store.errors import AccessError, AssetUnreadable, InvalidInput, UnknownName
from zarr_store.grid import Grid

GRID = Grid("EPSG:32633", (10.0, 0.0, 0.0, 0.0, -10.0, 0.0), (40, 40))
WIDE = Grid("EPSG:32633", (10.0, 0.0, 0.0, 0.0, -10.0, 0.0), (256, 256))
"""More than a head, so that blocks are asked for."""
GRAIN = np.random.default_rng(0).integers(1, 9000, WIDE.shape).astype(np.uint16)
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
    config = make_config(None, {"providers": str(file)})
    (scene,) = find_scenes(str(path), config).scenes
    assert scene.provider == "my-archive"
    assert scene.dn_offset == -1000  # by the baseline: its rule, not the flag's
    assert scene.assets["red"].href == "https://a.files.example.org/B04.tif"
    assert IngestConfig.model_validate_json(config.model_dump_json()) == config
    with pytest.raises(InvalidInput, match="--allow-host"):
        find_scenes(str(path), IngestConfig())


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
    box = SimpleNamespace(data=b"", etag="", rules=(), href=f"s3://box/{tmp_path.name}/a b.tif")

    def put(value: int) -> None:
        path = write_raster(tmp_path / f"{value}.tif", WIDE, GRAIN + np.uint16(value))
        box.data, box.etag = path.read_bytes(), f'"v{value}"'

    def file(request: Any) -> Any:
        start, _, stop = request.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        body = box.data[int(start) : int(stop or len(box.data)) + 1]
        where = f"bytes {start}-{int(start) + len(body) - 1}/{len(box.data)}"
        return (206 if "Range" in request.headers else 200), {"Content-Range": where, "ETag": box.etag}, body

    box.path = f"/box/{tmp_path.name}/a%20b.tif"  # heads of files are kept by the process
    server.answer[box.path] = file
    for name in list(os.environ):
        if name.startswith(("AWS_", "BOX_")):
            monkeypatch.delenv(name)
    put(7)
    box.put = put

    def use(*, pays: bool, rates: Any = ()) -> np.ndarray:
        box.rules = (BucketRule(("box",), server.url, pays, "BOX"),)
        asset = AssetRef(band="red", key="B04", href=box.href, nodata=0)
        box.access = Access(
            attempts=1, low_speed_s=1, bucket_rules=box.rules, private_names=("127.0.0.1",), rates=rates,
            requester_pays=pays,
        )  # fmt: skip
        read: np.ndarray = read_on_grid(
            asset, WIDE, WIDE, "nearest", scene="S", access=box.access, on_version=box.told.append
        )
        return read - GRAIN

    box.read, box.told = use, []
    return box


def _asked(server: Any, bucket: Any) -> list[dict[str, list[str]]]:
    urls = [request.path.partition("?") for request in server.requests]
    return [parse_qs(query) for path, _, query in urls if path == bucket.path]


def test_keys_come_from_the_environment_and_sign_the_request(
    bucket: Any, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "OTHERKEY")  # another provider's
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "other")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "other-token")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")  # of the bucket that the cube goes to
    monkeypatch.setenv("BOX_ACCESS_KEY_ID", "BOXKEY")
    monkeypatch.setenv("BOX_SECRET_ACCESS_KEY", "canary-secret")
    assert (bucket.read(pays=True) == 7).all()
    asked = _asked(server, bucket)
    assert asked
    for query in asked:
        assert query["X-Amz-Credential"][0].startswith("BOXKEY/")
        assert query["x-amz-request-payer"] == ["requester"]
        assert query["X-Amz-Signature"]
        assert "X-Amz-Security-Token" not in query
    assert "canary-secret" not in str(server.requests)
    assert "canary-secret" not in repr(bucket.rules[0].keys(os.environ))
    monkeypatch.setenv("BOX_SESSION_TOKEN", "own-token")
    assert (bucket.read(pays=True) == 7).all()
    assert _asked(server, bucket)[-1]["X-Amz-Security-Token"] == ["own-token"]


def test_a_refusal_names_no_signature(bucket: Any, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOX_ACCESS_KEY_ID", "BOXKEY")
    monkeypatch.setenv("BOX_SECRET_ACCESS_KEY", "canary-secret")
    server.answer[bucket.path] = lambda _: (403, {}, b"<Error/>")
    with pytest.raises(AssetUnreadable, match="HTTP 403") as caught:
        bucket.read(pays=False)
    assert "Amz" not in str(caught.value)
    assert len(_asked(server, bucket)) == 1  # a second signature would be refused like the first


def test_without_keys_nothing_is_signed_and_nobody_is_asked_for_some(bucket: Any, server: Any) -> None:
    assert (bucket.read(pays=False) == 7).all()
    assert not any("Authorization" in request.headers for request in server.requests)
    assert not any(_asked(server, bucket))
    count = len(server.requests)
    with pytest.raises(AssetUnreadable, match="BOX_ACCESS_KEY_ID and BOX_SECRET_ACCESS_KEY"):
        bucket.read(pays=True)
    assert len(server.requests) == count


def test_a_file_in_a_bucket_has_a_version_and_its_replacement_another(bucket: Any) -> None:
    bucket.read(pays=False)
    now = file_version(bucket.href, bucket.access)
    assert bucket.told == [now]
    assert now is not None
    assert '"v7"' in now
    bucket.put(9)
    assert file_version(bucket.href, bucket.access) != now
    with pytest.raises(AssetUnreadable, match="replaced while it was read"):
        bucket.read(pays=False)  # its head was known from before
    assert (bucket.read(pays=False) == 9).all()
    assert bucket.told[-1] == file_version(bucket.href, bucket.access)


def test_each_request_to_a_bucket_takes_a_turn(bucket: Any, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []
    monkeypatch.setattr("ingest.raster.download.wait_for_turn", lambda href, _: turns.append(href))
    bucket.read(pays=False)
    assert turns == [bucket.href] * len(_asked(server, bucket))
    assert len(turns) > 1
    assert limit_of(bucket.href, [("box", 3.0)]) == ("box", 3.0)


def test_copernicus_keys_are_its_own() -> None:
    rules, pool = Access().bucket_rules, urllib3.PoolManager()
    environment = {"AWS_ACCESS_KEY_ID": "A", "AWS_SECRET_ACCESS_KEY": "a"}
    href = "s3://eodata/Sentinel-2/x.jp2"
    plain = "https://eodata.dataspace.copernicus.eu/eodata/Sentinel-2/x.jp2"
    assert bucket_url(href, rules, pool, environment) == plain
    environment |= {"CDSE_S3_ACCESS_KEY_ID": "C", "CDSE_S3_SECRET_ACCESS_KEY": "c"}
    url, _, query = bucket_url(href, rules, pool, environment).partition("?")
    assert url == plain
    assert parse_qs(query)["X-Amz-Credential"][0].startswith("C/")


class Amazon:
    """Tells the region of a bucket, as Amazon does even where it refuses."""

    def __init__(self, status: int, region: str | None) -> None:
        self.status, self.headers = status, {} if region is None else {"x-amz-bucket-region": region}
        self.asked: list[str] = []

    def request(self, method: str, url: str, **_: Any) -> Amazon:
        self.asked.append(f"{method} {url}")
        return self


@pytest.mark.parametrize("status", [200, 301, 403])
def test_a_bucket_of_amazon_is_read_where_it_is(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ingest.trust.buckets._regions", {})
    amazon, keys = Amazon(status, "eu-central-1"), {"AWS_ACCESS_KEY_ID": "A", "AWS_SECRET_ACCESS_KEY": "a"}
    rules = Access().bucket_rules
    for key in ("tiles/1.jp2", "tiles/2.jp2"):
        url = bucket_url(f"s3://sentinel-s2-l2a/{key}", rules, cast(PoolManager, amazon), keys, pay=True)
        assert url.startswith(f"https://s3.eu-central-1.amazonaws.com/sentinel-s2-l2a/{key}?")
        assert "%2Feu-central-1%2Fs3%2F" in url
    assert amazon.asked == ["HEAD https://s3.amazonaws.com/sentinel-s2-l2a"]
    url = bucket_url("s3://sentinel-cogs/a.tif", rules, cast(PoolManager, Amazon(status, "us-west-2")), {})
    assert url == "https://s3.us-west-2.amazonaws.com/sentinel-cogs/a.tif"


def test_a_bucket_that_amazon_does_not_know_or_tell_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ingest.trust.buckets._regions", {})
    with pytest.raises(InvalidInput, match="no bucket elsewhere at Amazon; name its endpoint"):
        bucket_url("s3://elsewhere/a.tif", (), cast(PoolManager, Amazon(404, None)), {})
    for told in (None, "evil.example/"):
        with pytest.raises(AccessError, match=r"did not name the region of bucket elsewhere \(HTTP 503\)"):
            bucket_url("s3://elsewhere/a.tif", (), cast(PoolManager, Amazon(503, told)), {})


def test_an_endpoint_that_the_user_names_may_be_private() -> None:
    mine = ProviderRule(name="mine", hosts=("box",), buckets=("box",), endpoint="https://minio.lan:9000")
    config = IngestConfig(collections=("c",), providers=(mine,))
    assert Access.of(config).private_names == ("minio.lan",)
    assert Access.of(IngestConfig(collections=("c",))).private_names == ()


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
    scenes = find_scenes(f"{server.url}/", IngestConfig(collections=(collection,), bands=("red",), mask="none")).scenes
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
            assert scene.dn_offset == (-1000 if str(scene.baseline) >= "04.00" else 0)
    if offsets is not None:
        assert {scene.dn_offset for scene in scenes if str(scene.baseline) >= "04.00"} <= offsets
