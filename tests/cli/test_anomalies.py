"""Commands that plant, find and date what is unusual: their files, and one line for what they cannot use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import shapely

from ingest.request.parquet import open_geoparquet
from zarr_store import BandSpec, CubeSpec, Grid, Layout, ShardWriter, create_cube

from .conftest import Outcome

TINY = ("--set", "tiles=1", "--set", "tile_px=64", "--set", "overlap_px=0", "--set", "block_px=128",
        "--set", "dates=['2022-06-16']", "--set", "radar_dates=[]")  # fmt: skip


def test_simulate_plants_what_a_file_lists(run: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "planted.toml").write_text('[[anomaly]]\nkind = "cloud"\ndate = 2022-06-16\nsize_m = 80\n')
    done = run("simulate", tmp_path / "world", "--anomalies", tmp_path / "planted.toml", *TINY, "--json")
    assert done.code == 0, done.err
    assert Path(done.json["anomalies"]).is_file()
    assert (tmp_path / "world/anomalies.tif").is_file()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[[anomalies]]\nkind = "cloud"\n', "expected tables [[anomaly]]"),
        ('[[anomaly]]\nkind = "crater"\ndate = 2022-06-16\n', "anomalies.0.kind"),
        ('[[anomaly]]\nkind = "cloud"\ndate = 2022-06-17\n', "is not one of the dates"),
    ],
)
def test_simulate_refuses_a_file_in_one_line_and_writes_nothing(
    run: Callable[..., Outcome], tmp_path: Path, text: str, words: str
) -> None:
    (tmp_path / "planted.toml").write_text(text)
    done = run("simulate", tmp_path / "world", "--anomalies", tmp_path / "planted.toml", *TINY)
    assert done.code == 2
    assert words in done.error_line()
    assert [path.name for path in tmp_path.iterdir()] == ["planted.toml"]


@pytest.fixture(scope="module")
def cubes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cubes of 64² pixels: `plain` has two bands of noise and one odd pixel on three dates; `same` two equal bands;
    `masked` nothing clear; `empty` a band without numbers; `single` one date.
    """
    folder = tmp_path_factory.mktemp("cubes")
    grid = Grid("EPSG:32633", (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_000_000.0), (64, 64))
    times = tuple(f"2023-0{month}-01T10:00:00" for month in (4, 6, 8))
    rng = np.random.default_rng(0)
    for name, dates, status in (("plain", 3, 1), ("same", 1, 1), ("masked", 1, 2), ("single", 1, 1)):
        spec = CubeSpec("s2", "reflectance", (BandSpec("red", scale=1e-4), BandSpec("nir", scale=1e-4)), grid,
                        times[:dates], layout=Layout("tiny", (1, 32, 32), (1, 64, 64)))  # fmt: skip
        create_cube(folder / name, [spec], items={"s2": [{"id": "i"}]}, provenance={})
        for region in spec.shards().values():
            image = rng.normal(2000, 100, (1, 2, 64, 64)).astype(np.uint16)
            if name == "same":
                image[:, 1] = image[:, 0]
            if region.t1 == dates:
                image[:, :, 40, 20] = 9000
            arrays: dict[str, Any] = {"reflectance": image, "status": np.full((1, 64, 64), status, np.uint8),
                                      "source_item": np.zeros((1, 64, 64), np.int16)}  # fmt: skip
            ShardWriter(folder / name, "s2").write(region, arrays, key="k", sources=())
    spec = CubeSpec("s1", "backscatter", (BandSpec("vv", nodata=None), BandSpec("vh", nodata=None)), grid, times[:1],
                    layout=Layout("tiny", (1, 32, 32), (1, 64, 64)))  # fmt: skip
    create_cube(folder / "empty", [spec], items={"s1": [{"id": "i"}]}, provenance={})
    power = rng.gamma(4.4, 0.02, (1, 2, 64, 64)).astype(np.float32)
    power[:, 1] = np.nan
    ShardWriter(folder / "empty", "s1").write(
        spec.shards()[0, 0, 0], {"backscatter": power, "status": np.ones((1, 64, 64), np.uint8),
                                 "source_item": np.zeros((1, 64, 64), np.int16)}, key="k", sources=())  # fmt: skip
    return folder


def test_anomaly_writes_scores_mask_table_and_pictures(
    run: Callable[..., Outcome], cubes: Path, tmp_path: Path
) -> None:
    done = run("anomaly", cubes / "plain", tmp_path / "out", "--dates", "change", "--threshold", "chi2",
               "--false-alarms", "1e-6", "--json")  # fmt: skip
    assert done.code == 0, done.err
    found = done.json
    assert {"method", "threshold", "flagged", "places", "seconds"} <= set(found)
    assert (found["method"], found["flagged"], len(found["places"])) == ("rx", 1, 1)
    place = found["places"][0]
    assert {"x", "y", "lon", "lat", "date", "score", "pixels"} <= set(place)
    assert (place["x"], place["y"], place["date"]) == (500_205.0, 4_999_595.0, "2023-08-01")
    assert place["area_m2"] == 100.0
    out = tmp_path / "out"
    with open_geoparquet(out / "places.parquet") as file:
        outlines, thumbnails = file.read("thumbnail")
        assert file.crs is not None
    assert shapely.from_wkb(outlines[0]).bounds == (500_200.0, 4_999_590.0, 500_210.0, 4_999_600.0)
    assert thumbnails is not None
    assert bytes(thumbnails[0]).startswith(b"\x89PNG")
    with rasterio.open(out / "mask.tif") as cog:
        assert np.argwhere(cog.read(1) == 1).tolist() == [[40, 20]]
    with rasterio.open(out / "score.tif") as cog:
        assert cog.read(1).max() == pytest.approx(place["score"])
    assert (out / "quicklook.png").read_bytes().startswith(b"\x89PNG")
    assert "thumbnail" not in (out / "gallery.html").read_text().split("<figure>")[0]
    assert not [path for path in tmp_path.iterdir() if path.name != "out"]


@pytest.mark.parametrize(
    ("cube", "options", "code", "words"),
    [
        ("same", [], 2, "red, nir depend on each other"),
        ("masked", [], 4, "has no observed pixel"),
        ("empty", [], 2, "vh holds no number anywhere"),
        ("single", ["--dates", "change"], 2, "compares the last date with those before it"),
        ("plain", ["--bands", "blue"], 2, "unknown band 'blue'"),
        ("plain", ["--false-alarms", "1e-5"], 2, "needs 1,000,000 held-out rows"),
        ("plain", ["--false-alarms", "0.7"], 2, "expected a share above 0 and below 0.5"),
        ("plain", ["--shrinkage", "some"], 2, "expected a share from 0 to 1, or auto"),
        ("plain", ["--method", "local-rx", "--windows", "4,9"], 2, "expected two odd numbers"),
        ("plain", ["--method", "local-rx", "--windows", "1,2,3"], 2, "expected two odd numbers"),
        ("plain", ["--method", "autoencoder"], 2, "needs --run RUN"),
        ("plain", ["--method", "embedding"], 2, "give vectors of `terrashard embed`"),
        ("plain", ["--run", "somewhere"], 2, "--run is for the methods autoencoder and embedding"),
        ("plain", ["--method", "isolation", "--threshold", "chi2"], 2, "is for scores of RX"),
        ("nothing", [], 2, "nothing"),
    ],
)
def test_anomaly_refuses_in_one_line_and_leaves_nothing(
    run: Callable[..., Outcome], cubes: Path, tmp_path: Path, cube: str, options: list[object], code: int, words: str
) -> None:
    done = run("anomaly", cubes / cube, tmp_path / "out", *options)
    assert done.code == code, done.err
    assert words in done.error_line()
    assert not list(tmp_path.iterdir())


def test_anomaly_replaces_its_own_result_and_nothing_else(
    run: Callable[..., Outcome], cubes: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    done = run("anomaly", cubes / "plain", tmp_path / "mine", "--threshold", "chi2")
    assert done.code == 2
    assert "is not a result of `terrashard anomaly`" in done.error_line()
    assert (tmp_path / "mine/thesis.txt").read_text() == "years of work"


def test_change_writes_dates_magnitudes_and_kinds(run: Callable[..., Outcome], tmp_path: Path) -> None:
    days = np.arange(18_000, 18_000 + 40 * 25, 25)
    times = tuple(str(np.datetime64(int(day), "D").astype("datetime64[s]")) for day in days)
    grid = Grid("EPSG:32633", (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_000_000.0), (8, 16))
    spec = CubeSpec("s2", "reflectance", (BandSpec("red", scale=1e-4), BandSpec("nir", scale=1e-4)), grid, times,
                    layout=Layout("series", (40, 8, 16), (40, 8, 16)))  # fmt: skip
    create_cube(tmp_path / "cube", [spec], items={"s2": [{"id": "i"}]}, provenance={})
    image = np.random.default_rng(0).normal([[[[500]], [[3000]]]], 30, (40, 2, 8, 16))
    image[27:, :, :, :5] = np.random.default_rng(1).normal([[[[1500]], [[1800]]]], 30, (13, 2, 8, 5))
    arrays: dict[str, Any] = {"reflectance": image.astype(np.uint16), "status": np.ones((40, 8, 16), np.uint8),
                              "source_item": np.zeros((40, 8, 16), np.int16)}  # fmt: skip
    ShardWriter(tmp_path / "cube", "s2").write(spec.shards()[0, 0, 0], arrays, key="k", sources=())
    done = run("change", tmp_path / "cube", tmp_path / "out", "--harmonics", 1, "--json")
    assert done.code == 0, done.err
    assert {"breaks", "seconds"} <= set(done.json)
    assert done.json["kinds"]["vegetation loss"] == 40
    assert done.json["breaks"] < 46  # few of the pixels that did not change
    day = np.datetime64(int(days[27]), "D")
    with rasterio.open(tmp_path / "out/break_date.tif") as cog:
        # one in a hundred dates before the break lies outside the limit by chance, and is then its first
        assert (cog.read(1)[:, :5] == int(str(day).replace("-", ""))).mean() >= 0.9
    with rasterio.open(tmp_path / "out/kind.tif") as cog:
        assert (cog.read(1)[:, :5] == 1).mean() >= 0.9
    assert (tmp_path / "out/quicklook.png").read_bytes().startswith(b"\x89PNG")
    assert sum(done.json["years"].values()) == done.json["breaks"]
    refused = run("change", tmp_path / "cube", tmp_path / "no", "--time", "0,1,2")
    assert refused.code == 2
    assert "has 3 dates; a model of 2 harmonics needs 18 clear ones" in refused.error_line()
    assert not (tmp_path / "no").exists()
