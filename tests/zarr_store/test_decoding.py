"""What no codec can decode is damage, whichever exception the codec raises (FAULTS Z21)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zarr_store import open_cube
from zarr_store.decoding import decoding
from zarr_store.errors import IntegrityError, NothingFound
from zarr_store.samples import Sample, SampleSpec, open_samples, write_samples

NAME = "sentinel-2-l2a"
_BYTES: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}
_ZSTD: dict[str, Any] = {"name": "zstd", "configuration": {"level": 0, "checksum": False}}
_BLOSC: dict[str, Any] = {
    "name": "blosc",
    "configuration": {"typesize": 8, "cname": "zstd", "clevel": 5, "shuffle": "shuffle", "blocksize": 0},
}
CODECS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "none": ([_BYTES], "ValueError"),
    "blosc": ([_BYTES, _BLOSC], "RuntimeError"),
    "zstd twice": ([_BYTES, _ZSTD, _ZSTD], "RuntimeError"),
    "checksum": ([_BYTES, {"name": "crc32c"}], "ValueError"),
}
"""Codecs that did not pack the axes, and what they raise."""
DAMAGE = {"zeros": bytes(40), "cut short": b"\x28\xb5\x2f\xfd", "empty": b""}


@pytest.mark.parametrize(("group", "array"), [(NAME, "x"), (NAME, "time"), (f"overview/{NAME}", "y")])
@pytest.mark.parametrize("codecs", CODECS)
def test_axes_that_metadata_say_are_packed_otherwise(cube_path: Path, group: str, array: str, codecs: str) -> None:
    chain, raised = CODECS[codecs]
    root = json.loads((cube_path / "zarr.json").read_text())
    root["consolidated_metadata"]["metadata"][f"{group}/{array}"]["codecs"] = chain
    (cube_path / "zarr.json").write_text(json.dumps(root))
    cube = open_cube(cube_path)
    with pytest.raises(IntegrityError, match=f"{group}: unusable metadata or damaged bytes .{raised}"):
        cube.overview(NAME) if group.startswith("overview") else cube.dataset(NAME)


@pytest.mark.parametrize("array", ["x", "band"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_axes_whose_bytes_are_damaged(cube_path: Path, array: str, damage: str) -> None:
    path = cube_path / NAME / array / "c" / "0"
    assert path.stat().st_size > 0
    path.write_bytes(DAMAGE[damage])
    with pytest.raises(IntegrityError, match=f"{NAME}: unusable metadata or damaged bytes"):
        open_cube(cube_path).dataset(NAME)


def test_names_of_samples_whose_bytes_are_damaged(tmp_path: Path) -> None:
    spec, image = SampleSpec(2, ("red",), (4, 4), "uint8", ("a", "b")), np.zeros((1, 4, 4), np.uint8)
    store = tmp_path / "samples.zarr"
    write_samples(store, spec, [Sample(image, np.array(n, np.uint8), 15.0, 45.0, f"n{n}") for n in range(2)])
    (store / "name" / "c" / "0").write_bytes(bytes(40))
    with pytest.raises(IntegrityError, match=r"name: unusable metadata or damaged bytes .RuntimeError"):
        open_samples(store).names()


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, SystemError, NotImplementedError, EOFError, IndexError])
def test_whatever_a_codec_raises_is_damage(error: type[Exception]) -> None:
    with pytest.raises(IntegrityError, match=f"here: unusable metadata or damaged bytes .{error.__name__}: odd"):  # noqa: SIM117
        with decoding("here"):
            raise error("odd")


def test_errors_with_a_name_keep_it() -> None:
    with pytest.raises(NothingFound, match="none"), decoding("here"):
        raise NothingFound("none")
    with pytest.raises(PermissionError), decoding("here"):
        raise PermissionError("not a matter of decoding")
