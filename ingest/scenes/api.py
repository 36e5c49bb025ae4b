"""Search a STAC API with pystac-client, within limits.

Every request goes through `Documents` (timeouts, bounded retries, size caps, credentials bound to their origin), and
every page through a guard: pystac-client itself follows a `next` link to itself without end, and to any host.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import urljoin, urlsplit

import cql2
from pystac_client import Client
from pystac_client.conformance import ConformanceClasses
from pystac_client.stac_api_io import StacApiIO

from ingest.request.config import IngestConfig
from ingest.request.products import PRODUCTS
from ingest.request.query import Comparison, Condition, conjuncts
from ingest.scenes.catalogue import CatalogueItem
from ingest.scenes.documents import Documents, HttpStatusError
from ingest.scenes.footprint import to_geojson
from ingest.scenes.selection import Selection
from ingest.trust.hrefs import is_url, same_origin
from ingest.trust.redact import redact_url
from zarr_store.errors import AccessError, InvalidInput, UnknownName

__all__ = ["api_root", "ask_api"]

log = logging.getLogger(__name__)

PAGE_ITEMS = 100
"""Number of items that a page is asked to have."""
MAX_PAGES = 5_000
"""Largest number of pages of one search."""
_EMPTY_PAGES = 3
"""Number of empty pages in a row that end a search."""
_QUERY_WORDS = {"<": "lt", "<=": "lte", ">": "gt", ">=": "gte", "=": "eq", "!=": "neq"}


def api_root(documents: Documents, location: str, document: Mapping[str, Any]) -> str | None:
    """Return the URL of the API that a document belongs to; None for a static document.

    Raises:
        InvalidInput: The document is one page of a search.
    """
    links = [link for link in document.get("links") or [] if isinstance(link, Mapping)]
    rels = {link.get("rel") for link in links}
    if document.get("conformsTo") or "search" in rels:
        return location
    if document.get("type") == "Collection" and "items" in rels:
        root = next((link.get("href") for link in links if link.get("rel") == "root"), None)
        if isinstance(root, str) and same_origin(urljoin(location, root), location):
            return urljoin(location, root)
    if document.get("type") == "FeatureCollection" and any(link.get("rel") == "next" for link in links):
        raise InvalidInput(f"{redact_url(location)} is one page of a search; give the address of the API itself")
    return None


class _GuardedIO(StacApiIO):
    """Transport of pystac-client over `Documents`, with a guard on paging."""

    def __init__(self, documents: Documents) -> None:
        super().__init__(max_retries=None)
        self.documents = documents

    def request(
        self,
        href: str,
        method: str | None = None,
        headers: dict[str, str] | None = None,
        parameters: dict[str, Any] | None = None,
    ) -> str:
        return json.dumps(self.documents.request(href, method=(method or "GET").upper(), parameters=parameters))

    def get_pages(
        self, url: str, method: str | None = None, parameters: dict[str, Any] | None = None
    ) -> Iterator[dict[str, Any]]:
        """Yield the pages of a search, until there is no next one.

        Raises:
            AccessError: A page came twice, or there are too many pages.
            InvalidInput: A next link leads to another host, or the answer is not a FeatureCollection.
        """
        first, method, sent = parameters or {}, (method or "GET").upper(), parameters or {}
        seen: set[bytes] = set()
        empty = 0
        for _ in range(MAX_PAGES):
            page = self.documents.request(url, method=method, parameters=sent)
            features = page.get("features") if isinstance(page, Mapping) else None
            if not isinstance(features, list):
                raise InvalidInput(f"{redact_url(url)}: expected a FeatureCollection, got {str(page)[:80]!r}")
            mark = hashlib.sha256(json.dumps(features, sort_keys=True).encode()).digest()
            if features and mark in seen:
                raise AccessError(
                    f"{redact_url(url)}: the API sends the same page again and again; report it to its operators"
                )
            seen.add(mark)
            empty = 0 if features else empty + 1
            yield dict(page)
            link = next((v for v in page.get("links") or [] if isinstance(v, Mapping) and v.get("rel") == "next"), None)
            if link is None or empty >= _EMPTY_PAGES:
                return
            url = self._next_url(url, link)
            method = str(link.get("method") or "GET").upper()
            body = link.get("body") if isinstance(link.get("body"), Mapping) else {}
            # the href of a GET link holds its parameters; the body of a POST link is complete, or merged with the first
            sent = {} if method != "POST" else {**(first if link.get("merge") else {}), **dict(body or {})}
        raise AccessError(f"{redact_url(url)}: more than {MAX_PAGES} pages of items; narrow the region or the time")

    def _next_url(self, url: str, link: Mapping[str, Any]) -> str:
        target = urljoin(url, str(link.get("href") or ""))
        if same_origin(target, url):
            return target
        here, there = urlsplit(url), urlsplit(target)
        if here.scheme == "https" and there.scheme == "http" and here.netloc == there.netloc:
            return there._replace(scheme="https").geturl()  # APIs behind a proxy often forget their own scheme
        raise InvalidInput(
            f"{redact_url(url)}: the next page is on another host ({there.netloc.rpartition('@')[2]}): refused"
        )


def ask_api(documents: Documents, root: str, config: IngestConfig) -> Iterator[CatalogueItem]:
    """Yield the items of an API, in its own order.

    Raises:
        AccessError: With `strict`, the API gave another number of items than it promised.
    """
    details = _collections(documents, root, config)
    io = _GuardedIO(documents)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # missing conformance classes are handled below
        client = Client.open(root, stac_io=io)
        if not client.conforms_to(ConformanceClasses.ITEM_SEARCH):
            client.add_conforms_to("ITEM_SEARCH")
        query: dict[str, dict[str, Any]] = {}
        if client.conforms_to(ConformanceClasses.QUERY):
            for condition in config.selection.comparisons:
                query.setdefault(condition.name, {})[_QUERY_WORDS[condition.operator]] = condition.value
        wanted = _filter(
            client, [one for one in config.selection.conditions if not (query and isinstance(one, Comparison))]
        )
        region = Selection(config).region
        start, end = (moment.strftime("%Y-%m-%dT%H:%M:%SZ") if moment else ".." for moment in config.selection.interval)
        crossing = config.selection.bbox is not None and config.selection.bbox[0] > config.selection.bbox[2]
        for method, cql in itertools.product(("POST", "GET"), (wanted, None) if wanted else (None,)):
            request = client.search(
                method=method,
                collections=list(config.selection.collections),
                bbox=config.selection.bbox if not crossing else None,
                intersects=to_geojson(region)
                if region is not None and (crossing or config.selection.geometry)
                else None,
                datetime=f"{start}/{end}" if config.selection.datetime else None,
                query=query or None,
                filter=None if cql is None else cql.to_json() if method == "POST" else cql.to_text(),
                filter_lang=None if cql is None else "cql2-json" if method == "POST" else "cql2-text",
                limit=min(PAGE_ITEMS, config.selection.max_items or PAGE_ITEMS),
            )
            # not request.pages_as_dicts(), which ends at the first page without items even if there is a next one
            pages = io.get_pages(request.url, request.method, request.get_parameters())
            try:
                first = next(pages, None)
                break
            except HttpStatusError as error:
                if cql is not None and error.status == 400:
                    log.info("%s does not understand the filter; its answers are filtered here", redact_url(root))
                elif method == "GET" or error.status not in (404, 405, 501):
                    raise
    ids: set[str] = set()
    promised = None
    for page in itertools.chain([first] if first else [], pages):
        if promised is None and isinstance(page.get("numberMatched"), int):
            promised = int(page["numberMatched"])
        for item in page["features"]:
            entry = _from_api(item, root, details)
            ids.add(f"{item.get('collection')}/{item.get('id')}")
            yield entry
    if promised is not None and promised != len(ids):
        message = f"{redact_url(root)} promised {promised} items and gave {len(ids)} different ones"
        if config.running.strict:
            raise AccessError(f"{message}; search again, or leave --strict out to use the items that came")
        log.warning("%s; the catalogue may have changed meanwhile, search again", message)


def _filter(client: Client, conditions: Iterable[Condition]) -> cql2.Expr | None:
    """Return the part of the conditions that the API states to understand; the rest is applied to its answers only."""
    stated = client.get_conforms_to()
    if not client.conforms_to(ConformanceClasses.FILTER) or not any("cql2" in uri for uri in stated):
        return None
    advanced = any(uri.endswith("/advanced-comparison-operators") for uri in stated)
    parts = [dict(part) for one in conditions for part in conjuncts(one.tree(), advanced=advanced)]
    return cql2.Expr({"op": "and", "args": parts} if len(parts) > 1 else parts[0]) if parts else None


def _from_api(item: Any, root: str, details: Mapping[str, Any]) -> CatalogueItem:
    """Make a `CatalogueItem` of a feature; relative hrefs start at its own address, if the API itself serves that."""
    if not isinstance(item, Mapping):
        raise InvalidInput(f"{redact_url(root)}: a feature is not an object; expected STAC items")
    links = [link for link in item.get("links") or [] if isinstance(link, Mapping)]
    self_href = next((str(link.get("href")) for link in links if link.get("rel") == "self"), "")
    base = self_href if is_url(self_href) and same_origin(self_href, root) else root
    return CatalogueItem(item, base, details.get(str(item.get("collection")), {}))


def _collections(documents: Documents, root: str, config: IngestConfig) -> dict[str, Mapping[str, Any]]:
    """Return `item_assets` of the requested collections, by collection id.

    Raises:
        UnknownName: The API has no such collection.
        InvalidInput: The request names no collection.
    """
    url = root.rstrip("/") + "/collections"
    if not config.selection.collections:
        known = ", ".join(
            name for name in _collection_ids(documents, url) if any(name in p.collections for p in PRODUCTS)
        )
        raise InvalidInput(
            f"{redact_url(root)} is an API: name a --collection (it has {known or 'none that is understood'})"
        )
    details: dict[str, Mapping[str, Any]] = {}
    for name in config.selection.collections:
        try:
            document = documents.request(f"{url}/{name}")
        except HttpStatusError as error:
            if error.status not in (400, 404):
                raise
            known_ids = _collection_ids(documents, url)
            if name not in known_ids and known_ids:
                raise UnknownName.of("collection", name, known_ids, redact_url(root)) from error
            continue
        assets = document.get("item_assets") if isinstance(document, Mapping) else None
        details[name] = assets if isinstance(assets, Mapping) else {}
    return details


def _collection_ids(documents: Documents, url: str) -> list[str]:
    try:
        listing = documents.request(url)
    except HttpStatusError:
        return []
    entries = listing.get("collections") if isinstance(listing, Mapping) else None
    return [str(c["id"]) for c in entries or [] if isinstance(c, Mapping) and "id" in c]
