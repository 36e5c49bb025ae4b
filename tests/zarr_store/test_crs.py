"""A CRS that a stranger states opens no file."""

from __future__ import annotations

from pathlib import Path

import pytest

from zarr_store.crs import parse_crs
from zarr_store.errors import InvalidInput
from zarr_store.grid import Grid, normal_crs

_WGS84 = (
    'GEOGCRS["WGS 84",DATUM["World Geodetic System 1984",ELLIPSOID["WGS 84",6378137,298.257223563]],'
    'CS[ellipsoidal,2],AXIS["lat",north],AXIS["lon",east],UNIT["degree",0.0174532925199433]]'
)


def hostile(path: Path) -> dict[str, object]:
    """The ways to make PROJ open a file."""
    from pyproj import CRS

    bound = (
        f'BOUNDCRS[SOURCECRS[{_WGS84}],TARGETCRS[{_WGS84}],ABRIDGEDTRANSFORMATION["t",METHOD["NTv2",ID["EPSG",9615]],'
        f'PARAMETERFILE["Latitude and longitude difference file","{path}",ID["EPSG",8656]]]]'
    )
    return {
        "proj": f"+proj=longlat +ellps=bessel +nadgrids={path} +type=crs",
        "geoid": f"+proj=longlat +ellps=bessel +geoidgrids={path} +vunits=m +type=crs",
        "init": f"+init={path}:1",
        "short": f"init={path}:1",
        "model": f"proj=defmodel model={path}",
        "step": f"+proj=pipeline +step +proj=defmodel +model={path}",
        "null first": f"+proj=gridshift +grids=@null,{path}",
        "wkt": bound,
        "projjson": CRS.from_wkt(bound).to_json_dict(),
        "projjson text": CRS.from_wkt(bound).to_json(),
        "old wkt": (
            'GEOGCS["x",DATUM["d",SPHEROID["b",6377397.155,299.15],EXTENSION["PROJ4_GRIDS","'
            f'{path}"]],PRIMEM["Greenwich",0],UNIT["degree",0.0174532925199433]]'
        ),
    }


@pytest.mark.parametrize("kind", [
    "proj", "geoid", "init", "short", "model", "step", "null first", "wkt", "projjson", "projjson text", "old wkt",
])  # fmt: skip
def test_a_crs_that_names_a_file_is_refused_before_proj_opens_it(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "grid.gsb"
    path.write_bytes(b"grid")
    stated = hostile(path)[kind]
    with pytest.raises(InvalidInput, match="names a file"):
        normal_crs(stated)
    if isinstance(stated, str):
        with pytest.raises(InvalidInput, match="names a file"):
            Grid(stated, (10.0, 0, 0, 0, -10.0, 0), (8, 8))


@pytest.mark.parametrize("text", ["EPSG:3857", "OGC:CRS84", "urn:ogc:def:crs:EPSG::4326"])
def test_a_plain_crs_is_taken(text: str) -> None:
    assert parse_crs(text).is_projected or parse_crs(text).is_geographic
