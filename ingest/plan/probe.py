"""`SceneProbe` holds what the files of a scene state: headers, and a few pixels that show whether they have the offset.

Item metadata are often stale or wrong: sizes of another resolution, or an offset of -1000 that was already subtracted.
The header wins over the metadata, and the pixels win over both. Every mismatch becomes a sentence for the plan and the
report.
"""

from __future__ import annotations

import functools
import logging
import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from pyproj.exceptions import ProjError
from shapely.geometry import shape

from ingest.plan.coverage import Coverage, choose_coverage_band, find_window, measure_coverage
from ingest.plan.reduced import ReducedProbe
from ingest.plan.sample import Sample, is_read_whole, measure_blocks, read_near, read_sample, trim
from ingest.plan.tags import describe_conversion, find_refusals, follow_offset_of_files, stored_type
from ingest.raster.faults import is_file_fault
from ingest.raster.kept import KeptPixels, kept_bytes
from ingest.raster.ranges import find_range_file
from ingest.request.config import IngestConfig
from ingest.request.products import PRODUCTS
from ingest.scenes.band_offsets import settle_bands
from ingest.scenes.footprint import box_region, meets
from ingest.scenes.offsets import (
    OffsetReading,
    Verdict,
    combine_bands,
    explain_wrong_scale,
    is_settled_by,
    needs_closer_look,
    settle_offset,
)
from ingest.scenes.scene import AssetRef, Scene
from ingest.trust.waits import crew
from zarr_store.errors import AssetUnreadable, InvalidInput, TerrashardError
from zarr_store.grid import Grid

if TYPE_CHECKING:
    from rasterio.io import DatasetReader

    from ingest.raster.limits import Access

__all__ = ["AssetProbe", "SceneProbe", "measure_offset", "probe_scenes", "read_band"]

log = logging.getLogger(__name__)

_THREADS = 8
"""Number of headers read at once. Each is a few small requests; more would trip the rate limits of providers."""

_VISIBLE = ("coastal", "blue", "green", "red")
"""Bands that can show the offset, bluest first: land and water are darkest there."""


@dataclass(frozen=True)
class AssetProbe:
    """The header of one file.

    Attributes:
        grid: Grid of the file; None where `error` states why it is unknown.
        dtype: numpy name of the stored type.
        nodata: Value of pixels without data, as the file declares it.
        overviews: Factors of the overviews inside the file.
        block: (height, width) of a block, in pixels.
        size_bytes: Size of the file, where it is known without another request.
        error: Why the file cannot be used, redacted.
        scale: Scale that the file states; 1.0 where it states none.
        offset_dn: Offset that the file states, in digital numbers of a cube; 0.0 where it states none.
        unit: Unit that the file states, in lower case; empty where it states none.
        refusal: Why the pixels are not used although the file can be read.
        block_bytes: Mean stored bytes of the blocks that the region touches, or of all; None where that is unknown.
        reduced: Overviews that can be read in place of the full image, where they are asked for.
        no_overviews: Why others cannot; empty where all can, or none is asked for.
    """

    grid: Grid | None = None
    dtype: str | None = None
    nodata: float | None = None
    overviews: tuple[int, ...] = ()
    block: tuple[int, int] | None = None
    size_bytes: int | None = None
    error: str | None = None
    scale: float = 1.0
    offset_dn: float = 0.0
    unit: str = ""
    refusal: str | None = None
    block_bytes: float | None = None
    reduced: tuple[ReducedProbe, ...] = ()
    no_overviews: str = ""

    def overview(self, factor: int) -> ReducedProbe | None:
        """Return the overview of a factor; None where there is none."""
        return next((one for one in self.reduced if one.factor == factor), None)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {
            **fields,
            "grid": self.grid.to_dict() if self.grid else None,
            "overviews": list(self.overviews),
            "block": list(self.block) if self.block else None,
            "reduced": [one.to_dict() for one in self.reduced],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Make the object from its JSON form, which `to_dict` returns."""
        return cls(
            **{
                **data,
                "grid": Grid.from_dict(data["grid"]) if data["grid"] else None,
                "overviews": tuple(data["overviews"]),
                "block": tuple(data["block"]) if data["block"] else None,
                "reduced": tuple(ReducedProbe.from_dict(one) for one in data.get("reduced", ())),
            }
        )


@dataclass(frozen=True)
class SceneProbe:
    """The facts that the files of one scene state.

    Attributes:
        assets: The header of each file, by band.
        dn_offset: What must be added to a digital number (DN), by metadata and pixels: 0 or -1000.
        verdict: "confirmed" and "repaired": the pixels decided; "contradicted": they disagree and the policy keeps the
            metadata; "inconclusive": clouds, snow or too few pixels; "unchecked": no band that could tell.
        share_below_1000: Share of valid DN in 1…999 of the bluest band.
        reading: What the pixels say about the offset; None if none were read.
        valid_share: Share of the region, or of the scene's raster where that is smaller, that has data; None where
            unknown.
        cloud_share: Share of the pixels with data in the region that are of masked classes; None without a class layer.
        discrepancies: Sentences on files that disagree with the metadata or cannot be read.
        band_offsets: Band → what must be added to its numbers, for the bands that differ from `dn_offset`.
    """

    assets: Mapping[str, AssetProbe]
    dn_offset: int
    verdict: Verdict
    share_below_1000: float | None = None
    discrepancies: tuple[str, ...] = ()
    valid_share: float | None = None
    cloud_share: float | None = None
    reading: OffsetReading | None = None
    band_offsets: Mapping[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "assets": {band: asset.to_dict() for band, asset in self.assets.items()},
            "dn_offset": self.dn_offset,
            "verdict": self.verdict,
            "share_below_1000": self.share_below_1000,
            "valid_share": self.valid_share,
            "cloud_share": self.cloud_share,
            "reading": self.reading.to_dict() if self.reading else None,
            "discrepancies": list(self.discrepancies),
            "band_offsets": dict(self.band_offsets),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Make the object from its JSON form, which `to_dict` returns."""
        assets = {band: AssetProbe.from_dict(asset) for band, asset in data["assets"].items()}
        reading = OffsetReading(**data["reading"]) if data.get("reading") else None
        return cls(**{**data, "assets": assets, "discrepancies": tuple(data["discrepancies"]), "reading": reading})


@dataclass
class _Header:
    """The header of one asset, with the sample and the coverage that were read from its pixels."""

    probe: AssetProbe
    sample: Sample | None = field(default=None)
    coverage: Coverage | None = None


def probe_scenes(
    scenes: Sequence[Scene], config: IngestConfig, *, source: str = ""
) -> dict[tuple[str, str], SceneProbe]:
    """Read the headers of all assets, a small sample per Sentinel-2 L2A scene, and the classes over the region.

    An unreadable file is recorded and not raised: the plan goes on without it, and its pixels become `missing`.

    Args:
        scenes: Scenes that `ingest.scenes.search.find_scenes` returned.
        config: Region, masked classes, retries, timeouts and `offset_policy`.
        source: SOURCE of the scenes; its own host may be a private one.

    Returns:
        (collection, id) → probe; two collections may use the same id.

    Raises:
        InvalidInput: `offset_policy` is "fail" and pixels contradict the metadata, or nothing states the offset; or
            `strict`, and pixels are not reflectance.
    """
    from ingest.raster.limits import Access

    jobs = [(scene, asset) for scene in scenes for asset in scene.assets.values()]
    access = Access.of(config, source)
    with crew(_THREADS) as pool:
        headers = list(pool.map(lambda job: _probe_asset(*job, config=config, access=access), jobs))
        by_scene: dict[tuple[str, str], dict[str, _Header]] = defaultdict(dict)
        for (scene, asset), header in zip(jobs, headers, strict=True):
            by_scene[scene.key][asset.band] = header
        probes = pool.map(lambda scene: _conclude_or_not(scene, by_scene[scene.key], config, access), scenes)
        return {scene.key: probe for scene, probe in zip(scenes, probes, strict=True)}


def _conclude_or_not(scene: Scene, headers: Mapping[str, _Header], config: IngestConfig, access: Access) -> SceneProbe:
    """Return the result of `_conclude`, or the headers alone where it raises an unexpected error."""
    try:
        return _conclude(scene, headers, config, access)
    except InvalidInput:  # what --strict and --offset-policy fail ask for
        raise
    except Exception as error:  # noqa: BLE001  # one file or scene never ends a plan; --strict raises it
        sentence = _defect(error, f"scene {scene.id}", config)
        probes = {band: header.probe for band, header in headers.items()}
        return SceneProbe(probes, scene.dn_offset, "unchecked", discrepancies=(sentence,))


def _offset_band(scene: Scene) -> str | None:
    """Return the band whose pixels show the offset; None for L1C, whose blue is bright over any ground."""
    if scene.product != "sentinel-2-l2a":
        return None
    return next((band for band in _VISIBLE if band in scene.assets and scene.assets[band].kind == "data"), None)


def _coverage_band(scene: Scene) -> str | None:
    """Return the band whose pixels show how much of the region the scene covers."""
    product = next((rule for rule in PRODUCTS if rule.name == scene.product), None)
    return choose_coverage_band(scene.assets, product.mask_layer if product else None)


def _probe_asset(scene: Scene, asset: AssetRef, *, config: IngestConfig, access: Access) -> _Header:
    from ingest.raster.access import remember_header, remember_overviews, with_asset
    from ingest.raster.header import grid_of
    from ingest.raster.read import values_of
    from ingest.raster.values import Stated

    with_pixels = asset.band == _offset_band(scene)

    def use(dataset: DatasetReader) -> _Header:
        stated = Stated.of(dataset)
        values = values_of(stated, stored_type(scene, asset), asset)
        grid = _placed(grid_of(dataset))
        window = find_window(grid, config)
        probe = AssetProbe(
            grid=grid,
            dtype=str(dataset.dtypes[0]),
            nodata=None if dataset.nodata is None else float(dataset.nodata),
            overviews=tuple(int(factor) for factor in dataset.overviews(1)),
            block=(int(dataset.block_shapes[0][0]), int(dataset.block_shapes[0][1])),
            size_bytes=file.size if (file := find_range_file(dataset)) is not None else None,
            scale=stated.scale,
            offset_dn=stated.offset_dn,
            unit=stated.unit,
            block_bytes=measure_blocks(dataset, window or (0, 0, grid.height, grid.width)),
        )
        if window is not None:
            remember_header(dataset, access)
        if config.grid.read_overviews and asset.kind == "data":
            found = remember_overviews(dataset, access, grid)
            region = window or (0, 0, grid.height, grid.width)
            reduced = tuple(ReducedProbe.of(one, region) for one in found.usable)
            probe = replace(probe, reduced=reduced, no_overviews=found.refusal)
        if not with_pixels:
            return _Header(probe)
        sample = coverage = near = None
        # where overviews are asked for, the ingest does not need the blocks of the region
        if window is not None and not is_read_whole(dataset) and not config.grid.read_overviews:
            if file is not None:
                file.keep = None  # of the blocks, only the pixels of the region are kept
            near = _near(dataset, window)
        if near is not None and window is not None:
            kept_bytes(os.getpid()).keep_pixels(asset.href, trim(near, window))
            if asset.band == _coverage_band(scene):
                coverage = measure_coverage(dataset, grid, asset, config, near=near)
            blocks = Sample.of_blocks(near)
            if (stated.scale, stated.offset) == (1.0, 0.0) and is_settled_by(scene, blocks.reading):
                sample = blocks
        if sample is None:
            if file is not None and not is_read_whole(dataset):
                file.keep = None  # an overview is of no use for the ingest
            sample = read_sample(dataset).in_numbers_of_the_cube(values)
        return _Header(probe, sample, coverage)

    try:
        header = with_asset(asset.href, use, scene=scene.id, asset=asset.key, access=access, keep=True)
    except (AssetUnreadable, InvalidInput) as error:
        log.warning("%s", error)
        return _Header(AssetProbe(error=str(error)))
    except Exception as error:  # noqa: BLE001  # one file or scene never ends a plan; --strict raises it
        return _Header(AssetProbe(error=_defect(error, f"scene {scene.id}, asset {asset.key}", config)))
    grid = header.probe.grid
    if grid is None or asset.band != _coverage_band(scene) or header.coverage is not None:
        return header
    try:
        coverage = with_asset(
            asset.href,
            lambda file: measure_coverage(file, grid, asset, config),
            scene=scene.id,
            asset=asset.key,
            access=access,
            keep=True,
        )
    except (AssetUnreadable, InvalidInput) as error:  # its header can be used nevertheless
        log.warning("%s", error)
        return header
    except Exception as error:  # noqa: BLE001  # one file or scene never ends a plan; --strict raises it
        _defect(error, f"scene {scene.id}, asset {asset.key}", config)
        return header
    return replace(header, coverage=coverage)


def _near(dataset: DatasetReader, window: tuple[int, int, int, int]) -> KeptPixels | None:
    """Return the pixels of the blocks of the region; None where one is damaged, which the ingest will report."""
    try:
        return read_near(dataset, window)
    except Exception as error:
        if not is_file_fault(error):
            raise
        return None


_SENTINEL_PIXEL_M = (1.0, 1e5)
"""Smallest and largest pixel of a scene that is believed, in metres."""


@functools.lru_cache(maxsize=4096)
def _placed(grid: Grid) -> Grid:
    """Check that pixels of Sentinel scenes can have this grid: one odd header must not decide the grid of a cube.

    Raises:
        InvalidInput: The pixels have an impossible size, or the grid has no place in longitude and latitude.
    """
    metres = max(grid.resolution) / grid.units_per_metre, min(grid.resolution) / grid.units_per_metre
    if not (metres[0] <= _SENTINEL_PIXEL_M[1] and metres[1] >= _SENTINEL_PIXEL_M[0]):
        raise InvalidInput(
            f"its pixels would be {metres[1]:g} m wide; expected {_SENTINEL_PIXEL_M[0]:g} to {_SENTINEL_PIXEL_M[1]:g} m"
        )
    try:
        bounds = grid.lonlat_bounds()
    except ProjError as error:
        raise InvalidInput(f"its place in longitude and latitude is not known ({error})") from error
    if not all(math.isfinite(value) for value in bounds):
        raise InvalidInput(f"it would lie at {grid.bounds} in {grid.crs[:40]}, which is not a place on Earth")
    return grid


def _defect(error: Exception, where: str, config: IngestConfig) -> str:
    """Log an unforeseen error of one file or scene with its traceback; the plan goes on without that file or scene.

    Returns:
        A sentence for the plan.

    Raises:
        Exception: `error` itself, with --strict, or where it ends the command (a stop, a full disk).
    """
    if config.running.strict or isinstance(error, TerrashardError):
        raise error
    text = f"{type(error).__name__}: {error}"
    log.error("%s cannot be used, please report this (%s)", where, text, exc_info=error)
    return f"{where} cannot be used ({text})"


def measure_offset(
    scene: Scene, access: Access, known: Mapping[str, OffsetReading] | None = None
) -> OffsetReading | None:
    """Read windows at full resolution of all visible bands of a scene, and decide what they say about its offset.

    A band that cannot be read now tells nothing.

    Args:
        scene: The scene; only its readable assets may be given.
        access: Limits and retries.
        known: Band → reading of pixels that were read before, which is replaced unless it is of the file's own pixels.

    Returns:
        The reading; None for a product or bands that cannot tell, or if nothing could be read.
    """
    bluest = _offset_band(scene)
    readings = dict(known or {})
    for band in _VISIBLE if bluest else ():
        asset = scene.assets.get(band)
        if asset is None or asset.kind != "data" or (band in readings and readings[band].windows):
            continue
        reading = read_band(scene, asset, access)
        if reading is not None:
            readings[band] = reading
    if bluest is None or bluest not in readings:
        return None
    return combine_bands(readings[bluest], [reading for band, reading in readings.items() if band != bluest])


def read_band(scene: Scene, asset: AssetRef, access: Access) -> OffsetReading | None:
    """Read windows of one band at full resolution; None if it cannot be read now."""
    from ingest.raster.access import with_asset
    from ingest.raster.read import values_of
    from ingest.raster.values import Stated

    def sample_of(file: DatasetReader) -> Sample:
        values = values_of(Stated.of(file), stored_type(scene, asset), asset)
        return read_sample(file, closely=True).in_numbers_of_the_cube(values)

    try:
        return with_asset(asset.href, sample_of, scene=scene.id, asset=asset.key, access=access).reading
    except (AssetUnreadable, InvalidInput) as error:
        log.warning("%s", error)
        return None


def _conclude(scene: Scene, headers: Mapping[str, _Header], config: IngestConfig, access: Access) -> SceneProbe:
    """Decide the offset and the coverage of a scene, and list where its files and its metadata disagree."""
    covered = headers.get(_coverage_band(scene) or "")
    coverage = covered.coverage if covered else None
    probes = {band: header.probe for band, header in headers.items()}
    units = {band: probe.unit for band, probe in probes.items() if probe.error is None}
    negative = coverage.negative if coverage else None
    for refused, reason in find_refusals(scene, units, negative, strict=config.running.strict).items():
        probes[refused] = replace(probes[refused], refusal=reason)
    scene, remarks, unknown = follow_offset_of_files(
        scene,
        {band: probe.offset_dn for band, probe in probes.items()},
        [band for band, probe in probes.items() if probe.scale != 1.0 or probe.offset_dn != 0.0],
    )
    sentences = remarks + _mismatches(scene, probes)
    band = _offset_band(scene)
    header = headers.get(band) if band else None
    reading = header.sample.reading if header is not None and header.sample is not None else None
    if reading is not None and needs_closer_look(scene, reading):
        readable = {name: asset for name, asset in scene.assets.items() if not headers[name].probe.error}
        reading = measure_offset(replace(scene, assets=readable), access, {band: reading} if band else None)
    if header is not None and header.sample is not None:
        scale = next(rule.scale for rule in PRODUCTS if rule.name == scene.product)
        odd = explain_wrong_scale(np.concatenate([part.ravel() for part in header.sample.windows]), scale)
        if odd and config.running.strict:
            raise InvalidInput(f"scene {scene.id}: {band}: {odd}; leave it out, or go on without --strict")
        sentences += [f"{band}: {odd}"] if odd else []
    band_offsets: dict[str, int] = {}
    sentence: str | None = None
    if scene.band_offsets or unknown:
        readings = {
            name: own
            for name, asset in scene.assets.items()
            if asset.kind == "data"
            and scene.product == "sentinel-2-l2a"
            and not probes[name].error
            and (own := read_band(scene, asset, access)) is not None
        }
        bands = settle_bands(scene, readings, unknown, policy=config.pixels.offset_policy)
        for name, reason in bands.refusals.items():
            probes[name] = replace(probes[name], refusal=probes[name].refusal or reason)
            sentences.append(f"{name}: {reason}")
        first = band if band is not None and band in bands.offsets else next(iter(bands.offsets))
        reading, dn_offset, verdict = readings.get(first), bands.offsets[first], bands.verdicts[first]
        band_offsets = {name: value for name, value in bands.offsets.items() if value != dn_offset}
        sentences += bands.sentences
    else:
        dn_offset, verdict, sentence = settle_offset(scene, reading, policy=config.pixels.offset_policy)
    return SceneProbe(
        assets=probes,
        dn_offset=dn_offset,
        verdict=verdict,
        share_below_1000=round(reading.share_below_1000, 6)
        if reading and reading.share_below_1000 is not None
        else None,
        discrepancies=(*sentences, *([sentence] if sentence else [])),
        valid_share=coverage.valid if coverage else None,
        cloud_share=coverage.hidden if coverage else None,
        reading=reading,
        band_offsets=band_offsets,
    )


def _mismatches(scene: Scene, probes: Mapping[str, AssetProbe]) -> list[str]:
    """Return sentences on grids, types, sizes and nodata that differ between item and file, with the bands."""
    bands_with: dict[str, list[str]] = defaultdict(list)
    for band, probe in probes.items():
        asset = scene.assets[band]
        if probe.error:
            bands_with[probe.error].append(band)
            continue
        if asset.grid is not None and probe.grid is not None and asset.grid != probe.grid:
            bands_with[f"item says {_describe(asset.grid, probe.grid)}, file is {_describe(probe.grid, asset.grid)}; "
                 "the file is followed"].append(band)  # fmt: skip
        if asset.dtype and probe.dtype and asset.dtype != probe.dtype:
            bands_with[f"item says {asset.dtype}, file holds {probe.dtype}; the file is followed"].append(band)
        if None not in (asset.size_bytes, probe.size_bytes) and asset.size_bytes != probe.size_bytes:
            bands_with[
                f"item says {asset.size_bytes} bytes, file has {probe.size_bytes}: it was replaced or cut short"
            ].append(band)
        if probe.refusal:
            bands_with[probe.refusal].append(band)
        if asset.kind == "data" and (text := describe_conversion(scene, asset, probe.scale, probe.unit)):
            bands_with[text].append(band)
        if probe.nodata is not None and asset.nodata is not None and not _same(asset.nodata, probe.nodata):
            text = f"item says nodata {asset.nodata:g}, file declares {probe.nodata:g}; both are masked"
            bands_with[text].append(band)
    grids = [probe.grid for probe in probes.values() if probe.grid]
    if grids and not meets(shape(dict(scene.footprint)), box_region(grids[0].lonlat_bounds())):
        bounds = ", ".join(f"{v:.3g}" for v in grids[0].lonlat_bounds())
        bands_with[f"file lies at {bounds} (lon/lat), outside the item's footprint; the file is followed"] = [
            next(iter(probes))
        ]
    return [f"{', '.join(bands)}: {text}" for text, bands in bands_with.items()]


def _describe(grid: Grid, other: Grid) -> str:
    text = str(grid)
    if str(other) == text:  # only the origin differs
        text += f" from {grid.transform[2]:.9g}, {grid.transform[5]:.9g}"
    return text


def _same(left: float, right: float) -> bool:
    return left == right or (np.isnan(left) and np.isnan(right))
