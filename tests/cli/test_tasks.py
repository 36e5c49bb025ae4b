"""Commands that need no labels: what they write, and one line for what they cannot use, with nothing half-written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio

from jaxtrain.inference.maps import open_map
from zarr_store import BandSpec, CubeSpec, Grid, Layout, ShardWriter, create_cube

from .conftest import Outcome


@pytest.fixture(scope="module")
def cubes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cubes of 64² pixels on three dates: `two` has two spectra, `masked` nothing clear, `empty` a band of NaN."""
    folder = tmp_path_factory.mktemp("cubes")
    grid = Grid("EPSG:32633", (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_000_000.0), (64, 64))
    times = tuple(f"2023-0{month}-01T10:00:00" for month in (4, 6, 8))
    for name, status in (("two", 1), ("masked", 2)):
        spec = CubeSpec("s2", "reflectance", (BandSpec("red", scale=1e-4), BandSpec("nir", scale=1e-4)), grid, times,
                        layout=Layout("tiny", (1, 32, 32), (1, 64, 64)))  # fmt: skip
        create_cube(folder / name, [spec], items={"s2": [{"id": "i"}]}, provenance={})
        image = np.where(np.arange(64) < 20, 500, 3000).astype(np.uint16) * np.ones((1, 2, 64, 1), np.uint16)
        for region in spec.shards().values():
            arrays: dict[str, Any] = {"reflectance": image, "status": np.full((1, 64, 64), status, np.uint8),
                      "source_item": np.zeros((1, 64, 64), np.int16)}  # fmt: skip
            ShardWriter(folder / name, "s2").write(region, arrays, key="k", sources=())
    spec = CubeSpec("s1", "backscatter", (BandSpec("vv", nodata=None), BandSpec("vh", nodata=None)), grid, times[:1],
                    layout=Layout("tiny", (1, 32, 32), (1, 64, 64)))  # fmt: skip
    create_cube(folder / "empty", [spec], items={"s1": [{"id": "i"}]}, provenance={})
    power = np.random.default_rng(0).gamma(4.4, 0.02, (1, 2, 64, 64)).astype(np.float32)
    power[:, 1] = np.nan
    ShardWriter(folder / "empty", "s1").write(
        spec.shards()[0, 0, 0], {"backscatter": power, "status": np.ones((1, 64, 64), np.uint8),
                                 "source_item": np.zeros((1, 64, 64), np.int16)}, key="k", sources=())  # fmt: skip
    return folder


def test_kmeans_writes_map_picture_table_and_model(run: Callable[..., Outcome], cubes: Path, tmp_path: Path) -> None:
    done = run("kmeans", cubes / "two", tmp_path / "out", "-k", 2, "--json")
    assert done.code == 0, done.err
    found = done.json
    assert {"k", "inertia", "iterations", "sizes", "centres", "seconds", "pixels"} <= set(found)
    assert found["sizes"] == [44 * 64, 20 * 64]
    np.testing.assert_allclose(found["centres"], [[0.3, 0.3], [0.05, 0.05]], rtol=1e-5)
    assert found["area_m2"] == [44 * 64 * 100.0, 20 * 64 * 100.0]
    labels = open_map(tmp_path / "out/clusters.zarr").read()
    np.testing.assert_array_equal(labels, np.where(np.arange(64) < 20, 1, 0) * np.ones((64, 1), int))
    with rasterio.open(tmp_path / "out/clusters.tif") as cog:
        np.testing.assert_array_equal(cog.read(1), labels)
        assert cog.crs.to_epsg() == 32633
        assert cog.colormap(1)[0] != cog.colormap(1)[1]
    for picture in ("quicklook.png", "clusters.png"):
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")
    table = json.loads((tmp_path / "out/clusters.json").read_text())["clusters"]
    assert list(table[0]["season"]) == ["2023-04-01T10:00:00", "2023-06-01T10:00:00", "2023-08-01T10:00:00"]
    assert table[0]["season"]["2023-06-01T10:00:00"]["nir"] == pytest.approx(0.3)
    assert not [path for path in tmp_path.iterdir() if path.name != "out"]


@pytest.mark.parametrize(
    ("cube", "options", "code", "words"),
    [
        ("two", ["-k", 3], 2, "has 2 distinct rows of 4,096"),
        ("two", ["-k", "2..300"], 2, "expected numbers from 2 to 254"),
        ("two", ["-k", "many"], 2, "expected a number such as 8"),
        ("two", ["--bands", "blue"], 2, "unknown band 'blue'"),
        ("two", ["--time", "2021"], 2, "unknown time '2021'"),
        ("two", ["--pca", 5], 2, "has 2 features"),
        ("two", ["--memory", "much"], 2, "expected a size such as 4GB"),
        ("two", ["--dask", "nowhere"], 2, "expected the address of a scheduler"),
        ("two", ["--model", "nothing"], 2, "expected a result of `terrashard kmeans`"),
        ("masked", [], 4, "has no observed pixel"),
        ("empty", ["-k", 2], 2, "vh holds no number anywhere"),
        ("absent", [], 2, "does not exist"),
    ],
)
def test_kmeans_refuses_in_one_line_and_leaves_nothing(
    run: Callable[..., Outcome], cubes: Path, tmp_path: Path, cube: str, options: list[object], code: int, words: str
) -> None:
    done = run("kmeans", cubes / cube, tmp_path / "out", *options)
    assert done.code == code, done.err
    assert words in done.error_line()
    assert not list(tmp_path.iterdir())


def test_kmeans_replaces_its_own_result_and_nothing_else(
    run: Callable[..., Outcome], cubes: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    done = run("kmeans", cubes / "two", mine, "-k", 2)
    assert done.code == 2
    assert "is not a result of `terrashard kmeans`" in done.error_line()
    assert (mine / "thesis.txt").read_text() == "years of work"


def test_pca_writes_components_of_each_pixel(run: Callable[..., Outcome], cubes: Path, tmp_path: Path) -> None:
    done = run("pca", cubes / "two", tmp_path / "out", "-n", 1, "--json")
    assert done.code == 0, done.err
    assert done.json["ratio"] == pytest.approx([1.0])
    assert done.json["vectors"] == [pytest.approx([0.5**0.5, 0.5**0.5])]
    with rasterio.open(tmp_path / "out/components.tif") as cog:
        scores = cog.read(1)
        assert cog.crs.to_epsg() == 32633
    np.testing.assert_allclose(scores[0, 30] - scores[0, 10], 0.25 * 2**0.5, rtol=1e-5)
    assert (tmp_path / "out/quicklook.png").exists()
    refused = run("pca", cubes / "two", tmp_path / "no", "-n", 3)
    assert refused.code == 2
    assert "has 2 features" in refused.error_line()
    assert not (tmp_path / "no").exists()
