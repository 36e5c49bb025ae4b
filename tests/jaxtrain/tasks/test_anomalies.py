"""Anomalies over blocks are those of plain numpy, on any devices, stopped and continued."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import zarr
from scipy import ndimage
from scipy.stats import chi2

from jaxtrain.runs.checkpoint import CheckpointStore
from jaxtrain.tasks import anomalies, cube_reader, places
from jaxtrain.tasks.anomalies import AnomalyOptions, find_anomalies
from jaxtrain.tasks.background import make_background, score_rows
from jaxtrain.tasks.detectors import Neighbours
from jaxtrain.tasks.held_out import ScoreCounts, held_out
from jaxtrain.tasks.local_rx import score_locally
from jaxtrain.tasks.moments import Moments
from jaxtrain.tasks.places import find_places
from jaxtrain.tasks.score_store import ScoreStore
from jaxtrain.tasks.tables import change_from_before, open_table
from jaxtrain.tasks.work import LocalWorkers, TableRef, keep_blocks
from zarr_store.errors import InvalidInput, Preempted
from zarr_store.grid import Grid
from zarr_store.samples import Sample, SampleSpec, write_samples

from ..cube_factory import make_cube

WORKERS = LocalWorkers(2)
ODD = (slice(100, 106), slice(80, 86))


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cube_reader, "_MOST_VALUES", 1)
    keep_blocks(1 << 20)
    yield
    keep_blocks(0)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cube with 36 pixels of a spectrum that occurs nowhere else, a cloud and a corner without data."""
    url = tmp_path_factory.mktemp("anomalies") / "odd.zarr"
    make_cube(url, hole=True, odd=ODD, noise=80.0)
    return url


def correlated(rows: int, features: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(features, features)) * np.logspace(0, -2, features)
    return (rng.normal(size=(rows, features)) @ mixing.T + 3.0).astype(np.float32)


def background_of(rows: np.ndarray, **chosen: Any) -> Any:
    return make_background(Moments.of(rows.T), [f"b{at}" for at in range(rows.shape[1])], **chosen)


@pytest.mark.parametrize("features", [1, 10, 40])
def test_scores_of_rx_are_squared_mahalanobis_distances_to_six_digits(features: int) -> None:
    rows = correlated(70_000, features)  # more than one piece
    wide = rows.astype(np.float64) - rows.astype(np.float64).mean(axis=0)
    inverse = np.linalg.inv(np.atleast_2d(np.cov(rows.astype(np.float64).T)))
    wanted = np.einsum("nf,fg,ng->n", wide, inverse, wide)
    np.testing.assert_allclose(score_rows(rows.T, background_of(rows)), wanted, rtol=1e-6)


def test_a_background_of_an_earlier_release_gives_the_same_scores() -> None:
    rows = correlated(500, 5)
    found = background_of(rows)
    turned, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))
    kept = {**found.to_dict(), "whitening": (turned @ found.whitening).tolist()}
    np.testing.assert_allclose(
        score_rows(rows.T, type(found).from_dict(kept)), score_rows(rows.T, found), rtol=1e-5
    )  # fmt: skip


def test_oas_shrinks_few_rows_and_hardly_many() -> None:
    few, many = background_of(correlated(15, 10), shrinkage=None), background_of(correlated(50_000, 10), shrinkage=None)
    assert few.shrinkage > 0.02
    assert many.shrinkage < 1e-3
    assert background_of(correlated(6, 10), shrinkage=None).shrinkage > 0  # fewer rows than features


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: rows * [1, 1, 0] + [0, 0, 5], "b2 has one value everywhere"),
        (lambda rows: rows[:, [0, 1, 1]], "b1, b2 depend on each other"),
        (lambda rows: rows[:3], "3 rows are too few for 3 features"),
    ],
)
def test_a_singular_covariance_is_named(change: Any, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        background_of(change(correlated(200, 3)).astype(np.float32))


def test_local_rx_is_that_of_each_ring() -> None:
    image = correlated(40 * 150, 3, seed=2).T.reshape(3, 40, 150)
    image[:, 10:13, 20:40] = np.nan
    background = background_of(image.reshape(3, -1)[:, np.isfinite(image[0]).ravel()].T)
    found = score_locally(image, background, inner=3, outer=9, shrinkage=0.2)
    assert np.isnan(found[11, 30])
    white = background.whiten(np.nan_to_num(image))
    for y, x in ((0, 0), (20, 75), (9, 30), (39, 149), (25, 128)):
        ring = [
            white[:, j, i] for j in range(max(0, y - 4), min(40, y + 5)) for i in range(max(0, x - 4), min(150, x + 5))
            if max(abs(j - y), abs(i - x)) > 1 and np.isfinite(image[0, j, i])
        ]  # fmt: skip
        part = np.array(ring)
        covariance = 0.8 * np.cov(part.T) + 0.2 * np.eye(3)
        apart = white[:, y, x] - part.mean(axis=0)
        assert found[y, x] == pytest.approx(float(apart @ np.linalg.solve(covariance, apart)), rel=1e-5)


def test_a_vector_is_scored_by_its_nearest_neighbours_and_not_by_itself() -> None:
    rows = correlated(300, 4)
    background = background_of(rows)
    reference = background.whiten(rows[:100].T).T
    ref: Any = type("Ref", (), {"block": lambda self, number: _block(rows)})()
    found = Neighbours(ref, background, np.ascontiguousarray(reference))(0)
    white = background.whiten(rows.T).T
    apart = np.sort(np.linalg.norm(white[:, None] - reference[None], axis=2), axis=1)
    wanted = np.concatenate([apart[:100, 1:6].mean(axis=1), apart[100:, :5].mean(axis=1)])
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def _block(rows: np.ndarray) -> Any:
    from jaxtrain.tasks.table import Block

    return Block(rows.T, None, (len(rows),), (0, 0), np.full(rows.shape[1], len(rows)), len(rows))


def test_an_empirical_threshold_keeps_the_stated_rate() -> None:
    scores = np.random.default_rng(0).chisquare(4, 200_000).astype(np.float32)
    counts = ScoreCounts()
    for part in np.array_split(scores, 7):
        counts.add(part)
    counts.add(np.array([np.nan], np.float32))
    threshold = counts.threshold(1e-3, where="x")
    assert (scores > threshold).mean() <= 1e-3
    assert threshold == pytest.approx(float(np.quantile(scores, 0.999)), rel=2e-3)
    with pytest.raises(InvalidInput, match="needs 10,000,000 held-out rows, x has 200,000"):
        counts.threshold(1e-6, where="x")


def test_places_are_connected_pixels_whatever_the_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    mask = ndimage.gaussian_filter(rng.normal(size=(90, 70)), 2) > 0.12
    scores = rng.gamma(2.0, 1.0, mask.shape).astype(np.float32)
    grid = Grid("EPSG:32633", (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_000_000.0), mask.shape)
    labels, count = ndimage.label(mask, np.ones((3, 3), int))
    found = {}
    for strip in (7, 512):
        monkeypatch.setattr(places, "_STRIP", strip)
        found[strip], total = find_places(grid, lambda rows: (scores[rows], mask[rows]), date="", most=1000)
        assert total == count > 5
    for one, other in zip(found[7], found[512], strict=True):
        assert (one.row, one.column, one.pixels, one.box) == (other.row, other.column, other.pixels, other.box)
        inside = labels == labels[one.row, one.column]
        assert one.pixels == inside.sum()
        assert one.score == scores[inside].max()
        assert one.mean_score == pytest.approx(scores[inside].mean(), rel=1e-5)
    ranked = [one.score for one in found[512]]
    assert ranked == sorted(ranked, reverse=True)
    assert (found[512][0].x - 500_000) / 10 - 0.5 == found[512][0].column
    assert found[512][0].lat == pytest.approx(45.15, abs=0.02)


def test_change_of_radar_is_the_ratio_to_the_mean_intensity() -> None:
    power = np.random.default_rng(0).gamma(4.4, 0.1, (4, 2, 3, 3))
    decibels = (10 * np.log10(power)).astype(np.float32)
    decibels[0, :, 0, 0] = np.nan
    wanted = 10 * np.log10(power[-1] / power[:-1].mean(axis=0))
    wanted[:, 0, 0] = 10 * np.log10(power[-1] / power[1:-1].mean(axis=0))[:, 0, 0]
    np.testing.assert_allclose(change_from_before(decibels, radar=True), wanted, rtol=1e-4, atol=1e-4)
    optical = change_from_before(power.astype(np.float32), radar=False)
    np.testing.assert_allclose(optical, power[-1] - power[:-1].mean(axis=0), atol=1e-6)


CHI2 = AnomalyOptions(threshold="chi2", time="2023-08-11", rate=1e-4)


@pytest.fixture(scope="module")
def reference(odd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Anomalies of one device and one thread, in one go."""
    out = tmp_path_factory.mktemp("reference") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cube_reader, "_MOST_VALUES", 1)
        first = jax.local_devices()[:1]
        patch.setattr(jax, "local_devices", lambda: first)
        find_anomalies(odd, out, CHI2, workers=LocalWorkers(1))
    return out


def files(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def test_a_spectrum_that_occurs_nowhere_else_is_the_first_place(odd: Path, reference: Path) -> None:
    made = zarr.open_group(str(reference / "anomalies.zarr"), mode="r")
    score, mask = np.asarray(made["score"]), np.asarray(made["mask"])
    assert (mask[ODD] == 1).all()
    assert score.shape == (192, 160)
    rows = open_table(str(odd), time="2023-08-11")
    block = rows.read_box(cube_reader.Box(0, 192, 0, 160))  # type: ignore[attr-defined]
    np.testing.assert_allclose(
        score.ravel()[block.at], score_rows(block.values, background_of(block.values.T)), rtol=1e-5
    )
    assert (mask == 1).sum() == (score > chi2.isf(1e-4, 4)).sum()
    import json

    about = json.loads((reference / "anomalies.json").read_text())
    first = about["places"][0]
    assert first["date"] == "2023-08-11"
    assert ODD[0].start <= first["row"] < ODD[0].stop
    assert ODD[1].start <= first["column"] < ODD[1].stop
    assert (reference / "thumbnails/001.png").read_bytes().startswith(b"\x89PNG")
    assert "data:image/png" in (reference / "gallery.html").read_text()


@pytest.mark.parametrize("devices", [2, 8])
def test_bytes_are_the_same_on_any_number_of_devices(
    odd: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, devices: int
) -> None:
    used: set[Any] = set()
    there, real = jax.local_devices()[:devices], jax.device_put
    monkeypatch.setattr(jax, "local_devices", lambda: there)

    def put(x: Any, device: Any) -> Any:
        used.add(device)
        return real(x, device)

    monkeypatch.setattr(jax, "device_put", put)
    find_anomalies(odd, tmp_path / "out", CHI2, workers=WORKERS)
    assert len(used) == devices
    assert files(tmp_path / "out") == files(reference)


def test_a_run_that_was_stopped_continues_and_gives_the_same_bytes(
    odd: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: list[str] = []

    def die(name: str) -> None:
        passed.append(name)
        if name in ("anomaly block written 7", "anomaly block kept 12"):
            monkeypatch.setattr(anomalies, "crashpoint", passed.append)
            raise Preempted("stopped")

    for _ in range(2):
        monkeypatch.setattr(anomalies, "crashpoint", die)
        with pytest.raises(Preempted):
            find_anomalies(odd, tmp_path / "out", CHI2, workers=WORKERS)
        assert not (tmp_path / "out").exists()
        if "anomaly block kept 12" not in passed:
            passed.clear()
            monkeypatch.setattr(anomalies, "crashpoint", die)
    passed.clear()
    monkeypatch.setattr(anomalies, "crashpoint", passed.append)
    find_anomalies(odd, tmp_path / "out", CHI2, workers=WORKERS)
    assert passed[0] == "anomaly block written 7"  # nothing that was kept is computed again
    assert files(tmp_path / "out") == files(reference)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_held_out_ground_is_whole_cells_and_gives_the_threshold(odd: Path, tmp_path: Path) -> None:
    table = open_table(str(odd), time="2023-08-11")
    chosen = held_out(table, np.arange(192 * 160, dtype=np.uint64), 1).reshape(192, 160)
    assert len(np.unique(chosen[:64, :64])) == 1
    assert 0 < chosen.mean() < 0.7
    found = find_anomalies(odd, tmp_path / "out", AnomalyOptions(time="2023-08-11", rate=0.01, seed=1), workers=WORKERS)
    score = np.asarray(zarr.open_group(str(tmp_path / "out/anomalies.zarr"), mode="r")["score"])
    assert found.held_out == chosen.sum()
    share = (score[chosen] > found.threshold).mean()
    assert 0.005 < share <= 0.01


def test_local_rx_over_blocks_has_no_seams(odd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = []
    for size, name in ((1, "blocks"), (8 << 20, "one")):
        monkeypatch.setattr(cube_reader, "_MOST_VALUES", size)
        keep_blocks(0)  # blocks are kept by number, and the two runs have different ones
        options = AnomalyOptions(method="local-rx", inner=3, outer=9, threshold="chi2", time="2023-08-11")
        find_anomalies(odd, tmp_path / name, options, workers=WORKERS)
        scores.append(np.asarray(zarr.open_group(str(tmp_path / name / "anomalies.zarr"), mode="r")["score"]))
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-4)
    assert np.isfinite(scores[0]).all()


def test_without_scikit_learn_the_isolation_forest_says_what_to_install(
    odd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.ensemble", None)
    with pytest.raises(InvalidInput, match=r"pip install 'terrashard\[anomaly\]'"):
        find_anomalies(odd, tmp_path / "out", AnomalyOptions(method="isolation"), workers=WORKERS)
    assert not list(tmp_path.iterdir())


def test_the_isolation_forest_finds_it_too(odd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK"):
        monkeypatch.setenv(name, "TRUE")  # scikit-learn sets them when it is imported; this takes them back
    pytest.importorskip("sklearn")
    options = AnomalyOptions(method="isolation", time="2023-08-11", rate=0.01)
    found = find_anomalies(odd, tmp_path / "out", options, workers=WORKERS)
    assert ODD[0].start <= found.places[0].row < ODD[0].stop


def test_scores_of_vectors_keep_their_rows(odd: Path, tmp_path: Path) -> None:
    vectors = correlated(400, 4)
    vectors[17] += 9
    root = zarr.create_group(str(tmp_path / "vectors.zarr"), attributes={"terrashard_embedding": {"data": str(odd)}})
    for name, values in (("embedding", vectors), ("x", np.full(400, 500_400.0)), ("y", np.full(400, 4_999_000.0))):
        root.create_array(name, data=values)
    options = AnomalyOptions(method="embedding", rate=0.2)
    found = find_anomalies(tmp_path / "vectors.zarr", tmp_path / "out", options, workers=WORKERS)
    assert found.places[0].row == 17
    assert found.places[0].lat == pytest.approx(45.14, abs=0.02)
    made = ScoreStore(tmp_path / "out/anomalies.zarr", open_table(str(tmp_path / "vectors.zarr")), {})
    assert int(np.asarray(made.score).argmax()) == 17


def test_vectors_of_other_samples_or_of_another_checkpoint_are_not_continued_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request has the contents of store and checkpoint, as their paths stay the same when they are made again."""
    asked: list[str] = []

    def look(_out: str, _task: str, request: dict[str, Any]) -> Any:
        asked.append(json.dumps(request, sort_keys=True))
        raise KeyboardInterrupt

    monkeypatch.setattr(anomalies, "TaskFolder", look)
    manifest = CheckpointStore(tmp_path / "run/checkpoints").path(7) / "manifest.json"
    manifest.parent.mkdir(parents=True)
    spec = SampleSpec(2, ("red",), (4, 4), "uint16", ("a",), "one")
    for number, checkpoint in ((1, "first"), (1, "first"), (2, "first"), (2, "second")):
        manifest.write_text(checkpoint)
        shutil.rmtree(tmp_path / "store.zarr", ignore_errors=True)
        pixels = np.full((1, 4, 4), number, np.uint16)
        label = np.asarray(np.uint8(0))
        write_samples(tmp_path / "store.zarr", spec, [Sample(pixels, label, 1, 2, name) for name in ("a", "b")])
        with pytest.raises(KeyboardInterrupt):
            find_anomalies(tmp_path / "store.zarr", tmp_path / "out", AnomalyOptions(method="embedding"),
                           run=tmp_path / "run")  # fmt: skip
    first, again, samples, network = asked
    assert first == again
    assert len({first, samples, network}) == 3


def test_blocks_are_read_once_where_they_fit(odd: Path) -> None:
    table = open_table(str(odd), time="2023-08-11")
    ref = TableRef.of(table)
    assert ref.block(3) is ref.block(3)
