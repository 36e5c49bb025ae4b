"""CQL2 text: what passes, what is refused, and how much of it an API is asked with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ingest.request.config import IngestConfig
from ingest.request.query import Comparison, Cql2, conjuncts, parse_condition
from ingest.scenes.search import find_scenes
from zarr_store.errors import NothingFound

FACTS = {
    "id": "S2A_x",
    "platform": "sentinel-2a",
    "eo:cloud_cover": 12.5,
    "s2:processing_baseline": "05.09",
    "datetime": "2023-08-15T09:57:57.246Z",
    "flag": True,
    "100%": "a_b",
}


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("eo:cloud_cover < 40 AND platform = 'sentinel-2a'", True),
        ("eo:cloud_cover > 40 OR platform = 'sentinel-2a'", True),
        ("NOT (eo:cloud_cover > 40 OR platform = 'sentinel-2a')", False),
        ("platform IN ('sentinel-2a', 'sentinel-2b')", True),
        ("platform NOT IN ('sentinel-2b', 'sentinel-2c')", True),
        ("eo:cloud_cover BETWEEN 12.5 AND 13", True),
        ("eo:cloud_cover NOT BETWEEN 12.5 AND 13", False),
        ("platform LIKE 'sentinel-2%'", True),
        ("platform LIKE 'sentinel-__'", True),
        ("platform LIKE 'sentinel'", False),
        ("platform LIKE 'sentinel.2a'", False),  # a pattern is no regular expression
        ("casei(platform) = casei('SENTINEL-2A')", True),
        ("grid IS NULL", True),
        ("platform IS NOT NULL", True),
        ("s2:processing_baseline >= '04.00' AND flag = true", True),
        ("datetime >= TIMESTAMP('2023-08-15T11:57:57.246+02:00')", True),
        ("datetime > TIMESTAMP('2023-08-15T09:57:58Z')", False),
        ("40 > eo:cloud_cover", True),
        # an absent property is unknown, and so is its negation
        ("absent < 3", False),
        ("NOT (absent < 3)", False),
        ("absent < 3 OR platform IS NOT NULL", True),
        ("absent NOT IN (1, 2)", False),
        ("NOT (absent < 3 AND platform = 'x')", True),
    ],
)
def test_what_passes(text: str, holds: bool) -> None:
    assert parse_condition(text).holds(FACTS) is holds
    if "NOT (" not in text:
        assert Cql2(text).holds(FACTS) is holds


def test_simple_comparisons_stay_as_they_were() -> None:
    assert parse_condition("eo:cloud_cover<40") == Comparison("eo:cloud_cover", "<", 40.0)
    assert parse_condition("platform=sentinel-2a").holds(FACTS)
    assert parse_condition("platform = 'Sentinel-2A'").holds(FACTS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("eo:cloud_cover < 40 AND", "at character 24"),
        ("eo:cloud_cover", "expected PROPERTY<VALUE"),
        ("S_INTERSECTS(geometry, POINT(1 2)) AND gsd = 10", "--bbox or --geometry"),
        ("gsd + 1 < 4 AND a = 1", "not supported"),
        ("datetime > TIMESTAMP('yesterday') AND a = 1", "expected a time such as"),
        ("(" * 3000 + "a = 1" + ")" * 3000, "too long or nested too deeply"),
        ("NOT " * 900 + "a = 1", "too long or nested too deeply"),
    ],
)
def test_nonsense_is_refused_before_anything_is_asked(text: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        IngestConfig(query=(text,))


def test_commas_of_a_settings_file_do_not_cut_lists() -> None:
    config = IngestConfig(query="eo:cloud_cover<40, platform IN ('a','b')")
    assert config.selection.query == ("eo:cloud_cover<40", "platform IN ('a','b')")
    assert IngestConfig.model_validate(config.model_dump()) == config


def test_files_are_selected_by_it(save: Callable[..., Path], make_item: Callable[..., dict[str, Any]]) -> None:
    path = save(make_item("A", eo__cloud_cover=10), make_item("B", eo__cloud_cover=60), make_item("C", platform=None))
    ids = [
        s.id for s in find_scenes(str(path), IngestConfig(query=("id IN ('A', 'B') AND eo:cloud_cover < 50",))).scenes
    ]
    assert ids == ["A"]
    with pytest.raises(NothingFound, match="turned away 3"):
        find_scenes(
            str(path), IngestConfig(query=("eo:cloud_cover BETWEEN 61 AND 70 OR platform IS NULL AND gsd = 1",))
        )


def test_only_what_an_api_understands_is_sent() -> None:
    tree = Cql2("a = 1 AND b IN (1, 2) AND (c > 2 OR d IS NULL) AND NOT e LIKE 'x%'").tree()
    assert [part["op"] for part in conjuncts(tree, advanced=False)] == ["=", "or"]
    assert [part["op"] for part in conjuncts(tree, advanced=True)] == ["=", "in", "or", "not"]


@pytest.mark.parametrize("advanced", [True, False])
@pytest.mark.parametrize("method", ["POST", "GET"])
def test_an_api_is_asked_by_its_conformance(
    server: Any, make_item: Callable[..., dict[str, Any]], advanced: bool, method: str
) -> None:
    cql = "http://www.opengis.net/spec/cql2/1.0/conf/"
    item_search = "https://api.stacspec.org/v1.0.0/item-search"
    conforms = [item_search, f"{item_search}#filter", cql + "cql2-text", cql + "basic-cql2"]
    conforms += [cql + "advanced-comparison-operators"] if advanced else []
    search_link = {"rel": "search", "href": f"{server.url}/search", "type": "application/geo+json"}
    root = {"type": "Catalog", "id": "api", "stac_version": "1.0.0", "description": "", "conformsTo": conforms,
            "links": [search_link, {**search_link, "method": "POST"}]}  # fmt: skip
    server.json("/", root)
    server.json("/collections/sentinel-2-l2a", {"id": "sentinel-2-l2a", "type": "Collection", "links": []})
    items = [make_item("A", eo__cloud_cover=10), make_item("B", eo__cloud_cover=60)]  # it ignores every condition

    def answer(request: Any) -> Any:
        if request.method != method:
            return 405, {}, {"detail": "no"}
        return 200, {}, {"type": "FeatureCollection", "features": items, "links": []}

    server.answer["/search"] = answer
    config = IngestConfig(collections=("sentinel-2-l2a",), query=("eo:cloud_cover<40 AND platform LIKE 'sentinel-2%'",))
    assert [s.id for s in find_scenes(f"{server.url}/", config).scenes] == ["A"]
    asked = next(r for r in reversed(server.requests) if r.path.startswith("/search"))
    sent = str(asked.body) if method == "POST" else asked.path
    assert "eo%3Acloud_cover" in sent or "eo:cloud_cover" in sent
    assert ("like" in sent.lower()) is advanced


def test_a_filter_that_is_refused_is_left_to_us(server: Any, make_item: Callable[..., dict[str, Any]]) -> None:
    conforms = ["https://api.stacspec.org/v1.0.0/item-search", "https://api.stacspec.org/v1.0.0/item-search#filter",
                "http://www.opengis.net/spec/cql2/1.0/conf/basic-cql2"]  # fmt: skip
    link = {"rel": "search", "href": f"{server.url}/search", "type": "application/geo+json", "method": "POST"}
    server.json("/", {"type": "Catalog", "id": "api", "stac_version": "1.0.0", "description": "",
                      "conformsTo": conforms, "links": [link]})  # fmt: skip
    server.json("/collections/sentinel-2-l2a", {"id": "sentinel-2-l2a", "type": "Collection", "links": []})
    refused = []

    def answer(request: Any) -> Any:
        if "filter" in request.body:
            refused.append(request.body)
            return 400, {}, {"detail": "unknown queryable"}
        items = [make_item("A", eo__cloud_cover=10), make_item("B", eo__cloud_cover=60)]
        return 200, {}, {"type": "FeatureCollection", "features": items, "links": []}

    server.answer["/search"] = answer
    config = IngestConfig(collections=("sentinel-2-l2a",), query=("eo:cloud_cover < 40 AND gsd IS NULL",))
    assert [s.id for s in find_scenes(f"{server.url}/", config).scenes] == ["A"]
    assert len(refused) == 1
