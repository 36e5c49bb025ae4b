"""From labels to a map through the commands: polygons of real land use, and values."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio.transform import from_origin

from cli.labels import read_names
from ingest.labels.alignment import compare_mirrored
from zarr_store import BandSpec, CubeSpec, Grid, ShardWriter, create_cube, open_cube
from zarr_store.errors import InvalidInput
from zarr_store.labels import NOT_LABELLED, open_label
from zarr_store.spec import DerivedSpec, Layout

COLLECTION = "sentinel-2-l2a"
SHARED = Path(__file__).parents[2].parent / "shared/data"


def write_cube(url: Path, image: np.ndarray, grid: Grid, bands: tuple[str, ...], **more: Any) -> None:
    """One date; `image` (band, y, x); of red and nir also the index ndvi."""
    derived = (DerivedSpec("ndvi", ("nir", "red"), "(nir - red) / (nir + red)", "Rouse et al. 1974"),)
    named = tuple(BandSpec(band, 0, 1e-4) for band in bands)
    spec = CubeSpec(COLLECTION, "reflectance", named, grid, ("2023-08-10T10:00:00",), derived=derived, **more)
    create_cube(url, [spec], items={COLLECTION: [{"id": "a", "datetime": "2023-08-10T10:00:00Z"}]}, provenance={})
    red, nir = (image[bands.index(name)].astype(float) for name in ("red", "nir"))
    shape = (1, *grid.shape)
    arrays = {
        "reflectance": image[None],
        "status": np.ones(shape, np.uint8),
        "source_item": np.zeros(shape, np.int16),
        "ndvi": np.round((nir - red) / (nir + red) * 1e4).astype(np.int16)[None],
    }
    for region in spec.shards().values():
        t, y, x = region.slices
        cut = {name: a[t, :, y, x] if a.ndim == 4 else a[t, y, x] for name, a in arrays.items()}
        ShardWriter(url, COLLECTION).write(region, cut, key="k", sources=())


def write_raster(path: Path, pixels: np.ndarray) -> None:
    """On the pixels of `cube`."""
    with rasterio.open(
        path, "w", driver="GTiff", height=128, width=160, count=1, dtype=pixels.dtype, crs="EPSG:32633",
        transform=from_origin(500_000, 5_000_000, 10, 10),
    ) as file:  # fmt: skip
        file.write(pixels, 1)


@pytest.fixture(scope="module")
def cube(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """128 × 160 pixels of smooth ground."""
    y, x = np.mgrid[:128, :160]
    rng = np.random.default_rng(0)
    red = 900 + 500 * np.sin(x / 17) * np.cos(y / 13) + rng.normal(0, 20, x.shape)
    nir = 2600 + 900 * np.cos(x / 23 + y / 31) + rng.normal(0, 20, x.shape)
    path = tmp_path_factory.mktemp("labels") / "cube.zarr"
    grid = Grid("EPSG:32633", (10, 0, 500_000, 0, -10, 5_000_000), (128, 160))
    layout = Layout("tiny", (1, 32, 32), (1, 64, 64))
    write_cube(path, np.stack([red, nir]).astype(np.uint16), grid, ("red", "nir"), layout=layout)
    return path


def write_config(path: Path, cube: Path, label: str, **sections: dict[str, Any]) -> Path:
    base: dict[str, dict[str, Any]] = {
        "data": {"cube": str(cube), "label": label, "patch": 32},
        "data.split": {"block_m": 320},
        "model": {"name": "mlp", "width": 16, "depth": 2},
        "optim": {"warmup_steps": 2, "learning_rate": 0.02},
        "run": {"steps": 30, "batch_size": 8, "evaluate_every": 30, "checkpoint_every": 30},
    }
    lines = []
    for name in {**base, **sections}:
        lines += [
            f"[{name}]",
            *(
                f"{key} = {json.dumps(value)}"
                for key, value in {**base.get(name, {}), **sections.get(name, {})}.items()
            ),
        ]
    path.write_text("\n".join(lines))
    return path


def test_a_raster_of_classes_is_learned_and_mapped(run: Callable[..., Any], cube: Path, tmp_path: Path) -> None:
    x = np.arange(160)
    classes = np.where(open_cube(cube).dataset(COLLECTION)["ndvi"].values[0] > 5000, 20, 10).astype(np.uint8)
    write_raster(tmp_path / "t.tif", np.where(x < 150, classes, 99).astype(np.uint8))
    made = run("labels", cube, tmp_path / "t.tif", "--name", "cover", "--names", "10=bare,20=green", "--json")
    assert made.code == 0, made.err
    assert made.json["labelled"] == 128 * 150
    layers = run("info", cube, "--json").json["labels"]
    assert list(layers["cover"]["classes"]) == ["bare", "green"]
    config = write_config(tmp_path / "c.toml", cube, "cover", optim={"class_weights": "balanced"})
    trained = run("train", config, "--out", tmp_path / "run", "--json")
    assert trained.code == 0, trained.err
    scores = run("evaluate", tmp_path / "run", "--json").json
    assert scores["classes"] == ["bare", "green"]
    assert scores["accuracy"] > 0.9
    assert "Worst tiles" in (tmp_path / "run/report.html").read_text()
    # the same command goes on with the run; with other labels it is another run
    assert run("train", config, "--out", tmp_path / "run").code == 0
    with rasterio.open(tmp_path / "t.tif", "r+") as file:
        file.write(classes, 1)
    assert (
        run("labels", cube, tmp_path / "t.tif", "--name", "cover", "--names", "10=bare,20=green", "--replace").code == 0
    )
    changed = run("train", config, "--out", tmp_path / "run")
    assert changed.code == 2
    assert "is not the cube that the run began with" in changed.error_line()


@pytest.mark.usefixtures("figures_unpainted")
def test_an_index_is_learned_as_values(run: Callable[..., Any], cube: Path, tmp_path: Path) -> None:
    refused = run("train", write_config(tmp_path / "c.toml", cube, "ndvi"), "--out", tmp_path / "run")
    assert refused.code == 2
    assert "choose huber or mse" in refused.error_line()
    config = write_config(tmp_path / "c.toml", cube, "ndvi", optim={"loss": "huber"}, data={"zoom": 0.2})
    trained = run("train", config, "--out", tmp_path / "run", "--json")
    assert trained.code == 0, trained.err
    scores = run("evaluate", tmp_path / "run", "--json").json
    assert scores["r2"] > 0.8
    assert scores["accuracy"] is None
    assert scores["rmse"] >= scores["mae"] >= abs(scores["bias"])
    report = (tmp_path / "run/report.html").read_text()
    assert "share of the variance explained" in report
    mapped = run("predict", tmp_path / "run", cube, tmp_path / "m.zarr", "--cog", tmp_path / "m.tif", "--json")
    assert mapped.code == 0, mapped.err
    truth = open_cube(cube).dataset(COLLECTION)["ndvi"].values[0] * 1e-4
    with rasterio.open(tmp_path / "m.tif") as file:
        assert file.dtypes == ("float32",)
        assert file.descriptions == ("ndvi",)
        found = file.read(1)
    assert np.isfinite(found).all()
    assert 1 - np.square(found - truth).mean() / truth.var() > 0.8
    assert mapped.json["values"]["mean"] == pytest.approx(found.mean(), abs=1e-5)
    assert run("quicklook", tmp_path / "m.zarr", tmp_path / "m.png").code == 0
    wrong = run("predict", tmp_path / "run", cube, tmp_path / "p.zarr", "--probabilities")
    assert "have no probabilities" in wrong.error_line()


def test_damaged_labels_are_named(run: Callable[..., Any], cube: Path, tmp_path: Path) -> None:
    write_raster(tmp_path / "v.tif", np.full((128, 160), 1.5, np.float32))
    assert run("labels", cube, tmp_path / "v.tif", "--name", "damaged", "--values").code == 0
    shard = cube / "labels/damaged/label/c/0/0"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    found = run("verify", cube)
    assert found.code == 6
    assert "label layer damaged is corrupt" in found.error_line()
    shard.write_bytes(whole)
    assert run("verify", cube).code == 0


@pytest.mark.real_data
def test_land_use_polygons_of_berlin_lie_on_their_image(run: Callable[..., Any], tmp_path: Path) -> None:
    folder = SHARED / "scenes/berlin_l1c"
    if not folder.exists():
        pytest.skip("the real scenes are not there")
    image = []
    for band in ("B04", "B08"):
        with rasterio.open(next(folder.glob(f"IMG_DATA/*_{band}.jp2"))) as file:
            image.append(file.read(1))
            grid = Grid("EPSG:32633", tuple(file.transform[:6]), file.shape)
    write_cube(tmp_path / "berlin.zarr", np.maximum(np.stack(image), 1), grid, ("red", "nir"))
    source = next(folder.glob("gis_osm*.gpkg"))
    made = run("labels", tmp_path / "berlin.zarr", source, "--name", "landuse", "--attribute", "fclass", "--json")
    assert made.code == 0, made.err
    assert "warning" not in made.err
    assert sorted(made.json["classes"]) == [
        "farm",
        "forest",
        "grass",
        "meadow",
        "residential",
        "scrub",
        "water",
        "wetland",
    ]
    opened = open_cube(tmp_path / "berlin.zarr")
    layer = open_label(opened, "landuse")
    fit = compare_mirrored(opened, layer)
    assert fit is not None
    assert fit.best == "as it is"
    assert fit.shares["as it is"] > 3 * max(share for name, share in fit.shares.items() if name != "as it is")
    assert int((layer.read() != NOT_LABELLED).sum()) == made.json["labelled"]


@pytest.mark.real_data
def test_t18_cropland_of_a_real_series_is_seen_to_be_upside_down_and_half_a_pixel_off(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    """GDAL turns a netCDF file without a CRS upside down, and its coordinates are of pixel centres, not of corners."""
    folder = SHARED / "series/monthly_s1s2"
    if not folder.exists():
        pytest.skip("the real series is not there")

    def read(name: str, variable: str) -> np.ndarray:
        program = "import sys, numpy, rasterio; numpy.save(sys.argv[2], rasterio.open(sys.argv[1]).read())"
        source, pixels = f"netcdf:{folder / name}:{variable}", tmp_path / "pixels.npy"
        # in a process of its own: one that has read with terrashard opens no netCDF any more
        subprocess.run([sys.executable, "-W", "ignore", "-c", program, source, pixels], check=True, timeout=60)
        return np.load(pixels)

    inputs, labels = "worldcereal_preprocessed_inputs.nc", "worldcereal_cropland_classification.nc"
    x, y = (float(read(labels, axis).ravel()[0]) for axis in ("x", "y"))
    grid = Grid("EPSG:32631", (10, 0, x - 5, 0, -10, y + 5), (100, 100))
    image = np.stack([read(inputs, f"S2-L2A-{band}")[4] for band in ("B04", "B08")])
    assert image.shape == (2, 100, 100)
    write_cube(tmp_path / "month.zarr", np.where(image == 65535, 1, image).astype(np.uint16), grid, ("red", "nir"))
    as_read = read(labels, "__xarray_dataarray_variable__")[0].astype(np.uint8)

    def write(name: str, left: float, top: float, pixels: np.ndarray) -> Path:
        with rasterio.open(
            tmp_path / name, "w", driver="GTiff", height=100, width=100, count=1, dtype="uint8", crs="EPSG:32631",
            transform=from_origin(left, top, 10, 10),
        ) as file:  # fmt: skip
            file.write(pixels, 1)
        return tmp_path / name

    cropland = as_read[::-1]
    names = ("--names", "0=other,1=cropland")
    cube = tmp_path / "month.zarr"
    made = run("labels", cube, write("right.tif", x - 5, y + 5, cropland), *names, "--json")
    assert made.code == 0, made.err
    assert "warning" not in made.err
    assert made.json["classes"]["cropland"]["pixels"] == int((cropland == 1).sum()) > 0
    turned = run("labels", cube, write("turned.tif", x - 5, y + 5, as_read), *names, "--name", "turned")
    assert turned.code == 0, turned.err
    assert "fit the image better upside down" in turned.err
    shifted = run("labels", cube, write("centres.tif", x, y, cropland), *names, "--name", "shifted")
    assert shifted.code == 2
    assert "0.50 pixels down and 0.50 right" in shifted.error_line()


def test_a_value_has_one_name_and_may_be_negative() -> None:
    assert read_names("-1=none, 2=a,3=a") == {-1: "none", 2: "a", 3: "a"}
    with pytest.raises(InvalidInput, match="--names gives 1 two names, a and b"):
        read_names("1=a,1=b")
