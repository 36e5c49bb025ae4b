"""Long item tables and provenance are compressed in the metadata; what reads them gets the same values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from zarr_store import attributes
from zarr_store.create import create_cube, record_provenance
from zarr_store.errors import IntegrityError
from zarr_store.grid import Grid
from zarr_store.grow import grow_cube
from zarr_store.read import open_cube
from zarr_store.spec import BandSpec, CubeSpec, Layout

GRID = Grid("EPSG:32633", (10.0, 0.0, 0.0, 0.0, -10.0, 0.0), (16, 16))
ITEMS = [{"id": f"item “{n}”", "datetime": "2023-01-01T00:00:00Z"} for n in range(50)]
PROVENANCE = {"plan": "p", "collections": {"s2": {"offset_verdicts": {f"i{n}": {"verdict": "no"} for n in range(50)}}}}


def spec(*days: int) -> CubeSpec:
    times = tuple(f"2023-01-{day:02}T00:00:00" for day in days)
    return CubeSpec("s2", "reflectance", (BandSpec("red"),), GRID, times, (), Layout("t", (1, 16, 16), (1, 16, 16)))


def make(path: Path) -> Path:
    create_cube(path, [spec(1)], items={"s2": ITEMS}, provenance=PROVENANCE)
    return path


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(attributes, "_LONG", 1000)
    return make(tmp_path / "packed.zarr")


def test_long_ones_are_compressed_and_short_ones_stay_as_they_are(packed: Path, tmp_path: Path) -> None:
    document = json.loads((packed / "zarr.json").read_text())
    assert document["attributes"]["terrashard"]["provenance"].startswith("zlib,base64:")
    assert json.loads((packed / "s2/zarr.json").read_text())["attributes"]["terrashard"].startswith("zlib,base64:")
    cube = open_cube(packed)
    assert (cube.items("s2"), cube.provenance) == (ITEMS, PROVENANCE)
    assert cube.spec("s2") == spec(1)
    assert cube.dataset("s2").reflectance.shape == (1, 1, 16, 16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attributes, "_LONG", 4 << 20)
        plain = make(tmp_path / "plain.zarr")
    text = (plain / "zarr.json").read_text()
    assert "zlib,base64" not in text
    assert json.loads(text)["attributes"]["terrashard"]["provenance"] == PROVENANCE
    assert open_cube(plain).items("s2") == ITEMS


def test_a_cube_whose_metadata_are_compressed_is_continued_and_grows(packed: Path) -> None:
    make(packed)  # the same cube again
    more = [*ITEMS, {"id": "new", "datetime": "2023-01-02T00:00:00Z"}]
    assert grow_cube(packed, [spec(1, 2)], items={"s2": more}, provenance=PROVENANCE | {"plan": "q"}) > 0
    cube = open_cube(packed)
    assert (cube.items("s2"), cube.provenance["plan"], len(cube.spec("s2").times)) == (more, "q", 2)
    record_provenance(packed, {"plan": "short"})
    assert open_cube(packed).provenance == {"plan": "short"}


def cut(text: str) -> str:
    return text[:-8]


def not_base64(text: str) -> str:
    return text[:40] + "%" + text[41:]


def other_bytes(text: str) -> str:
    return f"zlib,base64:{'AAAA' * 20}"


@pytest.mark.parametrize("spoil", [cut, not_base64, other_bytes])
def test_a_damaged_text_is_refused_by_place(packed: Path, spoil: Any) -> None:
    for path, ask in (
        (packed / "s2/zarr.json", lambda: open_cube(packed).items("s2")),
        (packed / "zarr.json", lambda: open_cube(packed).provenance),
    ):
        before = path.read_text()
        document = json.loads(before)
        found = document["attributes"]["terrashard"]
        if isinstance(found, str):
            document["attributes"]["terrashard"] = spoil(found)
        else:
            found["provenance"] = spoil(found["provenance"])
        path.write_text(json.dumps(document))
        with pytest.raises(IntegrityError, match=r"zarr\.json.*restore the file"):
            ask()
        path.write_text(before)


def test_a_text_that_unpacks_to_too_much_is_refused(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attributes, "_MOST_UNPACKED", 2000)
    with pytest.raises(IntegrityError, match="longer than 2000 bytes"):
        open_cube(packed).items("s2")
