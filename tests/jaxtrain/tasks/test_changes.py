"""Breaks of harmonic models: planted ones are found at their date, quiet pixels have none, and runs continue."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import zarr

from jaxtrain.tasks import changes, cube_reader
from jaxtrain.tasks.changes import ChangeOptions, find_changes
from jaxtrain.tasks.harmonic import HarmonicModel, detect_breaks
from jaxtrain.tasks.work import LocalWorkers, keep_blocks
from zarr_store.create import create_cube
from zarr_store.errors import InvalidInput, NothingFound, Preempted
from zarr_store.grid import Grid
from zarr_store.spec import BandSpec, CubeSpec, Layout
from zarr_store.write import ShardWriter

MODEL = HarmonicModel(harmonics=1)
DATES = 60


def series(pixels: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Days, values (time, band, pixel) with gaps and missed clouds, and the day of the planted break or nan."""
    rng = np.random.default_rng(seed)
    days = np.sort(rng.choice(np.arange(0, 4 * 365), DATES, replace=False)).astype(float) + 18_000
    turn = 2 * np.pi / 365.2425 * days[:, None, None]
    size = (2, pixels)
    values = rng.uniform(0.1, 0.3, size) + rng.uniform(0.02, 0.06, size) * np.cos(turn + rng.uniform(-0.3, 0.3, size))
    values = values + rng.normal(0, 0.008, (DATES, *size))
    broken = np.full(pixels, np.nan)
    broken[: pixels // 2] = days[0] + rng.uniform(700, 1000, pixels // 2)
    values += np.where((days[:, None] >= broken)[:, None], np.array([0.12, -0.1])[:, None], 0.0)
    values[:, :, ::7] += np.where(rng.random((DATES, 1, 1)) < 0.03, 0.5, 0.0)  # clouds that no mask shows
    values = np.where((rng.random((DATES, pixels)) < 0.85)[:, None], values, np.nan)
    return days, values.astype(np.float32), broken


@pytest.fixture(scope="module")
def found() -> tuple[Any, np.ndarray, np.ndarray, np.ndarray]:
    days, values, broken = series(400)
    return detect_breaks(days, values, MODEL), days, values, broken


def test_planted_breaks_are_dated_by_the_first_clear_observation_after_them(found: Any) -> None:
    breaks, days, values, broken = found
    assert breaks.fitted.mean() > 0.97
    first = np.array([
        days[(days >= day) & np.isfinite(values[:, 0, n])][0] for n, day in enumerate(broken[:200])
    ])  # fmt: skip
    near = np.abs(breaks.day[:, :200] - first).min(axis=0, initial=np.inf, where=np.isfinite(breaks.day[:, :200]))
    assert (near <= 31).mean() > 0.9
    assert (breaks.count[200:] > 0).mean() < 0.05


def test_magnitude_and_change_are_those_that_were_planted(found: Any) -> None:
    breaks, *_ = found
    change = breaks.change[0, :, :200]
    np.testing.assert_allclose(np.nanmedian(change, axis=1), [0.12, -0.1], atol=0.02)
    assert np.nanmedian(breaks.magnitude[0]) > 5
    assert np.isnan(breaks.change[0][:, breaks.count == 0]).all()


def test_too_few_clear_observations_have_no_model() -> None:
    days, values, _ = series(8, seed=1)
    values[::2] = np.nan
    values[: DATES - 20] = np.nan  # fewer than the model needs are left
    breaks = detect_breaks(days, values, MODEL)
    assert not breaks.fitted.any()
    assert not breaks.count.any()


def make_series_cube(url: Path, *, dates: int = DATES, seed: int = 0, clear: bool = True) -> np.ndarray:
    """A cube of 32² pixels whose left half has a planted break; returns the days of the breaks."""
    days, values, broken = series(1024, seed)
    days, values = days[:dates], values[:dates].reshape(-1, 2, 32, 32)
    times = tuple(str((np.datetime64(int(day), "D")).astype("datetime64[s]")) for day in days)
    grid = Grid("EPSG:32633", (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_000_000.0), (32, 32))
    spec = CubeSpec("s2", "reflectance", (BandSpec("red", scale=1e-4), BandSpec("nir", scale=1e-4)), grid, times,
                    layout=Layout("series", (dates, 16, 16), (dates, 16, 32)))  # fmt: skip
    create_cube(url, [spec], items={"s2": [{"id": "i"}]}, provenance={})
    seen = np.isfinite(values).all(axis=1)
    stored = np.clip(np.nan_to_num(values) * 1e4, 1, 65535).astype(np.uint16)
    status = np.where(seen, 1 if clear else 2, 2).astype(np.uint8)
    for region in spec.shards().values():
        t, y, x = region.slices
        arrays = {"reflectance": stored[t, :, y, x], "status": status[t, y, x],
                  "source_item": np.zeros(region.shape, np.int16)}  # fmt: skip
        ShardWriter(url, "s2").write(region, arrays, key="k", sources=())
    return broken.reshape(32, 32)


@pytest.fixture(autouse=True)
def _small_boxes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cube_reader, "_MOST_VALUES", 1)
    keep_blocks(1 << 20)
    yield
    keep_blocks(0)


OPTIONS = ChangeOptions(harmonics=1)


@pytest.fixture(scope="module")
def cube(tmp_path_factory: pytest.TempPathFactory) -> Path:
    url = tmp_path_factory.mktemp("series") / "cube.zarr"
    make_series_cube(url)
    return url


@pytest.fixture(scope="module")
def reference(cube: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Changes of one device and one thread, in one go."""
    out = tmp_path_factory.mktemp("reference") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cube_reader, "_MOST_VALUES", 1)
        first = jax.local_devices()[:1]
        patch.setattr(jax, "local_devices", lambda: first)
        find_changes(cube, out, OPTIONS, workers=LocalWorkers(1))
    return out


def files(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def test_the_layers_show_where_and_when_the_cube_changed(reference: Path) -> None:
    made = zarr.open_group(str(reference / "change.zarr"), mode="r")
    date, kind, count = (np.asarray(made[name]) for name in ("break_date", "kind", "count"))
    changed = count[:16] > 0  # the first half of the pixels
    assert changed.mean() > 0.9
    assert (count[16:] > 0).mean() < 0.1
    assert (kind[0, :16][changed] == 1).mean() > 0.95  # red rises and near infrared falls
    assert (date[0, :16][changed] > 18_600).mean() > 0.95
    assert (kind[date == 0] == 0).all()


def test_a_run_that_was_stopped_continues_and_gives_the_same_bytes(
    cube: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(name: str) -> None:
        if name == "change block written 1":
            raise Preempted("stopped")

    monkeypatch.setattr(changes, "crashpoint", die)
    with pytest.raises(Preempted):
        find_changes(cube, tmp_path / "out", OPTIONS, workers=LocalWorkers(2))
    assert not (tmp_path / "out").exists()
    passed: list[str] = []
    monkeypatch.setattr(changes, "crashpoint", passed.append)
    find_changes(cube, tmp_path / "out", OPTIONS, workers=LocalWorkers(2))
    assert passed[0] == "change block written 1"
    assert files(tmp_path / "out") == files(reference)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_break_after_noon_is_dated_by_the_day_of_its_observation() -> None:
    times = np.datetime64("2018-01-01T17:00:00") + np.arange(0, 1500, 12).astype("timedelta64[D]")
    times[80] += np.timedelta64(7 * 3600 - 20, "s")  # 20 s before midnight, less than float32 tells apart
    days = times.astype("datetime64[s]").astype(np.int64) / 86_400.0
    values = (0.1 + 0.005 * np.random.default_rng(0).standard_normal((len(days), 2, 2))).astype(np.float32)
    values[80:, :, 0] += 0.3
    values[90:, :, 1] += 0.3
    found = detect_breaks(days, values, HarmonicModel())
    dates = changes._dates(days, found.day)[0].astype("datetime64[D]")
    assert dates.tolist() == [times[80].astype("datetime64[D]").item(), times[90].astype("datetime64[D]").item()]


def test_too_few_dates_and_clouds_everywhere_are_refused_and_leave_nothing(cube: Path, tmp_path: Path) -> None:
    short = ",".join(str(at) for at in range(10))
    with pytest.raises(InvalidInput, match="has 10 dates; a model of 1 harmonics needs 18 clear ones"):
        find_changes(cube, tmp_path / "out", ChangeOptions(harmonics=1, time=short))
    with pytest.raises(InvalidInput, match="--harmonics 4: expected 1 to 3"):
        ChangeOptions(harmonics=4)
    with pytest.raises(InvalidInput, match=r"--probability 1: expected 0\.5 or more"):
        ChangeOptions(probability=1.0)
    make_series_cube(tmp_path / "cloudy", clear=False)
    with pytest.raises(NothingFound, match="no pixel has enough clear dates"):
        find_changes(tmp_path / "cloudy", tmp_path / "out", OPTIONS, workers=LocalWorkers(1))
    assert [path.name for path in tmp_path.iterdir()] == ["cloudy"]


def test_a_young_model_does_not_take_its_own_uncertainty_for_a_break() -> None:
    """Right after a fit to few dates, predictions in a season that was not seen are far off."""
    days, values, _ = series(2000, seed=3)
    quiet = values[:, :, 1000:]
    breaks = detect_breaks(days, quiet, HarmonicModel(harmonics=3))
    assert breaks.fitted.mean() > 0.9
    assert (breaks.count > 0).mean() < 0.01


def test_one_missed_cloud_among_the_deciding_dates_does_not_move_the_break() -> None:
    """It is many times as far off as the change, in another direction."""
    rng = np.random.default_rng(0)
    days = np.arange(0, 60 * 16, 16.0)
    values = rng.normal(0.2, 0.01, (60, 3, 120)).astype(np.float32)
    values[40:] += np.array([0.08, -0.08, -0.06], np.float32)[:, None]
    for pixel in range(120):
        values[41 + pixel % 4, :, pixel] = 0.9
    breaks = detect_breaks(days, values, HarmonicModel(harmonics=1))
    assert (breaks.day[0] == days[40]).mean() > 0.95
    assert (breaks.count == 1).mean() > 0.95
