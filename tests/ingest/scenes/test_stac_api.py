"""A STAC API is searched: pages, conditions, credentials, and servers that misbehave."""

from __future__ import annotations

import base64
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ingest.request.config import IngestConfig
from ingest.scenes import api as api_module
from ingest.scenes.search import find_items, find_scenes
from ingest.trust.connections import PatientRetry
from zarr_store.errors import AccessError, InvalidInput, NothingFound, UnknownName

Make = Callable[..., dict[str, Any]]
Save = Callable[..., Path]
L2A = IngestConfig(collections=("sentinel-2-l2a",))


# A STAC API


class Api:
    """A STAC API on a scripted server: pages of items, by POST and GET."""

    def __init__(self, server: Any, items: list[dict[str, Any]], *, page: int = 2) -> None:
        self.server, self.items, self.page = server, items, page
        search_link = {"rel": "search", "href": f"{server.url}/search", "type": "application/geo+json"}
        core = "https://api.stacspec.org/v1.0.0/"
        server.json("/", {
            "type": "Catalog", "id": "api", "stac_version": "1.0.0", "description": "d",
            "conformsTo": [core + "core", core + "item-search", core + "item-search#query"],
            "links": [{"rel": "self", "href": server.url + "/"}, search_link, {**search_link, "method": "POST"}],
        })  # fmt: skip
        server.json("/collections", {"collections": [{"id": "sentinel-2-l2a"}, {"id": "sentinel-1-grd"}]})
        server.json("/collections/sentinel-2-l2a", {"type": "Collection", "id": "sentinel-2-l2a", "item_assets": {}})
        server.answer["/search"] = self.search

    def search(self, request: Any) -> tuple[int, dict[str, str], Any]:
        body = request.body or {}
        start = int(body.get("token", 0))
        features = self.items[start : start + self.page]
        links = []
        if start + self.page < len(self.items):
            links = [{"rel": "next", "href": f"{self.server.url}/search", "method": "POST", "merge": True,
                      "body": {"token": start + self.page}}]  # fmt: skip
        return 200, {}, {"type": "FeatureCollection", "features": features, "links": links}


@pytest.fixture
def items(make_item: Make) -> list[dict[str, Any]]:
    """Five dates, hrefs relative to the item."""
    return [
        make_item(
            f"day-{day}", datetime=f"2023-08-{day}T10:00:00Z", s2__datatake_id=f"GS2A_202308{day}T095031_04_N05.09"
        )
        for day in range(10, 15)
    ]


def test_pages_are_followed_and_conditions_sent(server: Any, items: list[dict[str, Any]]) -> None:
    Api(server, [*items, items[0]])
    config = L2A.model_copy(
        update={"bbox": (15.1, 46.1, 15.2, 46.2), "datetime": "2023-08", "query": ("eo:cloud_cover<40",)}
    )
    scenes = find_scenes(server.url, config).scenes
    assert [s.id for s in scenes] == [f"day-{day}" for day in range(10, 15)]
    assert scenes[0].assets["blue"].href == f"{server.url}/B02.tif"
    sent = [r.body for r in server.requests if r.path == "/search"]
    assert len(sent) == 3
    assert sent[0] == {
        "limit": 100,
        "collections": ["sentinel-2-l2a"],
        "bbox": [15.1, 46.1, 15.2, 46.2],
        "datetime": "2023-08-01T00:00:00Z/2023-08-31T23:59:59Z",
        "query": {"eo:cloud_cover": {"lt": 40.0}},
    }
    assert sent[2]["token"] == 4
    assert sent[2]["bbox"] == sent[0]["bbox"]


def test_a_server_that_ignores_conditions_is_corrected(server: Any, items: list[dict[str, Any]]) -> None:
    Api(server, items)
    assert len(find_scenes(server.url, L2A.model_copy(update={"datetime": "2023-08-12/.."})).scenes) == 3
    with pytest.raises(NothingFound):
        find_scenes(server.url, L2A.model_copy(update={"bbox": (0.0, 0.0, 1.0, 1.0)}))


def test_max_items_stops_asking(server: Any, items: list[dict[str, Any]]) -> None:
    Api(server, items)
    assert len(find_scenes(server.url, L2A.model_copy(update={"max_items": 2})).scenes) == 2
    assert server.paths().count("/search") == 1


def test_a_region_over_the_antimeridian_is_sent_as_a_shape(server: Any, items: list[dict[str, Any]]) -> None:
    Api(server, items)
    with pytest.raises(NothingFound):
        find_scenes(server.url, L2A.model_copy(update={"bbox": (179.0, 0.0, -179.0, 1.0)}))
    body = next(r.body for r in server.requests if r.path == "/search")
    assert "bbox" not in body
    assert body["intersects"]["type"] == "MultiPolygon"


def test_an_api_that_knows_no_post_is_asked_by_get(server: Any, items: list[dict[str, Any]]) -> None:
    api = Api(server, items, page=3)

    def by_get(request: Any) -> tuple[int, dict[str, str], Any]:
        if request.method == "POST":
            return 405, {}, {"detail": "no"}
        second = "token=3" in request.path
        links = [] if second else [{"rel": "next", "href": f"{server.url}/search?token=3"}]
        return (
            200,
            {},
            {"type": "FeatureCollection", "features": api.items[3:] if second else api.items[:3], "links": links},
        )

    server.answer["/search"] = by_get
    assert len(find_scenes(server.url, L2A).scenes) == 5
    gets = [r.path for r in server.requests if r.path.startswith("/search") and r.method == "GET"]
    assert "collections=sentinel-2-l2a" in gets[0]
    assert gets[1] == "/search?token=3"


def test_a_page_that_repeats_for_ever_is_an_error(server: Any, items: list[dict[str, Any]]) -> None:
    Api(server, items)
    link = {"rel": "next", "href": f"{server.url}/search", "method": "POST", "body": {"token": 0}}
    server.json("/search", {"type": "FeatureCollection", "features": items[:2], "links": [link]})
    with pytest.raises(AccessError, match="same page again"):
        find_scenes(server.url, L2A)
    assert server.paths().count("/search") == 2  # the fault did fire


def test_empty_pages_for_ever_end_too(server: Any, items: list[dict[str, Any]]) -> None:
    Api(server, items)
    link = {"rel": "next", "href": f"{server.url}/search", "method": "POST", "body": {}}
    server.json("/search", {"type": "FeatureCollection", "features": [], "links": [link]})
    with pytest.raises(NothingFound):
        find_scenes(server.url, L2A)
    assert server.paths().count("/search") == 3


def test_an_empty_page_before_the_last_loses_nothing(server: Any, items: list[dict[str, Any]]) -> None:
    Api(server, items)
    link = {"rel": "next", "href": f"{server.url}/more"}
    server.json("/search", {"type": "FeatureCollection", "features": [], "links": [link]})
    server.json("/more", {"type": "FeatureCollection", "features": items, "links": []})
    assert len(find_scenes(server.url, L2A).scenes) == 5


def test_a_next_link_to_another_host_is_refused_and_gets_nothing(
    server: Any, make_server: Callable[[], Any], items: list[dict[str, Any]]
) -> None:
    Api(server, items)
    other = make_server()
    other.json("/search", {"type": "FeatureCollection", "features": items[2:], "links": []})
    link = {"rel": "next", "href": f"{other.url}/search", "method": "POST", "body": {}}
    server.json("/search", {"type": "FeatureCollection", "features": items[:2], "links": [link]})
    with pytest.raises(InvalidInput, match="another host"):
        find_scenes(server.url, L2A, headers={"Authorization": "Bearer canary"})
    assert server.paths().count("/search") == 1
    assert other.requests == []


def test_credentials_stay_at_their_origin(
    server: Any, make_server: Callable[[], Any], items: list[dict[str, Any]]
) -> None:
    Api(server, items)
    other = make_server()
    other.json("/moved", {"type": "Collection", "id": "sentinel-2-l2a"})
    server.answer["/collections/sentinel-2-l2a"] = lambda _: (302, {"Location": f"{other.url}/moved"}, b"")
    find_scenes(server.url, L2A, headers={"Authorization": "Bearer canary"})
    assert all(r.headers.get("Authorization") == "Bearer canary" for r in server.requests)
    assert len(other.requests) == 1
    assert "canary" not in str(other.requests[0].headers)


def test_userinfo_of_the_source_is_sent_and_never_shown(server: Any, items: list[dict[str, Any]]) -> None:
    Api(server, items)
    source = server.url.replace("http://", "http://me:canary@")
    scenes = find_scenes(source, L2A).scenes
    token = "Basic " + base64.b64encode(b"me:canary").decode()
    assert {r.headers.get("Authorization") for r in server.requests} == {token}
    assert "canary" not in json.dumps([s.to_dict() for s in scenes])
    server.json("/search", {"detail": "no such user"}, status=403)
    with pytest.raises(AccessError) as caught:
        find_scenes(source, L2A)
    assert "HTTP 403" in str(caught.value)
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize("status", [429, 503])
def test_an_overloaded_api_is_asked_again(server: Any, items: list[dict[str, Any]], status: int) -> None:
    api = Api(server, items)
    failures = iter([status, status])

    def flaky(request: Any) -> tuple[int, dict[str, str], Any]:
        failed = next(failures, None)
        return (failed, {"Retry-After": "0"}, {}) if failed else api.search(request)

    server.answer["/search"] = flaky
    assert len(find_scenes(server.url, L2A).scenes) == 5
    assert server.paths().count("/search") == 5


def test_an_api_whose_pages_never_end_is_left(
    server: Any, items: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert api_module.MAX_PAGES == 5000
    monkeypatch.setattr(api_module, "MAX_PAGES", 4)
    Api(server, items)
    asked = itertools.count()

    def endless(_: Any) -> tuple[int, dict[str, str], Any]:
        number = next(asked)
        page = [{**items[0], "id": f"item-{number}"}]
        link = {
            "rel": "next",
            "href": f"{server.url}/search",
            "method": "POST",
            "merge": True,
            "body": {"token": number},
        }
        return 200, {}, {"type": "FeatureCollection", "features": page, "links": [link]}

    server.answer["/search"] = endless
    with pytest.raises(AccessError, match="more than 4 pages of items; narrow the region or the time"):
        find_scenes(server.url, L2A)
    assert next(asked) == 4


def test_an_api_is_given_the_time_that_it_asks_for(server: Any, items: list[dict[str, Any]]) -> None:
    api = Api(server, items)
    asked: list[float] = []

    def busy_once(request: Any) -> tuple[int, dict[str, str], Any]:
        asked.append(time.monotonic())
        return (429, {"Retry-After": "2"}, {}) if len(asked) == 1 else api.search(request)

    server.answer["/search"] = busy_once
    assert len(find_scenes(server.url, L2A).scenes) == 5
    assert 2.0 <= asked[1] - asked[0] < 10, "our own pause would be half a second at most"


def test_an_api_that_asks_for_an_hour_is_not_waited_for(
    server: Any, items: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert PatientRetry.longest_s == 120
    monkeypatch.setattr(PatientRetry, "longest_s", 1.0)
    api = Api(server, items)
    asked: list[float] = []

    def busy_once(request: Any) -> tuple[int, dict[str, str], Any]:
        asked.append(time.monotonic())
        return (503, {"Retry-After": "3600"}, {}) if len(asked) == 1 else api.search(request)

    server.answer["/search"] = busy_once
    assert len(find_scenes(server.url, L2A).scenes) == 5
    assert 1.0 <= asked[1] - asked[0] < 10


def test_an_api_that_stays_down_is_an_access_error(server: Any, items: list[dict[str, Any]]) -> None:
    Api(server, items)
    server.answer["/search"] = lambda _: (503, {"Retry-After": "0"}, b"<html>down</html>")
    with pytest.raises(AccessError, match="HTTP 503") as caught:
        find_scenes(server.url, L2A.model_copy(update={"retries": 2}))
    assert "html" not in str(caught.value)
    assert server.paths().count("/search") == 3


def test_a_silent_api_ends_at_the_timeout(server: Any, items: list[dict[str, Any]]) -> None:
    import threading

    Api(server, items)
    release = threading.Event()
    server.answer["/search"] = lambda _: (release.wait(10), (200, {}, {}))[1]
    try:
        with pytest.raises(AccessError, match="no answer in time"):
            find_scenes(server.url, L2A.model_copy(update={"retries": 0, "timeout_s": 0.3}))
    finally:
        release.set()


def test_names_are_checked_with_the_api(server: Any, items: list[dict[str, Any]]) -> None:
    Api(server, items)
    with pytest.raises(UnknownName, match="did you mean 'sentinel-2-l2a'"):
        find_scenes(server.url, IngestConfig(collections=("sentinel-2-l2b",)))
    with pytest.raises(InvalidInput, match=r"name a --collection \(it has sentinel-2-l2a\)"):
        find_scenes(server.url, IngestConfig())
    asked = len(server.requests)
    with pytest.raises(UnknownName, match="blue"):
        find_scenes(server.url, L2A.model_copy(update={"bands": ("bleu",)}))
    assert len(server.requests) == asked  # refused before anything was sent


def test_a_collection_url_of_an_api_selects_it(server: Any, items: list[dict[str, Any]]) -> None:
    Api(server, items)
    links = [{"rel": "items", "href": "x"}, {"rel": "root", "href": server.url + "/"}]
    server.json("/collections/sentinel-2-l2a", {"type": "Collection", "id": "sentinel-2-l2a", "links": links})
    found = find_items(f"{server.url}/collections/sentinel-2-l2a", IngestConfig())
    assert len(found) == 5
    assert next(r.body for r in server.requests if r.path == "/search")["collections"] == ["sentinel-2-l2a"]


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        ((200, {}, b"<!doctype html><p>Log in"), InvalidInput, "HTML"),
        ((200, {}, b'{"type": "FeatureColl'), InvalidInput, "cut off"),
        ((200, {}, {"features": 7}), InvalidInput, "expected a FeatureCollection"),
        ((400, {}, {"detail": "bad bbox"}), AccessError, "bad bbox"),
        ((200, {"Content-Length": "500"}, b'{"type": '), AccessError, "cannot reach"),
    ],
)
def test_answers_that_are_no_answers(
    server: Any, items: list[dict[str, Any]], answer: Any, error: type[Exception], message: str
) -> None:
    Api(server, items)
    server.answer["/search"] = lambda _: answer
    with pytest.raises(error, match=message):
        find_scenes(server.url, L2A.model_copy(update={"timeout_s": 1.0, "retries": 0}))


def test_a_static_catalogue_over_http(server: Any, items: list[dict[str, Any]]) -> None:
    links = [{"rel": "item", "href": f"./items/{item['id']}.json"} for item in items]
    server.json("/cat/catalog.json", {"type": "Catalog", "id": "c", "links": links})
    for item in items:
        server.json(f"/cat/items/{item['id']}.json", item)
    scenes = find_scenes(f"{server.url}/cat/catalog.json", IngestConfig()).scenes
    assert [s.assets["scl"].href for s in scenes] == [f"{server.url}/cat/items/SCL.tif"] * 5
    with pytest.raises(AccessError, match="404"):
        find_scenes(f"{server.url}/cat/nothing.json", IngestConfig())


def test_a_closed_port_fails_fast() -> None:
    with pytest.raises(AccessError, match="Connection refused"):
        find_scenes("http://127.0.0.1:9/", IngestConfig())
