"""Folders of labelled images and labelled scenes become sample stores; what cannot be used is named and refused."""

from __future__ import annotations

import json

import imagecodecs
import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.transform import from_origin

from ingest.labels.labelled_scene import import_scene
from ingest.labels.patches import EUROSAT_BANDS, import_patches
from zarr_store.errors import CorruptShard, InvalidInput, NotACube, NothingFound
from zarr_store.samples import is_sample_store, open_samples

SIDE = 16


def picture(path, seed):
    values = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return values


def folder_of(root, names=("Forest/a.png", "Forest/b.png", "River/c.png")):
    made = {name: picture(root / name, i) for i, name in enumerate(names)}
    (root / "coordinates.csv").write_text(
        "file,label,latitude,longitude\na.png,Forest,50.5,9.5\nb.png,Forest,51,10\nc.png,River,-3.25,170\n"
    )
    return made


def test_a_folder_of_classes_keeps_every_pixel_label_and_place(tmp_path):
    made = folder_of(tmp_path / "in")
    seen = []
    report = import_patches(tmp_path / "in", tmp_path / "s.zarr", on_progress=lambda done, of: seen.append((done, of)))
    assert report.classes == {"Forest": 2, "River": 1}
    assert report.without_place == 0
    assert seen[-1] == (6, 6)
    store = open_samples(tmp_path / "s.zarr")
    assert store.spec.bands == ("red", "green", "blue")
    assert store.names() == list(made)
    np.testing.assert_array_equal(store.label, [0, 0, 1])
    np.testing.assert_array_equal(store.longitude, [9.5, 10, 170])
    np.testing.assert_array_equal(store.latitude, [50.5, 51, -3.25])
    images = store.images([2, 0])
    np.testing.assert_array_equal(images[0], np.moveaxis(made["River/c.png"], -1, 0))
    np.testing.assert_array_equal(images[1], np.moveaxis(made["Forest/a.png"], -1, 0))
    assert store.digest == report.digest


def test_thirteen_bands_come_with_their_names_and_their_own_place(tmp_path):
    values = np.arange(13 * SIDE * SIDE, dtype=np.uint16).reshape(13, SIDE, SIDE)
    for name in ("Crop", "Lake"):
        (tmp_path / "in" / name).mkdir(parents=True)
        with rasterio.open(
            tmp_path / "in" / name / "x.tif", "w", driver="GTiff", width=SIDE, height=SIDE, count=13, dtype="uint16",
            crs="EPSG:32633", transform=from_origin(500_000 - 80, 5_000_080, 10, 10),
        ) as file:  # fmt: skip
            file.write(values)
    import_patches(tmp_path / "in", tmp_path / "s.zarr")
    store = open_samples(tmp_path / "s.zarr")
    assert store.spec.bands == EUROSAT_BANDS
    assert store.spec.dtype == "uint16"
    np.testing.assert_array_equal(store.images([1])[0], values)
    # the middle of the raster is easting 500 km, the central meridian of zone 33: 15 degrees east
    np.testing.assert_allclose(store.longitude, 15.0, atol=1e-9)
    np.testing.assert_allclose(store.latitude, 45.1534, atol=1e-3)


def test_bad_files_are_named_and_nothing_is_written(tmp_path):
    folder_of(tmp_path / "in")
    whole = (tmp_path / "in/Forest/a.png").read_bytes()
    (tmp_path / "in/Forest/cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "in/River/text.jpg").write_text("not an image")
    Image.new("RGB", (8, 8)).save(tmp_path / "in/River/small.png")
    with pytest.raises(InvalidInput, match=r"3 of 6 images cannot be used") as caught:
        import_patches(tmp_path / "in", tmp_path / "s.zarr")
    for name in ("cut.png", "text.jpg", "small.png"):
        assert name in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]
    report = import_patches(tmp_path / "in", tmp_path / "s.zarr", skip_bad=True)
    assert report.samples == 3
    assert len(report.left_out) == 3


def test_several_classes_of_an_image_come_from_a_table(tmp_path):
    folder_of(tmp_path)
    (tmp_path / "labels.csv").write_text("file,labels\nForest/a.png,Forest;River\nRiver/c.png,River\nForest/b.png,\n")
    import_patches(tmp_path, tmp_path / "out/s.zarr")
    store = open_samples(tmp_path / "out/s.zarr")
    assert store.spec.labelled == "several"
    np.testing.assert_array_equal(store.label, [[1, 1], [0, 1], [0, 0]])
    (tmp_path / "labels.csv").write_text("file,labels\n../secret.png,Forest\nForest/a.png,River\n")
    with pytest.raises(InvalidInput, match=r"line 2: '../secret.png' lies outside"):
        import_patches(tmp_path, tmp_path / "out/t.zarr")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("file,lat,lon\n", "expected columns file, latitude, longitude, got file, lat, lon"),
        ("file,latitude,longitude\na.png,north,9\n", "line 2: latitude and longitude must be numbers"),
        ("file,latitude,longitude\na.png,50,9\nb.png,100,9\n", "line 3: expected degrees"),
        ("file,latitude,longitude\na.png,50,5,9,5\n", "line 2: expected 3 values, as the header has columns, got 5"),
        ("file,latitude,longitude,file\na.png,50,9,b.png\n", "expected columns file, latitude, longitude, got file"),
    ],
)
def test_tables_of_places_are_checked(tmp_path, table, message):
    folder_of(tmp_path)
    (tmp_path / "coordinates.csv").write_text(table)
    with pytest.raises(InvalidInput, match=message):
        import_patches(tmp_path, tmp_path / "s.zarr")


def test_what_is_no_folder_of_images_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match="is not a folder"):
        import_patches(tmp_path / "absent", tmp_path / "s.zarr")
    with pytest.raises(NothingFound, match="holds no image"):
        import_patches(tmp_path, tmp_path / "s.zarr")
    folder_of(tmp_path / "in")
    import_patches(tmp_path / "in", tmp_path / "s.zarr")
    with pytest.raises(InvalidInput, match="exists; give another path"):
        import_patches(tmp_path / "in", tmp_path / "s.zarr")
    with pytest.raises(InvalidInput, match="2 names in --bands, but the images have 3 bands"):
        import_patches(tmp_path / "in", tmp_path / "t.zarr", bands=("a", "b"))


def test_a_damaged_sample_is_named(tmp_path):
    folder_of(tmp_path / "in")
    import_patches(tmp_path / "in", tmp_path / "s.zarr")
    (shard,) = [p for p in (tmp_path / "s.zarr/image/c").rglob("*") if p.is_file()]
    data = bytearray(shard.read_bytes())
    data[30] ^= 0xFF  # in the first sample; the index of the shard lies at the end
    shard.write_bytes(data)
    store = open_samples(tmp_path / "s.zarr")
    assert store.images([1]).shape == (1, 3, SIDE, SIDE)
    with pytest.raises(CorruptShard, match="sample 0"):
        store.images([1, 0])


def test_other_folders_are_no_sample_stores(tmp_path):
    assert not is_sample_store(tmp_path)
    with pytest.raises(NotACube, match=r"holds no zarr\.json"):
        open_samples(tmp_path)
    (tmp_path / "zarr.json").write_text('{"attributes": {"terrashard": {"samples": 99}}}')
    with pytest.raises(NotACube, match="sample format 99, this release reads 1 and 2"):
        open_samples(tmp_path)


def test_a_scene_with_labels_is_one_sample(tmp_path):
    rng = np.random.default_rng(0)
    scene, truth = rng.integers(0, 9000, (12, 10, 5)).astype(np.uint16), rng.integers(0, 4, (12, 10)).astype(np.uint8)
    truth[0, 0] = 3
    np.save(tmp_path / "x.npy", scene)
    np.save(tmp_path / "y.npy", truth)
    report = import_scene(tmp_path / "x.npy", tmp_path / "y.npy", tmp_path / "s.zarr", names=("a", "b", "c"))
    assert report.classes == {name: int((truth == i + 1).sum()) for i, name in enumerate("abc")}
    store = open_samples(tmp_path / "s.zarr")
    assert store.spec.labelled == "pixels"
    np.testing.assert_array_equal(store.images([0])[0], np.moveaxis(scene, -1, 0))
    np.testing.assert_array_equal(store.label[0], truth)
    np.save(tmp_path / "y.npy", truth[:5])
    with pytest.raises(InvalidInput, match=r"expected one band of shape \(12, 10\)"):
        import_scene(tmp_path / "x.npy", tmp_path / "y.npy", tmp_path / "t.zarr")


def tiff(path, values, *, mask=None, scale=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(
        path, "w", driver="GTiff", width=values.shape[2], height=values.shape[1], count=len(values),
        dtype=values.dtype, **({"crs": "EPSG:32633", "transform": from_origin(5e5, 5e6, 10, 10)} | options),
    ) as file:  # fmt: skip
        file.write(values)
        if mask is not None:
            file.write_mask(mask)
        if scale is not None:
            file.scales, file.offsets = [scale[0]] * len(values), [scale[1]] * len(values)
            file.units = [scale[2]] * len(values)


def invalid_of(kind, path):
    """Write one image whose first rows hold no data, stated in the way of `kind`; return the true pixels."""
    rng = np.random.default_rng(3)
    hole = np.zeros((SIDE, SIDE), bool)
    hole[:4] = True
    dtype = {"nodata": "float32", "nan": "float32", "inf": "float32", "one band": "float32"}.get(kind, "uint16")
    if kind in ("rgba tif", "rgba png", "transparent png"):
        dtype = "uint8"
    values = rng.integers(50, 200, (3, SIDE, SIDE)).astype(dtype)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        if kind in ("nodata", "nan", "inf", "65535"):
            fill = {"nodata": -9999, "nan": np.nan, "inf": -np.inf, "65535": 65535}[kind]
            values[:, hole] = fill
            tiff(path / "x.tif", values, nodata=None if kind == "inf" else fill)
        elif kind == "one band":
            values[1, hole] = -9999
            tiff(path / "x.tif", values, nodata=-9999)
        elif kind == "mask":
            tiff(path / "x.tif", values, mask=np.where(hole, 0, 255).astype(np.uint8))
        elif kind == "mask and nodata":  # each hides a part of the hole
            values[:, :2] = 65535
            mask = np.full((SIDE, SIDE), 255, np.uint8)
            mask[2:4] = 0
            tiff(path / "x.tif", values, mask=mask, nodata=65535)
        elif kind == "rgba tif":
            alpha = np.where(hole, 0, 255).astype(np.uint8)[None]
            tiff(path / "x.tif", np.concatenate([values, alpha]), photometric="RGB", alpha="YES")
    picture = np.moveaxis(values, 0, -1)
    path.mkdir(parents=True, exist_ok=True)
    if kind == "rgba png":
        Image.fromarray(np.dstack([picture, np.where(hole, 0, 255).astype(np.uint8)])).save(path / "x.png")
    elif kind == "rgba png 16":
        alpha = np.where(hole, 0, 65535).astype(np.uint16)
        (path / "x.png").write_bytes(imagecodecs.png_encode(np.ascontiguousarray(np.dstack([picture, alpha]))))
    elif kind == "transparent png":
        picture[hole] = (1, 2, 3)
        Image.fromarray(picture).save(path / "x.png", transparency=(1, 2, 3))
    return np.moveaxis(picture, -1, 0), hole


@pytest.mark.parametrize(
    "kind", ["nodata", "nan", "inf", "65535", "one band", "mask", "mask and nodata", "rgba tif", "rgba png",
             "rgba png 16", "transparent png"],
)  # fmt: skip
def test_pixels_without_data_are_marked_and_hold_nothing(tmp_path, kind):
    values, hole = invalid_of(kind, tmp_path / "in/A")
    whole = np.full((3, SIDE, SIDE), 77, values.dtype)
    tiff(tmp_path / "in/B/whole.tif", whole)
    report = import_patches(tmp_path / "in", tmp_path / "s.zarr")
    store = open_samples(tmp_path / "s.zarr")
    assert store.spec.bands == ("red", "green", "blue")
    assert report.invalid_pixels == hole.sum()
    np.testing.assert_array_equal(store.valid([0, 1]), [~hole, np.ones_like(hole)])
    np.testing.assert_array_equal(store.images([0])[0], np.where(hole, 0, values))
    np.testing.assert_array_equal(store.images([1])[0], whole)
    assert json.loads((tmp_path / "s.zarr/zarr.json").read_text())["attributes"]["terrashard"]["samples"] == 2


def test_what_lies_beside_a_raster_is_not_lost_in_silence(tmp_path):
    values = np.full((1, SIDE, SIDE), 7, np.uint8)
    tiff(tmp_path / "in/A/x.tif", values)
    tiff(tmp_path / "in/B/y.tif", values, nodata=7)
    tiff(tmp_path / "in/B/z.tif", values)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False), rasterio.open(tmp_path / "in/A/x.tif", "r+") as file:
        file.write_mask(np.zeros((SIDE, SIDE), np.uint8))
    for name in ("y", "z"):
        (tmp_path / f"in/B/{name}.tif.aux.xml").write_text("<PAMDataset><NoDataValue>7</NoDataValue></PAMDataset>")
    with pytest.raises(InvalidInput) as caught:
        import_patches(tmp_path / "in", tmp_path / "s.zarr")
    assert "x.tif has its mask in x.tif.msk" in str(caught.value)
    assert "z.tif.aux.xml states NoDataValue, which z.tif does not" in str(caught.value)
    assert "y.tif.aux.xml" not in str(caught.value)  # the file itself states it, too


def test_numbers_of_a_colour_table_are_no_brightness(tmp_path):
    values = np.random.default_rng(0).integers(0, 2, (1, SIDE, SIDE)).astype(np.uint8)
    tiff(tmp_path / "in/A/x.tif", values, nbits=1)  # one bit is black or white
    assert import_patches(tmp_path / "in", tmp_path / "bits.zarr").samples == 1
    tiff(tmp_path / "codes/A/x.tif", values, photometric="palette")
    with rasterio.open(tmp_path / "codes/A/x.tif", "r+") as file:
        file.write_colormap(1, {0: (200, 30, 10, 255), 1: (10, 200, 30, 255)})
    with pytest.raises(InvalidInput, match=r"x\.tif: its numbers are codes of a colour table"):
        import_patches(tmp_path / "codes", tmp_path / "codes.zarr")
    # of labels they are codes
    np.save(tmp_path / "scene.npy", np.ones((SIDE, SIDE, 2), np.uint8))
    import_scene(tmp_path / "scene.npy", tmp_path / "codes/A/x.tif", tmp_path / "scene.zarr")
    np.testing.assert_array_equal(open_samples(tmp_path / "scene.zarr").label[0], values[0])


def test_a_band_that_counts_as_alpha_is_pointed_out(tmp_path):
    values = np.random.default_rng(0).integers(1, 255, (4, SIDE, SIDE)).astype(np.uint8)
    tiff(tmp_path / "in/A/x.tif", values)  # GDAL makes the fourth channel of uint8 an alpha channel
    report = import_patches(tmp_path / "in", tmp_path / "s.zarr")
    assert report.bands == ("red", "green", "blue")
    assert "pixels are partly transparent and count as valid; if the last channel" in report.warnings[0]
    with pytest.raises(InvalidInput, match="the images have 3 bands, without alpha channels"):
        import_patches(tmp_path / "in", tmp_path / "t.zarr", bands=("red", "green", "blue", "nir"))


def test_names_are_compared_in_one_form(tmp_path):
    apart, whole = "Flu\u0301", "Fl\u00fa"
    folder_of(tmp_path / "in", (f"{apart}/a.png", "b c/b.png"))
    places = f"file,latitude,longitude\n{whole}/a.png,50,9\nb c/b.png,51,9\n"
    (tmp_path / "in/coordinates.csv").write_text(places, encoding="utf-8")
    report = import_patches(tmp_path / "in", tmp_path / "s.zarr")
    assert (set(report.classes), report.without_place) == ({whole, "b c"}, 0)
    folder_of(tmp_path / "twice", (f"{apart}/a.png", f"{whole}/b.png"))
    with pytest.raises(InvalidInput, match="are both of class"):
        import_patches(tmp_path / "twice", tmp_path / "t.zarr")


def test_a_store_without_invalid_pixels_is_as_it_was(tmp_path):
    folder_of(tmp_path / "in")
    import_patches(tmp_path / "in", tmp_path / "s.zarr")
    store = open_samples(tmp_path / "s.zarr")
    assert set(store.spec.to_dict()) == {"count", "bands", "size", "dtype", "classes", "labelled"}
    assert not (tmp_path / "s.zarr/valid").exists()
    assert store.valid([0, 2]).all()


def test_an_image_without_any_valid_pixel_cannot_be_used(tmp_path):
    folder_of(tmp_path / "in")
    Image.new("RGBA", (SIDE, SIDE)).save(tmp_path / "in/River/empty.png")
    with pytest.raises(InvalidInput, match=r"empty\.png: none of its pixels is valid"):
        import_patches(tmp_path / "in", tmp_path / "s.zarr")
    assert import_patches(tmp_path / "in", tmp_path / "s.zarr", skip_bad=True).samples == 3


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_png_of_sixteen_bits_keeps_its_depth(tmp_path, channels):
    values = np.random.default_rng(0).integers(900, 1010, (2, SIDE, SIDE, channels)).astype(np.uint16)
    for name, one in zip(("Crop", "Forest"), values, strict=True):
        (tmp_path / "in" / name).mkdir(parents=True)
        data = imagecodecs.png_encode(np.ascontiguousarray(one if channels > 1 else one[..., 0]))
        assert data[24] == 16
        (tmp_path / "in" / name / "x.png").write_bytes(data)
    import_patches(tmp_path / "in", tmp_path / "s.zarr")
    store = open_samples(tmp_path / "s.zarr")
    assert store.spec.dtype == "uint16"
    bands = channels - (channels in (2, 4))
    np.testing.assert_array_equal(store.images([0, 1]), np.moveaxis(values[..., :bands], -1, 1))
    (tmp_path / "in/Crop/x.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(InvalidInput, match=r"x\.png: "):
        import_patches(tmp_path / "in", tmp_path / "t.zarr")


def test_scales_of_the_files_stay_and_must_be_alike(tmp_path):
    values = np.arange(2 * SIDE * SIDE, dtype=np.uint16).reshape(2, SIDE, SIDE)
    for name in ("A/a", "A/b", "B/c"):
        tiff(tmp_path / f"in/{name}.tif", values, scale=(1e-4, -0.1, "sr"))
    import_patches(tmp_path / "in", tmp_path / "s.zarr")
    assert open_samples(tmp_path / "s.zarr").spec.scales == ((1e-4, -0.1, "sr"),) * 2
    tiff(tmp_path / "in/B/d.tif", values, scale=(2e-5, 0.0, "sr"))
    with pytest.raises(InvalidInput, match=r"d\.tif: expected .* got scale, offset and unit \(\(2e-05"):
        import_patches(tmp_path / "in", tmp_path / "t.zarr")


def test_what_is_passed_over_is_counted_and_named(tmp_path):
    folder_of(tmp_path)
    for name in ("Forest/a.webp", "Forest/b.png.aux.xml", "loose.png", "_old/x.png", "Forest/more/y.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "Lake").mkdir()
    (tmp_path / "coordinates.csv").write_text(
        "file,latitude,longitude\nForest\\a.png,50.5,9.5\nin/Forest/b.png,51,10\n./River/c.png,-3.25,170\n"
        "Forest/z.png,1,1\nq.png,1,1\n"
    )
    report = import_patches(tmp_path, tmp_path / "s.zarr")
    assert report.without_place == 0
    np.testing.assert_array_equal(open_samples(tmp_path / "s.zarr").latitude, [50.5, 51, -3.25])
    assert report.passed_over == (
        "3 files that are no images in a class folder: Forest/a.webp, Forest/b.png.aux.xml, loose.png",
        "2 folders without images, which make no classes: Lake, _old",
        "1 folder inside the folder of a class: Forest/more",
        "2 rows of coordinates.csv that match no image: Forest/z.png, q.png",
    )
    (tmp_path / "labels.csv").write_text("file,labels\nForest/a.png,Forest;River\nRiver/c.png,River\n")
    assert import_patches(tmp_path, tmp_path / "t.zarr", skip_bad=True).passed_over[0] == (
        "4 images that labels.csv does not name: Forest/b.png, Forest/more/y.png, _old/x.png, loose.png"
    )
    (tmp_path / "labels.csv").write_text("file,labels\nForest/a.png,Forest\n./Forest/a.png,River\n")
    with pytest.raises(InvalidInput, match=r"line 3: '\./Forest/a\.png' was already named in line 2"):
        import_patches(tmp_path, tmp_path / "u.zarr")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("x.png,1,1\n", r"line 2: 'x\.png' could be Forest/x\.png or River/x\.png; write the folder"),
        ("Forest/x.png,1,1\nForest/x.png,2,2\n", r"lines 2 and 3 give Forest/x\.png two places"),
    ],
)
def test_a_row_of_places_means_one_image(tmp_path, rows, message):
    folder_of(tmp_path, ("Forest/x.png", "River/x.png"))
    (tmp_path / "coordinates.csv").write_text(f"file,latitude,longitude\n{rows}")
    with pytest.raises(InvalidInput, match=message):
        import_patches(tmp_path, tmp_path / "s.zarr")
    (tmp_path / "coordinates.csv").write_text("file,latitude,longitude\nForest/x.png,1,2\nRiver/x.png,3,4\n")
    import_patches(tmp_path, tmp_path / "s.zarr")
    np.testing.assert_array_equal(open_samples(tmp_path / "s.zarr").longitude, [2, 4])


AT = from_origin(5e5, 5e6, 10, 10)


def scene(folder):
    """An image of two bands and its labels, as GeoTIFFs on one grid."""
    rng = np.random.default_rng(1)
    truth = rng.integers(1, 4, (1, 20, 30)).astype(np.uint8)
    tiff(folder / "x.tif", rng.integers(1, 9000, (2, 20, 30)).astype(np.uint16), transform=AT)
    tiff(folder / "y.tif", truth, transform=AT)
    return folder / "x.tif", truth


def test_labels_of_a_scene_are_placed_by_their_transform(tmp_path):
    image, truth = scene(tmp_path)
    import_scene(image, tmp_path / "y.tif", tmp_path / "same.zarr")
    np.testing.assert_array_equal(open_samples(tmp_path / "same.zarr").label, truth)
    # the same labels on a larger grid that begins elsewhere, and some rows only
    wide = np.zeros((1, 30, 40), np.uint8)
    wide[0, 4:24, 7:37] = truth[0]
    tiff(tmp_path / "wide.tif", wide, transform=from_origin(5e5 - 70, 5e6 + 40, 10, 10))
    tiff(tmp_path / "part.tif", truth[:, 5:], transform=from_origin(5e5, 5e6 - 50, 10, 10))
    for name, expected in (("wide", truth), ("part", np.where(np.arange(20)[:, None] < 5, 0, truth))):
        report = import_scene(image, tmp_path / f"{name}.tif", tmp_path / f"{name}.zarr")
        np.testing.assert_array_equal(open_samples(tmp_path / f"{name}.zarr").label, expected)
        assert "were placed by its transform" in report.warnings[0]
    # the same shape, shifted by two pixels
    tiff(tmp_path / "moved.tif", truth, transform=from_origin(5e5 + 20, 5e6, 10, 10))
    import_scene(image, tmp_path / "moved.tif", tmp_path / "moved.zarr")
    label = open_samples(tmp_path / "moved.zarr").label[0]
    np.testing.assert_array_equal(label[:, 2:], truth[0, :, :-2])
    assert not label[:, :2].any()


def test_labels_of_a_scene_that_do_not_fit_are_refused(tmp_path):
    image, truth = scene(tmp_path)
    south = rasterio.Affine(10, 0, 5e5, 0, 10, 5e6 - 200)
    tiff(tmp_path / "south.tif", truth[:, ::-1], transform=south)
    tiff(tmp_path / "half.tif", truth, transform=from_origin(5e5 + 5, 5e6, 10, 10))
    tiff(tmp_path / "far.tif", truth, transform=from_origin(6e5, 5e6, 10, 10))
    Image.fromarray(truth[0]).save(tmp_path / "nowhere.tif")
    marked = truth.copy()
    marked[0, 0, :5], marked[0, 1, :5] = 0, 255
    tiff(tmp_path / "zero.tif", marked, nodata=255)
    tiff(tmp_path / "scaled.tif", truth, scale=(2.0, 0.0, ""))
    for name, message in (
        ("south", "mirrored|north-up|south-up"),
        ("half", r"0.50 right of those of x.tif: .* Correct its transform$"), ("far", "outside x.tif at"),
        ("nowhere", "states where it lies, .*nowhere.tif does not"), ("zero", "0 would be a class"),
        ("scaled", "classes cannot have"),
    ):  # fmt: skip
        with pytest.raises(InvalidInput, match=message):
            import_scene(image, tmp_path / f"{name}.tif", tmp_path / "s.zarr")
    assert not (tmp_path / "s.zarr").exists()
    # rows and columns are meant where a file cannot say where it lies
    np.save(tmp_path / "y.npy", truth[0])
    import_scene(image, tmp_path / "y.npy", tmp_path / "s.zarr")
    # an image and labels that are both south-up fit
    tiff(tmp_path / "image.tif", np.ones((2, 20, 30), np.uint16), transform=south)
    import_scene(tmp_path / "image.tif", tmp_path / "south.tif", tmp_path / "t.zarr")
    np.testing.assert_array_equal(open_samples(tmp_path / "t.zarr").label, truth[:, ::-1])
    with pytest.raises(InvalidInput, match="warp the image to a north-up grid"):
        import_scene(tmp_path / "image.tif", tmp_path / "y.tif", tmp_path / "u.zarr")


def test_pixels_of_a_scene_without_a_number_are_marked(tmp_path):
    image = np.random.default_rng(0).normal(size=(12, 10, 3))
    image[2, 3, 1], image[4, 5, 0] = np.nan, np.inf
    np.save(tmp_path / "x.npy", image)
    np.save(tmp_path / "y.npy", np.full((12, 10), 2, np.uint8))
    report = import_scene(tmp_path / "x.npy", tmp_path / "y.npy", tmp_path / "s.zarr", names=("a", "b"))
    assert report.invalid_pixels == 2
    assert report.classes == {"a": 0, "b": 118}
    store = open_samples(tmp_path / "s.zarr")
    assert np.argwhere(store.valid([0])[0] == 0).tolist() == [[2, 3], [4, 5]]
    assert np.isfinite(store.images([0])).all()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.full((4, 4, 2), (1 << 24) + 1), "do not fit uint16 or, without rounding, float32"),
        (np.full((4, 4, 2), 1e300), "fit float32"),
        (np.full((4, 4, 2), 1 + 2j), "expected real numbers"),
    ],
)
def test_a_scene_whose_numbers_would_change_is_refused(tmp_path, image, message):
    np.save(tmp_path / "x.npy", image)
    np.save(tmp_path / "y.npy", np.array([[1, 2, 1, 2]] * 4, np.uint8))
    with pytest.raises(InvalidInput, match=message):
        import_scene(tmp_path / "x.npy", tmp_path / "y.npy", tmp_path / "s.zarr")


def test_images_of_another_type_are_refused_in_words(tmp_path):
    for name in "AB":
        tiff(tmp_path / "p" / name / "0.tif", np.full((1, 8, 8), -5, np.int16))
    with pytest.raises(
        InvalidInput, match=r"p: its images hold int16, and a sample store holds .*float32: convert them"
    ):
        import_patches(tmp_path / "p", tmp_path / "s.zarr")
    assert not (tmp_path / "s.zarr").exists()
