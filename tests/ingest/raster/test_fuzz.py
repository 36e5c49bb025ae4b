"""Damaged files: an error, or the pixels that GDAL reads; no crash, no hang, no memory bomb, no other exception.

`TERRASHARD_FUZZ=20000` tries as many rasters, and a quarter as many documents.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ingest.raster import blocks

from ..fuzz import AUX, Finding, campaign, check_raster
from ..fuzz_files import good_files, hostile_files, moved_table, mutated, scene, tiff, tiles

RASTERS = 1500
DOCUMENTS = 1500
LONG = int(os.environ.get("TERRASHARD_FUZZ", "0"))
READ_AS_GDAL_DOES = (
    "bits-reversed", "deep-tiles", "upside-down", "predictor-unpacked", "predictor-twice", "predictor-behind-all",
    "predictor-of-one-byte", "predictor-of-two-values", "predictor-signed", "signed", "void", "half-floats",
    "metadata-compression", "metadata-predictor", "metadata-bits", "next-is-itself", "sub-directory-is-itself",
    "strips-and-tiles", "tile-of-100", "offsets-all-one", "planar-2",
)  # fmt: skip
"""Odd files that GDAL reads; it may."""


def put(folder: Path, data: bytes) -> Path:
    path = folder / "file.tif"
    path.write_bytes(data)
    path.with_name("file.tif.aux.xml").write_text(AUX)
    return path


@pytest.mark.parametrize("name", good_files())
def test_intact_files_are_read_as_gdal_reads_them(tmp_path: Path, name: str) -> None:
    assert check_raster(put(tmp_path, good_files()[name])) == "read"


@pytest.mark.parametrize("name", hostile_files())
def test_files_that_lie_are_errors_or_read_as_gdal_reads_them(tmp_path: Path, name: str) -> None:
    outcome = check_raster(put(tmp_path, hostile_files()[name]))
    if name in READ_AS_GDAL_DOES:
        assert outcome == "read"
    if name.endswith("-cut") or "-cut-" in name or name.startswith("predictor-0"):
        assert outcome == "error", "what is cut short, or refused by GDAL, has no pixels"
    if name in ("offsets-0", "offsets-signed", "offsets-on-the-header"):
        assert outcome == "error", "GDAL gives the first bytes of the file as pixels"


@pytest.mark.parametrize("start", [0, 4])
def test_blocks_on_the_header_are_errors(tmp_path: Path, start: int) -> None:
    """GDAL gives the signature of the file as pixels."""
    packed = tiles(scene("uint16"))
    assert check_raster(put(tmp_path, tiff(packed, {324: [start] * len(packed)}))) == "error"


@pytest.mark.parametrize("what", [(273, 324), (279, 325)], ids=["places", "sizes"])
@pytest.mark.parametrize(
    "name", ["strips-none", "strips-deflate", "tiles-packbits-uint16", "big-zstd", "mm-zstd", "cog-deflate", "nodata"]
)
def test_tables_of_blocks_that_cannot_be_read_are_errors(tmp_path: Path, name: str, what: tuple[int, int]) -> None:
    """Whoever has asked GDAL for the places of blocks then gets zeros, or other bytes of the file, as pixels."""
    data = good_files()[name]
    assert check_raster(put(tmp_path, data)) == "read"
    for place in (len(data) - 4, len(data) + 100, 0x7FFFFFFF):
        assert check_raster(put(tmp_path, moved_table(data, what, place))) == "error"
    for kind in (0, 2, 5, 6, 8, 10, 12, 13, 255):
        assert check_raster(put(tmp_path, moved_table(data, what, kind=kind))) == "error"


def test_damaged_rasters() -> None:
    report = campaign("rasters", 0, LONG or RASTERS)
    assert report.files == (LONG or RASTERS)
    assert not report.findings, "\n".join(f"file {number}: {what}" for number, what in report.findings)
    assert report.outcomes["read"] > report.files / 20, "hardly a file was read, so hardly one was compared"
    assert report.outcomes["error"] > report.files / 20


def test_damaged_documents() -> None:
    count = LONG // 4 or DOCUMENTS
    report = campaign("documents", 0, count)
    assert report.files == count
    assert not report.findings, "\n".join(f"document {number}: {what}" for number, what in report.findings)
    assert report.outcomes["read"] > count / 20
    assert report.outcomes["error"] > count / 20


@pytest.mark.parametrize(
    ("what", "says"),
    [("crash", "ended with -6"), ("hang", "no end after 1 s"), ("bomb", "it took"), ("raise", "KeyError")],
)
def test_the_search_finds_and_survives(what: str, says: str) -> None:
    report = campaign(f"test-{what}", 0, 7, most_s=1)
    assert report.files == 7
    assert report.outcomes == {"read": 6, "finding": 1}
    ((number, told),) = report.findings
    assert number == 3
    assert says in told


def test_other_pixels_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(blocks._UNPREDICT, ("u", "2"), None)
    with pytest.raises(Finding, match=r"pixels of .* are not GDAL's"):
        check_raster(put(tmp_path, good_files()["tiles-zstd-uint16-2"]))


def test_a_file_is_had_again_by_its_number() -> None:
    assert mutated(17) == mutated(17)
    assert mutated(17) != mutated(18)
