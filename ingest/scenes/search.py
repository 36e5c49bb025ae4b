"""SOURCE → scenes: a STAC API, a static catalogue, an item file or stac-geoparquet. Runs once, on the client."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ingest.request.config import IngestConfig
from ingest.request.products import PRODUCTS, choose_bands, find_product, refuse_unsupported
from ingest.scenes.api import api_root, ask_api
from ingest.scenes.catalogue import FoundItem, Trail, items_in, open_source
from ingest.scenes.dedupe import Duplicate, dedupe
from ingest.scenes.documents import Documents
from ingest.scenes.harmonise import harmonise
from ingest.scenes.scene import Scene
from ingest.scenes.selection import Selection
from ingest.trust.hrefs import is_url
from ingest.trust.redact import redact_text, redact_url
from zarr_store.errors import InvalidInput, NothingFound, Preempted, UnknownName

__all__ = ["Found", "Unusable", "find_items", "find_scenes", "search"]

log = logging.getLogger(__name__)


class Unusable(NamedTuple):
    """An item that no scene can be made of, and why."""

    collection: str
    item_id: str
    reason: str


@dataclass(frozen=True)
class Found:
    """What one search gives.

    Attributes:
        scenes: In order.
        duplicates: Copies that were left out for them.
        items: The items of the scenes.
        unusable: Items that were left out because they cannot be understood.
    """

    scenes: tuple[Scene, ...]
    duplicates: tuple[Duplicate, ...] = ()
    items: tuple[FoundItem, ...] = ()
    unusable: tuple[Unusable, ...] = ()


def search(source: str, config: IngestConfig, *, headers: Mapping[str, str] | None = None) -> list[Scene]:
    """Find, harmonise, de-duplicate and order the scenes that `config` asks for.

    Args:
        source: STAC API URL; path or URL of a catalog.json, collection.json, ItemCollection or item; or a
            stac-geoparquet file.
        config: Collections, region, time, query, bands, trust.
        headers: Request headers for SOURCE's own origin only.

    Returns:
        Scenes by collection, time, tile and id; never empty.

    Raises:
        NothingFound: A valid question without an answer.
        UnknownName: A collection that SOURCE does not have, or a band that no product has.
        InvalidInput: SOURCE cannot be read as STAC, or none of its assets may be opened.
        AccessError: Network or authorisation; with `strict` also an API that gives another count than it promised.
    """
    return list(find_scenes(source, config, headers=headers).scenes)


def find_scenes(source: str, config: IngestConfig, *, headers: Mapping[str, str] | None = None) -> Found:
    """As `search`, with what was left out: one item that cannot be understood does not end a search.

    Raises:
        InvalidInput: Not one item can be understood; or, with `strict`, one cannot.
    """
    _check_names(config)
    scenes: list[Scene] = []
    items: dict[int, FoundItem] = {}
    skipped: InvalidInput | None = None
    unusable: list[Unusable] = []
    refused: Exception | None = None
    odd: list[tuple[FoundItem, InvalidInput]] = []
    for found in find_items(source, config, headers=headers, odd=None if config.running.strict else odd):
        if not config.selection.collections and (reason := _not_ours(found.item)):
            skipped = skipped or reason
            continue
        try:
            scene = harmonise(found.item, base=found.base, config=config, source=source, item_assets=found.item_assets)
        except (UnknownName, Preempted):  # a name that the user gave; a stop
            raise
        except Exception as error:  # an item of a stranger may be anything
            if config.running.strict:
                raise
            refused = refused or error
            unusable.append(_unusable(found.item, error))
            continue
        scenes.append(scene)
        items[id(scene)] = found
    unusable += [_unusable(found.item, error) for found, error in odd]
    refused = refused or next((error for _, error in odd), None)
    if not scenes and (skipped or refused):
        raise skipped or refused or InvalidInput(source)
    _check_assets(scenes)
    if config.running.strict:
        _refuse_lacking(scenes)
    kept, drops = dedupe(scenes)
    for drop in drops:
        log.info("%s left out: %s", drop.dropped.id, drop.reason)
    # the items of this very answer: an API may answer the same question differently a moment later
    return Found(tuple(kept), tuple(drops), tuple(items[id(scene)] for scene in kept), tuple(unusable))


def _unusable(item: Mapping[str, Any], error: Exception) -> Unusable:
    """The report on an item that was left out; what is no fault of the item is logged with its traceback."""
    expected = isinstance(error, InvalidInput)
    reason = str(error) if expected else f"it cannot be understood ({type(error).__name__}: {error})"
    told = Unusable(str(item.get("collection"))[:200], str(item.get("id"))[:200], redact_text(reason)[:600])
    if not expected:
        log.error("item %r: %s; please report this", told.item_id, reason, exc_info=error)
    log.warning("item %r is left out: %s", told.item_id, told.reason)
    return told


def find_items(
    source: str,
    config: IngestConfig,
    *,
    headers: Mapping[str, str] | None = None,
    odd: list[tuple[FoundItem, InvalidInput]] | None = None,
) -> list[FoundItem]:
    """The raw items that match, with the place each was read from; what `terrashard search -o` writes.

    Args:
        source: As for `search`.
        config: As for `search`.
        headers: As for `search`.
        odd: Takes items of which time or footprint cannot be understood, so that nobody knows whether they match;
            without it the first of them is an error.

    Raises:
        NothingFound: No item matches.
        UnknownName: SOURCE has no such collection.
        InvalidInput: SOURCE is not STAC.
        AccessError: Network or authorisation.
    """
    with Documents(source, config, headers) as documents:
        location, document = open_source(documents)
        selection = Selection(config)
        trail = Trail()
        if is_url(location) and isinstance(document, Mapping) and (root := api_root(documents, location, document)):
            asked = config
            if document.get("type") == "Collection" and not config.selection.collections:
                asked = config.model_copy(update={"collections": (str(document["id"]),)})
            candidates = ask_api(documents, root, asked)
        else:
            candidates = items_in(documents, location, document, wanted=config.selection.collections, trail=trail)
        items: list[FoundItem] = []
        ids: set[tuple[str, str]] = set()
        for found in candidates:
            key = (str(found.item.get("collection")), str(found.item.get("id")))
            try:
                wanted = selection.keeps(found.item)
            except InvalidInput as error:
                if odd is None:
                    raise
                odd.append((found, error))
                continue
            if not wanted or key in ids:
                continue
            ids.add(key)
            items.append(found)
            if config.selection.max_items and len(items) >= config.selection.max_items:
                break
    if not items and not odd:
        for name in config.selection.collections:
            if trail.collections and name not in trail.collections:
                raise UnknownName.of("collection", name, trail.collections, redact_url(source))
        raise NothingFound(selection.explain(redact_url(source)))
    return items


def _check_names(config: IngestConfig) -> None:
    """Refuse band names before anything is asked over the network."""
    for name in config.selection.collections:
        refuse_unsupported(name)
    named = [rule for name in config.selection.collections for rule in PRODUCTS if name in rule.collections]
    for rule in named or PRODUCTS:
        choose_bands(rule, config.selection.bands, config.pixels.mask)


def _not_ours(item: Mapping[str, Any]) -> InvalidInput | None:
    """Why an item of an unasked-for collection is passed over, or None."""
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
    """What --strict says of bands that an item does not have, which are otherwise missing in its slice.

    Raises:
        InvalidInput: It names the first item.
    """
    lacking = [scene for scene in scenes if scene.lacking]
    if lacking:
        raise InvalidInput(
            f"{len(lacking)} of {len(scenes)} items lack bands that were asked for (first: {lacking[0].id} lacks "
            f"{', '.join(lacking[0].lacking)}); ask for other --bands, or leave --strict out to keep them as missing"
        )


def _check_assets(scenes: list[Scene]) -> None:
    """Fail when not one data band of any scene can be read: a trust setting or a wrong catalogue, not a gap."""
    if any(asset.kind == "data" for scene in scenes for asset in scene.assets.values()):
        return
    refusals = [note for scene in scenes for note in scene.notes if "refused" in note]
    if refusals:
        raise InvalidInput(f"no asset may be opened; the first: {refusals[0]}")
    lacking = ", ".join(scenes[0].lacking)
    raise NothingFound(f"none of {len(scenes)} items has a requested band ({lacking}); ask for other bands")
