"""Reading: boxes equal numpy slices; what is absent or damaged raises and is never zeros."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zarr_store import CubeSpec, Region, ShardWriter, create_cube, open_cube
from zarr_store.errors import CorruptShard, IntegrityError, MissingShard, NotACube, UnknownName
from zarr_store.write import shard_key

from .conftest import ITEMS, NAME


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_any_box_equals_the_slice(
    cube_path: Path, spec: CubeSpec, pixels: dict[str, np.ndarray], data: st.DataObject
) -> None:
    cube = open_cube(cube_path)
    edges = [sorted(data.draw(st.lists(st.integers(0, n), min_size=2, max_size=2, unique=True))) for n in spec.shape]
    region = Region(*(v for pair in edges for v in pair))
    t, y, x = region.slices
    np.testing.assert_array_equal(cube.read(NAME, "status", region), pixels["status"][t, y, x])
    np.testing.assert_array_equal(cube.read(NAME, "reflectance", region, [1, 0]), pixels["reflectance"][t, ::-1, y, x])


@pytest.mark.parametrize("array", ["reflectance", "status"])
def test_a_deleted_shard_is_missing_not_zero(cube_path: Path, spec: CubeSpec, array: str) -> None:
    index, region = list(spec.shards().items())[3]
    (cube_path / shard_key(spec, array, index)).unlink()
    with pytest.raises(MissingShard, match="never written or was deleted"):
        open_cube(cube_path).read(NAME, array, region)


def test_every_flipped_bit_is_caught(cube_path: Path, spec: CubeSpec, pixels: dict[str, np.ndarray]) -> None:
    index, region = next(iter(spec.shards().items()))
    path = cube_path / shard_key(spec, "reflectance", index)
    whole = path.read_bytes()
    rng = np.random.default_rng(3)
    caught = 0
    for bit in rng.integers(0, len(whole) * 8, 60):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(damaged)
        try:
            read = open_cube(cube_path).read(NAME, "reflectance", region)
        except (CorruptShard, MissingShard):
            caught += 1
        else:
            # a bit that nothing refers to may flip, but what is read is still right
            np.testing.assert_array_equal(read, pixels["reflectance"][0:1, :, 0:32, 0:32])
    assert caught >= 58


@pytest.mark.parametrize("size", [0, 10, 0.5])
def test_a_truncated_shard_is_corrupt(cube_path: Path, spec: CubeSpec, size: float) -> None:
    index, region = next(iter(spec.shards().items()))
    path = cube_path / shard_key(spec, "scl", index)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(size if size > 1 else size * len(whole))])
    with pytest.raises((CorruptShard, MissingShard)):
        open_cube(cube_path).read(NAME, "scl", region)


def test_a_shard_not_written_yet_is_missing(tmp_path: Path, spec: CubeSpec) -> None:
    create_cube(tmp_path / "new.zarr", [spec], items=ITEMS, provenance={})
    region = next(iter(spec.shards().values()))
    with pytest.raises(MissingShard):
        open_cube(tmp_path / "new.zarr").read(NAME, "reflectance", region)


def test_what_is_no_cube_is_said(tmp_path: Path, cube_path: Path) -> None:
    with pytest.raises(NotACube, match="does not exist"):
        open_cube(tmp_path / "nothing")
    (tmp_path / "folder").mkdir()
    with pytest.raises(NotACube, match=r"holds no zarr\.json"):
        open_cube(tmp_path / "folder")
    (tmp_path / "folder/zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    with pytest.raises(NotACube, match="not a terrashard cube"):
        open_cube(tmp_path / "folder")
    for attributes, words in (
        ('{"terrashard": {"samples": 1}}', r"is a sample store, not a cube: `terrashard info .*folder` shows it"),
        ('{"terrashard_map": {}}', "is a map, not a cube: show it with `terrashard quicklook"),
    ):
        (tmp_path / "folder/zarr.json").write_text(
            f'{{"zarr_format": 3, "node_type": "group", "attributes": {attributes}}}'
        )
        with pytest.raises(NotACube, match=words):
            open_cube(tmp_path / "folder")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/model.json").write_text("{}")
    with pytest.raises(NotACube, match="is a training run, not a cube"):
        open_cube(tmp_path / "run")
    root = cube_path / "zarr.json"
    whole = root.read_text()
    root.write_text(whole[:50])
    with pytest.raises(NotACube, match="unreadable metadata"):
        open_cube(cube_path)
    newer = json.loads(whole)
    newer["attributes"]["terrashard"]["format"] = 99
    root.write_text(json.dumps(newer))
    with pytest.raises(NotACube, match="cube format 99"):
        open_cube(cube_path)


def test_unknown_names_and_lost_metadata(cube_path: Path) -> None:
    cube = open_cube(cube_path)
    with pytest.raises(UnknownName, match="did you mean 'sentinel-2-l2a'"):
        cube.spec("sentinel-2-l2")
    (cube_path / NAME / "zarr.json").unlink()
    with pytest.raises(IntegrityError, match="restore it"):
        open_cube(cube_path).spec(NAME)


def test_a_failed_shard_is_recorded_and_raises(tmp_path: Path, spec: CubeSpec) -> None:
    create_cube(tmp_path / "c.zarr", [spec], items=ITEMS, provenance={})
    index, region = next(iter(spec.shards().items()))
    ShardWriter(tmp_path / "c.zarr", NAME).fail(region, key="k", sources=[])
    cube = open_cube(tmp_path / "c.zarr")
    row = cube.ledger(NAME).get(index)
    assert row is not None
    assert row.state == "failed"
    assert not cube.index(NAME).present.any()
    with pytest.raises(MissingShard):
        cube.read(NAME, "status", region)
