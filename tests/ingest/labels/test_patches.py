"""Folders of labelled images and labelled scenes become sample stores; what cannot be used is named and refused."""

from __future__ import annotations

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
    with pytest.raises(NotACube, match="sample format 99, this release reads 1"):
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
