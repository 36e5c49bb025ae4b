"""Search SOURCE for scenes: a STAC API, a static catalogue, an item file or stac-geoparquet; once, on the client."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ingest.request.config import IngestConfig
from ingest.request.products import PRODUCTS, choose_bands, find_product, refuse_unsupported
from ingest.scenes.api import api_root, ask_api
from ingest.scenes.catalogue import CatalogueItem, iterate_items, open_source
from ingest.scenes.dedupe import Duplicate, dedupe, name_apart
from ingest.scenes.documents import Documents
from ingest.scenes.harmonise import harmonise
from ingest.scenes.scene import Scene
from ingest.scenes.selection import Selection
from ingest.trust.hrefs import is_url
from ingest.trust.redact import redact_text, redact_url
from zarr_store.errors import InvalidInput, NothingFound, Preempted, UnknownName

__all__ = ["SearchResult", "Unusable", "find_items", "find_scenes"]

log = logging.getLogger(__name__)


class Unusable(NamedTuple):
    """An item that cannot become a scene, with the reason."""

    collection: str
    item_id: str
    reason: str


@dataclass(frozen=True)
class SearchResult:
    """The result of one search.

    Attributes:
        scenes: Scenes, by collection, time, tile and id.
        duplicates: Copies of the same acquisitions that were left out.
        items: The item of each scene.
        unusable: Items that were left out because they cannot be understood.
    """

    scenes: tuple[Scene, ...]
    duplicates: tuple[Duplicate, ...] = ()
    items: tuple[CatalogueItem, ...] = ()
    unusable: tuple[Unusable, ...] = ()


def find_scenes(source: str, config: IngestConfig, *, headers: Mapping[str, str] | None = None) -> SearchResult:
    """Find, harmonise, de-duplicate and order the scenes that `config` asks for.

    One item that cannot be understood does not end a search; the result names it.

    Args:
        source: STAC API URL; path or URL of a catalog.json, collection.json, ItemCollection or item; or a
            stac-geoparquet file.
        config: Collections, region, time, query, bands and trust.
        headers: Request headers for SOURCE's own origin only.

    Returns:
        At least one scene, and what was left out.

    Raises:
        NothingFound: SOURCE has no such scene.
        UnknownName: SOURCE has no such collection, or no product has such a band.
        InvalidInput: SOURCE cannot be read as STAC, no item can be understood, or no asset may be opened; with `strict`
            also one item that cannot be understood.
        AccessError: The network or the authorisation failed; with `strict` also an API that gives another number of
            items than it promised.
    """
    _check_names(config)
    scenes: list[Scene] = []
    items: dict[int, CatalogueItem] = {}
    unsupported: InvalidInput | None = None
    unusable: list[Unusable] = []
    refused: Exception | None = None
    undecided: list[tuple[CatalogueItem, InvalidInput]] = []
    for entry in find_items(source, config, headers=headers, undecided=None if config.running.strict else undecided):
        if not config.selection.collections and (reason := _unsupported(entry.item)):
            unsupported = unsupported or reason
            if not entry.item.get("collection"):  # those of other collections are passed over; this may be a wanted one
                unusable.append(_unusable(entry.item, reason))
            continue
        try:
            scene = harmonise(entry.item, base=entry.base, config=config, source=source, item_assets=entry.item_assets)
        except (UnknownName, Preempted):  # a name that the user gave, or a stop
            raise
        except Exception as error:  # an item from outside may hold anything
            if config.running.strict:
                raise
            refused = refused or error
            unusable.append(_unusable(entry.item, error))
            continue
        scenes.append(scene)
        items[id(scene)] = entry
    unusable += [_unusable(entry.item, error) for entry, error in undecided]
    refused = refused or next((error for _, error in undecided), None)
    if not scenes and (unsupported or refused):
        raise unsupported or refused or InvalidInput(source)
    _check_assets(scenes)
    if config.running.strict:
        _refuse_lacking(scenes)
    kept, drops = dedupe(scenes)
    for drop in drops:
        log.info("%s left out: %s", drop.dropped.id, drop.reason)
    # the items of this very answer: an API may answer the same question differently a moment later
    found = tuple(items[id(scene)] for scene in kept)
    return SearchResult(tuple(name_apart(kept)), tuple(drops), found, tuple(unusable))


def _unusable(item: Mapping[str, Any], error: Exception) -> Unusable:
    """Log and describe an item that is left out; an error that the item did not cause is logged with traceback."""
    expected = isinstance(error, InvalidInput)
    reason = str(error) if expected else f"it cannot be understood ({type(error).__name__}: {error})"
    result = Unusable(str(item.get("collection"))[:200], str(item.get("id"))[:200], redact_text(reason)[:600])
    if not expected:
        log.error("item %r: %s; please report this", result.item_id, reason, exc_info=error)
    log.warning("item %r is left out: %s", result.item_id, result.reason)
    return result


def find_items(
    source: str,
    config: IngestConfig,
    *,
    headers: Mapping[str, str] | None = None,
    undecided: list[tuple[CatalogueItem, InvalidInput]] | None = None,
) -> list[CatalogueItem]:
    """Find the raw items that match, each with the place that it was read from.

    Args:
        source: SOURCE, as for `find_scenes`.
        config: Settings of the search, as for `find_scenes`.
        headers: Request headers, as for `find_scenes`.
        undecided: List that takes items whose time or footprint cannot be understood, so that it is unknown whether
            they match. Without it the first of them is an error.

    Raises:
        NothingFound: No item matches.
        UnknownName: SOURCE has no such collection.
        InvalidInput: SOURCE is not STAC.
        AccessError: The network or the authorisation failed.
    """
    with Documents(source, config, headers) as documents:
        location, document = open_source(documents)
        selection = Selection(config)
        collection_ids: set[str] = set()
        if is_url(location) and isinstance(document, Mapping) and (root := api_root(documents, location, document)):
            request = config
            if document.get("type") == "Collection" and not config.selection.collections:
                request = config.model_copy(update={"collections": (str(document["id"]),)})
            candidates = ask_api(documents, root, request)
        else:
            candidates = iterate_items(
                documents, location, document, wanted=config.selection.collections, collection_ids=collection_ids
            )
        items: list[CatalogueItem] = []
        listed: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
        for entry in candidates:
            key = (str(entry.item.get("collection")), str(entry.item.get("id")))
            try:
                wanted = selection.keeps(entry.item)
            except InvalidInput as error:
                if undecided is None:
                    raise
                undecided.append((entry, error))
                continue
            if not wanted or entry.item in listed[key]:  # some APIs list an item on two pages
                continue
            listed[key].append(entry.item)
            items.append(entry)
            if config.selection.max_items and len(items) >= config.selection.max_items:
                break
    if not items and not undecided:
        for name in config.selection.collections:
            if collection_ids and name not in collection_ids:
                raise UnknownName.of("collection", name, collection_ids, redact_url(source))
        raise NothingFound(selection.explain(redact_url(source)))
    return items


def _check_names(config: IngestConfig) -> None:
    """Refuse unknown bands and unsupported collections before the first request."""
    for name in config.selection.collections:
        refuse_unsupported(name)
    named = [rule for name in config.selection.collections for rule in PRODUCTS if name in rule.collections]
    for rule in named or PRODUCTS:
        choose_bands(rule, config.selection.bands, config.pixels.mask)


def _unsupported(item: Mapping[str, Any]) -> InvalidInput | None:
    """Return the error for an item of a product that is not supported; None for any other item."""
    collection = str(item.get("collection") or "")
    try:
        refuse_unsupported(collection, item)
    except InvalidInput as refusal:
        return refusal
    if find_product(item) is None:
        return InvalidInput(
            f"collection {collection!r} is of no product that is understood: expected Sentinel-2 L2A or L1C, or "
            "Sentinel-1 RTC; name another one with --collection"
        )
    return None


def _refuse_lacking(scenes: list[Scene]) -> None:
    """Refuse items that lack bands, for --strict; otherwise such bands become missing pixels.

    Raises:
        InvalidInput: An item lacks a band; the message names the first one.
    """
    lacking = [scene for scene in scenes if scene.lacking]
    if lacking:
        raise InvalidInput(
            f"{len(lacking)} of {len(scenes)} items lack bands that were asked for (first: {lacking[0].id} lacks "
            f"{', '.join(lacking[0].lacking)}); ask for other --bands, or leave --strict out to keep them as missing"
        )


def _check_assets(scenes: list[Scene]) -> None:
    """Refuse a result without any readable data band: its cause is a trust setting or a wrong catalogue, not a gap.

    Raises:
        InvalidInput: No asset may be opened.
        NothingFound: No item has a requested band.
    """
    if any(asset.kind == "data" for scene in scenes for asset in scene.assets.values()):
        return
    refusals = [note for scene in scenes for note in scene.notes if "refused" in note]
    if refusals:
        raise InvalidInput(f"no asset may be opened; the first: {refusals[0]}")
    lacking = ", ".join(scenes[0].lacking)
    raise NothingFound(f"none of {len(scenes)} items has a requested band ({lacking}); ask for other bands")
