"""A JPEG 2000 header may claim no more tiles than its file can hold."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from ingest.raster.access import with_asset
from ingest.raster.codestream import count_tiles
from zarr_store.errors import AssetUnreadable

from ..fuzz_files import good_files, scene


def read(path: Path) -> np.ndarray:
    return np.asarray(with_asset(str(path), lambda dataset: dataset.read(1), scene="s", asset="red"))


def test_a_header_that_claims_more_tiles_than_fit_is_refused_before_gdal_opens_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = good_files()["jp2-uint16"]
    path = tmp_path / "a.jp2"
    path.write_bytes(whole)
    np.testing.assert_array_equal(read(path), scene("uint16"))
    at = whole.index(b"\xff\x4f\xff\x51") + 8  # Xsiz, behind the markers, the length and the capabilities
    rows = struct.pack(">I", 786_582)
    path.unlink()
    path.write_bytes(whole[: at + 4] + rows + whole[at + 8 :])
    claimed = count_tiles(path.read_bytes())
    assert claimed is not None
    assert claimed > len(whole) // 14
    monkeypatch.setattr("ingest.raster.access.open_raster", lambda *_, **__: pytest.fail("GDAL opened it"))
    with pytest.raises(AssetUnreadable, match=f"claims {claimed} tiles"):
        read(path)


def test_what_holds_no_codestream_is_left_to_gdal() -> None:
    assert count_tiles(b"\x00\x00\x00\x0cjP  \r\n\x87\n" + b"x" * 100) is None
    assert count_tiles(b"\xff\x4f\xff\x51\x00") is None
