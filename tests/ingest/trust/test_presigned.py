"""Hrefs are opaque: their queries and escapes arrive as the catalogue gave them, and signatures are stored nowhere."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest

from ingest.plan.making import make_plan
from ingest.plan.plan import Plan
from ingest.raster.download import head_cache
from ingest.request.config import IngestConfig
from ingest.run.loop import run
from ingest.scenes.harmonise import harmonise
from ingest.testing import write_raster
from ingest.trust import presigned
from ingest.trust.hrefs import HrefPolicy, resolve_href
from ingest.trust.redact import strip_signature
from ingest.upkeep.audit import audit
from ingest.upkeep.repair import verify_sources
from zarr_store.errors import InvalidInput
from zarr_store.grid import Grid
from zarr_store.read import open_cube

GRID = Grid("EPSG:32633", (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_100_000.0), (64, 64))
CONFIG = IngestConfig(bands=("blue",), mask="none")
CANARY = "c4n4ry0fTh3S1gn4tur3"


def pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(1200, 4000, GRID.shape).astype(np.uint16)


def item(href: str, key: str = "B02") -> dict[str, Any]:
    west, south, east, north = GRID.lonlat_bounds()
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    return {
        "type": "Feature", "stac_version": "1.0.0", "id": "A", "collection": "sentinel-2-l2a", "links": [],
        "bbox": [west, south, east, north], "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {
            "datetime": "2023-08-10T10:06:49Z", "platform": "sentinel-2a", "s2:processing_baseline": "03.01",
        },
        "assets": {key: {"href": href}},
    }  # fmt: skip


class Service:
    """A server of this machine that hands out a catalogue, and files by a rule of its own."""

    def __init__(self, server: Any, find: Callable[[str], bytes | None]) -> None:
        self.server, self.find = server, find
        self.asked: list[str] = []
        self.server.answer = Answers(self)
        self.items: list[dict[str, Any]] = []

    @property
    def source(self) -> str:
        return f"{self.server.url}/items.json"

    def reply(self, request: Any) -> Any:
        if request.path.startswith("/items.json"):
            return 200, {"Content-Type": "application/json"}, {"type": "FeatureCollection", "features": self.items}
        self.asked.append(request.path)
        data = self.find(request.path)
        if data is None:
            return 403, {}, {"detail": "no"}
        first, _, last = request.headers["Range"].removeprefix("bytes=").partition("-")
        body = data[int(first) : int(last) + 1]
        where = f"bytes {first}-{int(first) + len(body) - 1}/{len(data)}"
        return 206, {"Content-Range": where, "ETag": '"one"'}, body


class Answers(dict[str, Any]):
    """Whatever path is asked for, the service answers."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def get(self, path: object, default: object = None) -> Any:
        return self.service.reply


@pytest.fixture
def tif(tmp_path: Path) -> Callable[[int], bytes]:
    return lambda seed: write_raster(tmp_path / f"{seed}.tif", GRID, pixels(seed)).read_bytes()


def ingested(service: Service, cube: Path, client: Any, **changes: Any) -> np.ndarray:
    plan = make_plan(service.source, CONFIG)
    report = run(plan, cube, client=client, typed=service.source)
    assert report.exit_code == 0, report.summary()
    return np.asarray(open_cube(cube).dataset("sentinel-2-l2a")["reflectance"].values[0, 0])


@pytest.mark.parametrize("query", [
    "band=B02&sr=2", "sr=2&band=B02", "exp=7&sr=2", "sr=2&name=a%20b+c", "sr=2&empty=&flag", "sp=1&st=3&sr=2&sv=9",
    "sr=2&policy=open&expires=never",
])  # fmt: skip
def test_a_query_is_asked_for_as_it_is(
    server: Any, tif: Callable[[int], bytes], tmp_path: Path, local_client: Any, query: str
) -> None:
    one, two = tif(1), tif(2)
    service = Service(server, lambda path: two if "sr=2" in path else one)
    service.items = [item(f"/get?{query}")]
    np.testing.assert_array_equal(ingested(service, tmp_path / "c.zarr", local_client), pixels(2))
    assert {path.partition("?")[2] for path in service.asked} == {query}
    config = IngestConfig(allow_private_hosts=True)
    assert verify_sources(tmp_path / "c.zarr", config).different == ()


SIGNED = {
    "s3": f"X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Expires=3600&X-Amz-Signature={CANARY}",
    "azure": f"st=2023&se=2033&sr=c&sp=r&sv=2022-11-02&sig={CANARY}%3D",
    "cloudfront": f"Expires=1893456000&Signature={CANARY}&Key-Pair-Id=K1",
    "token": f"layer=2&access_token={CANARY}",
    "own": f"sr=2&exp=7&sig={CANARY}",
}


@pytest.mark.parametrize("kind", SIGNED)
def test_a_signature_is_used_when_a_file_is_read_and_stored_nowhere(
    server: Any, tif: Callable[[int], bytes], tmp_path: Path, local_client: Any, kind: str,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level("DEBUG")
    data = tif(1)
    service = Service(server, lambda path: data if CANARY in path else None)
    service.items = [item(f"/B02.tif?{SIGNED[kind]}")]
    got = ingested(service, tmp_path / "c.zarr", local_client)
    np.testing.assert_array_equal(got, pixels(1))
    assert {path.partition("?")[2] for path in service.asked} == {SIGNED[kind]}
    plan = make_plan(service.source, CONFIG)
    (asset,) = (a for task in plan.tasks for scene in task.sources for a in scene.assets)
    assert asset.presigned
    kept = {"token": "?layer=2", "own": "?sr=2&exp=7"}.get(kind, "")
    assert asset.href == f"{server.url}/B02.tif{kept}"
    shown = [plan.to_json(), plan.summary(), repr(plan), repr(asset), caplog.text]
    shown += [path.read_text(errors="replace") for path in (tmp_path / "c.zarr").rglob("*") if path.is_file()]
    assert not [text for text in shown if CANARY in text]
    # a plan that was kept has no signature, and the error says what helps
    monkeypatch.setattr(presigned, "_signed", {})
    head_cache.cache_clear()
    service.items, items = [], service.items
    found = verify_sources(tmp_path / "c.zarr", IngestConfig(allow_private_hosts=True, retries=0))
    (text,) = found.unread
    assert "HTTP 403" in text
    assert "repeat the `terrashard ingest` command on SOURCE" in text
    # verification searches the catalogue for what a cube lacks, and signatures that it finds there are used
    service.items = items
    head_cache.cache_clear()
    found = verify_sources(tmp_path / "c.zarr", IngestConfig(allow_private_hosts=True, retries=0))
    assert (found.unread, found.different) == ((), ())
    # the same command finds a signature again, and nothing is to be done
    monkeypatch.setattr(presigned, "_signed", {})
    again = run(make_plan(service.source, CONFIG), tmp_path / "c.zarr", client=local_client, typed=service.source)
    assert (len(again.skipped), again.exit_code) == (1, 0)


def test_another_signature_of_the_same_file_is_the_same_plan(server: Any, tif: Callable[[int], bytes]) -> None:
    data = tif(1)
    service = Service(server, lambda path: data)
    digests = set()
    for moment, secret in ((1893456000, "aaaa"), (1893459999, "bbbb")):
        service.items = [item(f"/B02.tif?layer=1&Expires={moment}&Signature={secret}&Key-Pair-Id=K1")]
        digests.add(make_plan(service.source, CONFIG).digest)
    assert len(digests) == 1


def test_an_expired_signature_says_so(server: Any, tmp_path: Path) -> None:
    service = Service(server, lambda path: None)
    service.items = [item(f"/B02.tif?sig={CANARY}&se=2020&sv=1")]
    with pytest.raises(OSError, match="repeat the command on SOURCE") as caught:
        make_plan(service.source, CONFIG)
    assert CANARY not in str(caught.value)


def test_workers_of_other_processes_get_the_signatures_of_their_tasks(server: Any, tif: Callable[[int], bytes]) -> None:
    """What a worker gets beside its task; it is pickled, and neither shown nor part of what is compared."""
    import pickle
    from dataclasses import replace

    from ingest.raster.limits import Access

    data = tif(1)
    service = Service(server, lambda path: data)
    service.items = [item(f"/B02.tif?sig={CANARY}&se=2033&sv=1")]
    plan = make_plan(service.source, CONFIG)
    hrefs = [a.href for task in plan.tasks for scene in task.sources for a in scene.assets]
    access = pickle.loads(pickle.dumps(replace(Access(), signed_hrefs=presigned.signed_hrefs(hrefs))))
    assert CANARY in presigned.find_signed(hrefs[0], access.signed_hrefs)
    assert CANARY not in repr(access)
    assert access == Access()
    assert hash(access) == hash(Access())


def test_two_bands_that_differ_only_in_a_signature_are_not_read_as_one() -> None:
    two = item("https://h.example/get?sig=aaaa")
    two["assets"]["B03"] = {"href": "https://h.example/get?sig=bbbb"}
    config = IngestConfig(bands=("blue", "green"), mask="none", allow_hosts=("h.example",))
    scene = harmonise(two, base="https://h.example/items.json", config=config)
    assert (set(scene.assets), scene.lacking) == ({"blue"}, ("green",))
    assert "differs from that of another band only in what looks like a signature" in " ".join(scene.notes)


@pytest.mark.parametrize("url", [
    "https://h/get?band=B02&sr=2", "https://h/get?b&a=&c=%7E%2f+x", "https://h/a?x=1;y=2", "https://h/a.tif", "s3://b/k?x=1",
    "https://h/a?exp=7&expires=2030-01-01&policy=x&st=1&se=2&sv=3&sp=4&spr=https", "https://h/a?design=1&signal=2",
])  # fmt: skip
def test_what_is_no_signature_stays_byte_for_byte(url: str) -> None:
    assert strip_signature(url) == url


@pytest.mark.parametrize(("url", "kept"), [
    ("https://h/a?b=%20+&X-Amz-Signature=c&z", "https://h/a?b=%20+&z"),
    ("https://h/a?se=2033-01-01&sp=r&sv=2022&sr=b&sig=x%3D&layer=1", "https://h/a?layer=1"),
    ("https://h/a?sr=20m&se=2033-01-01&sv=2022&sig=x", "https://h/a?sr=20m"),
    ("https://h/a?%73ig=x", "https://h/a"),
    ("https://h/a?exp=1893456000&hmac=x&band=2", "https://h/a?band=2"),
    ("https://h/a?X-Goog-Credential=x#part", "https://h/a#part"),
])  # fmt: skip
def test_a_signature_is_cut_out_and_nothing_else(url: str, kept: str) -> None:
    assert strip_signature(url) == kept


NAMES = ["B02 a.tif", "100%.tif", "a+b.tif", "ü.tif", "x#1.tif"]
HREFS = ["B02%20a.tif", "B02 a.tif", "100%25.tif", "100%.tif", "a+b.tif", "a%2Bb.tif", "%C3%BC.tif", "sub/../a%2bb.tif"]


@pytest.mark.parametrize("href", HREFS)
def test_escapes_mean_the_same_in_a_folder_and_on_a_server(
    server: Any, tmp_path: Path, tif: Callable[[int], bytes], href: str
) -> None:
    """The same catalogue, read as files and over HTTP, where the server undoes the escapes of what it is asked for."""
    folder = tmp_path / "served"
    (folder / "sub").mkdir(parents=True)
    for number, name in enumerate(NAMES):
        write_raster(folder / name, GRID, pixels(number))
    here, there = folder / "items.json", f"{server.url}/items.json"
    by_file = resolve_href(href, base=str(here), policy=HrefPolicy.around(str(here)))
    if ".." not in href:  # which no address may have
        by_http = resolve_href(href, base=there, policy=HrefPolicy.around(there))
        from ingest.raster.access import with_asset

        seen = Service(server, lambda path: (folder / unquote(path.lstrip("/"))).read_bytes())
        digest = with_asset(by_http, lambda file: file.read(1).tobytes(), scene="S", asset="B02")
        assert seen.asked
        assert digest == with_asset(by_file, lambda file: file.read(1).tobytes(), scene="S", asset="B02")
    assert Path(by_file).name in NAMES


def test_a_name_with_an_escape_in_it_is_found_where_there_is_no_other(tmp_path: Path) -> None:
    policy = HrefPolicy.around(str(tmp_path / "items.json"))
    (tmp_path / "items.json").touch()

    def find(href: str) -> str:
        return Path(resolve_href(href, base=str(tmp_path / "items.json"), policy=policy)).name

    for name in ("a%20b.tif", "get?band=B02", "x#1.tif"):
        (tmp_path / name).touch()
        assert find(name) == name
    (tmp_path / "a b.tif").touch()
    assert find("a%20b.tif") == "a b.tif", "as a server that hands out this folder"
    (tmp_path / "c.tif").touch()
    assert find("c.tif?version=2#part") == "c.tif"
    kept = str(tmp_path / "a%20b.tif")
    assert resolve_href(kept, base="/", policy=policy, resolved=True) == kept, "a plan is taken letter for letter"
    for hostile in (
        "%2e%2e/x.tif",
        "..%2f..%2fetc%2fpasswd",
        "%2Fvsicurl%2Fx",
        "a%00b.tif/../../../x",
        "/etc%2Fpasswd",
    ):
        with pytest.raises(InvalidInput):
            resolve_href(hostile, base=str(tmp_path / "items.json"), policy=policy)


def test_keys_of_a_bucket_have_no_escapes() -> None:
    policy = HrefPolicy.around("s3://box/items.json")
    for href, key in {
        "a b.tif": "a b.tif",
        "a%20b.tif": "a b.tif",
        "100%.tif": "100%.tif",
        "x/y+z.tif": "x/y+z.tif",
    }.items():
        assert resolve_href(href, base="s3://box/d/items.json", policy=policy) == f"s3://box/d/{key}"
    assert resolve_href("s3://box/a%20b.tif", base="s3://box/d/items.json", policy=policy) == "s3://box/a%20b.tif"


def test_audit_finds_cubes_whose_queries_lost_a_part(
    server: Any, tif: Callable[[int], bytes], tmp_path: Path, local_client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cube of before asked for `/get?band=B02` where the catalogue says `/get?band=B02&sr=2`."""
    one, two = tif(1), tif(2)
    service = Service(server, lambda path: two if "sr=2" in path else one)
    service.items = [item("/get?band=B02")]
    np.testing.assert_array_equal(ingested(service, tmp_path / "c.zarr", local_client), pixels(1))
    assert audit(tmp_path / "c.zarr", CONFIG, source=service.source).replaced == ()
    service.items = [item("/get?band=B02&sr=2")]
    report = audit(tmp_path / "c.zarr", CONFIG, source=service.source)
    assert [(row["id"], row["assets"]) for row in report.replaced] == [("A", ["B02"])]


def test_plans_of_before_are_read(server: Any, tif: Callable[[int], bytes]) -> None:
    data = tif(1)
    service = Service(server, lambda path: data)
    service.items = [item("/B02.tif")]
    plan = make_plan(service.source, CONFIG)
    text = plan.to_json()
    assert not re.search(r'"(presigned|refusal|file_offset|unit)"', json.dumps(json.loads(text)["scenes"]))
    assert Plan.from_json(text, "plan").digest == plan.digest
