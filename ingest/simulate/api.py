"""`make_application` makes the STAC API of a simulated world from the routes of stac-fastapi and lists in memory.

stac-fastapi has the routes, request models and conformance classes; the back end is a list of items from the static
catalogue on disk. Item hrefs in answers point to the file server of the same application.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urljoin

import attr
from fastapi import HTTPException, Request
from shapely.geometry import box, shape
from stac_fastapi.api.app import StacApi
from stac_fastapi.api.models import (
    ItemCollectionUri,
    create_get_request_model,
    create_post_request_model,
)
from stac_fastapi.extensions.pagination import TokenPaginationExtension
from stac_fastapi.extensions.query import QueryExtension
from stac_fastapi.types.config import ApiSettings
from stac_fastapi.types.core import BaseCoreClient
from stac_fastapi.types.errors import NotFoundError
from stac_fastapi.types.rfc3339 import rfc3339_str_to_datetime, str_to_interval
from starlette.routing import Route

__all__ = ["MemoryClient", "make_application"]

Json = dict[str, Any]


def make_application(collections: dict[str, Json], items: list[Json], routes: Sequence[Route]) -> Any:
    """Make the ASGI application of the API and of further routes.

    Args:
        collections: Collections by id, without links.
        items: Items in the order of answers, with hrefs relative to the server's root.
        routes: Further routes, here those of the file server.
    """
    paging, query = TokenPaginationExtension(), QueryExtension()
    settings = ApiSettings(
        _env_file=None,  # a .env in the working folder belongs to something else
        stac_fastapi_title="terrashard simulator",
        stac_fastapi_description="A simulated world as STAC API",
        stac_fastapi_landing_id="terrashard-simulator",
        stac_fastapi_version="1.0",
    )
    api = StacApi(
        settings=settings,
        client=MemoryClient(collections=collections, items=items, landing_page_id=settings.stac_fastapi_landing_id),
        extensions=[paging, query],
        search_get_request_model=create_get_request_model([paging, query]),
        search_post_request_model=create_post_request_model([paging, query]),
        items_get_request_model=create_get_request_model([paging], base_model=ItemCollectionUri),
        # no compression and no forwarded headers, so that byte counts and hrefs stay correct
        middlewares=[],
    )
    api.app.router.routes.extend(routes)
    return api.app


@attr.s
class MemoryClient(BaseCoreClient):
    """Back end that answers searches from lists in memory; the token of a page is the next position in the list."""

    collections: dict[str, Json] = attr.ib(factory=dict)
    items: list[Json] = attr.ib(factory=list)

    def all_collections(self, **kwargs: Any) -> Any:
        """Answer GET /collections."""
        request: Request = kwargs["request"]
        return {
            "collections": [self._collection(name, request) for name in self.collections],
            "links": [
                {"rel": "root", "type": "application/json", "href": str(request.base_url)},
                {"rel": "self", "type": "application/json", "href": str(request.url)},
            ],
        }

    def get_collection(self, collection_id: str, **kwargs: Any) -> Any:
        """Answer GET /collections/{collection_id}."""
        return self._collection(collection_id, kwargs["request"])

    def get_item(self, item_id: str, collection_id: str, **kwargs: Any) -> Any:
        """Answer GET /collections/{collection_id}/items/{item_id}."""
        for item in self.items:
            if (item["id"], item["collection"]) == (item_id, collection_id):
                return _linked(item, kwargs["request"])
        raise NotFoundError(f"no item {item_id} in collection {collection_id}")

    def item_collection(
        self,
        collection_id: str,
        bbox: Any = None,
        datetime: str | None = None,
        limit: int | None = 10,
        token: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Answer GET /collections/{collection_id}/items."""
        self._collection(collection_id, kwargs["request"])
        found = self._select(collections=[collection_id], bbox=bbox, datetime=datetime)
        return _page(found, limit, token, kwargs["request"])

    def get_search(
        self,
        collections: list[str] | None = None,
        ids: list[str] | None = None,
        bbox: Any = None,
        intersects: Any = None,
        datetime: str | None = None,
        limit: int | None = 10,
        token: str | None = None,
        query: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Answer GET /search."""
        try:
            area = json.loads(intersects) if intersects else None
            conditions = json.loads(query) if query else None
        except ValueError as error:
            raise HTTPException(status_code=400, detail=f"intersects and query must be JSON: {error}") from error
        found = self._select(collections, ids, bbox, area, datetime, conditions)
        return _page(found, limit, token, kwargs["request"])

    def post_search(self, search_request: Any, **kwargs: Any) -> Any:
        """Answer POST /search."""
        body = search_request.model_dump(mode="json", exclude_none=True)
        found = self._select(
            body.get("collections"),
            body.get("ids"),
            body.get("bbox"),
            body.get("intersects"),
            body.get("datetime"),
            body.get("query"),
        )
        return _page(found, body.get("limit", 10), body.get("token"), kwargs["request"], body=body)

    def _collection(self, name: str, request: Request) -> Json:
        if name not in self.collections:
            raise NotFoundError(f"no collection {name}")
        base = str(request.base_url)
        out = copy.deepcopy(self.collections[name])
        out["links"] = [
            {"rel": "self", "type": "application/json", "href": urljoin(base, f"collections/{name}")},
            {"rel": "parent", "type": "application/json", "href": base},
            {"rel": "root", "type": "application/json", "href": base},
            {"rel": "items", "type": "application/geo+json", "href": urljoin(base, f"collections/{name}/items")},
        ]
        return out

    def _select(
        self,
        collections: list[str] | None = None,
        ids: list[str] | None = None,
        bbox: Any = None,
        intersects: Json | None = None,
        datetime: str | None = None,
        query: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> list[Json]:
        area = shape(intersects.get("geometry", intersects)) if intersects else None
        if bbox:
            area = box(*bbox) if len(bbox) == 4 else box(bbox[0], bbox[1], bbox[3], bbox[4])
        span = str_to_interval(datetime) if datetime else None
        first, last = span if isinstance(span, tuple) else (span, span)
        out = []
        for item in self.items:
            when = rfc3339_str_to_datetime(item["properties"]["datetime"])
            if (
                (not collections or item["collection"] in collections)
                and (not ids or item["id"] in ids)
                and (first is None or when >= first)
                and (last is None or when <= last)
                and all(_holds(item, name, tests) for name, tests in (query or {}).items())
                and (area is None or shape(item["geometry"]).intersects(area))
            ):
                out.append(item)
        return out


def _holds(item: Json, name: str, tests: Mapping[str, Any]) -> bool:
    """Evaluate the comparisons of one property (STAC API query extension); an absent property fulfils none."""
    value = item["properties"].get(name, item.get(name))
    if value is None:
        return False
    compare: dict[str, Callable[[Any], bool]] = {
        "eq": lambda v: value == v,
        "neq": lambda v: value != v,
        "lt": lambda v: value < v,
        "lte": lambda v: value <= v,
        "gt": lambda v: value > v,
        "gte": lambda v: value >= v,
        "in": lambda v: value in v,
        "startsWith": lambda v: str(value).startswith(v),
        "endsWith": lambda v: str(value).endswith(v),
        "contains": lambda v: v in str(value),
    }
    for operator, wanted in tests.items():
        if operator not in compare:
            raise HTTPException(
                status_code=400, detail=f"unknown query operator {operator!r}; choose from {sorted(compare)}"
            )
        if not compare[operator](wanted):
            return False
    return True


def _page(
    found: list[Json], limit: int | None, token: str | None, request: Request, *, body: Json | None = None
) -> Json:
    """Make one page of results with the link to the next; `body` is the body of a POST."""
    try:
        start = int((token or "next:0").removeprefix("next:"))
    except ValueError as error:
        raise HTTPException(status_code=400, detail=f"token {token!r} was not given by this server") from error
    size = limit or 10
    page = found[start : start + size]
    base = str(request.base_url)
    links: list[Json] = [{"rel": "root", "type": "application/json", "href": base}]
    if start + size < len(found):
        after = f"next:{start + size}"
        url = str(request.url)
        link: Json = {"rel": "next", "type": "application/geo+json", "method": "POST" if body is not None else "GET"}
        if body is None:
            link["href"] = str(request.url.include_query_params(token=after))
        else:
            link |= {"href": url, "body": body | {"token": after}, "merge": False}
        links.append(link)
    return {
        "type": "FeatureCollection",
        "features": [_linked(item, request) for item in page],
        "links": links,
        "numberMatched": len(found),
        "numberReturned": len(page),
    }


def _linked(item: Json, request: Request) -> Json:
    """Copy an item, with absolute links and hrefs."""
    base = str(request.base_url)
    out = copy.deepcopy(item)
    path = f"collections/{item['collection']}"
    out["links"] = [
        {"rel": "self", "type": "application/geo+json", "href": urljoin(base, f"{path}/items/{item['id']}")},
        {"rel": "parent", "type": "application/json", "href": urljoin(base, path)},
        {"rel": "collection", "type": "application/json", "href": urljoin(base, path)},
        {"rel": "root", "type": "application/json", "href": base},
        *out["links"],
    ]
    for asset in out["assets"].values():
        asset["href"] = urljoin(base, asset["href"])
    return out
