"""Choose the scenes of a plan among probed scenes: which are used, what is read of them, and which shard needs them.

All of this is pure: the headers were read before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from pyproj.exceptions import ProjError
from shapely.affinity import translate
from shapely.geometry import box, shape
from shapely.geometry.base import BaseGeometry

from ingest.pixels.indices import choose_indices
from ingest.plan.grouping import Step, lattice_rank
from ingest.plan.target import Candidate, pixel_box, project_bounds, region_lonlat
from ingest.plan.task import PlannedScene, Recipe, SourceAsset
from ingest.raster.overview import choose_overview
from ingest.raster.read import Stored, reads_overviews
from ingest.request.config import IngestConfig
from ingest.request.products import PRODUCTS, BandChoice, ProductRule
from ingest.scenes.footprint import box_region, meets
from ingest.scenes.scene import AssetRef, Scene
from ingest.trust.redact import redact_url
from zarr_store.errors import AssetUnreadable, InvalidInput, NothingFound
from zarr_store.grid import Bounds, Grid, check_on_earth
from zarr_store.spec import BandSpec, CubeSpec, Layout, item_type_for

if TYPE_CHECKING:
    from ingest.plan.probe import SceneProbe

__all__ = [
    "Drop",
    "ProbedScene",
    "Probes",
    "make_collection_spec",
    "place_scenes",
    "product_of",
    "refuse_unopened",
    "select_scenes",
]

_SLIVER = 1e-4
"""Smallest share of the region that a scene must show to be used."""
Probes = Mapping[Any, "SceneProbe"]
"""(collection, id), or the id alone where it names one scene, → the probe of the scene."""


@dataclass(frozen=True)
class Drop:
    """A scene that a plan does not use, with the reason; `copy_of` is the scene that is used in its place."""

    collection: str
    item_id: str
    reason: str
    copy_of: str | None = None


@dataclass(frozen=True)
class ProbedScene:
    """A scene with the probe of its files.

    Attributes:
        scene: The scene as the catalogue describes it.
        probe: What its files say; None where nobody opened them.
    """

    scene: Scene
    probe: SceneProbe | None

    @classmethod
    def of(cls, scene: Scene, probes: Probes) -> Self:
        """Pair a scene with its probe."""
        return cls(scene, probes.get(scene.key) or probes.get(scene.id))

    def header(self, band: str) -> Grid | None:
        """Return the grid that the file of a band states; None where no file was opened."""
        asset = self.probe.assets.get(band) if self.probe else None
        return asset.grid if asset else None

    def candidates(self) -> list[Candidate]:
        """Return the rasters of the scene whose headers are known."""
        return [
            Candidate(f"{self.scene.id}/{band}", header, asset.kind == "data")
            for band, asset in self.scene.assets.items()
            if (header := self.header(band)) is not None
        ]

    def shows_footprint(self) -> bool:
        """Return whether a file of the scene lies where its footprint does; a footprint elsewhere has no meaning."""
        headers = [c.grid for c in self.candidates()]
        footprint = shape(dict(self.scene.footprint)) if self.scene.footprint else None
        if not headers or footprint is None:
            return True
        return meets(footprint, box_region(headers[0].lonlat_bounds()))

    def stated_place(self) -> Grid | Bounds:
        """Return where the catalogue places the scene: the grid of its largest asset, else the lon/lat box."""
        stated = [a.grid for a in self.scene.assets.values() if a.grid is not None and _is_on_earth(a.grid)]
        if stated:
            return max(stated, key=lambda grid: (grid.height * grid.width, str(grid)))
        west, south, east, north = self.scene.bbox
        return (west, south, east + 360.0 if east < west else east, north)

    @property
    def dn_offset(self) -> int:
        """Offset to add to a digital number: 0 or -1000; the pixels decide where they were probed."""
        return self.probe.dn_offset if self.probe else self.scene.dn_offset

    @property
    def band_offsets(self) -> Mapping[str, int]:
        """Band → offset to add to its digital numbers, for the bands that differ from `dn_offset`."""
        return self.probe.band_offsets if self.probe else self.scene.band_offsets

    @property
    def verdict(self) -> str:
        """Verdict of the pixels on the offset; "unchecked" where they were not probed."""
        return self.probe.verdict if self.probe else "unchecked"

    @property
    def cloud_share(self) -> float | None:
        """Share of the scene's valid pixels in the region that is masked; None where it was not measured."""
        return self.probe.cloud_share if self.probe else None

    def extent(self, target: Grid) -> Grid:
        """Return the rectangle of the scene's raster: by the header, else the metadata, else its footprint's box."""
        headers = [c.grid for c in self.candidates()]
        if headers:
            return max(headers, key=lambda grid: (grid.height * grid.width, str(grid)))
        place = self.stated_place()
        if isinstance(place, Grid):
            return place
        return Grid.from_bounds(target.crs, project_bounds(place, target.crs), resolution=target.resolution)

    def rank(self, target: Grid) -> int:
        """Return the scene's `lattice_rank`, from the headers of its files."""
        return lattice_rank([c.grid for c in self.candidates()] or [self.extent(target)], target)


def _is_on_earth(grid: Grid) -> bool:
    try:
        check_on_earth(grid)
    except InvalidInput:
        return False
    return True


def refuse_unopened(probed: Sequence[ProbedScene]) -> None:
    """Raise the error for scenes of which no file could be opened.

    Raises:
        AssetUnreadable: The first file that could not be opened, with its cause.
        InvalidInput: No scene has an asset to open.
    """
    for one in probed:
        for band, asset_probe in (one.probe.assets if one.probe else {}).items():
            asset = one.scene.assets.get(band)
            if asset is not None and asset_probe.error:
                named = asset_probe.error.startswith("scene ")  # as errors of reading are
                where = "" if named else f"scene {one.scene.id}, asset {asset.key} ({redact_url(asset.href)}): "
                unreadable = AssetUnreadable(
                    f"{where}{asset_probe.error} (and no other file of {len(probed)} scenes could be opened)"
                )
                unreadable.asset = asset.key
                raise unreadable
    raise InvalidInput(
        f"none of the {len(probed)} scenes has a readable band (first: {probed[0].scene.id}, "
        f"lacking {', '.join(probed[0].scene.lacking) or 'nothing'}); check --bands and the access rules of the source"
    )


def select_scenes(
    probed: Sequence[ProbedScene], grid: Grid, config: IngestConfig
) -> tuple[list[ProbedScene], list[Drop]]:
    """Split scenes into those that show more than a sliver of the grid, and the rest with reasons.

    Raises:
        NothingFound: No scene is left.
    """
    asked = region_lonlat(config)
    west, south, east, north = asked or grid.lonlat_bounds()
    region = box(west, south, east + 360.0 if east < west else east, north)
    kept, drops = [], []
    reached_by: dict[Grid, bool] = {}  # the scenes of a tile share an extent
    for one in probed:
        scene = one.scene
        try:
            extent = one.extent(grid)
            if extent not in reached_by:
                reached_by[extent] = pixel_box(extent, grid) is not None
            reached = reached_by[extent]
        except (InvalidInput, ProjError):  # only its footprint is known, and that has no place in this CRS
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
        share = _covered_share(scene, region) if one.shows_footprint() else 1.0
        if share < _SLIVER:
            drops.append(Drop(scene.collection, scene.id, f"it sees {share:.4%} of what its tile could: a sliver"))
            continue
        kept.append(one)
    if not kept:
        if slivers := [drop for drop in drops if drop.reason.endswith("a sliver")]:
            raise NothingFound(
                f"none of the {len(probed)} scenes shows anything of the region {_show((west, south, east, north))}: "
                f"of {slivers[0].item_id}, {slivers[0].reason}; ask for other dates or a larger region"
            )
        boxes = [one.scene.bbox for one in probed]
        west_most, south_most = min(b[0] for b in boxes), min(b[1] for b in boxes)
        scenes_box = (west_most, south_most, max(b[2] for b in boxes), max(b[3] for b in boxes))
        raise NothingFound(
            f"none of the {len(probed)} scenes lies in the region: that is {_show((west, south, east, north))}, "
            f"the scenes are in {_show(scenes_box)} (west, south, east, north in degrees); correct --bbox or --geometry"
        )
    return kept, drops


def _covered_share(scene: Scene, region: BaseGeometry) -> float:
    """Return the share of the region, or of the scene's box where that is smaller, that the footprint covers.

    The region may lie on either side of the antimeridian.
    """
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
    """Return the rules of the scene's product."""
    return next(rule for rule in PRODUCTS if rule.name == scene.product)


def make_collection_spec(
    collection: str,
    product: ProductRule,
    choice: BandChoice,
    grid: Grid,
    steps: Sequence[Step],
    layout: Layout,
    config: IngestConfig,
    *,
    scenes: int = 0,
) -> CubeSpec:
    """Specify the collection of a cube that holds a number of scenes of one product."""
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
        item_type_for(scenes),
    )


def place_scenes(
    recipe: Recipe, steps: Sequence[Step], by_id: Mapping[str, ProbedScene], config: IngestConfig
) -> tuple[tuple[dict[str, Any], ...], list[PlannedScene]]:
    """Make the item table, in order of time, and list the scenes step by step in the order in which they win.

    Raises:
        InvalidInput: There are more scenes than a cube holds.
    """
    ordered = sorted(by_id.values(), key=lambda one: (one.scene.datetime, one.scene.id))
    recipe.spec.check_items(len(ordered))
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


def _item_row(one: ProbedScene, step: int) -> dict[str, Any]:
    scene = one.scene
    names = (
        "id", "datetime", "provider", "platform", "baseline", "tile", "relative_orbit", "orbit_direction", "datatake",
        "cloud_cover", "created", "updated",
    )  # fmt: skip
    row = {name: getattr(scene, name) for name in names}
    measured = {} if one.cloud_share is None else {"cloud_share": one.cloud_share}
    own = {"band_offsets": dict(one.band_offsets)} if one.band_offsets else {}
    return row | {"step": step, "bbox": list(scene.bbox), "dn_offset": one.dn_offset} | own | measured


def _source_asset(one: ProbedScene, asset: AssetRef, recipe: Recipe, config: IngestConfig) -> SourceAsset:
    layer = asset.kind == "class"
    radar = recipe.spec.kind == "backscatter"
    stored: Stored = "uint8" if layer else "float32" if radar else "uint16"
    probe = one.probe.assets.get(asset.band) if one.probe else None
    header = one.header(asset.band)
    overview = None
    if recipe.overviews and probe is not None and header is not None and reads_overviews(asset, stored):
        overview = choose_overview(probe.reduced, header, recipe.spec.grid)
    return SourceAsset(
        scene=one.scene.id,
        band=asset.band,
        key=asset.key,
        href=asset.href,
        header=header,
        nodata=asset.nodata if asset.nodata is None or math.isfinite(asset.nodata) else None,
        kind=asset.kind,
        stored=stored,
        resampling=config.grid.resampling,
        dn_offset=one.band_offsets.get(asset.band, one.dn_offset) if stored == "uint16" else 0,
        size_bytes=asset.size_bytes,
        checksum=asset.checksum,
        scale=None if layer or asset.scale in (1.0, product_of(one.scene).scale) else asset.scale,
        unit=asset.unit if radar and asset.unit and not layer else None,
        file_offset=probe.offset_dn or None if probe and stored == "uint16" else None,
        presigned=asset.presigned,
        refusal=probe.refusal if probe else None,
        overview=overview.factor if overview else None,
    )
