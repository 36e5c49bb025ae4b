"""`scene_item`, `radar_item` and `catalog_documents` make the STAC documents of a world, with relative links.

Sentinel-2 items follow the form of Earth Search v1, half of them as STAC 1.0 (projection 1.x, `raster:bands`,
`eo:bands`) and half as STAC 1.1 (`proj:code`, `bands`), as real catalogues mix them. Sentinel-1 items follow
Planetary Computer's `sentinel-1-rtc`.
"""

from __future__ import annotations

import datetime as dt
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import shapely
from pyproj import Transformer
from shapely.geometry import Polygon, mapping

from ingest.simulate.clouds import SCL_CLASSES, SCL_CLOUD
from ingest.simulate.config import CRS, Acquisition, SimulateConfig
from ingest.simulate.ground import CLASSES
from ingest.simulate.radar import NODATA, POLARISATIONS, RadarPass
from ingest.simulate.spectra import BANDS, Band
from zarr_store.grid import Grid

__all__ = [
    "S1_COLLECTION",
    "S2_COLLECTION",
    "Extent",
    "catalog_documents",
    "radar_item",
    "radar_item_id",
    "scene_id",
    "scene_item",
    "to_json",
    "uses_stac_1_1",
]

S2_COLLECTION = "sentinel-2-l2a"
S1_COLLECTION = "sentinel-1-rtc"
_COG = "image/tiff; application=geotiff; profile=cloud-optimized"
_EPSG = int(CRS.partition(":")[2])
_EXTENSIONS = "https://stac-extensions.github.io"
_LICENCE = "https://sentinel.esa.int/documents/247904/690755/Sentinel_Data_Legal_Notice"

Json = dict[str, Any]


@dataclass(frozen=True)
class Extent:
    """The area of one scene: polygon in the CRS of the tiles, and number of pixels of each SCL value."""

    polygon: Polygon
    scl_counts: tuple[int, ...] = ()


def to_json(document: Json) -> str:
    """Return the JSON text of a document; all use this function, so equal documents have equal bytes."""
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def scene_id(acquisition: Acquisition, tile: str) -> str:
    """Make an item id in Earth Search's form: platform, tile, day, sequence, level."""
    return f"S2{acquisition.platform}_{tile}_{acquisition.time:%Y%m%d}_0_L2A"


def radar_item_id(overpass: RadarPass) -> str:
    """Make an item id in Planetary Computer's form: the GRD product name with `rtc` at its end."""
    start, stop = overpass.time, overpass.time + dt.timedelta(seconds=25)
    revolution = 43000 + 7 * overpass.index
    return f"S1A_IW_GRDH_1SDV_{start:%Y%m%dT%H%M%S}_{stop:%Y%m%dT%H%M%S}_{revolution:06d}_{overpass.orbit:06X}_rtc"


def uses_stac_1_1(acquisition: Acquisition, tile_index: int) -> bool:
    """Return whether an item is STAC 1.1, as every other is, so that neighbours and dates both mix the versions."""
    return (acquisition.index + tile_index) % 2 == 1


def scene_item(acquisition: Acquisition, tile: str, tile_index: int, grids: tuple[Grid, Grid], extent: Extent) -> Json:
    """Make the item of one Sentinel-2 scene.

    Args:
        acquisition: The overpass.
        tile: MGRS name, e.g. "33TWL".
        tile_index: Position of the tile, which decides the STAC version.
        grids: The tile's grid at full and at half resolution.
        extent: Footprint and pixel counts.
    """
    modern = uses_stac_1_1(acquisition, tile_index)
    identity = scene_id(acquisition, tile)
    # tiles of one datatake are sensed seconds apart
    time = acquisition.time + dt.timedelta(seconds=457.248 + 14.5 * tile_index)
    made = acquisition.time + dt.timedelta(hours=4, minutes=32)
    if acquisition.baseline == "05.10":
        made = dt.datetime(2024, 3, 1, 4, 0, tzinfo=dt.UTC) + dt.timedelta(minutes=acquisition.index)  # reprocessed
    total = max(1, sum(extent.scl_counts))
    valid = max(1, total - extent.scl_counts[0])
    share = {value: round(100.0 * count / valid, 6) for value, count in enumerate(extent.scl_counts)}
    sensed = f"{acquisition.time:%Y%m%dT%H%M%S}"
    take = f"GS2{acquisition.platform}_{sensed}_{acquisition.revolution:06d}_N{acquisition.baseline}"
    number = f"N{acquisition.baseline.replace('.', '')}"
    properties: Json = {
        "created": _stamp(made),
        "updated": _stamp(made),
        "platform": f"sentinel-2{acquisition.platform.lower()}",
        "constellation": "sentinel-2",
        "instruments": ["msi"],
        "eo:cloud_cover": round(sum(share[value] for value in SCL_CLOUD), 6),
        **({"proj:code": CRS} if modern else {"proj:epsg": _EPSG}),
        "mgrs:utm_zone": int(tile[:2]),
        "mgrs:latitude_band": tile[2],
        "mgrs:grid_square": tile[3:],
        "grid:code": f"MGRS-{tile}",
        "view:sun_azimuth": acquisition.sun_azimuth,
        "view:sun_elevation": acquisition.sun_elevation,
        "s2:nodata_pixel_percentage": round(100.0 * extent.scl_counts[0] / total, 6),
        "s2:cloud_shadow_percentage": share[3],
        "s2:vegetation_percentage": share[4],
        "s2:not_vegetated_percentage": share[5],
        "s2:water_percentage": share[6],
        "s2:unclassified_percentage": share[7],
        "s2:medium_proba_clouds_percentage": share[8],
        "s2:high_proba_clouds_percentage": share[9],
        "s2:thin_cirrus_percentage": share[10],
        "s2:snow_ice_percentage": share[11],
        "s2:product_type": "S2MSI2A",
        "s2:processing_baseline": acquisition.baseline,
        "s2:product_uri": f"S2{acquisition.platform}_MSIL2A_{sensed}_{number}"
        f"_R{acquisition.orbit:03d}_T{tile}_{made:%Y%m%dT%H%M%S}.SAFE",
        "s2:generation_time": _stamp(made),
        "s2:datatake_id": take,
        "s2:datatake_type": "INS-NOBS",
        "s2:sequence": "0",
        "sat:orbit_state": "descending",
        "sat:relative_orbit": acquisition.orbit,
        "datetime": _stamp(time),
    }
    if acquisition.radiometry != "none":
        properties["earthsearch:boa_offset_applied"] = acquisition.radiometry in ("subtracted", "mislabelled")
    full, half = grids
    assets = {band.key: _band_asset(band, full if band.gsd_m == 10 else half, acquisition, modern) for band in BANDS}
    assets["scl"] = _class_asset(
        "SCL.tif", "Scene classification map (SCL)", half, [_class(v, n, d, c) for v, n, d, c in SCL_CLASSES], modern
    )
    land = [_class(c.value, c.name, c.description, "{:02x}{:02x}{:02x}".format(*c.colour)) for c in CLASSES]
    assets["landcover"] = _class_asset(
        "landcover.tif",
        "Land cover (the simulator's ground truth)",
        full,
        [_class(0, "no_data", "No data", "000000"), *land],
        modern,
    )
    assets["landcover"]["roles"] = ["data", "class"]
    extensions = (
        ["eo/v2.0.0", "raster/v2.0.0", "projection/v2.0.0"]
        if modern
        else ["eo/v1.1.0", "raster/v1.1.0", "projection/v1.1.0"]
    )
    extensions += ["grid/v1.1.0", "mgrs/v1.0.0", "view/v1.0.0", "sat/v1.0.0", "classification/v2.0.0"]
    return _item(
        identity, S2_COLLECTION, properties, extent.polygon, assets, extensions, "1.1.0" if modern else "1.0.0"
    )


def radar_item(overpass: RadarPass, grid: Grid, extent: Extent) -> Json:
    """Make the item of one Sentinel-1 RTC scene on a grid."""
    start, stop = overpass.time, overpass.time + dt.timedelta(seconds=25)
    bounds = list(grid.bounds)
    properties: Json = {
        "datetime": _stamp(start + dt.timedelta(seconds=12.5)),
        "start_datetime": _stamp(start),
        "end_datetime": _stamp(stop),
        "platform": "SENTINEL-1A",
        "constellation": "Sentinel-1",
        "proj:epsg": _EPSG,
        "proj:bbox": bounds,
        "proj:shape": list(grid.shape),
        "proj:transform": _transform(grid),
        "s1:resolution": "high",
        "sar:instrument_mode": "IW",
        "sar:frequency_band": "C",
        "sar:center_frequency": 5.405,
        "sar:product_type": "RTC",
        "sar:polarizations": ["VV", "VH"],
        "sar:observation_direction": "right",
        "sar:looks_equivalent_number": 4.4,
        "sar:pixel_spacing_range": grid.resolution[0],
        "sar:pixel_spacing_azimuth": grid.resolution[0],
        "sat:orbit_state": "ascending" if overpass.ascending else "descending",
        "sat:relative_orbit": overpass.orbit,
        "sat:absolute_orbit": 43000 + 7 * overpass.index,
    }
    assets = {
        name: {
            "href": f"./{name}.tif",
            "type": _COG,
            "title": f"{name.upper()}: gamma0, terrain corrected, linear power",
            "roles": ["data"],
            "raster:bands": [{"nodata": NODATA, "data_type": "float32", "spatial_resolution": grid.resolution[0]}],
        }
        for name in POLARISATIONS
    }
    extensions = ["sar/v1.0.0", "sat/v1.0.0", "projection/v1.1.0", "raster/v1.1.0"]
    return _item(radar_item_id(overpass), S1_COLLECTION, properties, extent.polygon, assets, extensions, "1.0.0")


def catalog_documents(config: SimulateConfig, items: dict[str, list[Json]]) -> dict[str, Json]:
    """Make the catalogue and its collections, by relative path.

    Args:
        config: The world.
        items: Items of each collection, which must not be empty.
    """
    about = {
        S2_COLLECTION: ("Sentinel-2 Level-2A, simulated", "Surface reflectance of a simulated landscape"),
        S1_COLLECTION: ("Sentinel-1 RTC, simulated", "Gamma0 backscatter of a simulated landscape"),
    }
    documents: dict[str, Json] = {}
    children = []
    for name, members in items.items():
        title, description = about[name]
        boxes = [item["bbox"] for item in members]
        times = sorted(item["properties"]["datetime"] for item in members)
        lower, upper = (list(map(min, zip(*boxes, strict=True)))[:2], list(map(max, zip(*boxes, strict=True)))[2:])
        path = f"{name}/collection.json"
        children.append({"rel": "child", "href": f"./{path}", "type": "application/json", "title": title})
        documents[path] = {
            "type": "Collection",
            "id": name,
            "stac_version": "1.0.0",
            "title": title,
            "description": f"{description}; written by `terrashard simulate` with seed {config.seed}. No real data.",
            "license": "CC0-1.0",
            "extent": {"spatial": {"bbox": [[*lower, *upper]]}, "temporal": {"interval": [[times[0], times[-1]]]}},
            "links": [
                {"rel": "root", "href": "../catalog.json", "type": "application/json"},
                {"rel": "parent", "href": "../catalog.json", "type": "application/json"},
                *(
                    {"rel": "item", "href": f"./{item['id']}/{item['id']}.json", "type": "application/geo+json"}
                    for item in members
                ),
            ],
        }
    documents["catalog.json"] = {
        "type": "Catalog",
        "id": f"terrashard-simulated-{config.seed}",
        "stac_version": "1.0.0",
        "description": "A simulated landscape seen by Sentinel-2 and Sentinel-1, written by `terrashard simulate`.",
        "links": [{"rel": "root", "href": "./catalog.json", "type": "application/json"}, *children],
    }
    return documents


def _band_asset(band: Band, grid: Grid, acquisition: Acquisition, modern: bool) -> Json:
    offset = 0.0 if acquisition.radiometry == "none" else -0.1
    asset: Json = {"href": f"./{band.name}.tif", "type": _COG, "title": band.title}
    if modern:
        asset |= {
            "bands": [
                {
                    "name": band.name,
                    "eo:common_name": band.key,
                    "eo:center_wavelength": band.wavelength_um,
                    "eo:full_width_half_max": band.width_um,
                    "nodata": 0,
                    "data_type": "uint16",
                    "raster:spatial_resolution": grid.resolution[0],
                    "raster:scale": 0.0001,
                    "raster:offset": offset,
                }
            ],
        }
    else:
        asset |= {
            "eo:bands": [
                {
                    "name": band.key,
                    "common_name": band.key,
                    "description": band.title.partition(" - ")[0],
                    "center_wavelength": band.wavelength_um,
                    "full_width_half_max": band.width_um,
                }
            ],
            "raster:bands": [
                {
                    "nodata": 0,
                    "data_type": "uint16",
                    "bits_per_sample": 15,
                    "spatial_resolution": grid.resolution[0],
                    "scale": 0.0001,
                    "offset": offset,
                }
            ],
        }
    return asset | {"gsd": grid.resolution[0], **_projection(grid, modern), "roles": ["data", "reflectance"]}


def _class_asset(href: str, title: str, grid: Grid, classes: list[Json], modern: bool) -> Json:
    about = {"nodata": 0, "data_type": "uint8"}
    bands: Json = (
        {"bands": [about]} if modern else {"raster:bands": [about | {"spatial_resolution": grid.resolution[0]}]}
    )
    return {
        "href": f"./{href}",
        "type": _COG,
        "title": title,
        "gsd": grid.resolution[0],
        **bands,
        "classification:classes": classes,
        **_projection(grid, modern),
        "roles": ["data"],
    }


def _class(value: int, name: str, description: str, colour: str) -> Json:
    return {"value": value, "name": name, "description": description, "color_hint": colour.upper()}


def _projection(grid: Grid, modern: bool) -> Json:
    shape: Json = {"proj:shape": list(grid.shape), "proj:transform": _transform(grid)}
    return ({"proj:code": CRS} if modern else {}) | shape


def _transform(grid: Grid) -> list[float]:
    return [int(v) if v == int(v) else v for v in grid.transform]


def _stamp(time: dt.datetime) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.") + f"{time.microsecond // 1000:03d}000Z"


def _item(
    identity: str,
    collection: str,
    properties: Json,
    polygon: Polygon,
    assets: Json,
    extensions: list[str],
    version: str,
) -> Json:
    to_lonlat = Transformer.from_crs(CRS, "EPSG:4326", always_xy=True)
    # straight lines of the UTM grid bend in degrees, by less than a pixel once they are cut every 2 km
    footprint = shapely.transform(
        polygon.segmentize(2000.0), lambda xy: np.column_stack(to_lonlat.transform(xy[:, 0], xy[:, 1]))
    )
    west, south, east, north = footprint.bounds
    return {
        "type": "Feature",
        "stac_version": version,
        "stac_extensions": [f"{_EXTENSIONS}/{name}/schema.json" for name in extensions],
        "id": identity,
        "collection": collection,
        "geometry": _rounded(mapping(footprint)),
        "bbox": [round(v, 7) for v in (west, south, east, north)],
        "properties": properties,
        "links": [
            {"rel": "root", "href": "../../catalog.json", "type": "application/json"},
            {"rel": "parent", "href": "../collection.json", "type": "application/json"},
            {"rel": "collection", "href": "../collection.json", "type": "application/json"},
            {"rel": "license", "href": _LICENCE},
        ],
        "assets": assets,
    }


def _rounded(geometry: Json) -> Json:
    rings = [[[round(x, 7), round(y, 7)] for x, y in ring] for ring in geometry["coordinates"]]
    return {"type": geometry["type"], "coordinates": rings}
