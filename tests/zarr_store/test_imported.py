"""netCDF files and xarray datasets that become collections, static layers and labels of a cube."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from zarr_store import from_xarray, open_cube, open_layer, verify_cube
from zarr_store.cf import Options, recognise
from zarr_store.errors import CubeMismatch, InvalidInput, UnknownName
from zarr_store.grow import grow_cube
from zarr_store.imported import ImportReport, layer_from_xarray
from zarr_store.labels import LabelLayer, open_label
from zarr_store.netcdf import digest_file, open_netcdf

ROOT = Path(__file__).resolve().parents[2]
SERIES = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "series"
CRS = "EPSG:32631"
MONTHLY = SERIES / "monthly_s1s2"
PATCH = SERIES / "labelled" / "00002806639B424A"
S2 = tuple(f"S2-L2A-B{n}" for n in ("02", "03", "04", "05", "06", "07", "08", "11", "12"))
needs_monthly = pytest.mark.skipif(not MONTHLY.exists(), reason="the monthly series is absent")
needs_patch = pytest.mark.skipif(not PATCH.exists(), reason="the labelled series is absent")


def world(times: int = 3, side: int = 20, size: float = 10.0, **variables: Any) -> xr.Dataset:
    """A dataset on UTM pixels, rows from north to south, with days as times."""
    rng = np.random.default_rng(5)
    dims = ("t", "y", "x")
    numbers = variables or {"red": rng.integers(1, 9000, (times, side, side)).astype(np.uint16)}
    return xr.Dataset(
        {name: (dims[-one.ndim :], one, {"_FillValue": 0}) for name, one in numbers.items()},
        {
            "t": ("t", np.arange(times) * 5 + 11_000, {"units": "days since 1990-01-01"}),
            "y": 5_612_115.0 - size * np.arange(side),
            "x": 664_005.0 + size * np.arange(side),
        },
    )


@pytest.fixture(scope="module")
def monthly(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cube = tmp_path_factory.mktemp("monthly") / "m.zarr"
    path = MONTHLY / "worldcereal_preprocessed_inputs.nc"
    source = {"file": path.name, "sha256": digest_file(path)}
    with open_netcdf(path) as data:
        from_xarray(data, cube, collection="s2", bands=S2, nodata=65535, source=source, profile="timeseries")
        from_xarray(
            data, cube, collection="s1", bands=("S1-SIGMA0-VV", "S1-SIGMA0-VH"), nodata=65535, decibel=(20, -83),
            source=source, profile="timeseries",
        )  # fmt: skip
        for name in ("elevation", "slope"):
            layer_from_xarray(data, cube, name=name, band=name, options=Options(nodata=65535, unit="m"), source=source)
    with open_netcdf(MONTHLY / "worldcereal_cropland_classification.nc") as data:
        layer_from_xarray(
            data, cube, name="cropland", role="labels", kind="classes", band="classification",
            options=Options(crs=CRS, nodata="none"), names={0: "other", 1: "cropland"},
        )  # fmt: skip
    return cube


@needs_monthly
def test_the_monthly_series_has_the_numbers_of_its_file(monthly: Path) -> None:
    raw = xr.open_dataset(MONTHLY / "worldcereal_preprocessed_inputs.nc", engine="h5netcdf", decode_cf=False)
    opened = open_cube(monthly)
    assert opened.collections == ("s2", "s1")
    assert (opened.grid.crs, opened.grid.resolution, opened.grid.bounds[0]) == (CRS, (10, 10), 664_000)
    s2 = opened.dataset("s2")
    assert s2.time.values[0] == np.datetime64("2020-11-01")
    expected = np.stack([raw[name].values.view(np.uint16) for name in S2], axis=1)
    np.testing.assert_array_equal(s2.reflectance.values, expected)
    np.testing.assert_array_equal(s2.status.values == 0, (expected == 65535).any(axis=1))
    assert (s2.status.values == 0).sum() == 20_000
    dn = np.stack([raw[name].values.view(np.uint16) for name in ("S1-SIGMA0-VV", "S1-SIGMA0-VH")], axis=1)
    s1 = opened.dataset("s1")
    np.testing.assert_array_equal(s1.backscatter.values, (20 * np.log10(dn.astype(np.float64)) - 83).astype(np.float32))
    assert opened.spec("s1").bands[0].unit == "dB"
    assert -19 < float(s1.backscatter.mean()) < -7
    assert (s1.status.values == 1).all()
    layer = open_layer(opened, "elevation")
    np.testing.assert_array_equal(layer.read(), raw["elevation"].values[0])
    assert layer.statistics is not None
    assert (layer.unit, layer.statistics.least, layer.statistics.most) == ("m", 142, 172)
    with xr.open_dataset(MONTHLY / "worldcereal_cropland_classification.nc", engine="h5netcdf") as labels:
        np.testing.assert_array_equal(open_label(opened, "cropland").read(), labels.to_array()[0, 0].values)
    assert verify_cube(monthly).damage == ()


@needs_patch
def test_the_labelled_series_keeps_its_20_m_bands_on_a_grid_that_nests(tmp_path: Path) -> None:
    cube = tmp_path / "flanders.zarr"
    fine, coarse, radar, labels = (
        next(PATCH.glob(f"{name}*.nc")) for name in ("S2_L2A_10m", "S2_L2A_20m", "S1_GRD", "OUTPUT")
    )
    with open_netcdf(fine) as data:
        made = from_xarray(data.isel(timestamp=slice(0, 16)), cube, collection="s2-10m", profile="timeseries")
        assert (made.kind, made.bands) == ("reflectance", ("B02", "B03", "B04", "B08"))
    with open_netcdf(coarse) as data:
        part = data.isel(timestamp=slice(0, 16))
        bands = ("B05", "B06", "B07", "B8A", "B11", "B12")
        from_xarray(
            part, cube, collection="s2-20m", bands=bands, mask="SCL", masked=(3, 8, 9, 10), profile="timeseries"
        )
        opened = open_cube(cube)
        assert opened.collections == ("s2-10m", "s2-20m")
        assert opened.spec("s2-20m").grid == opened.grid.coarsen(2)
        twenty = opened.dataset("s2-20m")
        np.testing.assert_array_equal(twenty.reflectance.values, np.stack([part[b].values for b in bands], axis=1))
        np.testing.assert_array_equal(twenty.SCL.values, part["SCL"].values)
        np.testing.assert_array_equal(twenty.status.values == 2, np.isin(part["SCL"].values, (3, 8, 9, 10)))
    with open_netcdf(radar) as data:
        part = data.isel(timestamp=slice(0, 8))
        assert from_xarray(part, cube, collection="s1", unit="dB", profile="timeseries").kind == "backscatter"
        expected = np.stack([part[b].values * 0.0001 for b in ("VH", "VV")], axis=1).astype(np.float32)
        np.testing.assert_array_equal(open_cube(cube).dataset("s1").backscatter.values, expected)
    with open_netcdf(labels) as data:
        layer_from_xarray(data, cube, name="crops", role="labels", kind="classes", band="CT")
        crops = open_label(open_cube(cube), "crops")
        of = {value: int(name.removeprefix("class ")) for value, name in crops.spec.classes}
        back = np.vectorize(lambda value: of.get(value, 0))(crops.read())
        np.testing.assert_array_equal(back, data["CT"].values)
    assert verify_cube(cube).damage == ()


def test_axes_that_run_the_other_way_are_turned_and_times_are_sorted(tmp_path: Path) -> None:
    data = world()
    turned = data.isel(y=slice(None, None, -1), x=slice(None, None, -1), t=[2, 0, 1]).transpose("x", "t", "y")
    for name, one in (("plain", data), ("turned", turned)):
        from_xarray(one, tmp_path / name, collection="s", crs=CRS)
    plain, other = (open_cube(tmp_path / name) for name in ("plain", "turned"))
    assert plain.spec("s") == other.spec("s")
    np.testing.assert_array_equal(other.dataset("s").reflectance.values, plain.dataset("s").reflectance.values)
    assert other.dataset("s").source_item.values[1, 0, 0] == 1


def test_a_decoded_dataset_gives_physical_values(tmp_path: Path) -> None:
    raw = world(1, 2, vv=np.array([[[0, 200], [-400, 12]]], np.int32))
    raw["vv"].attrs |= {"scale_factor": 0.01}
    for name, one in (("raw", raw), ("decoded", xr.decode_cf(raw))):
        from_xarray(one, tmp_path / name, collection="s", crs=CRS)
        cube = open_cube(tmp_path / name)
        np.testing.assert_array_equal(
            cube.dataset("s").backscatter.values[0, 0], np.array([[np.nan, 2], [-4, 0.12]], np.float32)
        )
        assert cube.dataset("s").status.values[0].tolist() == [[0, 1], [1, 1]]


def test_an_import_that_was_killed_continues_and_a_complete_one_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import zarr_store.imported as imported
    from tests.ingest.growing import tree

    data, source = world(times=5), {"file": "a.nc", "sha256": "0" * 64}
    whole, killed = tmp_path / "a" / "cube.zarr", tmp_path / "b" / "cube.zarr"
    for path in (whole, killed):
        path.parent.mkdir()
    assert from_xarray(data, whole, collection="s", crs=CRS, source=source).written == 5
    fill, reached = imported._Filler.fill, []

    def dies(self: Any, region: Any) -> Any:
        reached.append(region)
        if len(reached) == 3:
            raise KeyboardInterrupt
        return fill(self, region)

    monkeypatch.setattr(imported._Filler, "fill", dies)
    with pytest.raises(KeyboardInterrupt):
        from_xarray(data, killed, collection="s", crs=CRS, source=source)
    assert len(open_cube(killed).ledger("s").rows()) == 2
    again = from_xarray(data, killed, collection="s", crs=CRS, source=source)
    assert (again.written, again.done_before) == (3, 2)
    assert tree(killed) == tree(whole)
    monkeypatch.setattr(imported._Filler, "fill", lambda *_: pytest.fail("a number was read"))
    assert from_xarray(data, killed, collection="s", crs=CRS, source=source).done_before == 5
    with pytest.raises(CubeMismatch, match=r"has a collection s of other data .*sha256"):
        from_xarray(data, killed, collection="s", crs=CRS, source={"file": "a.nc", "sha256": "1" * 64})
    assert tree(killed) == tree(whole)


@pytest.mark.parametrize("stated", [{"scale": 0.5}, {"offset": 2.0}, {"nodata": 5.0}])
def test_another_scale_or_nodata_value_of_the_same_file_is_stored(tmp_path: Path, stated: dict[str, float]) -> None:
    numbers = np.arange(1, 401, dtype=np.uint16).reshape(1, 20, 20)
    data, source = world(times=1, red=numbers), {"file": "a.nc", "sha256": "0" * 64}

    def stored(url: Path, **options: float) -> tuple[ImportReport, np.ndarray]:
        report = from_xarray(
            data, url, collection="s", crs=CRS, source=source, kind="backscatter",
            **options,  # type: ignore[arg-type]
        )  # fmt: skip
        (region,) = open_cube(url).spec("s").shards().values()
        return report, open_cube(url).read("s", "backscatter", region)

    first, before = stored(tmp_path / "cube.zarr", scale=0.1)
    assert (first.written, first.done_before) == (1, 0)
    again, after = stored(tmp_path / "cube.zarr", **{"scale": 0.1, **stated})
    assert (again.written, again.done_before) == (1, 0)
    fresh, expected = stored(tmp_path / "fresh.zarr", **{"scale": 0.1, **stated})
    np.testing.assert_array_equal(after, expected)
    assert fresh.written
    assert not np.array_equal(before, after)
    assert stored(tmp_path / "cube.zarr", **{"scale": 0.1, **stated})[0].done_before == 1


KILLED = """
import os, signal, sys
import xarray as xr
from zarr_store import crash, from_xarray
os._exit = lambda _code: os.kill(os.getpid(), signal.SIGKILL)
crash.arm(int(sys.argv[3]))
with xr.open_dataset(sys.argv[1], decode_cf=False) as data:
    from_xarray(data, sys.argv[2], collection="s", crs="%s", source={"file": "a.nc", "sha256": "0" * 64})
"""


def test_an_import_whose_process_is_killed_goes_on_with_the_same_bytes(tmp_path: Path) -> None:
    from tests.ingest.growing import tree

    source = {"file": "a.nc", "sha256": "0" * 64}
    file, whole, killed = tmp_path / "a.nc", tmp_path / "a" / "cube.zarr", tmp_path / "b" / "cube.zarr"
    for path in (whole, killed):
        path.parent.mkdir()
    world(times=5).to_netcdf(file, engine="h5netcdf")
    command = [sys.executable, "-c", KILLED % CRS, str(file), str(killed), "30"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    before = len(open_cube(killed).ledger("s").rows())
    assert 0 < before < 5
    with xr.open_dataset(file, decode_cf=False) as data:
        again = from_xarray(data, killed, collection="s", crs=CRS, source=source)
        from_xarray(data, whole, collection="s", crs=CRS, source=source)
    assert (again.written, again.done_before) == (5 - before, before)
    assert tree(killed) == tree(whole)


def test_other_numbers_without_a_digest_are_written_again(tmp_path: Path) -> None:
    data = world()
    from_xarray(data, tmp_path / "c", collection="s", crs=CRS)
    assert from_xarray(data, tmp_path / "c", collection="s", crs=CRS).written == 0
    data["red"][1, 3, 3] = 77
    assert from_xarray(data, tmp_path / "c", collection="s", crs=CRS).written == 1
    assert open_cube(tmp_path / "c").dataset("s").reflectance.values[1, 0, 3, 3] == 77


def test_an_imported_collection_stays_when_the_cube_grows(tmp_path: Path) -> None:
    """A plan knows nothing of it: the cube grows by the dates of its own collection, and keeps the other."""
    from dataclasses import replace

    cube = tmp_path / "c"
    from_xarray(world(), cube, collection="own", crs=CRS)
    from_xarray(world(), cube, collection="imported", crs=CRS)
    spec, rows = open_cube(cube).spec("own"), open_cube(cube).items("own")
    later = replace(spec, times=(*spec.times, "2030-01-01T00:00:00"))
    assert grow_cube(cube, [later], items={"own": [*rows, {**rows[0], "id": "new"}]}, provenance={}) > 0
    assert open_cube(cube).collections == ("own", "imported")
    assert len(open_cube(cube).spec("own").times) == 4
    assert open_cube(cube).dataset("imported").reflectance.shape[0] == 3


@pytest.mark.parametrize(
    ("change", "asked", "message"),
    [
        (lambda d: d, {}, r"no coordinate reference system; give it with --crs EPSG:N"),
        (lambda d: d.assign_attrs(crs="EPSG:32632"), {"nodata": 0}, None),
        (lambda d: d.assign(red=d.red.assign_attrs(_FillValue=None)), {"crs": CRS}, r"holds uint16 and .*--nodata N"),
        (lambda d: d.drop_vars("t"), {"crs": CRS}, r"red \(t, y, x\) are ambiguous.*--time NAME or --band-dim"),
        (lambda d: d.drop_vars("x"), {"crs": CRS}, r"one coordinate of columns, found none .* name it with --x NAME"),
        (lambda d: d.isel(t=0, drop=True), {"crs": CRS}, r"has no time; give that of its pixels with --time"),
        (lambda d: d, {"crs": CRS, "bands": ("rad",)}, r"rad.*red"),
        (lambda d: d, {"crs": CRS, "time": "when"}, r"when.*--time"),
        (lambda d: d.assign_coords(x=d.x + 0.2 * (d.x > 664_100)), {"crs": CRS}, r"x are not evenly spaced"),
        (lambda d: d, {"crs": "EPSG:4326"}, r"--crs"),
        (lambda d: d.isel(t=[0, 0]), {"crs": CRS}, r"the time .* occurs twice"),
        (lambda d: d.assign_coords(u=("u", [0, 1], d.t.attrs)), {"crs": CRS}, r"several dimensions of time"),
        (lambda d: d, {"crs": CRS, "kind": "reflectance", "decibel": (20, -83)}, r"--decibel gives values as float32"),
    ],
)  # fmt: skip
def test_what_is_absent_or_ambiguous_asks_for_the_option_that_answers(
    tmp_path: Path, change: Any, asked: dict[str, Any], message: str | None
) -> None:
    data = change(world())
    if message is None:
        assert from_xarray(data, tmp_path / "c", collection="s", **asked).crs == "EPSG:32632"
        return
    with pytest.raises((InvalidInput, UnknownName), match=message) as caught:
        from_xarray(data, tmp_path / "c", collection="s", **asked)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "c").exists()


def test_bands_along_a_dimension_are_named_by_it_or_by_the_user(tmp_path: Path) -> None:
    stack = np.arange(2 * 3 * 4 * 4, dtype=np.uint16).reshape(2, 3, 4, 4)
    base = world(times=2, side=4)
    data = base.drop_vars("red").assign(v=(("t", "bands", "y", "x"), stack))
    named = data.assign_coords(bands=["a", "b", "c"])
    found = recognise(named, Options(crs=CRS, nodata="none", bands=("c", "a")))
    assert [band.name for band in found.bands] == ["c", "a"]
    np.testing.assert_array_equal(found.bands[0].read(), stack[:, 2])
    with pytest.raises(InvalidInput, match=r"3 bands along bands have no names; give all 3 with --bands"):
        recognise(data, Options(crs=CRS, nodata="none"))
    assert [b.name for b in recognise(data, Options(("p", "q", "r"), crs=CRS, nodata="none")).bands] == ["p", "q", "r"]
    with pytest.raises(InvalidInput, match=r"choose with --variable NAME or --bands"):
        recognise(named.assign(red=base.red), Options(crs=CRS, nodata="none"))


def one_band(numbers: np.ndarray, **attributes: Any) -> xr.Dataset:
    data = world(times=len(numbers), red=numbers)
    data.red.attrs = attributes
    return data


@pytest.mark.parametrize(
    ("attributes", "kind"),
    [
        ({"_FillValue": np.uint16(0), "missing_value": np.uint16(65535)}, "uint16"),
        ({"missing_value": np.array([0, 65535], np.uint16)}, "uint16"),
        ({"_FillValue": np.uint16(0), "valid_max": np.uint16(9000)}, "uint16"),
        ({"valid_range": np.array([1, 9000], np.uint16)}, "uint16"),
        # a range of floats is of the values, of which 0.9 is stored as 9000
        ({"valid_min": 1e-4, "valid_max": 0.9, "scale_factor": 1e-4, "_FillValue": np.uint16(0)}, "uint16"),
        ({"valid_range": np.array([1, 9000], np.int16)}, "float32"),
    ],
)
def test_all_that_the_metadata_say_is_no_data_is_none(tmp_path: Path, attributes: dict[str, Any], kind: str) -> None:
    numbers = np.full((3, 20, 20), 9000, kind)
    numbers[:, :4], numbers[:, 4:7] = 0, 65535
    from_xarray(one_band(numbers, **attributes), tmp_path / "c", collection="s", crs=CRS)
    cube = open_cube(tmp_path / "c")
    observed = cube.dataset("s").status.values == 1
    np.testing.assert_array_equal(observed, numbers == 9000)
    plain = cube.dataset("s", scaled=True, masked=True)
    seen = plain[cube.spec("s").kind].values[:, 0]
    assert np.isnan(seen[numbers != 9000]).all()
    np.testing.assert_allclose(seen[numbers == 9000], 9000 * attributes.get("scale_factor", 1.0), rtol=1e-6)
    stated = one_band(numbers, **attributes)
    from_xarray(stated, tmp_path / "all", collection="s", crs=CRS, nodata="none")
    assert (open_cube(tmp_path / "all").dataset("s").status.values == 1).all()


def test_a_valid_range_of_packed_numbers_holds_for_a_decoded_dataset(tmp_path: Path) -> None:
    numbers = np.array([0, 1, 9000, 9001], np.uint16).repeat(300).reshape(3, 20, 20)
    packed = one_band(numbers, scale_factor=0.01, add_offset=-7.0, valid_range=np.array([1, 9000], np.uint16))
    decoded = xr.decode_cf(packed)
    assert decoded.red.dtype.kind == "f"
    from_xarray(decoded, tmp_path / "c", collection="s", crs=CRS)
    status = open_cube(tmp_path / "c").dataset("s").status.values
    np.testing.assert_array_equal(status == 1, (numbers >= 1) & (numbers <= 9000))


def test_floats_that_were_never_written_are_no_data(tmp_path: Path) -> None:
    numbers = np.full((3, 20, 20), 0.5, np.float32)
    numbers[0, :3] = 9.96921e36
    from_xarray(one_band(numbers), tmp_path / "c", collection="s", crs=CRS)
    np.testing.assert_array_equal(open_cube(tmp_path / "c").dataset("s").status.values == 1, numbers == 0.5)


def test_numbers_that_float32_would_round_are_refused(tmp_path: Path) -> None:
    numbers = np.full((3, 20, 20), 7, np.int32)
    numbers[2, 5, 5], numbers[0] = (1 << 24) + 1, -(1 << 31)
    with pytest.raises(InvalidInput, match=r"red holds whole numbers 7 … 16777217, and float32 holds every one only"):
        from_xarray(one_band(numbers, _FillValue=np.int32(-(1 << 31))), tmp_path / "c", collection="s", crs=CRS)
    assert not (tmp_path / "c").exists()
    numbers[2, 5, 5] = 1 << 24
    from_xarray(one_band(numbers, _FillValue=np.int32(-(1 << 31))), tmp_path / "c", collection="s", crs=CRS)


def test_classes_with_one_name_are_one_class_and_have_no_scale(tmp_path: Path) -> None:
    from_xarray(world(), tmp_path / "c", collection="s", crs=CRS)
    codes = one_band(np.array([1, 2, 255, 7], np.uint8).repeat(100).reshape(1, 20, 20))
    plain = Options(crs=CRS, nodata="none")
    names = {1: "crop", 2: "crop", 255: "water"}
    layer, _ = layer_from_xarray(
        codes, tmp_path / "c", name="t", role="labels", kind="classes", names=names, options=plain
    )
    assert isinstance(layer, LabelLayer)
    assert dict(layer.counts) == {"crop": 200, "water": 100}
    with pytest.raises(InvalidInput, match="red has scale 2 and offset 0, which classes cannot have"):
        layer_from_xarray(codes.assign(red=codes.red.assign_attrs(scale_factor=2.0)), tmp_path / "c", name="u",
                          role="labels", kind="classes", options=plain)  # fmt: skip


def test_a_grid_that_does_not_nest_and_a_layer_that_changes_are_refused(tmp_path: Path) -> None:
    cube = tmp_path / "c"
    from_xarray(world(), cube, collection="s", crs=CRS)
    before = json.loads((cube / "zarr.json").read_text())
    odd = world(side=13, size=15.0)
    with pytest.raises(InvalidInput, match=r"does not nest in .*one pixel of it is 1.5 pixels.*another cube"):
        from_xarray(odd, cube, collection="odd", crs=CRS)
    with pytest.raises(InvalidInput, match="red changes with time, and a layer has none"):
        layer_from_xarray(world(), cube, name="dem", options=Options(crs=CRS))
    coarse = world(times=1, side=10, size=20.0).assign_coords(
        y=5_612_110.0 - 20 * np.arange(10), x=664_010.0 + 20 * np.arange(10)
    )
    layer_from_xarray(coarse, cube, name="dem", options=Options(crs=CRS))
    np.testing.assert_array_equal(open_layer(open_cube(cube), "dem").read()[:2, :2], coarse.red.values[0, 0, 0])
    with pytest.raises(CubeMismatch, match="give another --name, or --replace"):
        layer_from_xarray(coarse + 1, cube, name="dem", options=Options(crs=CRS, nodata=0))
    with pytest.raises(UnknownName, match="static layer"):
        open_layer(open_cube(cube), "elevation")
    assert json.loads((cube / "zarr.json").read_text())["attributes"] == before["attributes"]


def test_a_file_that_is_no_netcdf_or_is_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.nc"
    world().to_netcdf(path, engine="h5netcdf")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 3])
    with pytest.raises(InvalidInput, match="cannot be read as netCDF"), open_netcdf(path):
        pass
    path.write_text("<html>")
    with pytest.raises(InvalidInput, match="is not a netCDF file"), open_netcdf(path):
        pass
    with pytest.raises(InvalidInput, match=r"cannot read .*No such file"), open_netcdf(tmp_path / "none.nc"):
        pass


def test_labels_of_the_finest_grid_are_not_learned_on_a_coarser_one(tmp_path: Path) -> None:
    from jaxtrain.config import DataConfig
    from jaxtrain.data.targets import resolve_target

    cube = tmp_path / "c"
    from_xarray(world(), cube, collection="fine", crs=CRS)
    coarse = world(side=10, size=20.0)
    from_xarray(coarse.assign_coords(y=coarse.y - 5.0, x=coarse.x + 5.0), cube, collection="coarse", crs=CRS)
    layer_from_xarray(world(times=1), cube, name="height", role="labels", options=Options(crs=CRS))
    opened = open_cube(cube)
    asked = DataConfig(cube=str(cube), collection="fine", label="height", classes={})
    assert resolve_target(opened, asked).values
    with pytest.raises(InvalidInput, match=r"lies on the finest grid .*train on fine"):
        resolve_target(opened, asked.model_copy(update={"collection": "coarse"}))
