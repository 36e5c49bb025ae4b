"""`Scene` and `AssetRef`: one harmonised form for STAC items of all providers and versions.

Probing, planning and reading use only these. They hold what the metadata state. `ingest.plan.probe.SceneProbe` holds
what the files state, and where the two disagree, the file wins. Hrefs are absolute and unsigned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from ingest.scenes.witnesses import Witness
from zarr_store.grid import Grid
from zarr_store.notebook import facts_table

__all__ = ["AssetKind", "AssetRef", "Scene"]

AssetKind = Literal["data", "class"]
"""Kind of a band: measured data, or a class layer."""


@dataclass(frozen=True)
class AssetRef:
    """One band of one scene: its address and its metadata.

    Attributes:
        band: Requested name of the band in the project's spelling, e.g. "blue", "scl", "vv".
        key: Asset key in the item, e.g. "B02".
        href: Absolute URL or absolute local path, unsigned.
        grid: Grid in the metadata; None where the item has no shape and transform.
        dtype: numpy name of the stored type, from the metadata or the product rule.
        nodata: Value of pixels without data.
        scale: Multiplier as the metadata state it; 1.0 for class layers.
        offset: Addend after `scale` as the metadata state it (-0.1 for baseline 04.00). It is never applied as it is:
            `Scene.dn_offset` is what counts.
        kind: "class" layers are never scaled, offset or interpolated.
        media_type: Media type as the item states it.
        size_bytes: Size of the file in bytes as the item states it (`file:size`).
        checksum: Multihash of the file in hexadecimal, as the item states it (`file:checksum`).
        presigned: True where the catalogue gave the href with a signature, which is kept out of `href`.
        unit: Unit of the pixels as the item states it, such as "dB".

    Example:
        >>> import ingest
        >>> scene = ingest.find_scenes("world/catalog.json", collections=["sentinel-2-l2a"], bands=["red"])[0]
        >>> scene.assets["red"].key, scene.assets["red"].kind
        ('red', 'data')
    """

    band: str
    key: str
    href: str
    grid: Grid | None = None
    dtype: str | None = None
    nodata: float | None = None
    scale: float = 1.0
    offset: float = 0.0
    kind: AssetKind = "data"
    media_type: str | None = None
    size_bytes: int | None = None
    checksum: str | None = None
    presigned: bool | None = None
    unit: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "grid"}
        return {**fields, "grid": self.grid.to_dict() if self.grid else None}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Make the object from its JSON form, which `to_dict` returns."""
        grid = data.get("grid")
        return cls(**{**data, "grid": Grid.from_dict(grid) if grid else None})


@dataclass(frozen=True)
class Scene:
    """One acquisition over one tile, as the catalogue describes it.

    Attributes:
        id: Item id; it is never used as a path.
        collection: Collection id as the catalogue spells it; the cube's group name.
        provider: Name of the provider rule ("earth-search", "planetary-computer", "cdse", "terrashard", "generic").
        datetime: Acquisition time in UTC, in whole seconds: "2023-08-10T10:06:49Z".
        assets: The requested and usable assets, by band.
        lacking: Requested bands that the item lacks, or whose href was refused.
        footprint: GeoJSON geometry in lon/lat.
        bbox: (west, south, east, north) in degrees; west > east across the antimeridian.
        platform: Satellite, such as "sentinel-2a".
        baseline: Processing baseline, such as "05.09".
        tile: MGRS tile, such as "33TWL".
        relative_orbit: Relative orbit: 1…143 (Sentinel-2) or 1…175 (Sentinel-1).
        orbit_direction: "ascending" or "descending".
        datatake: Datatake id of Sentinel-2, or absolute orbit for Sentinel-1.
        cloud_cover: Cloud cover of the whole item in percent.
        created: Time at which this version of the item was made.
        updated: Time of the last change of the item.
        dn_offset: Number that must be ADDED to a digital number by the metadata: 0 or -1000.
        offset_evidence: Reason for `dn_offset`.
        notes: Remarks for the person who reads the plan: refused hrefs, ignored metadata, an unknown CRS.
        witnesses: All that the metadata say about the offset; empty for scenes of older releases.
        product: Name of the product rule in `ingest.request.products`, e.g. "sentinel-2-l2a".
        datastrip: Sensing start of the datastrip, "20230810T100559"; parts of a split datatake differ in it.
        nodata_percent: Share of the tile without data in percent, as the item states it.
        band_offsets: Band → offset that it states itself, for the bands that differ from `dn_offset`.
        catalogue_id: Id in the catalogue, where other scenes of the search have the same one; else empty.

    Example:
        >>> import ingest
        >>> scene = ingest.find_scenes("world/catalog.json", collections=["sentinel-2-l2a"])[0]
        >>> scene.datetime, scene.dn_offset
        ('2022-04-20T10:08:08Z', 0)
    """

    id: str
    collection: str
    provider: str
    datetime: str
    assets: Mapping[str, AssetRef]
    lacking: tuple[str, ...]
    footprint: Mapping[str, Any]
    bbox: tuple[float, float, float, float]
    platform: str | None = None
    baseline: str | None = None
    tile: str | None = None
    relative_orbit: int | None = None
    orbit_direction: str | None = None
    datatake: str | None = None
    cloud_cover: float | None = None
    created: str | None = None
    updated: str | None = None
    dn_offset: int = 0
    offset_evidence: str = ""
    notes: tuple[str, ...] = ()
    product: str = ""
    datastrip: str | None = None
    nodata_percent: float | None = None
    catalogue_id: str = ""
    witnesses: tuple[Witness, ...] = ()
    band_offsets: Mapping[str, int] = field(default_factory=dict)

    def offset_of(self, band: str) -> int:
        """Return what must be added to a digital number of a band by the metadata: 0 or -1000."""
        return self.band_offsets.get(band, self.dn_offset)

    @property
    def key(self) -> tuple[str, str]:
        """(collection, id), which identifies a scene."""
        return (self.collection, self.id)

    def __repr__(self) -> str:
        cloud = "" if self.cloud_cover is None else f", cloud {self.cloud_cover:.0f} %"
        return f"<Scene {self.id} of {self.collection}, {self.datetime}{cloud}, {' '.join(self.assets)}>"

    def _repr_html_(self) -> str:
        rows = [
            ("collection", self.collection),
            ("time", self.datetime),
            ("tile", self.tile),
            ("platform", self.platform),
            ("baseline", self.baseline),
            ("cloud", None if self.cloud_cover is None else f"{self.cloud_cover:.1f} %"),
            ("offset", f"{self.dn_offset:+d} {self.offset_evidence}"),
            ("bands", ", ".join(self.assets)),
            ("lacking", ", ".join(self.lacking)),
            ("notes", "\n".join(self.notes)),
        ]
        return facts_table(f"Scene {self.id}", rows)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {
            **fields,
            "assets": {band: asset.to_dict() for band, asset in self.assets.items()},
            "lacking": list(self.lacking),
            "footprint": dict(self.footprint),
            "bbox": list(self.bbox),
            "notes": list(self.notes),
            "witnesses": [one.to_dict() for one in self.witnesses],
            "band_offsets": dict(self.band_offsets),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Make the object from its JSON form, which `to_dict` returns."""
        west, south, east, north = (float(v) for v in data["bbox"])
        return cls(
            **{
                **data,
                "assets": {band: AssetRef.from_dict(asset) for band, asset in data["assets"].items()},
                "lacking": tuple(data["lacking"]),
                "bbox": (west, south, east, north),
                "notes": tuple(data.get("notes", ())),
                "witnesses": tuple(Witness.from_dict(one) for one in data.get("witnesses", ())),
            }
        )
