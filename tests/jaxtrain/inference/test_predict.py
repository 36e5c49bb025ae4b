"""Maps: no seams, no dependence on how the work is cut, no invented ground, and everybody can open them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pystac
import pystac.validation
import pytest
import rasterio
import rioxarray  # noqa: F401  (registers .rio)
import xarray as xr
import zarr
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from pystac.extensions.projection import ProjectionExtension

from jaxtrain import predict, train
from jaxtrain.config import DataConfig
from jaxtrain.data.classes import Classes
from jaxtrain.evaluation.scores import restore_model
from jaxtrain.inference.blend import Strips, taper, window_starts
from jaxtrain.inference.maps import NODATA, create_map, is_map, open_map
from jaxtrain.learn.step import make_predict_step
from jaxtrain.runs.rundir import load_card
from zarr_store.errors import IntegrityError, InvalidInput, UnknownName
from zarr_store.grid import Grid
from zarr_store.read import open_cube
from zarr_store.regions import Region

from ..cube_factory import CLASSES, COLLECTION, make_cube, shared_cube, shared_run, tiny_config


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The map of the shared run over its cube, with probabilities."""
    url = tmp_path_factory.mktemp("map") / "map.zarr"
    predict(shared_run(), shared_cube(), url, probabilities=True)
    return url


def test_each_class_has_its_own_colour_in_a_map(made: Path) -> None:
    """The colours of the run's classes, by class: vegetation green, water blue, not one place further on."""
    expected = ["#2ca02c", "#e6c35c", "#1f5fbf"]
    attributes = zarr.open_group(str(made), mode="r")["class"].attrs
    assert attributes["class_names"] == ["vegetation", "not vegetated", "water"]
    assert attributes["flag_values"] == [0, 1, 2]
    assert attributes["flag_colors"].split() == expected
    assert attributes["flag_meanings"].split() == ["vegetation", "not_vegetated", "water"]
    classes = open_map(made).classes
    assert list(classes.colours) == expected
    assert classes.rgb().tolist() == [[0x2C, 0xA0, 0x2C], [0xE6, 0xC3, 0x5C], [0x1F, 0x5F, 0xBF]]


@given(st.integers(8, 200), st.integers(2, 5), st.floats(0, 0.5))
@settings(max_examples=60, deadline=None)
def test_windows_cover_everything(size: int, log_patch: int, share: float) -> None:
    patch = 2**log_patch
    overlap = int(share * patch)
    starts = window_starts(size, patch, overlap)
    covered = np.zeros(size, int)
    for start in starts:
        assert 0 <= start <= max(0, size - patch)
        covered[start : start + patch] += 1
    assert (covered > 0).all()
    assert (np.diff(starts) <= patch - overlap).all()


@pytest.mark.parametrize("overlap", [0, 3, 8, 16])
def test_weights_of_neighbours_add_up_to_one(overlap: int) -> None:
    weight = taper(32, overlap)
    total = np.zeros(200)
    for start in range(0, 200 - 32 + 1, 32 - overlap):
        total[start : start + 32] += weight
    end = (200 - 32) // (32 - overlap) * (32 - overlap) + 32
    np.testing.assert_allclose(total[overlap : end - overlap], 1, atol=1e-6)
    assert (np.diff(weight[:overlap]) > 0).all()


@given(
    st.integers(16, 60), st.integers(16, 60), st.sampled_from([8, 16]), st.integers(0, 4), st.integers(0, 2**20),
    st.integers(7, 60),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_strips_equal_a_sum_over_the_whole_scene(
    height: int, width: int, patch: int, overlap: int, seed: int, band: int
) -> None:
    rng = np.random.default_rng(seed)
    classes, dates = 3, 2
    side = np.maximum(taper(patch, overlap), np.float32(1e-4)).astype(float)
    seen = rng.random((dates, height, width)) < 0.8
    ys, xs = window_starts(height, patch, overlap), window_starts(width, patch, overlap)
    tiles = {(t, y, x): rng.random((patch, patch, classes)).astype(np.float32)
             for y in ys.tolist() for x in xs.tolist() for t in range(dates)}  # fmt: skip
    total, weights = np.zeros((height, width, classes)), np.zeros((height, width))
    for (t, y, x), tile in tiles.items():
        weight = np.outer(side, side) * seen[t, y : y + patch, x : x + patch]
        total[y : y + patch, x : x + patch] += weight[..., None] * tile
        weights[y : y + patch, x : x + patch] += weight
    got, known = np.full((height, width, classes), np.nan), np.zeros((height, width), bool)
    for x0 in range(0, width, band):
        x1 = min(x0 + band, width)
        strips = Strips(height, x0, x1, patch, overlap, classes)

        def take(blocks: Any, x0: int = x0, x1: int = x1) -> None:
            for y, mean, there in blocks:
                got[y : y + len(mean), x0:x1], known[y : y + len(mean), x0:x1] = mean, there

        for (t, y, x), tile in tiles.items():
            if x < x1 and x + patch > x0:
                take(strips.advance(y))
                strips.add(y, x, tile, seen[t, y : y + patch, x : x + patch].astype(np.uint8))
        take(strips.advance(None))
    np.testing.assert_array_equal(known, seen.any(axis=0))
    expected = total / np.maximum(weights, 1e-30)[..., None]
    np.testing.assert_allclose(got[known], expected[known], rtol=2e-4, atol=1e-5)


def test_the_map_does_not_depend_on_how_the_work_is_cut(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jaxtrain.inference.lattice.CHUNK", 40)
    monkeypatch.setattr("jaxtrain.inference.lattice._PATCHES_OF_SHARD", 1)
    monkeypatch.setattr("jaxtrain.inference.lattice._SHARDS_ACROSS", 8)
    monkeypatch.setattr("jaxtrain.inference.maps.CHUNK", 40)
    monkeypatch.setattr("jaxtrain.inference.making.CHUNK", 40)
    progress: list[tuple[int, int]] = []
    result = predict(shared_run(), shared_cube(), tmp_path / "m.zarr", on_batch=lambda *p: progress.append(p))
    assert progress[-1][0] == progress[-1][1] == len(progress)
    assert (result.shards_made, open_map(made).grid.shape) == (20, (192, 160))
    one, other = open_map(made), open_map(tmp_path / "m.zarr")
    assert (one.read("class") == other.read("class")).mean() > 0.9999  # rounding may turn a tie
    assert np.abs(one.read("confidence").astype(int) - other.read("confidence")).max() <= 1
    assert sum(result.pixels.values()) + result.nodata == 192 * 160


def test_inside_a_window_the_map_is_what_the_whole_scene_gives(tmp_path: Path) -> None:
    """With running statistics the network is a fixed filter: where its view lies inside a window nothing may differ."""
    cube = tmp_path / "c.zarr"
    make_cube(cube, shape=(1, 104, 104), masked=False)
    config = tiny_config(
        cube, model={"norm": "batch", "dropout": 0.0}, run={"steps": 3, "evaluate_every": 3}, data={"min_labelled": 0.1}
    )
    train(config, tmp_path / "run")
    predict(tmp_path / "run", cube, tmp_path / "m.zarr", probabilities=True, overlap=8)
    program, state, _, _ = restore_model(tmp_path / "run", load_card(tmp_path / "run"))
    image = open_cube(cube).read(COLLECTION, "reflectance", Region(0, 1, 0, 104, 0, 104))
    whole = np.asarray(make_predict_step(program)(state, image))[0] * 100
    got = np.moveaxis(open_map(tmp_path / "m.zarr").read("probability"), 0, -1).astype(float)
    view = 10  # pixels that a network of depth 1 looks beyond its output
    alone = np.zeros((104, 104), bool)
    for y in range(0, 104 - 31, 24):
        for x in range(0, 104 - 31, 24):
            alone[y + view : y + 32 - view, x + view : x + 32 - view] = True
    assert alone.mean() > 0.2
    assert np.abs(got - whole)[alone].max() <= 0.51  # stored as whole per cent
    assert np.abs(got - whole).mean() < 1.5  # and elsewhere it is close


def test_no_window_edge_shows(tmp_path: Path) -> None:
    """At a window's edge the probability steps no more than where windows lie elsewhere; without overlap it does."""

    def steps(overlap: int) -> np.ndarray:
        url = tmp_path / f"m{overlap}.zarr"
        predict(shared_run(), shared_cube(), url, probabilities=True, overlap=overlap, time="2023-08-11")
        p = open_map(url).read("probability").astype(float)
        return np.abs(np.diff(p, axis=2)).mean(axis=(0, 1))

    def edges(overlap: int) -> np.ndarray:
        starts = window_starts(160, 32, overlap)
        return np.unique([*(starts[1:] - 1), *(starts[:-1] + 31)])

    smooth = steps(16)
    assert steps(0)[edges(0)].mean() > 1.2 * smooth[edges(0)].mean()
    assert steps(8)[edges(8)].mean() < 1.1 * smooth[edges(8)].mean()


def test_dates_are_averaged_where_they_were_seen(made: Path, tmp_path: Path) -> None:
    both = open_map(made).read("probability").astype(float)
    single = []
    for day in ("2023-08-10", "2023-08-11"):
        result = predict(shared_run(), shared_cube(), tmp_path / f"{day}.zarr", time=day, probabilities=True)
        assert result.dates == (f"{day}T10:00:00",)
        single.append(open_map(tmp_path / f"{day}.zarr").read("probability"))
    cloud = np.zeros((192, 160), bool)
    cloud[40:70, 90:130] = True
    assert (single[0][:, cloud] == NODATA).all()  # masked on that date
    assert (single[0][:, ~cloud] <= 100).all()
    np.testing.assert_allclose(both[:, cloud], single[1][:, cloud], atol=0.51)
    mean = (single[0][:, ~cloud].astype(float) + single[1][:, ~cloud]) / 2
    np.testing.assert_allclose(both[:, ~cloud], mean, atol=1.01)


def test_masked_dates_have_a_say_only_where_no_date_is_clear(tmp_path: Path) -> None:
    clouds = {**CLASSES, "9": "cloud"}
    make_cube(tmp_path / "c.zarr", shape=(1, 192, 160))
    config = tiny_config(
        tmp_path / "c.zarr",
        data={"classes": clouds, "learn_masked": True},
        model={"dropout": 0.0},
        run={"steps": 40, "evaluate_every": 40, "checkpoint_every": 40},  # until the cloud is learned
    )
    train(config, tmp_path / "run")
    cloud = np.zeros((192, 160), bool)
    cloud[40:70, 90:130] = True
    maps = {}
    for name, cube, time in (("one", tmp_path / "c.zarr", None), ("two", shared_cube(), None),
                             ("clear", shared_cube(), "2023-08-11")):  # fmt: skip
        result = predict(tmp_path / "run", cube, tmp_path / f"{name}.zarr", time=time, probabilities=True)
        assert result.nodata == 0
        maps[name] = open_map(tmp_path / f"{name}.zarr").read("probability").astype(int)
    assert maps["one"][3][cloud].mean() > maps["one"][3][~cloud].mean() + 20  # the only date: the cloud is seen
    assert np.abs(maps["two"] - maps["clear"])[:, cloud].max() <= 1  # another date was clear: it alone decides
    assert np.abs(maps["two"] - maps["clear"])[:, ~cloud].max() > 1


def test_class_confidence_and_probability_agree(made: Path) -> None:
    opened = open_map(made)
    chosen, confidence, p = opened.read("class"), opened.read("confidence"), opened.read("probability")
    assert opened.layers == ("class", "confidence", "probability")
    assert (np.take_along_axis(p, chosen[None].astype(int), 0)[0] == confidence).all()
    assert (p.max(axis=0) == confidence).all()
    assert np.abs(p.astype(int).sum(axis=0) - 100).max() <= 2
    truth = open_cube(shared_cube()).read(COLLECTION, "scl", Region(1, 2, 0, 192, 0, 160))[0] - 4
    assert (chosen == truth).mean() > 0.7


def test_holes_stay_holes(tmp_path: Path) -> None:
    cube = make_cube(tmp_path / "c.zarr", shape=(1, 192, 160), hole=True, masked=False, skip_shards=[(0, 0, 1)])
    result = predict(shared_run(), cube.url, tmp_path / "m.zarr")
    chosen = open_map(tmp_path / "m.zarr").read("class")
    expected = np.zeros((192, 160), bool)
    expected[:64, 64:128] = True  # never written
    expected[-30:, -30:] = True  # outside the swath
    np.testing.assert_array_equal(chosen == NODATA, expected)
    assert result.nodata == expected.sum()
    assert any("4 of 30 chunks" in text and "never written" in text for text in result.warnings)


def test_xarray_and_rioxarray_open_the_map(made: Path) -> None:
    with xr.open_zarr(made, chunks=None) as opened:
        layer = opened["class"]
        assert (layer.dtype, layer.dims, opened["probability"].dims) == ("uint8", ("y", "x"), ("class", "y", "x"))
        assert layer.rio.crs.to_epsg() == 32633
        assert layer.rio.nodata == NODATA
        assert tuple(layer.rio.transform())[:6] == (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_000_000.0)
        assert layer.attrs["flag_meanings"] == "vegetation not_vegetated water"
    dataset = open_map(made).dataset()
    assert {"class", "confidence", "probability"} <= set(dataset.data_vars)
    array = zarr.open_array(str(made), path="class", mode="r")
    assert array.shards is None
    assert array.metadata.to_dict()["codecs"][1]["configuration"]["checksum"] is True  # type: ignore[index,call-overload]
    # what GDAL looks for in a Zarr array, read as GDAL reads it, whatever GDAL is here
    reference = zarr.open_group(str(made), mode="r")["spatial_ref"].attrs
    assert rasterio.CRS.from_wkt(str(reference["crs_wkt"])).to_epsg() == 32633
    order = Affine.from_gdal(*(float(v) for v in str(reference["GeoTransform"]).split()))
    assert tuple(order)[:6] == (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_000_000.0)
    assert array.attrs["grid_mapping"] == "spatial_ref"


@pytest.mark.skipif(
    tuple(int(v) for v in rasterio.__gdal_version__.split(".")[:2]) < (3, 12),
    reason=f"GDAL {rasterio.__gdal_version__} cannot read Zarr v3; 3.12 can",
)
def test_gdal_reads_the_map_with_its_georeference(made: Path) -> None:
    with rasterio.open(f'ZARR:"{made}":/class') as raster:
        assert raster.crs.to_epsg() == 32633
        assert raster.nodata == NODATA
        np.testing.assert_array_equal(raster.read(1), open_map(made).read("class"))


def test_an_opened_map_knows_what_made_it(made: Path) -> None:
    opened = open_map(made)
    assert opened.grid == open_cube(shared_cube()).spec(COLLECTION).grid
    assert opened.classes.names == ("vegetation", "not vegetated", "water")
    assert opened.attributes["step"] == 12
    assert opened.attributes["dates"] == ["2023-08-10T10:00:00", "2023-08-11T10:00:00"]
    np.testing.assert_array_equal(opened.read("class", slice(10, 20)), opened.read("class")[10:20])


def test_the_item_of_a_map_has_its_layers_its_network_and_its_cube(made: Path) -> None:
    document = json.loads((made / "item.json").read_text())
    item = pystac.Item.from_dict(document)
    assert pystac.validation.validate_dict({**document, "stac_extensions": []}, extensions=[])
    assert [url.split("/")[3] for url in item.stac_extensions] == ["projection", "raster", "classification", "mlm"]
    assert ProjectionExtension.ext(item).shape == [192, 160]
    classes = item.assets["class"].extra_fields["classification:classes"]
    assert [(one["value"], one["name"], one["color_hint"]) for one in classes] == [
        (0, "vegetation", "2CA02C"), (1, "not_vegetated", "E6C35C"), (2, "water", "1F5FBF")]  # fmt: skip
    assert set(item.assets) == {"class", "confidence", "probability", "model"}
    layers = [asset.href for name, asset in item.assets.items() if name != "model"]
    assert all((made / layer / "zarr.json").is_file() for layer in layers)
    (origin,) = item.links
    for href in (item.assets["model"].href, origin.target):
        assert not str(href).startswith("/")
    assert (made / item.assets["model"].href).samefile(shared_run() / "model.json")
    assert (made / str(origin.target)).parent.samefile(shared_cube())
    assert item.properties["mlm:input"][0]["bands"] == [band["name"] for band in item.properties["bands"]]
    assert item.properties["mlm:output"][0]["classification:classes"] == classes
    assert item.properties["start_datetime"] == "2023-08-10T10:00:00Z"


def test_a_map_of_before_gets_its_item_when_the_command_is_repeated(made: Path) -> None:
    text = (made / "item.json").read_bytes()
    (made / "item.json").unlink()
    assert predict(shared_run(), shared_cube(), made, probabilities=True).shards_made == 0
    assert (made / "item.json").read_bytes() == text


def test_a_map_is_replaced_and_nothing_else_is(made: Path, tmp_path: Path) -> None:
    url = tmp_path / "m.zarr"
    shutil.copytree(made, url)
    predict(shared_run(), shared_cube(), url)
    assert open_map(url).layers == ("class", "confidence")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious").write_text("x")
    for path, message in ((tmp_path / "folder", "is not a terrashard map"), (shared_cube(), "is not a terrashard map")):
        with pytest.raises(InvalidInput, match=message):
            predict(shared_run(), shared_cube(), path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "m.zarr"]
    assert not is_map(shared_cube())
    with pytest.raises(InvalidInput, match="does not exist: expected a map"):
        open_map(tmp_path / "none.zarr")


def test_a_map_that_fails_midway_leaves_the_old_one(made: Path, tmp_path: Path) -> None:
    url = tmp_path / "m.zarr"
    shutil.copytree(made, url)
    classes = Classes.of(DataConfig(cube="c", classes=CLASSES))
    grid = Grid("EPSG:4326", (0.1, 0.0, 10.0, 0.0, -0.1, 50.0), (5, 6))
    with pytest.raises(RuntimeError), create_map(url, grid, classes, attributes={}):
        raise RuntimeError
    assert open_map(url).layers == ("class", "confidence", "probability")
    with create_map(url, grid, classes, attributes={"a": 1}) as writer:
        writer.write(1, 2, np.ones((2, 3), np.uint8), np.full((2, 3), 50, np.uint8))
    opened = open_map(url)
    assert (opened.grid, opened.attributes) == (grid, {"a": 1})
    assert (opened.read("class") == 1).sum() == 6
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.zarr"]


def test_bad_input_is_named(tmp_path: Path) -> None:
    out = tmp_path / "m.zarr"
    with pytest.raises(UnknownName, match=r"unknown time '2023-08-09'.*did you mean"):
        predict(shared_run(), shared_cube(), out, time="2023-08-09")
    with pytest.raises(InvalidInput, match=r"time '2023-08' in .* means 2023-08-10T10:00:00, 2023-08-11T10:00:00"):
        predict(shared_run(), shared_cube(), out, time="2023-08")
    with pytest.raises(InvalidInput, match="overlap 17 must be between 0 and half a patch"):
        predict(shared_run(), shared_cube(), out, overlap=17)
    make_cube(tmp_path / "rgb.zarr", bands=("blue", "green", "red"), shape=(1, 64, 64), masked=False)
    with pytest.raises(UnknownName, match="unknown band 'nir'"):
        predict(shared_run(), tmp_path / "rgb.zarr", out)
    make_cube(tmp_path / "small.zarr", shape=(1, 20, 64), masked=False, chunk=16, shard=16)
    with pytest.raises(InvalidInput, match="20×64 pixels is smaller than the model's patch 32"):
        predict(shared_run(), tmp_path / "small.zarr", out)
    make_cube(tmp_path / "coarse.zarr", shape=(1, 64, 64), resolution=20.0, masked=False)
    with pytest.raises(InvalidInput, match=r"are 20 m on the ground, and the model was trained on pixels of 10 m"):
        predict(shared_run(), tmp_path / "coarse.zarr", out)
    assert not out.exists()
    insisted = predict(shared_run(), tmp_path / "coarse.zarr", out, allow_mismatch=True)
    assert "trained on pixels of 10 m; they are used as they are" in insisted.warnings[0]
    assert json.dumps(predict(shared_run(), tmp_path / "coarse.zarr", out, allow_mismatch=True).to_dict())
    assert jax.device_count() == 8


@pytest.mark.parametrize("layer", ["class", "x"])
def test_a_map_that_promises_too_much_is_not_opened(tmp_path: Path, layer: str) -> None:
    grid = Grid("EPSG:32633", (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_000_000.0), (8, 8))
    made = tmp_path / "map.zarr"
    classes = Classes.from_list([{"name": "a", "values": [1], "colour": "#000000"}])
    with create_map(made, grid, classes, attributes={}) as writer:
        writer.write(0, 0, np.zeros((8, 8), np.uint8), np.zeros((8, 8), np.uint8))
    assert open_map(made).dataset()["class"].shape == (8, 8)
    root = json.loads((made / "zarr.json").read_text())
    root["consolidated_metadata"]["metadata"][layer]["shape"][-1] = 10**11
    (made / "zarr.json").write_text(json.dumps(root))
    own = json.loads((made / layer / "zarr.json").read_text())
    own["chunk_grid"]["configuration"]["chunk_shape"] = [1 << 20] * len(own["shape"])
    (made / layer / "zarr.json").write_text(json.dumps(own))
    with pytest.raises(IntegrityError, match="promises what it must not"):
        open_map(made).dataset()
    if layer == "class":
        with pytest.raises(IntegrityError, match="promises what it must not: chunks of"):
            open_map(made).read()
