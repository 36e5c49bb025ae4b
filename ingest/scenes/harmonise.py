"""Turn a STAC item of any version and provider into a `Scene`.

Supported are STAC 0.9–1.1; projection v1 (`proj:epsg`) and v2 (`proj:code`), WKT2 and PROJJSON, on the asset or the
item; `raster:bands` (1.0) and `bands` with `raster:*` (1.1). Grids come from shape and transform, never from the
lon/lat bbox. `ingest.plan.probe` reads the file headers later; where they disagree with the item, they win.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ingest.request.asset_choice import choose_asset
from ingest.request.config import IngestConfig
from ingest.request.products import BandRule, ProductRule, choose_bands, find_product, refuse_unsupported
from ingest.scenes.band_offsets import own_offsets
from ingest.scenes.footprint import to_geojson
from ingest.scenes.identity import (
    acquisition_time,
    baseline_of,
    baselines_of,
    datastrip_of,
    datatake_of,
    first_of,
    number_of,
    platform_of,
    product_names,
    relative_orbit_of,
    text_of,
    tile_of,
    whole_of,
)
from ingest.scenes.offsets import OFFSET_DN, UNKNOWN_OFFSET, decide_offset, hear_witnesses, hears_raster_metadata
from ingest.scenes.place import place_of
from ingest.scenes.scene import AssetRef, Scene
from ingest.scenes.stated_grid import first_band, stated_grid
from ingest.trust.hrefs import HrefPolicy, resolve_href
from ingest.trust.presigned import set_signature_aside
from ingest.trust.providers import find_provider, trusted_hosts
from ingest.trust.redact import redact_url
from zarr_store.errors import InvalidInput

__all__ = ["harmonise"]


def harmonise(
    item: object,
    *,
    base: str,
    config: IngestConfig,
    source: str | None = None,
    item_assets: Mapping[str, Any] | None = None,
) -> Scene:
    """Turn a STAC item into a scene.

    Args:
        item: The item as a dict.
        base: URL or path of the document that the item was read from; relative hrefs start there.
        config: Bands, mask and trust.
        source: SOURCE as the user typed it; None for `base`.
        item_assets: `item_assets` of the item's collection, for items that state no scale and offset.

    Raises:
        InvalidInput: The item is malformed, of an unsupported product, or has no usable time.
        UnknownName: No product has a requested band.
    """
    if not isinstance(item, Mapping) or not isinstance(item.get("id"), str) or not item["id"]:
        raise InvalidInput(f"{base}: expected a STAC item with an id, got {str(item)[:80]!r}")
    where = f"item {item['id']!r}"
    properties = item.get("properties")
    if not isinstance(properties, Mapping) or not isinstance(item.get("assets"), Mapping):
        raise InvalidInput(f"{where}: expected a STAC item with properties and assets; leave it out")
    if not isinstance(item.get("collection") or "", str):
        raise InvalidInput(f"{where}: expected the id of a collection, got {str(item['collection'])[:80]!r}")
    collection = item.get("collection") or (
        config.selection.collections[0] if len(config.selection.collections) == 1 else None
    )
    refuse_unsupported(collection or "", item)
    product = find_product(item, collection)
    if product is None:
        raise InvalidInput(
            f"{where} of collection {collection!r} is of no product that is understood: expected Sentinel-2 L2A or "
            "L1C, or Sentinel-1 RTC"
        )
    provider = find_provider(item, source or base, config.trust.providers)
    policy = config.trust.href_policy(source or base, trusted_hosts(provider, source or base, config.trust.providers))
    notes: list[str] = []
    assets, lacking = _assets(item, product, config, base=base, policy=policy, notes=notes)
    place = place_of(item, where)
    notes += [place.note] if place.note else []
    names = product_names(item)
    baselines = baselines_of(properties, names, [asset.href for asset in assets.values()])
    baseline = baseline_of(baselines)
    stated, promised = (_stated_offsets(raw, assets, product) for raw in (item["assets"], item_assets or {}))
    about = (product, provider, collection or product.name, properties)
    dn_offset, evidence = decide_offset(*about, baseline, stated=stated, promised=promised)
    own: dict[str, int] = {}
    if product.offsets and (len(set(stated.values())) > 1 or not set(stated.values()) <= {0, OFFSET_DN}):
        shown = ", ".join(f"{band} {value:g}" for band, value in stated.items())
        if hears_raster_metadata(*about, baseline):
            data = [band for band, ref in assets.items() if ref.kind == "data"]
            own, refused = own_offsets(stated, data, known=not evidence.startswith(UNKNOWN_OFFSET))
            lacking = (*lacking, *(band for band in data if band in refused))
            assets = {band: ref for band, ref in assets.items() if band not in refused}
            notes += [
                f"{band}: refused, as its offset is "
                + (f"stated as {stated[band]:g}, expected 0 or {OFFSET_DN}" if band in stated else "not stated")
                + ", and those of the other bands differ"
                for band in data
                if band in refused
            ]
        notes.append(
            f"the offsets that its raster metadata state differ between bands, each band's own is used: {shown}"
            if own
            else f"the offsets that its raster metadata state are ignored, as they are no 0 or -1000 for all: {shown}"
        )
    moment, created = (
        acquisition_time(properties, where, notes),
        first_of(properties, "created", "s2:generation_time", "sentinel2:generation_time"),
    )
    scene = Scene(
        id=item["id"],
        collection=collection or product.name,
        provider=provider.name,
        datetime=moment,
        assets=assets,
        lacking=lacking,
        footprint=to_geojson(place.footprint),
        bbox=place.bounds,
        platform=text_of(properties.get("platform"), lower=True) or platform_of(names),
        baseline=baseline,
        tile=tile_of(properties, names),
        relative_orbit=relative_orbit_of(properties, names),
        orbit_direction=text_of(first_of(properties, "sat:orbit_state", "sentinel2:orbit_direction"), lower=True),
        datatake=datatake_of(properties, names, product),
        datastrip=datastrip_of(properties, names, _hrefs(item["assets"])),
        nodata_percent=_percent(
            first_of(properties, "s2:nodata_pixel_percentage", "sentinel2:nodata_pixel_percentage")
        ),
        cloud_cover=_percent(properties.get("eo:cloud_cover")),
        created=text_of(created),
        updated=text_of(properties.get("updated")),
        dn_offset=dn_offset,
        offset_evidence=evidence,
        notes=tuple(notes),
        product=product.name,
        witnesses=hear_witnesses(*about, baselines, stated=stated, promised=promised),
        band_offsets={band: value for band, value in own.items() if value != dn_offset},
    )
    _refuse_half_characters(scene, where)
    return scene


def _refuse_half_characters(scene: Scene, where: str) -> None:
    """Refuse a lone surrogate, one half of a character: JSON can hold it, but no message to a worker and no file can.

    Raises:
        InvalidInput: A name or text of the scene has one.
    """
    texts = [str(one) for one in scene.witnesses]
    texts += [value for value in vars(scene).values() if isinstance(value, str)]
    texts += [text for ref in scene.assets.values() for text in vars(ref).values() if isinstance(text, str)]
    try:
        "".join((*texts, *scene.notes)).encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(
            f"{where}: its texts contain half of a surrogate pair ({error.reason}); leave it out"
        ) from error


def _assets(
    item: Mapping[str, Any],
    product: ProductRule,
    config: IngestConfig,
    *,
    base: str,
    policy: HrefPolicy,
    notes: list[str],
) -> tuple[dict[str, AssetRef], tuple[str, ...]]:
    """Return the requested bands that can be read, and the names of those that cannot."""
    usable: dict[str, AssetRef] = {}
    lacking: list[str] = []
    taken: dict[str, str] = {}
    choice = choose_bands(product, config.selection.bands, config.pixels.mask)
    for band in choice.all:
        chosen = choose_asset(band, item["assets"])
        if chosen is None:
            lacking.append(band.name)
            continue
        key, asset = chosen.key, item["assets"][chosen.key]
        if chosen.others:
            notes.append(f"{band.name}: asset {key!r} is read; {', '.join(map(repr, chosen.others[:6]))} also name it")
        try:
            whole = resolve_href(asset.get("href"), base=base, policy=policy)
            href = set_signature_aside(whole)
            if taken.setdefault(href, whole) != whole:
                raise InvalidInput(
                    f"its href {redact_url(href)!r} differs from that of another band only in what looks like a "
                    "signature, which is never stored; they would be read as one file"
                )
        except InvalidInput as refusal:
            lacking.append(band.name)
            notes.append(f"asset {key!r}: {refusal}")
            continue
        usable[band.name] = _asset_ref(band, key, asset, href, item["properties"], product, notes)
        if whole != href:
            usable[band.name] = replace(usable[band.name], presigned=True)
    return usable, tuple(lacking)


def _asset_ref(
    band: BandRule,
    key: str,
    asset: Mapping[str, Any],
    href: str,
    properties: Mapping[str, Any],
    product: ProductRule,
    notes: list[str],
) -> AssetRef:
    is_class = band in product.classes
    dtype = _raster(asset, "data_type") or ("uint8" if is_class else product.dtype)
    nodata = number_of(_raster(asset, "nodata"))
    scale, offset = (_finite(number_of(_raster(asset, name))) for name in ("scale", "offset"))
    if scale is not None and scale <= 0:
        notes.append(f"asset {key!r}: scale {scale:g} is stated, which no number has: it is ignored")
        scale = None
    if not is_class and scale not in (None, 1.0, product.scale) and product.kind == "reflectance":
        notes.append(
            f"scale {scale:g} is stated, {product.name} has {product.scale:g}: numbers are converted, unless the file "
            "states a scale of its own"
        )
    return AssetRef(
        band=band.name,
        key=key,
        href=href,
        grid=stated_grid(asset, properties, f"asset {key!r}", notes),
        dtype=str(dtype),
        nodata=nodata if nodata is not None else (0.0 if is_class else float(product.nodata)),
        scale=1.0 if is_class else (product.scale if scale is None else scale),
        offset=0.0 if is_class or offset is None else offset,
        kind="class" if is_class else "data",
        media_type=text_of(asset.get("type")),
        size_bytes=_size(asset),
        checksum=text_of(asset.get("file:checksum"), lower=True),
        unit=text_of(_raster(asset, "unit")),
    )


def _size(asset: Mapping[str, Any]) -> int | None:
    size = whole_of(asset.get("file:size"))
    return size if size is not None and size > 0 else None


def _percent(value: object) -> float | None:
    number = number_of(value)
    return number if number is not None and 0.0 <= number <= 100.0 else None


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None


def _raster(asset: Mapping[str, Any], name: str) -> Any:
    """Return a raster field of a one-band asset, from `bands` (1.1), `raster:bands` (1.0) or the asset itself (1.1)."""
    for holder in (first_band(asset.get("bands")), first_band(asset.get("raster:bands")), asset):
        for spelling in (f"raster:{name}", name):
            if holder.get(spelling) is not None:
                return holder[spelling]
    return None


def _hrefs(assets: Mapping[str, Any]) -> list[str]:
    """Return the hrefs of all assets, also of those that are not read, such as the metadata of a datastrip."""
    found = (asset.get("href") for asset in assets.values() if isinstance(asset, Mapping))
    return [href for href in found if isinstance(href, str)]


def _unit_of_offset(offset: float, scale: float | None, product_scale: float) -> float:
    """Return the divisor that turns a stated offset into digital numbers of a cube.

    A stated offset is a reflectance, also if the numbers of the file have another scale than the product. Without a
    scale, or with a scale of 1, an offset of at least 1 is in digital numbers already.
    """
    return 1.0 if scale in (None, 1.0) and abs(offset) >= 1.0 else product_scale


def _stated_offsets(raw: Mapping[str, Any], assets: Mapping[str, AssetRef], product: ProductRule) -> dict[str, float]:
    """Return band → offset in digital numbers, as `raw` (assets or item_assets) states it for the data assets."""
    stated = {}
    for band, ref in assets.items():
        asset = raw.get(ref.key)
        if ref.kind == "data" and isinstance(asset, Mapping):
            offset, scale = (_finite(number_of(_raster(asset, name))) for name in ("offset", "scale"))
            if offset is not None and scale != 0:
                stated[band] = round(offset / _unit_of_offset(offset, scale, product.scale), 3)
    return stated
