"""Scenes with what their files say, on the way into a plan: which are used, what is read, which shard needs them.

Pure: headers were looked at before.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from pyproj.exceptions import ProjError
from shapely.affinity import translate
from shapely.geometry import box, shape
from shapely.geometry.base import BaseGeometry

from ingest.pixels.clip import is_outside
from ingest.pixels.indices import choose_indices
from ingest.plan.grouping import Step, lattice_rank
from ingest.plan.target import Candidate, pixel_box, project_bounds, region_lonlat
from ingest.plan.task import PlannedScene, Recipe, SourceAsset
from ingest.raster.read import Stored
from ingest.request.config import IngestConfig
from ingest.request.products import PRODUCTS, BandChoice, ProductRule
from ingest.scenes.scene import AssetRef, Scene
from ingest.trust.redact import redact_url
from zarr_store.errors import AssetUnreadable, InvalidInput, NothingFound
from zarr_store.grid import Bounds, Grid, check_on_earth
from zarr_store.regions import Region
from zarr_store.spec import BandSpec, CubeSpec, Layout

if TYPE_CHECKING:
    from ingest.plan.probe import SceneProbe

__all__ = [
    "Drop",
    "FoundScene",
    "Probes",
    "collection_spec",
    "place_scenes",
    "product_of",
    "refuse_unopened",
    "select_scenes",
    "sources_of",
]

_SLIVER = 1e-4
_MAX_ITEMS = 32_767
"""`source_item` is int16."""

Probes = Mapping[Any, "SceneProbe"]
"""(collection, id), or the id alone where it names one scene, → what its files say."""


@dataclass(frozen=True)
class Drop:
    """A scene that was found and is not used, and why."""

    collection: str
    item_id: str
    reason: str


@dataclass(frozen=True)
class FoundScene:
    """A scene with what its files say."""

    scene: Scene
    probe: SceneProbe | None

    @classmethod
    def of(cls, scene: Scene, probes: Probes) -> Self:
        return cls(scene, probes.get(scene.key) or probes.get(scene.id))

    def header(self, band: str) -> Grid | None:
        looked = self.probe.assets.get(band) if self.probe else None
        return looked.grid if looked else None

    def candidates(self) -> list[Candidate]:
        return [
            Candidate(f"{self.scene.id}/{band}", header, asset.kind == "data")
            for band, asset in self.scene.assets.items()
            if (header := self.header(band)) is not None
        ]

    def stated_place(self) -> Grid | Bounds:
        """Where the scene lies by the catalogue: the grid of its largest asset, else the lon/lat box."""
        stated = [a.grid for a in self.scene.assets.values() if a.grid is not None and _is_on_earth(a.grid)]
        if stated:
            return max(stated, key=lambda grid: (grid.height * grid.width, str(grid)))
        west, south, east, north = self.scene.bbox
        return (west, south, east + 360.0 if east < west else east, north)

    @property
    def dn_offset(self) -> int:
        return self.probe.dn_offset if self.probe else self.scene.dn_offset

    @property
    def verdict(self) -> str:
        return self.probe.verdict if self.probe else "unchecked"

    @property
    def cloud_share(self) -> float | None:
        """Of what it sees of the region, the share that is masked; None where it was not measured."""
        return self.probe.cloud_share if self.probe else None

    def extent(self, target: Grid) -> Grid:
        """The rectangle of the scene's raster: by header, else by metadata, else by the box of its footprint."""
        headers = [c.grid for c in self.candidates()]
        if headers:
            return max(headers, key=lambda grid: (grid.height * grid.width, str(grid)))
        place = self.stated_place()
        if isinstance(place, Grid):
            return place
        return Grid.from_bounds(target.crs, project_bounds(place, target.crs), resolution=max(target.resolution))

    def rank(self, target: Grid) -> int:
        """As `lattice_rank`, by the headers of its files."""
        return lattice_rank([c.grid for c in self.candidates()] or [self.extent(target)], target)


def _is_on_earth(grid: Grid) -> bool:
    try:
        check_on_earth(grid)
    except InvalidInput:
        return False
    return True


def refuse_unopened(found: Sequence[FoundScene]) -> None:
    for one in found:
        for band, looked in (one.probe.assets if one.probe else {}).items():
            asset = one.scene.assets.get(band)
            if asset is not None and looked.error:
                reason = f"{looked.error} (and no other file of {len(found)} scenes could be opened)"
                raise AssetUnreadable.of(one.scene.id, asset.key, reason, redact_url(asset.href))
    raise InvalidInput(
        f"none of the {len(found)} scenes has a readable band (first: {found[0].scene.id}, "
        f"lacking {', '.join(found[0].scene.lacking) or 'nothing'}); check --bands and the access rules of the source"
    )


def select_scenes(found: Sequence[FoundScene], grid: Grid, config: IngestConfig) -> tuple[list[FoundScene], list[Drop]]:
    """Scenes that touch the grid by more than a sliver, and the rest with reasons."""
    asked = region_lonlat(config)
    west, south, east, north = asked or grid.lonlat_bounds()
    region = box(west, south, east + 360.0 if east < west else east, north)
    kept, drops = [], []
    for one in found:
        scene = one.scene
        try:
            reached = pixel_box(one.extent(grid), grid) is not None
        except (InvalidInput, ProjError):  # its place is known by its footprint alone, which has none in this CRS
            reached = False
        if not reached:
            drops.append(Drop(scene.collection, scene.id, "its raster does not reach the region"))
            continue
        valid = one.probe.valid_share if one.probe else None
        if valid is not None and valid < _SLIVER:
            drops.append(
                Drop(scene.collection, scene.id, f"{valid:.4%} of what it could show of the region has data: a sliver")
            )
            continue
        share = _covered_share(scene, region)
        if share < _SLIVER:
            drops.append(Drop(scene.collection, scene.id, f"it sees {share:.4%} of what its tile could: a sliver"))
            continue
        kept.append(one)
    if not kept:
        if slivers := [drop for drop in drops if drop.reason.endswith("a sliver")]:
            raise NothingFound(
                f"none of the {len(found)} scenes shows anything of the region {_show((west, south, east, north))}: "
                f"of {slivers[0].item_id}, {slivers[0].reason}; ask for other dates or a larger region"
            )
        boxes = [one.scene.bbox for one in found]
        west_most, south_most = min(b[0] for b in boxes), min(b[1] for b in boxes)
        scenes_box = (west_most, south_most, max(b[2] for b in boxes), max(b[3] for b in boxes))
        raise NothingFound(
            f"none of the {len(found)} scenes lies in the region: that is {_show((west, south, east, north))}, "
            f"the scenes are in {_show(scenes_box)} (west, south, east, north in degrees); correct --bbox or --geometry"
        )
    return kept, drops


def _covered_share(scene: Scene, region: BaseGeometry) -> float:
    """Footprint within the region, over the region or the scene's box, whichever is smaller; antimeridian or not."""
    if not scene.footprint:
        return 1.0
    west, south, east, north = scene.bbox
    whole = min(region.area, (east - west) % 360.0 * (north - south))
    footprint = shape(dict(scene.footprint))
    moved = [translate(footprint, xoff=by) for by in (-360.0, 0.0, 360.0)]
    return float(sum(region.intersection(part).area for part in moved) / whole) if whole else 1.0


def _show(box_: Bounds) -> str:
    return "(" + ", ".join(f"{value:.4f}" for value in box_) + ")"


def product_of(scene: Scene) -> ProductRule:
    """The rules of the scene's product."""
    return next(rule for rule in PRODUCTS if rule.name == scene.product)


def collection_spec(
    collection: str,
    product: ProductRule,
    choice: BandChoice,
    grid: Grid,
    steps: Sequence[Step],
    layout: Layout,
    config: IngestConfig,
) -> CubeSpec:
    radar = product.kind == "backscatter"
    bands = tuple(
        BandSpec(band.name, None if radar else 0, 1.0 if radar else product.scale, 0.0, "1", band.wavelength_um)
        for band in choice.data
    )
    layers = tuple(layer.name for layer in choice.layers)
    return CubeSpec(
        collection,
        product.kind,
        bands,
        grid,
        tuple(step.time for step in steps),
        layers,
        layout,
        choose_indices(config.pixels.indices, product.kind, collection),
        config.pixels.reduce,
    )


def place_scenes(
    recipe: Recipe, steps: Sequence[Step], by_id: Mapping[str, FoundScene], config: IngestConfig
) -> tuple[tuple[dict[str, Any], ...], list[PlannedScene]]:
    """The item table in order of time, and the scenes in the order in which they win, step by step."""
    ordered = sorted(by_id.values(), key=lambda one: (one.scene.datetime, one.scene.id))
    if len(ordered) > _MAX_ITEMS:
        raise InvalidInput(f"{len(ordered)} scenes are more than a cube holds ({_MAX_ITEMS}); split --datetime")
    rows = {one.scene.id: row for row, one in enumerate(ordered)}
    step_of = {scene.id: number for number, step in enumerate(steps) for scene in step.scenes}
    table = tuple(_item_row(one, step_of[one.scene.id]) for one in ordered)
    planned = []
    for number, step in enumerate(steps):
        for scene in step.scenes:
            one = by_id[scene.id]
            wanted = (*recipe.spec.band_names, *recipe.classes)
            assets = tuple(
                _source_asset(one, asset, recipe, config) for band in wanted if (asset := scene.assets.get(band))
            )
            lacking = tuple(band for band in wanted if band not in scene.assets)
            extent = one.extent(recipe.spec.grid)
            planned.append(PlannedScene(rows[scene.id], scene.id, number, extent, assets, lacking))
    return table, planned


def _item_row(one: FoundScene, step: int) -> dict[str, Any]:
    scene = one.scene
    names = (
        "id", "datetime", "provider", "platform", "baseline", "tile", "relative_orbit", "orbit_direction", "datatake",
        "cloud_cover", "created", "updated",
    )  # fmt: skip
    row = {name: getattr(scene, name) for name in names}
    measured = {} if one.cloud_share is None else {"cloud_share": one.cloud_share}
    return row | {"step": step, "bbox": list(scene.bbox), "dn_offset": one.dn_offset} | measured


def _source_asset(one: FoundScene, asset: AssetRef, recipe: Recipe, config: IngestConfig) -> SourceAsset:
    layer = asset.kind == "class"
    stored: Stored = "uint8" if layer else "float32" if recipe.spec.kind == "backscatter" else "uint16"
    return SourceAsset(
        scene=one.scene.id,
        band=asset.band,
        key=asset.key,
        href=asset.href,
        header=one.header(asset.band),
        nodata=asset.nodata if asset.nodata is None or math.isfinite(asset.nodata) else None,
        kind=asset.kind,
        stored=stored,
        resampling=config.grid.resampling,
        dn_offset=one.dn_offset if stored == "uint16" else 0,
        size_bytes=asset.size_bytes,
        checksum=asset.checksum,
    )


def sources_of(
    region: Region, planned: Sequence[PlannedScene], grid: Grid, clip: str | None = None
) -> tuple[PlannedScene, ...]:
    """Scenes that may reach into a shard, in the order in which they win; none where all of it is clipped away."""
    window = grid.window(region.y0, region.x0, region.shape[1], region.shape[2])
    if is_outside(clip, window):
        return ()
    return tuple(scene for scene in planned if region.t0 <= scene.step < region.t1 and _reaches(scene.extent, window))


@functools.lru_cache(maxsize=1 << 16)
def _reaches(source: Grid, target: Grid) -> bool:
    """Whether a raster has pixels on a window; the tiles of a cube and its shards meet again on every date."""
    return pixel_box(source, target) is not None
