"""Headers beat metadata, pixels beat both."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import rasterio

from ingest.plan.probe import SceneProbe, probe_scenes
from ingest.request.config import IngestConfig
from ingest.scenes.offsets import OffsetReading, read_offset, settle_offset
from ingest.scenes.scene import Scene
from ingest.scenes.search import find_scenes
from zarr_store.errors import InvalidInput

Dn = npt.NDArray[np.uint16]


def land(*, offset: int = 0, side: int = 128, seed: int = 1) -> Dn:
    """Blue reflectance of dark land, 0.02–0.12."""
    rng = np.random.default_rng(seed)
    return (rng.normal(500, 120, (side, side)).clip(120, 1400) + offset).astype(np.uint16)


@pytest.mark.parametrize(
    ("dn", "state"),
    [
        (land(), "subtracted"),
        (land(offset=1000), "raised"),
        (land(offset=3000), "unclear"),  # clouds, with or without the offset
        (np.zeros((128, 128), np.uint16), "unclear"),
        (np.full((128, 128), 65535, np.uint16), "unclear"),
        (land(side=8), "unclear"),  # too few pixels
        (np.where(np.arange(128)[:, None] < 124, land(offset=3000), land()), "unclear"),  # 3 % dark is no proof
    ],
)
def test_what_pixels_say(dn: Dn, state: str) -> None:
    assert read_offset(dn).state == state


def test_smeared_swath_edges_do_not_count() -> None:
    dn = land(offset=1000, side=256)
    dn[:, :100] = 0
    dn[:, 100] = 400  # what a lossy overview makes of the edge
    assert np.mean(dn[dn > 0] < 1000) > 0.005
    assert read_offset(dn).state == "raised"


def scene(**changes: Any) -> Scene:
    base = Scene(
        id="s", collection="sentinel-2-l2a", provider="generic", datetime="2023-08-15T10:00:00Z", assets={}, lacking=(),
        footprint={"type": "Polygon", "coordinates": [[[0, 0], [1, 0], [1, 1], [0, 0]]]}, bbox=(0, 0, 1, 1),
        baseline="05.09", product="sentinel-2-l2a", offset_evidence="test",
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


RAISED, SUBTRACTED = OffsetReading("raised", 0.0, 1100.0, 9999), OffsetReading("subtracted", 0.9, 200.0, 9999)
UNCLEAR = OffsetReading("unclear", 0.0, 3000.0, 9999)


@pytest.mark.parametrize(
    ("metadata", "reading", "policy", "offset", "verdict"),
    [
        (0, SUBTRACTED, "repair", 0, "confirmed"),
        (-1000, RAISED, "repair", -1000, "confirmed"),
        (0, RAISED, "repair", -1000, "repaired"),
        (-1000, SUBTRACTED, "repair", 0, "repaired"),
        (0, RAISED, "warn", 0, "contradicted"),
        (-1000, SUBTRACTED, "warn", -1000, "contradicted"),
        (-1000, UNCLEAR, "fail", -1000, "inconclusive"),
        (0, None, "fail", 0, "unchecked"),
    ],
)
def test_policy_decides_between_metadata_and_pixels(
    metadata: int, reading: OffsetReading | None, policy: str, offset: int, verdict: str
) -> None:
    found = settle_offset(scene(dn_offset=metadata), reading, policy=policy)
    assert found[:2] == (offset, verdict)
    assert (found[2] is not None) == (verdict in ("repaired", "contradicted"))


def test_policy_fail_stops() -> None:
    with pytest.raises(InvalidInput, match=r"scene s: offset: metadata say \+0 .* 1000 is still in them"):
        settle_offset(scene(), RAISED, policy="fail")
    unknown = scene(baseline=None, offset_evidence="nothing states the offset (unknown baseline)")
    with pytest.raises(InvalidInput, match="pixels do not tell"):
        settle_offset(unknown, UNCLEAR, policy="fail")
    assert settle_offset(unknown, UNCLEAR, policy="warn")[2] is not None
    assert settle_offset(unknown, RAISED, policy="repair")[:2] == (-1000, "repaired")


def test_before_baseline_04_bright_ground_is_not_an_offset() -> None:
    assert settle_offset(scene(baseline="02.14"), RAISED, policy="fail")[:2] == (0, "inconclusive")


@pytest.mark.real_data
def test_zagreb_headers_and_pixels(zagreb: Path) -> None:
    config = IngestConfig(bands=("blue", "red", "scl"), datetime="2023-08-13/2023-08-15")
    scenes = find_scenes(str(zagreb), config).scenes
    probes = probe_scenes(scenes, config)
    assert set(probes) == {s.key for s in scenes}
    for probe in probes.values():
        assert (probe.verdict, probe.dn_offset) == ("confirmed", 0)
        assert probe.share_below_1000 is not None
        assert probe.share_below_1000 > 0.9
        for band in ("blue", "red", "scl"):
            grid = probe.assets[band].grid
            assert grid is not None
            assert (grid.shape, grid.resolution) == ((915, 915), (120, 120))
        said = "\n".join(probe.discrepancies)
        assert "blue, red: item says EPSG:32633 10980×10980 px at 10, file is EPSG:32633 915×915 px at 120" in said
        assert "scl: item says EPSG:32633 5490×5490 px at 20" in said
        assert SceneProbe.from_dict(json.loads(json.dumps(probe.to_dict()))) == probe


@pytest.mark.real_data
def test_real_pixels_without_items(shared_data: Path) -> None:
    for name in ("T48QUE", "T33NZA"):
        path = next((shared_data / "scenes" / "major_tom").rglob(f"*{name}*/B02.tif"))
        with rasterio.open(path) as dataset:
            reading = read_offset(dataset.read(1))
        # the second is cloudy and carries the offset: its darkest percent is far above 1600, so nothing is claimed
        assert reading.state == ("subtracted" if name == "T48QUE" else "unclear")
        assert reading.share_below_1000 is not None
        assert (reading.share_below_1000 == 0) == (name == "T33NZA")


def write_tif(path: Path, dn: npt.NDArray[Any], *, origin: tuple[float, float] = (500_000, 5_200_000)) -> None:
    with rasterio.open(
        path, "w", driver="GTiff", height=dn.shape[0], width=dn.shape[1], count=1, dtype=dn.dtype, nodata=0,
        crs="EPSG:32633", transform=rasterio.Affine(10, 0, origin[0], 0, -10, origin[1]),
    ) as dataset:  # fmt: skip
        dataset.write(dn, 1)


@pytest.fixture
def lying(tmp_path: Path, make_item: Callable[..., Any]) -> Callable[..., list[Scene]]:
    """Scenes of one item whose files exist; the item says what it likes."""

    def make(
        dn: Dn,
        bands: str = "blue,red,scl",
        *,
        origin: tuple[float, float] = (500_000, 5_200_000),
        **properties: Any,
    ) -> list[Scene]:
        item = make_item(**properties)
        write_tif(tmp_path / "B02.tif", dn, origin=origin)
        write_tif(tmp_path / "B04.tif", dn, origin=origin)
        write_tif(tmp_path / "SCL.tif", np.full(dn.shape, 4, np.uint8), origin=origin)
        (tmp_path / "item.json").write_text(json.dumps(item))
        return list(find_scenes(str(tmp_path / "item.json"), IngestConfig(bands=bands)).scenes)

    return make


def test_a_lying_flag_is_repaired_per_item(lying: Callable[..., list[Scene]]) -> None:
    scenes = lying(land(offset=1000), earthsearch__boa_offset_applied=True)
    probe = probe_scenes(scenes, IngestConfig())[scenes[0].key]
    assert (scenes[0].dn_offset, probe.dn_offset, probe.verdict) == (0, -1000, "repaired")
    assert "boa_offset_applied is true" in probe.discrepancies[-1]
    scenes = lying(land(), s2__processing_baseline="05.09")
    probe = probe_scenes(scenes, IngestConfig())[scenes[0].key]
    assert (scenes[0].dn_offset, probe.dn_offset, probe.verdict) == (-1000, 0, "repaired")


def test_unreadable_files_are_said_and_the_rest_goes_on(lying: Callable[..., list[Scene]], tmp_path: Path) -> None:
    scenes = lying(land())
    (tmp_path / "B04.tif").write_bytes(b"<html>log in</html>")
    (tmp_path / "SCL.tif").unlink()
    probe = probe_scenes(scenes, IngestConfig(retries=0))[scenes[0].key]
    assert probe.assets["blue"].error is None
    assert probe.verdict == "repaired"
    assert "not a TIFF" in (probe.assets["red"].error or "")
    assert probe.assets["scl"].error
    assert any(text.startswith("red: ") and "not a TIFF" in text for text in probe.discrepancies)


def test_files_that_lie_elsewhere_are_said(lying: Callable[..., list[Scene]]) -> None:
    scenes = lying(land(), origin=(500_000, 2_000_000))
    probe = probe_scenes(scenes, IngestConfig())[scenes[0].key]
    assert any("outside the item's footprint" in text for text in probe.discrepancies)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (land() // 300 + 1, "the scale seems to be applied already"),
        (land().astype(np.uint32) * 30 + 16_000, "another scale"),
    ],
)
def test_s17_values_that_are_no_reflectance_are_said(
    lying: Callable[..., list[Scene]], values: npt.NDArray[Any], says: str
) -> None:
    scenes = lying(values.clip(0, 65534).astype(np.uint16))
    probe = probe_scenes(scenes, IngestConfig())[scenes[0].key]
    assert any(text.startswith("blue: ") and says in text for text in probe.discrepancies)
    with pytest.raises(InvalidInput, match=says):
        probe_scenes(scenes, IngestConfig(strict=True))
    for usual in (land(), land(offset=1000), land(offset=9000)):
        assert not any("scale" in t for t in probe_scenes(lying(usual), IngestConfig())[scenes[0].key].discrepancies)


def test_other_types_and_nodata_are_said(lying: Callable[..., list[Scene]], tmp_path: Path) -> None:
    scenes = lying(land(), bands="blue")
    write_tif(tmp_path / "B02.tif", land().astype(np.int32))
    probe = probe_scenes(scenes, IngestConfig(mask="none"))[scenes[0].key]
    assert any("item says uint16, file holds int32" in text for text in probe.discrepancies)
    assert probe.assets["blue"].size_bytes == (tmp_path / "B02.tif").stat().st_size


def test_a_large_raster_without_overviews_is_sampled_in_windows(tmp_path: Path) -> None:
    from ingest.plan.sample import read_sample

    path = tmp_path / "large.tif"
    profile = {"driver": "GTiff", "height": 3000, "width": 3000, "count": 1, "dtype": "uint16", "tiled": True,
               "crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 0, 0, -10, 0)}  # fmt: skip
    with rasterio.open(path, "w", **profile) as dataset:
        dataset.write(land(side=3000), 1)
    with rasterio.open(path) as dataset:
        sample = read_sample(dataset, closely=True)
        assert [part.shape for part in sample.windows] == [(170, 170)] * 9
        assert sample.reading.state == "subtracted"


def test_class_layers_and_radar_are_never_asked(lying: Callable[..., list[Scene]]) -> None:
    scenes = lying(land())
    radar = dataclasses.replace(scenes[0], product="sentinel-1-rtc")
    assert probe_scenes([radar], IngestConfig())[radar.key].verdict == "unchecked"
    only_nir = dataclasses.replace(scenes[0], assets={"scl": scenes[0].assets["scl"]})
    assert probe_scenes([only_nir], IngestConfig())[only_nir.key].verdict == "unchecked"
