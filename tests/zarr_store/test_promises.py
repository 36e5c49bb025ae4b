"""Cubes that promise too much (FAULTS Z21), and cubes of other releases (Z20): refused before anything is decoded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import tensorstore as ts
from numcodecs import blosc

from zarr_store import CubeSpec, Region, create_cube, open_cube
from zarr_store.errors import CorruptShard, IntegrityError, NotACube

NAME = "sentinel-2-l2a"
BOX = Region(0, 1, 0, 16, 0, 16)


def edit(path: Path, change: Callable[[Any], None]) -> None:
    document = json.loads(path.read_text())
    about = document.get("attributes", {}).get("terrashard")
    if isinstance(about, str):  # as text or nested, it is read alike
        document["attributes"]["terrashard"] = json.loads(about)
    change(document)
    path.write_text(json.dumps(document))


def opens_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ts, "open", lambda *_, **__: pytest.fail("an array was opened"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda a: a["codecs"][0]["configuration"].update(chunk_shape=[1, 2, 32768, 32768]), "chunk"),
        (lambda a: a["chunk_grid"]["configuration"].update(chunk_shape=[1, 2, 1 << 20, 1 << 20]), "shard"),
        (lambda a: a.update(shape=[2, 2, 1 << 40, 57]), "shape"),
        (lambda a: a.update(data_type="complex128"), "data_type complex128, not uint16"),
        (lambda a: a.update(codecs=[{"name": "bytes"}]), "unreadable array metadata"),
        (lambda a: a["codecs"][0]["configuration"]["codecs"].append({"name": "gzip", "configuration": {"level": 1}}),
         "packed with gzip"),
    ],
)  # fmt: skip
def test_an_array_that_is_not_laid_out_as_its_collection_says_is_not_opened(
    cube_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None], told: str
) -> None:
    edit(cube_path / NAME / "reflectance" / "zarr.json", change)
    opens_nothing(monkeypatch)
    with pytest.raises(IntegrityError, match=told) as refused:
        open_cube(cube_path).read(NAME, "reflectance", BOX)
    assert str(cube_path) in str(refused.value)
    with pytest.raises(IntegrityError, match=told):
        open_cube(cube_path).dataset(NAME)


@pytest.mark.parametrize("shape", [[[], 2, 5, 8], [None, 2, 5, 8], ["2", 2, 5, 8], [], [2.5, 2, 5, 8]])
@pytest.mark.parametrize("group", [NAME, f"overview/{NAME}"])
def test_a_number_of_dates_that_is_no_number_is_refused(cube_path: Path, group: str, shape: list[Any]) -> None:
    edit(cube_path / group / "reflectance" / "zarr.json", lambda a: a.update(shape=shape))
    with pytest.raises(IntegrityError, match="shape"):
        open_cube(cube_path).overview(NAME) if group.startswith("overview") else open_cube(cube_path).dataset(NAME)


def test_a_cube_whose_parts_agree_on_a_bomb_is_not_opened(
    tmp_path: Path, spec: CubeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Array and collection both ask for chunks of 4 GiB."""
    path = tmp_path / "bomb.zarr"
    create_cube(path, [spec], items={NAME: [{"id": "A", "datetime": "2023-08-10T09:57:57Z"}]}, provenance={})
    side = 32768

    def of_collection(group: Any) -> None:
        told = group["attributes"]["terrashard"]["spec"]
        told["layout"] |= {"chunk": [1, side, side], "shard": [1, side, side]}
        told["grid"]["shape"] = [side, side]

    def of_array(array: Any) -> None:
        array["shape"][2:] = [side, side]
        array["chunk_grid"]["configuration"]["chunk_shape"] = [1, 2, side, side]
        array["codecs"][0]["configuration"]["chunk_shape"] = [1, 2, side, side]

    edit(path / NAME / "zarr.json", of_collection)
    edit(path / NAME / "reflectance" / "zarr.json", of_array)
    opens_nothing(monkeypatch)
    with pytest.raises(IntegrityError, match=f"promises chunks of {2 * 2 * side * side} bytes"):
        open_cube(path).read(NAME, "reflectance", BOX)


def test_a_chunk_that_claims_more_than_it_may_hold_is_an_error(cube_path: Path) -> None:
    """A frame that decodes to 64 MB in the place of 1 kB, with right checksums all around it."""
    shard = cube_path / NAME / "reflectance" / "c" / "0" / "0" / "0" / "0"
    data = shard.read_bytes()
    count = 4  # 32² shards of 16² chunks
    index = np.frombuffer(data[-16 * count - 4 : -4], "<u8").copy()
    bomb = blosc.compress(np.zeros(64 << 20, np.uint8).tobytes(), b"zstd", 9, blosc.SHUFFLE)
    bomb += google_crc32c.value(bomb).to_bytes(4, "little")
    body = data[: -16 * count - 4]
    index[:2] = len(body), len(bomb)
    told = index.tobytes()
    shard.write_bytes(body + bomb + told + google_crc32c.value(told).to_bytes(4, "little"))
    assert shard.stat().st_size < 1 << 20
    with pytest.raises(CorruptShard):
        open_cube(cube_path).read(NAME, "reflectance", BOX)


@pytest.mark.parametrize(
    ("format_", "told"), [(99, "use the newer terrashard"), (0, "make it again"), (None, "make it again")]
)
def test_z20_a_cube_of_another_format_is_refused_and_left_alone(
    cube_path: Path, spec: CubeSpec, format_: int | None, told: str
) -> None:
    edit(cube_path / "zarr.json", lambda root: root["attributes"]["terrashard"].update(format=format_))
    before = (cube_path / "zarr.json").read_bytes()
    with pytest.raises(NotACube, match=f"cube format {format_}, this release reads format 1.*{told}") as refused:
        open_cube(cube_path)
    assert refused.value.exit_code == 2
    with pytest.raises(NotACube, match=told):
        create_cube(cube_path, [spec], items={NAME: []}, provenance={})
    assert (cube_path / "zarr.json").read_bytes() == before


def test_z20_a_collection_that_says_what_is_not_known_is_named(cube_path: Path) -> None:
    edit(cube_path / NAME / "zarr.json", lambda g: g["attributes"]["terrashard"]["spec"].pop("layout"))
    with pytest.raises(IntegrityError, match=rf"{NAME}/zarr.json: .* cannot be used \(KeyError: 'layout'\)"):
        open_cube(cube_path).spec(NAME)
