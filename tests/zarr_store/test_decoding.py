"""What no codec can decode is damage, whichever exception the codec raises (FAULTS Z21)."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numcodecs
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


_MANY = 60_000_000
"""Texts, or bytes, that a chunk claims to hold: half a gigabyte that could still be allocated."""
BOMBS: dict[str, tuple[list[dict[str, Any]], bytes]] = {
    "texts": ([{"name": "vlen-utf8"}], _MANY.to_bytes(4, "little") + bytes(40)),
    "zstd": (
        [{"name": "vlen-utf8"}, _ZSTD],
        b"\x28\xb5\x2f\xfd\xe0" + (_MANY * 8).to_bytes(8, "little") + b"\x01\x00\x00",
    ),
    "blosc": (
        [{"name": "vlen-utf8"}, _BLOSC],
        b"\x02\x01\x01\x08" + b"".join(n.to_bytes(4, "little") for n in (_MANY * 8, _MANY * 8, 16)),
    ),
}
"""Codecs of an array of texts, and a chunk whose head claims gigabytes."""


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_chunk_that_claims_gigabytes_is_not_decoded(cube_path: Path, bomb: str) -> None:
    chain, chunk = BOMBS[bomb]
    for path, *keys in ((cube_path / "zarr.json", "consolidated_metadata", "metadata", f"{NAME}/band"),
                        (cube_path / NAME / "band" / "zarr.json",)):  # fmt: skip
        document = json.loads(path.read_text())
        inside = document
        for key in keys:
            inside = inside[key]
        inside["codecs"] = chain
        path.write_text(json.dumps(document))
    (cube_path / NAME / "band" / "c" / "0").write_bytes(chunk)
    tracemalloc.start()
    try:
        with pytest.raises(IntegrityError, match=f"{NAME}: unusable metadata or damaged bytes .*says that it holds"):
            open_cube(cube_path).dataset(NAME)
        assert tracemalloc.get_traced_memory()[1] < 400e6  # a document is read into a buffer of 256 MiB
    finally:
        tracemalloc.stop()


def test_names_of_samples_that_claim_gigabytes_are_not_decoded(tmp_path: Path) -> None:
    spec, image = SampleSpec(2, ("red",), (4, 4), "uint8", ("a", "b")), np.zeros((1, 4, 4), np.uint8)
    store = tmp_path / "samples.zarr"
    write_samples(store, spec, [Sample(image, np.array(n, np.uint8), 15.0, 45.0, f"n{n}") for n in range(2)])
    assert open_samples(store).names() == ["n0", "n1"]
    (store / "name" / "c" / "0").write_bytes(numcodecs.Zstd().encode(_MANY.to_bytes(4, "little") + bytes(40)))
    with pytest.raises(IntegrityError, match=f"a chunk of 2 texts says that it holds {_MANY}"):
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
