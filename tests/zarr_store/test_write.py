"""Writing: whole shards only, nothing half there, same bytes every time, and everybody can read it."""

from __future__ import annotations

import hashlib
import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
import rioxarray  # noqa: F401  (registers .rio)
import xarray as xr

from zarr_store import CubeSpec, Region, ShardWriter, SourceOutcome, create_cube, open_cube
from zarr_store.durable import PendingFile
from zarr_store.errors import CubeMismatch, InvalidInput, Locked, MisalignedWrite
from zarr_store.ledger import Ledger, LedgerRow
from zarr_store.lock import LOCK_KEY, CubeLock
from zarr_store.spec import overview_positions

from .conftest import ITEMS, NAME, cut


def tree_digest(path: Path) -> dict[str, str]:
    return {
        str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(path.rglob("*"))
        if p.is_file()
    }


def test_what_was_written_is_read_back(cube_path: Path, spec: CubeSpec, pixels: dict[str, np.ndarray]) -> None:
    plain = xr.open_zarr(cube_path, group=NAME, mask_and_scale=False)
    for name, values in pixels.items():
        np.testing.assert_array_equal(plain[name].values, values)
    assert list(plain.band.values) == ["blue", "nir"]
    assert plain.time.values.astype("datetime64[s]").tolist() == spec.time_values.tolist()
    np.testing.assert_array_equal(plain.x, spec.grid.x())
    np.testing.assert_array_equal(plain.y, spec.grid.y())


def test_the_overview_keeps_the_middle_pixel_of_each_block(
    cube_path: Path, spec: CubeSpec, pixels: dict[str, np.ndarray]
) -> None:
    """Also at the edges, where a block is cut and another pixel is the nearest to its middle."""
    overview = xr.open_zarr(cube_path, group=f"overview/{NAME}", mask_and_scale=False)["reflectance"].values
    rows, cols = (overview_positions(size) for size in spec.grid.shape)
    assert any(size % 8 for size in spec.grid.shape)
    assert not any(size % 8 for size in spec.layout.shard[1:])
    np.testing.assert_array_equal(overview, pixels["reflectance"][:, :, rows[:, None], cols])


def test_a_lock_that_is_lost_while_pixels_are_put_leaves_no_row(
    tmp_path: Path, spec: CubeSpec, pixels: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run may hold the cube by the time the last pixel lies there: then the row is not ours to write."""
    path = tmp_path / "cube.zarr"
    create_cube(path, [spec], items=ITEMS, provenance={})
    region = spec.shards()[0, 0, 0]
    with CubeLock(path, "first") as lock:
        packed = ShardWriter(path, NAME, fence=lock.token).pack(region, cut(pixels, region), key="k1", sources=[])
        asked: list[str] = []

        def lose_the_lock(place: str) -> None:
            asked.append(place)
            if place.startswith("pixels written"):
                (path / LOCK_KEY).write_text(json.dumps({"token": "of another run"}))

        monkeypatch.setattr("zarr_store.write.crashpoint", lose_the_lock)
        with pytest.raises(Locked, match="has ended or lost its lock"):
            packed.finish()
    assert asked == ["row dropped (0, 0, 0)", "pixels written (0, 0, 0)"], "the first look had passed"
    assert open_cube(path).ledger(NAME).rows() == {}


def test_a_row_is_put_after_all_pixels_and_dropped_before_them(
    tmp_path: Path, spec: CubeSpec, pixels: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a reader sees at each step, without recording system calls (`test_power_loss` records them)."""
    path = tmp_path / "cube.zarr"
    create_cube(path, [spec], items=ITEMS, provenance={})
    region = spec.shards()[0, 0, 0]
    writer = ShardWriter(path, NAME)
    steps: list[tuple[str, str]] = []
    put, drop, end = Ledger.put, Ledger.drop, PendingFile.finish

    def note_put(self: Ledger, row: LedgerRow) -> None:
        steps.append(("put", ""))
        put(self, row)

    def note_drop(self: Ledger, index: tuple[int, int, int]) -> None:
        steps.append(("drop", ""))
        drop(self, index)

    monkeypatch.setattr(Ledger, "put", note_put)
    monkeypatch.setattr(Ledger, "drop", note_drop)

    def finish(self: PendingFile) -> None:
        shown = open_cube(path).ledger(NAME).get((0, 0, 0))
        steps.append(("pixels", "" if shown is None else "beside a row"))
        end(self)

    monkeypatch.setattr(PendingFile, "finish", finish)
    for _ in range(2):
        steps.clear()
        writer.write(region, cut(pixels, region), key="k1", sources=[])
        # the row itself is a file that is put in place, too
        assert [step for step in steps if step[0] != "pixels"] == [("drop", ""), ("put", "")]
        before = steps[: steps.index(("put", ""))]
        assert before[1:] == [("pixels", "")] * (len(spec.arrays()) + 1)


def test_georeference_is_seen_by_rioxarray_and_by_the_geozarr_attributes(cube_path: Path, spec: CubeSpec) -> None:
    plain = xr.open_zarr(cube_path, group=NAME, mask_and_scale=False)
    assert plain.rio.crs.to_epsg() == 32633
    assert tuple(plain.rio.transform())[:6] == pytest.approx(spec.grid.transform)
    assert plain.attrs["proj:code"] == "EPSG:32633"
    assert plain.attrs["spatial:transform"] == list(spec.grid.transform)
    tree = xr.open_datatree(cube_path, engine="zarr")
    assert f"/{NAME}" in tree.groups
    assert f"/overview/{NAME}" in tree.groups


@pytest.mark.skipif(
    tuple(int(v) for v in rasterio.__gdal_version__.split(".")[:2]) < (3, 12),
    reason=f"GDAL {rasterio.__gdal_version__} cannot read Zarr v3; 3.12 can",
)
def test_gdal_reads_the_overview_with_its_georeference(
    cube_path: Path, spec: CubeSpec, pixels: dict[str, np.ndarray]
) -> None:
    with rasterio.open(f'ZARR:"{cube_path}/overview/{NAME}":/reflectance:1:0') as opened:
        assert opened.crs.to_epsg() == 32633
        assert opened.transform.a == spec.grid.resolution[0] * 8
        assert (opened.transform.c, opened.transform.f) == (spec.grid.bounds[0], spec.grid.bounds[3])
        np.testing.assert_array_equal(opened.read(1)[:4, :7], pixels["reflectance"][1, 0, 4:36:8, 4:57:8])


def test_shards_are_few_and_checksummed(cube_path: Path, spec: CubeSpec) -> None:
    meta = json.loads((cube_path / NAME / "reflectance/zarr.json").read_text())
    (sharding,) = meta["codecs"]
    assert [c["name"] for c in sharding["configuration"]["codecs"]] == ["bytes", "blosc", "crc32c"]
    assert [c["name"] for c in sharding["configuration"]["index_codecs"]] == ["bytes", "crc32c"]
    files = [p for p in (cube_path / NAME / "reflectance/c").rglob("*") if p.is_file()]
    assert len(files) == len(spec.shards()) == 8


def test_same_input_same_bytes_and_rewriting_changes_nothing(
    tmp_path: Path, cube_path: Path, spec: CubeSpec, pixels: dict[str, np.ndarray]
) -> None:
    before = tree_digest(cube_path)
    writer = pickle.loads(pickle.dumps(ShardWriter(cube_path, NAME)))
    for region in reversed(list(spec.shards().values())):
        writer.write(region, cut(pixels, region), key="k1", sources=[SourceOutcome(0, "A", "read")])
    assert tree_digest(cube_path) == before


def test_create_is_idempotent_and_refuses_another_cube_with_a_diff(cube_path: Path, spec: CubeSpec) -> None:
    before = tree_digest(cube_path)
    create_cube(cube_path, [spec], items=ITEMS, provenance={"made": "again"})
    with pytest.raises(CubeMismatch, match=r"class_layers: scl → none.*--overwrite"):
        create_cube(cube_path, [replace(spec, class_layers=())], items=ITEMS, provenance={})
    with pytest.raises(CubeMismatch, match="items"):
        create_cube(cube_path, [spec], items={NAME: ITEMS[NAME][:1]}, provenance={})
    assert tree_digest(cube_path) == before


@pytest.mark.parametrize("kind", ["file", "folder", "zarr"])
def test_create_refuses_what_is_not_ours(tmp_path: Path, spec: CubeSpec, kind: str) -> None:
    target = tmp_path / "something"
    if kind == "file":
        target.write_text("precious")
    else:
        target.mkdir()
        (target / ("zarr.json" if kind == "zarr" else "notes.txt")).write_text(
            '{"zarr_format": 3, "node_type": "group", "attributes": {}}'
        )
    before = tree_digest(tmp_path)
    with pytest.raises(InvalidInput, match="not a terrashard cube"):
        create_cube(target, [spec], items=ITEMS, provenance={})
    assert tree_digest(tmp_path) == before


def test_a_failed_creation_leaves_nothing(tmp_path: Path, spec: CubeSpec) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        create_cube(tmp_path / "cube.zarr", [spec], items=ITEMS, provenance={"bad": object()})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "region",
    [Region(0, 1, 0, 16, 0, 32), Region(0, 2, 0, 32, 0, 32), Region(0, 1, 8, 40, 0, 32), Region(0, 1, 0, 64, 0, 32)],
)
def test_only_whole_shards_are_written(cube_path: Path, pixels: dict[str, np.ndarray], region: Region) -> None:
    before = tree_digest(cube_path)
    with pytest.raises(MisalignedWrite, match="exactly one shard"):
        ShardWriter(cube_path, NAME).write(region, cut(pixels, region), key="k", sources=[])
    assert tree_digest(cube_path) == before


def test_arrays_must_fit_the_spec(cube_path: Path, spec: CubeSpec, pixels: dict[str, np.ndarray]) -> None:
    region = next(iter(spec.shards().values()))
    writer = ShardWriter(cube_path, NAME)
    good = cut(pixels, region)
    with pytest.raises(MisalignedWrite, match="needs the arrays"):
        writer.write(region, {k: v for k, v in good.items() if k != "status"}, key="k", sources=[])
    with pytest.raises(MisalignedWrite, match="expected uint16"):
        writer.write(region, good | {"reflectance": good["reflectance"].astype("int32")}, key="k", sources=[])


def test_an_all_nodata_shard_is_stored_and_not_missing(cube_path: Path, spec: CubeSpec) -> None:
    region = next(iter(spec.shards().values()))
    empty = {
        a.name: np.full((1, 2, 32, 32) if a.name == "reflectance" else (1, 32, 32), a.fill, a.dtype)
        for a in spec.arrays()
    }
    row = ShardWriter(cube_path, NAME).write(region, empty, key="k2", sources=[])
    assert row.state == "done"
    assert not open_cube(cube_path).read(NAME, "reflectance", region).any()


def test_a_missing_source_makes_the_row_partial(cube_path: Path, spec: CubeSpec, pixels: dict[str, np.ndarray]) -> None:
    index, region = next(iter(spec.shards().items()))
    outcome = SourceOutcome(1, "B", "missing", "red", "404")
    row = ShardWriter(cube_path, NAME).write(region, cut(pixels, region), key="k2", sources=[outcome])
    assert row.state == "partial"
    assert open_cube(cube_path).ledger(NAME).get(index) == row
    assert open_cube(cube_path).ledger(NAME).counts(8) == {
        "done": 7,
        "partial": 1,
        "failed": 0,
        "pending": 0,
        "total": 8,
    }
