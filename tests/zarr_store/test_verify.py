"""Verification names exactly what is damaged."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numcodecs
import numpy as np
import pytest

from zarr_store import CubeSpec, open_cube, verify_cube
from zarr_store.errors import IntegrityError, UnknownName
from zarr_store.write import shard_key

from .conftest import NAME


def test_a_whole_cube_is_clean(cube_path: Path, spec: CubeSpec) -> None:
    seen = []
    report = verify_cube(cube_path, on_shard=lambda done, total: seen.append((done, total)))
    assert report.damage == ()
    assert report.checked_shards == len(spec.shards())
    assert report.checked_bytes > 0
    assert seen[-1] == (8, 8)
    assert verify_cube(cube_path, share=0.25).checked_shards == 2


def test_damage_is_named(cube_path: Path, spec: CubeSpec) -> None:
    shards = list(spec.shards())
    flipped = cube_path / shard_key(spec, "scl", shards[1])
    data = bytearray(flipped.read_bytes())
    data[5] ^= 1
    flipped.write_bytes(data)
    (cube_path / shard_key(spec, "reflectance", shards[2])).unlink()
    damage = verify_cube(cube_path).damage
    assert [(d.array, d.index, d.state) for d in damage] == [
        ("scl", shards[1], "corrupt"),
        ("reflectance", shards[2], "missing"),
    ]
    assert str(flipped) in str(damage[0])


def test_a_damaged_ledger_row_is_named(cube_path: Path) -> None:
    row = next((cube_path / "_terrashard/ledger" / NAME).iterdir())
    row.write_bytes(row.read_bytes()[:40])
    with pytest.raises(IntegrityError, match="not a ledger row"):
        open_cube(cube_path).ledger(NAME).rows()


def test_unknown_name_reads_like_a_sentence() -> None:
    error = UnknownName.of("band", "bleu", ["blue", "red"], "collection x")
    assert str(error) == "unknown band 'bleu' in collection x: did you mean 'blue'? (known: blue, red)"
    assert error.exit_code == 2


AXES = {"overwritten": bytes(range(64)), "cut short": b"\x28\xb5\x2f\xfd", "empty": b"", "missing": None}


@pytest.mark.parametrize("damage", AXES)
def test_a_damaged_axis_is_named(cube_path: Path, damage: str) -> None:
    assert verify_cube(cube_path).damaged_axes == ()
    for group, axis in product((NAME, f"overview/{NAME}"), ("time", "band", "y", "x")):
        path, data = cube_path / group / axis / "c" / "0", AXES[damage]
        right = path.read_bytes()
        path.unlink() if data is None else path.write_bytes(data)
        (line,) = verify_cube(cube_path).damaged_axes
        assert line.startswith(f"axis {group}/{axis} ")
        assert str(cube_path / group / axis) in line
        path.write_bytes(right)


def test_an_axis_with_other_values_is_named_and_another_packing_is_none(cube_path: Path) -> None:
    import zarr

    axis = zarr.open_array(cube_path / NAME / "y", mode="r+")
    right = np.asarray(axis[:])
    axis[:] = right + 10.0 * (np.arange(len(right)) == 3)
    (line,) = verify_cube(cube_path).damaged_axes
    assert f"axis {NAME}/y holds 1 other values" in line
    axis[:] = right
    chunk = cube_path / NAME / "y" / "c" / "0"
    before = chunk.read_bytes()
    chunk.write_bytes(numcodecs.Zstd(level=9, checksum=False).encode(numcodecs.Zstd().decode(before)))
    assert chunk.read_bytes() != before
    assert verify_cube(cube_path).damaged_axes == ()
