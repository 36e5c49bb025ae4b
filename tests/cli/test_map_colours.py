"""Classes keep their colours from the map to the GeoTIFF and the picture: water is blue everywhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from PIL import Image

from cli.mapping import export_cog
from cli.picture import draw
from jaxtrain.config import DataConfig
from jaxtrain.data.classes import Classes
from jaxtrain.inference.maps import create_map, open_map
from zarr_store import Grid
from zarr_store.errors import IntegrityError

from ..jaxtrain.cube_factory import COLLECTION, make_cube

Run = Callable[..., Any]
NAMES = {"0": "water", "1": "forest", "2": "odd", "3": "town"}
COLOURS = [(0x1F, 0x5F, 0xBF), (0x1B, 0x6B, 0x2F), (0x12, 0x34, 0x56), (0xC4, 0x28, 0x1B)]


@pytest.fixture
def stripes(tmp_path: Path) -> Path:
    """Stripes of 16 columns: one of each class, in order, and a last one without data."""
    grid = Grid("EPSG:32633", (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_000_000.0), (128, 80))
    classes = Classes.of(DataConfig(cube="none", classes=NAMES, colours={"odd": "#123456"}))
    values = np.repeat(np.array([0, 1, 2, 3, 255], np.uint8), 16)[np.newaxis].repeat(128, axis=0)
    with create_map(tmp_path / "map.zarr", grid, classes, attributes={"run": "none", "step": 0}) as writer:
        writer.write(0, 0, values, np.where(values == 255, 255, 90).astype(np.uint8))
    return tmp_path / "map.zarr"


def test_a_geotiff_has_the_colour_of_each_class(stripes: Path, tmp_path: Path) -> None:
    export_cog(open_map(stripes), tmp_path / "map.tif")
    with rasterio.open(tmp_path / "map.tif") as made:
        table = made.colormap(1)
        assert [table[value][:3] for value in range(4)] == COLOURS
        assert [made.tags(1)[f"class_{value}"] for value in range(4)] == list(NAMES.values())
        assert (made.nodata, set(np.unique(made.read(1)[:, 64:]).tolist())) == (255, {255})
        for stripe in range(4):
            assert (made.read(1)[:, 16 * stripe : 16 * stripe + 16] == stripe).all()


def test_a_picture_has_the_colour_of_each_class_and_names_it(run: Run, stripes: Path, tmp_path: Path) -> None:
    assert run("quicklook", stripes, tmp_path / "map.png", "--width", 96).code == 0
    with Image.open(tmp_path / "map.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    panel = pixels[8 : 8 + 128, 8 : 8 + 80]
    for stripe, colour in enumerate([*COLOURS, (32, 32, 36)]):
        assert (panel[:, 16 * stripe : 16 * stripe + 16] == colour).all(), stripe
    legend = pixels[8 + 128 + 8 :].reshape(-1, 3)
    for colour in COLOURS:
        assert (legend == colour).all(axis=1).sum() > 100, "the legend has a box of each colour"


def test_pictures_and_geotiffs_of_what_cannot_be_decoded_are_errors(stripes: Path, tmp_path: Path) -> None:
    for path in (stripes / "class" / "c").rglob("0"):
        if path.is_file():
            path.write_bytes(bytes(40))
    with pytest.raises(IntegrityError, match=r"class: unusable metadata or damaged bytes .RuntimeError"):
        draw(str(stripes), str(tmp_path / "map.png"))
    with pytest.raises(IntegrityError, match=r"class: unusable metadata or damaged bytes .RuntimeError"):
        export_cog(open_map(stripes), tmp_path / "map.tif")
    assert not [path for path in tmp_path.iterdir() if path != stripes], "nothing of a picture is left"
    cube = make_cube(tmp_path / "cube.zarr", shape=(1, 64, 64))
    draw(cube.url, str(tmp_path / "cube.png"))
    for path in (tmp_path / "cube.zarr" / COLLECTION / "status" / "c").rglob("0"):
        if path.is_file():
            data = path.read_bytes()
            path.write_bytes(bytes(len(data) - 100) + data[-100:])  # the index of the shard is whole
    with pytest.raises(IntegrityError, match=f"{COLLECTION}: unusable metadata or damaged bytes"):
        draw(cube.url, str(tmp_path / "again.png"))


def test_a_geotiff_has_overviews_statistics_and_a_table_of_classes(stripes: Path, tmp_path: Path) -> None:
    """A second reader, GDAL's driver VRT, finds the names in the sidecar and the statistics in the file."""
    import xml.etree.ElementTree as ElementTree

    import rasterio.shutil

    export_cog(open_map(stripes), tmp_path / "map.tif")
    with rasterio.open(tmp_path / "map.tif") as made:
        tags = made.tags(1)
        assert made.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
    found = {name: float(tags[f"STATISTICS_{name}"]) for name in ("MINIMUM", "MAXIMUM", "MEAN", "STDDEV")}
    assert found == pytest.approx({"MINIMUM": 0, "MAXIMUM": 3, "MEAN": 1.5, "STDDEV": 1.25**0.5})
    assert float(tags["STATISTICS_VALID_PERCENT"]) == 80
    rasterio.shutil.copy(tmp_path / "map.tif", tmp_path / "map.vrt", driver="VRT")
    seen = ElementTree.parse(tmp_path / "map.vrt").getroot()
    assert [entry.text for entry in seen.iter("Category")] == list(NAMES.values())
    table = ElementTree.parse(tmp_path / "map.tif.aux.xml").getroot().find(".//GDALRasterAttributeTable")
    rows = [[cell.text for cell in row] for row in table.iter("Row")]
    assert rows == [[str(v), NAMES[str(v)], *map(str, COLOURS[v])] for v in range(4)]
