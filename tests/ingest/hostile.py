"""Files that try to make their reader open something else, and a program that reads them through every door.

    python hostile.py FOLDER        reads all files of a folder, one after the other, and prints what came of each

Before each file it looks for a path that cannot be, `/terrashard-reads/NAME`, so that a trace of system calls can be
cut there.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

MARK = "/terrashard-reads/"
DONE = f"{MARK}nothing-more"
SECRET = "the secret of another file"


def names_elsewhere(url: str, beside: Path) -> dict[str, str]:
    """What a file may name as its overviews: other machines, other files, and sources written out in the name."""
    canary = beside / "canary.tif"
    source = f"<SourceFilename>{canary}</SourceFilename><SourceBand>1</SourceBand>"
    return {
        "local": str(canary),
        "url": f"{url}/overview.tif",
        "vsicurl": f"/vsicurl/{url}/overview.tif",
        "streaming": f"/vsicurl_streaming/{url}/overview.tif",
        "subfile": f"/vsisubfile/0_100,/vsicurl/{url}/overview.tif",
        "directory": f"GTIFF_DIR:1:{canary}",
        "memory": "MEM:::DATAPOINTER=4096,PIXELS=64,LINES=64,DATATYPE=UInt16",
        "wms": f"<GDAL_WMS><Service name='TMS'><ServerUrl>{url}/${{z}}/${{x}}/${{y}}</ServerUrl></Service>"
        "<DataWindow><UpperLeftX>0</UpperLeftX><UpperLeftY>0</UpperLeftY><LowerRightX>64</LowerRightX>"
        "<LowerRightY>64</LowerRightY><SizeX>64</SizeX><SizeY>64</SizeY></DataWindow><BlockSizeX>32</BlockSizeX>"
        f"<BlockSizeY>32</BlockSizeY><BandsCount>1</BandsCount><Cache><Path>{beside / 'cache'}</Path></Cache>"
        "</GDAL_WMS>",
        "vrt": f"<VRTDataset rasterXSize='64' rasterYSize='64'><VRTRasterBand dataType='UInt16' band='1'>"
        f"<SimpleSource>{source}</SimpleSource></VRTRasterBand></VRTDataset>",
    }


def write_rasters(folder: Path, url: str, beside: Path) -> list[Path]:
    """TIFFs, JPEG 2000 files and raw codestreams that name overviews elsewhere, and files with neighbours."""
    import numpy as np
    import rasterio
    import rasterio.shutil

    from ingest.testing import write_raster
    from zarr_store.grid import Grid

    grid = Grid("EPSG:32633", (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_000_000.0), (256, 256))
    pixels = np.random.default_rng(1).integers(1, 9999, grid.shape).astype(np.uint16)
    write_raster(beside / "canary.tif", grid, pixels)
    (beside / "cache").mkdir()
    made = []
    for kind, name in names_elsewhere(url, beside).items():
        tif = write_raster(folder / f"{kind}.tif", grid, pixels)
        with rasterio.open(tif, "r+") as dataset:
            dataset.update_tags(ns="OVERVIEWS", OVERVIEW_FILE=name)
        boxed = folder / f"{kind}.jp2"
        rasterio.shutil.copy(tif, boxed, driver="JP2OpenJPEG", WRITE_METADATA="YES")
        assert b"OVERVIEW_FILE" in boxed.read_bytes()
        raw = folder / f"raw-{kind}.tif"
        _write_codestream(raw, grid, pixels)
        sidecar = Path(f"{raw}.aux.xml")
        escaped = name.replace("&", "&amp;").replace("<", "&lt;")
        extra = f'<Metadata domain="OVERVIEWS"><MDI key="OVERVIEW_FILE">{escaped}</MDI></Metadata></PAMDataset>'
        sidecar.write_text(sidecar.read_text().replace("</PAMDataset>", extra))
        made += [tif, boxed, raw]
    for name in ("neighbours.tif", "raw-neighbours.tif"):
        path = folder / name
        if name.startswith("raw"):
            _write_codestream(path, grid, pixels)
        else:
            write_raster(path, grid, pixels)
        for end in (".ovr", ".msk", ".aux", ".xml", ".rpb", ".ovr.aux.xml"):
            shutil.copy(beside / "canary.tif", f"{path}{end}")
        for end in (".tfw", ".tifw", ".wld", ".imd", ".IMD", ".RPB", ".aux", ".xml", "_RPC.TXT", "_rpc.txt", ".j2w"):
            (folder / f"{path.stem}{end}").write_text("1\n0\n0\n-1\n0\n0\n")
        made.append(path)
    return made


def _write_codestream(path: Path, grid: Any, pixels: Any) -> None:
    from ingest.testing import write_raster

    written = path.with_suffix(".j2k")
    write_raster(written, grid, pixels, driver="JP2OpenJPEG", QUALITY="100", REVERSIBLE="YES", CODEC="J2K")
    written.rename(path)
    Path(f"{written}.aux.xml").rename(f"{path}.aux.xml")


def write_vectors(folder: Path, url: str, beside: Path) -> list[Path]:
    """Files named as polygons that are something else, or hold more than polygons."""
    import numpy as np
    import pyogrio
    import shapely

    (beside / "secret.csv").write_text(f'use,wkt\n"{SECRET}","POLYGON((15 45,15.1 45,15.1 45.2,15 45.2,15 45))"\n')
    remote = f"<OGRVRTLayer name='r'><SrcDataSource>/vsicurl/{url}/r.csv</SrcDataSource></OGRVRTLayer>"
    vrt = (
        f"<OGRVRTDataSource><OGRVRTLayer name='secret'><SrcDataSource>{beside / 'secret.csv'}</SrcDataSource>"
        f"<GeometryField encoding='WKT' field='wkt'/><LayerSRS>EPSG:4326</LayerSRS></OGRVRTLayer>{remote}"
        "</OGRVRTDataSource>"
    )
    made = []
    for suffix in (".geojson", ".json", ".gpkg", ".fgb", ".shp", ".parquet"):
        made.append(folder / f"vrt{suffix}")
        made[-1].write_text(vrt)
    texts = {
        "address.geojson": f"{url}/p.geojson",
        "prefix.geojson": f"GeoJSON:{url}/p.geojson",
        "esri.geojson": json.dumps({"objectIdFieldName": "a", "features": [], "geometryType": "esriGeometryPoint"}),
        "wfs.geojson": f"<OGRWFSDataSource><URL>{url}/wfs</URL></OGRWFSDataSource>",
        "linked.geojson": json.dumps({"type": "FeatureCollection", "features": [], "href": f"{url}/next",
                                      "exceededTransferLimit": True}),
    }  # fmt: skip
    for name, text in texts.items():
        made.append(folder / name)
        made[-1].write_text(text)
    secret = beside / "secret.csv"
    ring = "[[[15,45],[15.1,45],[15.1,45.2],[15,45.2],[15,45]]]"
    stated = {
        "link": f'"crs": {{"type": "link", "properties": {{"href": "{url}/crs", "type": "proj4"}}}}',
        "url": f'"crs": {{"type": "url", "properties": {{"url": "{url}/crs"}}}}',
        "quoted": f"'CRS': {{'type': 'link', 'properties': {{'href': '{url}/crs'}}}}",
        "escaped": f'"\\u0063r\\u0073": {{"type": "link", "properties": {{"href": "{url}/crs"}}}}',
        "remark": f'"crs" /**/ : {{"type": "link", "properties": {{"href": "{url}/crs"}}}}',
        "init": f'"crs": {{"type": "name", "properties": {{"name": "+init={secret}:1"}}}}',
        "grids": f'"crs": {{"type": "name", "properties": {{"name": "+proj=longlat +nadgrids={secret} +type=crs"}}}}',
        "second": f'"crs": {{"type": "name", "properties": {{"name": "EPSG:4326", "Name": "+init={secret}:1"}}}}',
    }
    for name, member in stated.items():
        geometry = f'{{"type": "Polygon", "coordinates": {ring}}}'
        texts[f"crs-{name}.geojson"] = (
            f'{{"type": "FeatureCollection", {member}, "features": [{{"type": "Feature", "properties": {{"use": "a"}}, '
            f'"geometry": {geometry}}}]}}'
        )
        made.append(folder / f"crs-{name}.geojson")
        made[-1].write_text(texts[f"crs-{name}.geojson"])
    wkb, use = np.array(shapely.to_wkb([shapely.box(15, 45, 15.1, 45.2)]), object), np.array(["field"], object)
    for name in ("view.gpkg", "virtual.gpkg", "catalogue.gpkg", "journal.gpkg", "linked.shp"):
        made.append(folder / name)
        pyogrio.raw.write(
            made[-1], wkb, [use], ["use"], geometry_type="Polygon", crs="EPSG:4326", layer=Path(name).stem
        )
    good = folder / "good.fgb"
    pyogrio.raw.write(good, wkb, [use], ["use"], geometry_type="Polygon", crs="EPSG:4326", layer="good")
    for name, organisation in (("init", f"+init={secret}"), ("grids", f"+proj=longlat +nadgrids={secret} +x=")):
        made.append(folder / f"crs-{name}.fgb")
        made[-1].write_bytes(_with_organisation(good.read_bytes(), organisation))
    good.unlink()
    asks = f"ogr_geocode('{url}')"
    _sql(folder / "view.gpkg", "ALTER TABLE view RENAME TO hidden",
         f"CREATE VIEW view AS SELECT fid, geom, {asks} AS use FROM hidden")  # fmt: skip
    _sql(folder / "virtual.gpkg", "PRAGMA writable_schema = ON",
         "UPDATE sqlite_master SET sql = 'CREATE VIRTUAL TABLE virtual USING VirtualOGR(''"
         + str(beside / "secret.csv") + "'')', rootpage = 0 WHERE name = 'virtual'")  # fmt: skip
    _sql(folder / "catalogue.gpkg", "ALTER TABLE gpkg_geometry_columns RENAME TO hidden",
         "CREATE VIEW gpkg_geometry_columns AS SELECT * FROM hidden WHERE abs(1) = 1")  # fmt: skip
    (folder / "journal.gpkg-wal").write_bytes(b"\x37\x7f\x06\x82" + bytes(4096))
    for end in (".qix", ".sbn", ".sbx", ".idm", ".ind", ".cst", ".shp.xml", ".aux.xml"):
        (folder / f"linked{end}").write_bytes((folder / "linked.shx").read_bytes())
    return made


def _with_organisation(data: bytes, text: str) -> bytes:
    """A FlatGeobuf file whose CRS is of another organisation: the text is put in the place of its WKT."""
    changed, words = bytearray(data), text.encode()
    start = data.index(b"GEOG")
    changed[start - 4 : start + len(words) + 1] = struct.pack("<I", len(words)) + words + b"\0"
    organisation = data.index(b"\4\0\0\0EPSG\0")
    (at,) = (n for n in range(12, organisation) if n + int.from_bytes(data[n : n + 4], "little") == organisation)
    struct.pack_into("<I", changed, at, start - 4 - at)
    return bytes(changed)


def _sql(path: Path, *statements: str) -> None:
    database = sqlite3.connect(path)
    for name in ("regexp", "ST_IsEmpty", "ST_MinX", "ST_MaxX", "ST_MinY", "ST_MaxY"):  # named by OGR's triggers
        database.create_function(name, -1, lambda *_: 0)
    for statement in statements:
        database.execute(statement)
    database.commit()
    database.close()


def doors(path: Path) -> dict[str, Callable[[], object]]:
    """Everything that reads a file of this kind."""
    from zarr_store.grid import Grid

    grid = Grid("EPSG:32633", (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_000_000.0), (256, 256))
    if path.suffix in (".tif", ".jp2"):
        from ingest.labels.patches import read_patch
        from ingest.raster.access import with_asset
        from ingest.raster.opening import open_geotiff
        from ingest.raster.read import read_on_grid
        from ingest.scenes.scene import AssetRef

        def everything(dataset: Any) -> Any:
            return [dataset.overviews(1), dataset.read(1, out_shape=(16, 16)).shape, dataset.read_masks(1).shape,
                    dataset.tags(), dataset.files]  # fmt: skip

        def geotiff() -> Any:
            with open_geotiff(path) as dataset:
                return everything(dataset)

        ref = AssetRef(band="red", key="red", href=str(path), nodata=0)
        return {
            "asset": lambda: with_asset(str(path), everything, scene="s", asset="a"),
            "read": lambda: read_on_grid(ref, grid, grid, "nearest").sum(),
            "geotiff": geotiff,
            "patch": lambda: read_patch(path)[0].sum(),
        }
    from ingest.labels.features import read_features
    from ingest.request.geometry import load_geometry

    def features() -> Any:
        found = read_features(path, grid, attribute="use")
        return [len(found.geometries), list(found.values)]

    return {"features": features, "geometry": lambda: load_geometry(path)["type"]}


def read_all(paths: list[Path]) -> dict[str, dict[str, str]]:
    """What came of each file, by door; errors other than the project's own are not caught."""
    from ingest.raster.drivers import limit_raster_drivers, limit_vector_drivers
    from zarr_store.errors import TerrashardError

    # what they look for once in a process is no file's doing
    limit_raster_drivers()
    limit_vector_drivers()
    tempfile.gettempdir()
    came: dict[str, dict[str, str]] = {}
    for path in paths:
        came[path.name] = {}
        opened = doors(path)
        os.access(f"{MARK}{path.name}", os.F_OK)
        for door, read in opened.items():
            try:
                came[path.name][door] = f"read: {read()}"
            except TerrashardError as error:
                came[path.name][door] = f"refused: {error}"
    os.access(DONE, os.F_OK)
    return came


if __name__ == "__main__":
    listed = json.loads(Path(sys.argv[1]).read_text())
    sys.stdout.write(json.dumps(read_all([Path(name) for name in listed])))
