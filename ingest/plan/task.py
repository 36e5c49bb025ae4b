"""`ShardTask`: one shard of one collection and all that is needed to fill it.

A task holds everything that a worker must know, so that workers never ask a catalogue. Its key is a digest of all that
determines the shard's pixels: a shard whose ledger row has the same key is done.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Self

from ingest.pixels.grid_area import is_grid_area, sha_of
from ingest.raster.read import Stored
from zarr_store.errors import InvalidInput
from zarr_store.grid import Grid
from zarr_store.regions import Region
from zarr_store.spec import MAIN_ARRAYS, CubeSpec

__all__ = ["RULES_VERSION", "PlannedScene", "Recipe", "ShardTask", "SourceAsset", "digest", "digest_of_parts"]

RULES_VERSION = 3
"""Version of the rules that turn source pixels into cube pixels. A cube keeps the version that it was begun with.

1. Edges of pixels that coincide may differ by rounding where a raster is resampled within its CRS, so that a coarser
   target pixel also gets values of pixels beside those under it.
2. Such edges are equal.
3. Where pixels of the target hold whole pixels of a raster, their average is the exact mean, with halves rounded up.
   This holds for digital numbers of 16 bits; backscatter and coarser grids than 1/128 are averaged as by 2.
"""


def digest(value: Any) -> str:
    """Return the first 128 bits of SHA-256 over the canonical JSON of `value`, in hexadecimal."""
    return hashlib.sha256(_canonical(value).encode()).hexdigest()[:32]


def digest_of_parts(value: Mapping[str, Any]) -> str:
    """Compute `digest` of a mapping some of whose values are iterators, or mappings of iterators, piece by piece.

    >>> digest_of_parts({"b": iter([1, 2]), "a": {"x": iter(["y"])}}) == digest({"a": {"x": ["y"]}, "b": [1, 2]})
    True
    """
    hashed = hashlib.sha256()
    some: list[str] = []
    for text in _pieces(value):
        some.append(text)
        if len(some) == _AT_ONCE:
            hashed.update("".join(some).encode())
            some.clear()
    hashed.update("".join(some).encode())
    return hashed.hexdigest()[:32]


_AT_ONCE = 4096


def _pieces(value: Any) -> Iterator[str]:
    """Yield the canonical JSON of a value, in pieces."""
    if isinstance(value, Mapping) and any(isinstance(one, Iterator | Mapping) for one in value.values()):
        for number, name in enumerate(sorted(value)):
            yield f"{',' if number else '{'}{_canonical(name)}:"
            yield from _pieces(value[name])
        yield "}"
    elif isinstance(value, Iterator):
        yield "["
        for number, entry in enumerate(value):
            yield f",{_canonical(entry)}" if number else _canonical(entry)
        yield "]"
    else:
        yield _canonical(value)


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


@dataclass(frozen=True)
class SourceAsset:
    """One band of one scene, ready to be read.

    Attributes:
        scene: Item id, for error messages.
        band: Name of the band in the cube.
        key: Asset key in the item.
        href: Absolute address of the file, unsigned.
        header: Grid in the file header at the time of planning; None where the file could not be opened.
        nodata: Value of pixels without data in the metadata; the file's own value counts too.
        kind: "class" layers are never interpolated.
        stored: Type of the pixels in the cube.
        resampling: Kernel that is used where the lattices differ.
        dn_offset: Number that is added to digital numbers: 0 or -1000.
        size_bytes: Size of the file, as the item states it.
        checksum: Multihash of the file, as the item states it.
        scale: Scale that the item states, where it is not that of the product; the file's own wins.
        unit: Unit that the item states, where it matters; the file's own wins.
        file_offset: Offset that the file stated when it was planned, in digital numbers; None for none.
        presigned: True where the catalogue signed the href, which is kept without its signature.
        refusal: Why the file is not read although it can be opened.
        overview: Factor of the overview that is read in place of the full image; None for the full image.
    """

    scene: str
    band: str
    key: str
    href: str
    header: Grid | None
    nodata: float | None
    kind: Literal["data", "class"]
    stored: Stored
    resampling: str
    dn_offset: int
    size_bytes: int | None = None
    checksum: str | None = None
    scale: float | None = None
    unit: str | None = None
    file_offset: float | None = None
    presigned: bool | None = None
    refusal: str | None = None
    overview: int | None = None


_OPTIONAL = ("scale", "unit", "file_offset", "presigned", "refusal", "overview")
"""Fields of an asset that a plan leaves out where they have no value."""
_OF_FILES = ("header", "file_offset", "presigned", "refusal", "overview")
"""Fields of an asset that do not belong to the key of a shard: they come from files, or affect no pixel."""


@dataclass(frozen=True)
class PlannedScene:
    """One scene of one time step.

    Attributes:
        item: Row of the scene in the collection's item table.
        item_id: Id of the item.
        step: Number of the time step in the cube.
        extent: Grid with the rectangle of the scene's raster; pixels in it count as missing when it cannot be read.
        assets: Data bands in the cube's order, then class layers.
        lacking: Bands that the item does not have; a scene that lacks a band counts as missing as a whole.
    """

    item: int
    item_id: str
    step: int
    extent: Grid
    assets: tuple[SourceAsset, ...]
    lacking: tuple[str, ...] = ()

    def asset(self, band: str) -> SourceAsset | None:
        """Return the asset of a band, or None."""
        return next((asset for asset in self.assets if asset.band == band), None)

    @cached_property
    def identity(self) -> str:
        """The properties of the scene that belong to the key of a shard, as canonical JSON."""
        return _canonical(_identity(self))

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        shared = ("resampling", "dn_offset")
        first = self.assets[0] if self.assets else None
        dn_offset = next((a.dn_offset for a in self.assets if a.kind == "data"), 0)
        return {
            "item": self.item,
            "item_id": self.item_id,
            "step": self.step,
            "extent": self.extent.to_dict(),
            "lacking": list(self.lacking),
            "resampling": first.resampling if first else "nearest",
            "dn_offset": dn_offset,
            "assets": [
                {
                    name: value.to_dict() if isinstance(value, Grid) else value
                    for name, value in vars(asset).items()
                    if name not in shared and name != "scene" and (value is not None or name not in _OPTIONAL)
                }
                | ({"dn_offset": asset.dn_offset} if asset.kind == "data" and asset.dn_offset != dn_offset else {})
                for asset in self.assets
            ],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Make the object from its JSON form, which `to_dict` returns."""
        assets = tuple(
            SourceAsset(
                **{
                    **asset,
                    "scene": data["item_id"],
                    "header": _shared_grid(asset["header"]) if asset["header"] else None,
                    "resampling": data["resampling"],
                    "dn_offset": asset.get("dn_offset", data["dn_offset"]) if asset["kind"] == "data" else 0,
                }
            )
            for asset in data["assets"]
        )
        extent = _shared_grid(data["extent"])
        return cls(data["item"], data["item_id"], data["step"], extent, assets, tuple(data["lacking"]))


def _shared_grid(data: Mapping[str, Any]) -> Grid:
    """Return the grid of a JSON form; the files of a tile share one on every date."""
    return _grid(str(data["crs"]), tuple(map(float, data["transform"])), tuple(map(int, data["shape"])))


@functools.lru_cache(maxsize=4096)
def _grid(crs: str, transform: tuple[float, ...], shape: tuple[int, ...]) -> Grid:
    return Grid.from_dict({"crs": crs, "transform": transform, "shape": shape})


@dataclass(frozen=True)
class Recipe:
    """The settings that all shards of a collection share.

    Attributes:
        spec: Specification of the collection in the cube.
        mask_layer: Class layer that masks are made from; None masks nothing.
        mask_classes: Class values that are masked.
        mask_dilate_m: Distance by which masked areas grow, in metres.
        clip: GeoJSON text of an area in lon/lat; pixels outside it have no data. None for the whole grid.
        scenes: Collection of the catalogue whose scenes the group holds, where it has several groups, one for each
            pixel size (`ingest.plan.native`); empty where the group has the collection's name.
        version: Version of the rules (`RULES_VERSION`).
        overviews: Whether reflectance is read from overviews of the files where the grid is much coarser.
    """

    spec: CubeSpec
    mask_layer: str | None = None
    mask_classes: tuple[int, ...] = ()
    mask_dilate_m: float = 0.0
    clip: str | None = None
    scenes: str = ""
    version: int = RULES_VERSION
    overviews: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.version <= RULES_VERSION:
            raise InvalidInput(
                f"{self.spec.collection} was planned by version {self.version} of the rules for pixels; this release "
                f"knows 1 … {RULES_VERSION}: use a newer one"
            )

    @property
    def exact_edges(self) -> bool:
        """Whether edges of pixels that coincide are equal numbers where a raster is resampled."""
        return self.version > 1

    @property
    def exact_means(self) -> bool:
        """Whether averages of whole source pixels are exact means."""
        return self.version > 2

    @property
    def catalogue(self) -> str:
        """Collection of the catalogue whose scenes the group holds."""
        return self.scenes or self.spec.collection

    @property
    def native(self) -> bool:
        """Whether the group holds only the bands of one pixel size of its collection."""
        return bool(self.scenes)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class layers that are read: those that the cube keeps, then the mask's."""
        kept = self.spec.class_layers
        return (*kept, self.mask_layer) if self.mask_layer and self.mask_layer not in kept else kept

    @property
    def dtype(self) -> str:
        """Type of the main array."""
        return MAIN_ARRAYS[self.spec.kind]

    @cached_property
    def rules_text(self) -> str:
        """`rules` as canonical JSON."""
        return _canonical(self.rules())

    def rules(self) -> dict[str, Any]:
        """Return all settings that determine pixels, except region and sources; the time axis is not among them."""
        spec = {name: value for name, value in self.spec.to_dict().items() if name != "times"}
        rules = {
            "version": self.version,
            "spec": spec,
            "mask": [self.mask_layer, sorted(self.mask_classes), self.mask_dilate_m],
        }
        if self.overviews:
            rules["overviews"] = True
        if self.clip is None:
            return rules
        # of an area that is kept in pixels, what it stands for: how it is packed changes no pixel
        return rules | {"clip": {"sha256": sha_of(self.clip)} if is_grid_area(self.clip) else self.clip}

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "spec": self.spec.to_dict(),
            "mask_layer": self.mask_layer,
            "mask_classes": list(self.mask_classes),
            "mask_dilate_m": self.mask_dilate_m,
            "clip": self.clip,
            **({"scenes": self.scenes} if self.scenes else {}),
            **({"rules": self.version} if self.version > 1 else {}),
            **({"overviews": True} if self.overviews else {}),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Make the object from its JSON form, which `to_dict` returns."""
        return cls(
            CubeSpec.from_dict(data["spec"]),
            data["mask_layer"],
            tuple(data["mask_classes"]),
            data["mask_dilate_m"],
            data.get("clip"),
            data.get("scenes", ""),
            int(data.get("rules", 1)),
            bool(data.get("overviews", False)),
        )


@dataclass(frozen=True, order=True, slots=True)
class ShardTask:
    """One shard to fill.

    Attributes:
        collection: Name of the group in the cube.
        index: Shard index (t, y, x).
        region: Pixels that the shard holds.
        key: Digest of all that determines these pixels.
        sources: Scenes that may give pixels, per step in the order in which they win.
    """

    collection: str
    index: tuple[int, int, int]
    region: Region
    key: str
    sources: tuple[PlannedScene, ...] = field(compare=False, repr=False)

    @classmethod
    def of(cls, recipe: Recipe, index: tuple[int, int, int], region: Region, sources: tuple[PlannedScene, ...]) -> Self:
        """Make the task of a shard, with its key."""
        # equal to the canonical JSON of the whole, but put together from parts that many shards share
        identities = ",".join(scene.identity for scene in sources)
        text = f"[{recipe.rules_text},{_canonical(region.to_list())},[{identities}]]"
        key = hashlib.sha256(text.encode()).hexdigest()[:32]
        return cls(recipe.spec.collection, index, region, key, sources)


def _identity(scene: PlannedScene) -> dict[str, Any]:
    """Return the properties of a source that belong to the key of a shard; none comes from the file headers.

    A file that could not be opened has no header. When it can be opened later, the shard must keep its key.
    """
    whole = scene.to_dict()
    unstated = ("size_bytes", "checksum")
    assets = [
        {
            name: value
            for name, value in asset.items()
            if name not in _OF_FILES and (value is not None or name not in unstated)
        }
        for asset in whole["assets"]
    ]
    return {name: value for name, value in whole.items() if name != "extent"} | {"assets": assets}
