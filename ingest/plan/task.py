"""`ShardTask`: one shard of one collection and all that is needed to fill it; what a plan is made of.

Tasks hold everything a worker must know, so that workers never ask a catalogue, and their key is a digest of all that
determines the shard's pixels: a shard whose ledger row has the same key is done.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Self

from ingest.raster.read import Stored
from zarr_store.grid import Grid
from zarr_store.regions import Region
from zarr_store.spec import MAIN_ARRAYS, CubeSpec

__all__ = ["RULES_VERSION", "PlannedScene", "Recipe", "ShardTask", "SourceAsset", "digest"]

RULES_VERSION = 1
"""Raised when the rules change that turn source pixels into cube pixels; older shards are then made again."""


def digest(value: Any) -> str:
    """128 bits of SHA-256 over the canonical JSON of `value`."""
    return hashlib.sha256(_canonical(value).encode()).hexdigest()[:32]


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


@dataclass(frozen=True)
class SourceAsset:
    """One band of one scene, ready to be read.

    Attributes:
        scene: Item id, for errors.
        band: Name in the cube.
        key: Asset key in the item.
        href: Absolute and unsigned.
        header: Grid by the file header when it was planned; None where the file could not be opened.
        nodata: Value of pixels without data by metadata; the file's own value counts too.
        kind: "class" layers are never interpolated.
        stored: Type of the pixels in the cube.
        resampling: Kernel wanted where the lattices differ.
        dn_offset: Added to digital numbers.
        size_bytes: Of the file, as the item states it.
        checksum: Multihash of the file, as the item states it.
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


@dataclass(frozen=True)
class PlannedScene:
    """One scene of one time step.

    Attributes:
        item: Row of the collection's item table.
        item_id: Its id.
        step: Time step of the cube.
        extent: Grid whose rectangle the scene's raster fills; pixels in it count as missing when it cannot be read.
        assets: Data bands in the cube's order, then class layers.
        lacking: Bands that the item does not have; such a scene is missing as a whole.
    """

    item: int
    item_id: str
    step: int
    extent: Grid
    assets: tuple[SourceAsset, ...]
    lacking: tuple[str, ...] = ()

    def asset(self, band: str) -> SourceAsset | None:
        """The asset of a band, or None."""
        return next((asset for asset in self.assets if asset.band == band), None)

    @cached_property
    def identity(self) -> str:
        """What of it belongs to the key of a shard, as canonical JSON."""
        return _canonical(_identity(self))

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        shared = ("resampling", "dn_offset")
        first = self.assets[0] if self.assets else None
        return {
            "item": self.item,
            "item_id": self.item_id,
            "step": self.step,
            "extent": self.extent.to_dict(),
            "lacking": list(self.lacking),
            "resampling": first.resampling if first else "nearest",
            "dn_offset": next((a.dn_offset for a in self.assets if a.kind == "data"), 0),
            "assets": [
                {
                    name: value.to_dict() if isinstance(value, Grid) else value
                    for name, value in vars(asset).items()
                    if name not in shared and name != "scene"
                }
                for asset in self.assets
            ],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`."""
        assets = tuple(
            SourceAsset(
                **{
                    **asset,
                    "scene": data["item_id"],
                    "header": Grid.from_dict(asset["header"]) if asset["header"] else None,
                    "resampling": data["resampling"],
                    "dn_offset": data["dn_offset"] if asset["kind"] == "data" else 0,
                }
            )
            for asset in data["assets"]
        )
        extent = Grid.from_dict(data["extent"])
        return cls(data["item"], data["item_id"], data["step"], extent, assets, tuple(data["lacking"]))


@dataclass(frozen=True)
class Recipe:
    """What all shards of a collection share.

    Attributes:
        spec: The collection in the cube.
        mask_layer: Class layer that masks are made from; None masks nothing.
        mask_classes: Class values that are masked.
        mask_dilate_m: How far they grow, metres.
        clip: GeoJSON text of the area, lon/lat, outside which there is no data; None for the whole grid.
    """

    spec: CubeSpec
    mask_layer: str | None = None
    mask_classes: tuple[int, ...] = ()
    mask_dilate_m: float = 0.0
    clip: str | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """Class layers that are read: those kept, then the mask's."""
        kept = self.spec.class_layers
        return (*kept, self.mask_layer) if self.mask_layer and self.mask_layer not in kept else kept

    @property
    def dtype(self) -> str:
        """Of the main array."""
        return MAIN_ARRAYS[self.spec.kind]

    @cached_property
    def rules_text(self) -> str:
        """`rules` as canonical JSON."""
        return _canonical(self.rules())

    def rules(self) -> dict[str, Any]:
        """All that determines pixels besides region and sources; the time axis does not."""
        spec = {name: value for name, value in self.spec.to_dict().items() if name != "times"}
        rules = {
            "version": RULES_VERSION,
            "spec": spec,
            "mask": [self.mask_layer, sorted(self.mask_classes), self.mask_dilate_m],
        }
        return rules if self.clip is None else rules | {"clip": self.clip}

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "spec": self.spec.to_dict(),
            "mask_layer": self.mask_layer,
            "mask_classes": list(self.mask_classes),
            "mask_dilate_m": self.mask_dilate_m,
            "clip": self.clip,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`."""
        return cls(
            CubeSpec.from_dict(data["spec"]),
            data["mask_layer"],
            tuple(data["mask_classes"]),
            data["mask_dilate_m"],
            data.get("clip"),
        )


@dataclass(frozen=True, order=True)
class ShardTask:
    """One shard to fill.

    Attributes:
        collection: Group of the cube.
        index: Shard index (t, y, x).
        region: The pixels it holds.
        key: Digest of all that determines them.
        sources: Scenes that may give pixels, per step in the order in which they win.
    """

    collection: str
    index: tuple[int, int, int]
    region: Region
    key: str
    sources: tuple[PlannedScene, ...] = field(compare=False, repr=False)

    @classmethod
    def of(cls, recipe: Recipe, index: tuple[int, int, int], region: Region, sources: tuple[PlannedScene, ...]) -> Self:
        """The task of a shard, with its key."""
        # the same text as canonical JSON of the whole, put together from parts that many shards share
        told = ",".join(scene.identity for scene in sources)
        text = f"[{recipe.rules_text},{_canonical(region.to_list())},[{told}]]"
        key = hashlib.sha256(text.encode()).hexdigest()[:32]
        return cls(recipe.spec.collection, index, region, key, sources)


def _identity(scene: PlannedScene) -> dict[str, Any]:
    """What of a source belongs to the key of a shard: not what its files said when they were looked at.

    A file that could not be opened has no header, and must not make another plan of the one that finds it healed.
    """
    whole = scene.to_dict()
    unstated = ("size_bytes", "checksum")
    assets = [
        {
            name: value
            for name, value in asset.items()
            if name != "header" and (value is not None or name not in unstated)
        }
        for asset in whole["assets"]
    ]
    return {name: value for name, value in whole.items() if name != "extent"} | {"assets": assets}
