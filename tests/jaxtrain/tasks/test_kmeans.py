"""k-means over blocks is k-means: against plain numpy, on any devices and processes, stopped and continued."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import zarr

from jaxtrain.inference.maps import NODATA, open_map
from jaxtrain.tasks import cells, clusters, cube_reader, kmeans, tables, work
from jaxtrain.tasks.assign import assign_rows
from jaxtrain.tasks.cells import assign_cells, make_cells
from jaxtrain.tasks.choice import choose_k
from jaxtrain.tasks.cluster_model import ClusterModel
from jaxtrain.tasks.clusters import ClusterOptions, cluster, parse_k
from jaxtrain.tasks.kmeans import Fit, fit_kmeans
from jaxtrain.tasks.moments import principal_components, table_moments
from jaxtrain.tasks.sampling import sample_rows
from jaxtrain.tasks.scaling import Scaling, make_scaling
from jaxtrain.tasks.seeding import nearest_centres, seed_parallel
from jaxtrain.tasks.table import Feature, Table
from jaxtrain.tasks.tables import open_table
from jaxtrain.tasks.work import LocalWorkers, ProcessWorkers, keep_blocks
from zarr_store.errors import InvalidInput, NothingFound, Preempted
from zarr_store.samples import Sample, SampleSpec, write_samples

from ..cube_factory import make_cube, shared_cube
from ..modal_factory import make_modal_cube

WORKERS = LocalWorkers(2)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Boxes of one chunk, so that a tiny cube has thirty blocks, which are cut into cells although they are small; and
    no block of one test is kept for the next.
    """
    monkeypatch.setattr(cube_reader, "_MOST_VALUES", 1)
    monkeypatch.setattr(cells, "_LEAST", 256)
    monkeypatch.setattr(clusters, "draw_clusters", lambda *_: None)  # the test of the command draws
    keep_blocks(1 << 20)
    yield
    keep_blocks(0)


def all_rows(table: Table) -> np.ndarray:
    """Every row of a table at once, float64 (row, feature), ordered by number."""
    blocks = [table.read(number) for number in range(len(table))]
    ids = np.concatenate([block.ids for block in blocks])
    return np.concatenate([block.values for block in blocks], axis=1).T.astype(np.float64)[np.argsort(ids)]


def lloyd(rows: np.ndarray, centres: np.ndarray, iterations: int) -> np.ndarray:
    for _ in range(iterations):
        labels = np.square(rows[:, None] - centres[None]).sum(axis=2).argmin(axis=1)
        centres = np.stack([rows[labels == at].mean(axis=0) for at in range(len(centres))])
    return centres


@pytest.fixture(scope="module")
def holed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cube with a cloud, a corner without data and a shard that was never written."""
    url = tmp_path_factory.mktemp("kmeans") / "holed.zarr"
    make_cube(url, hole=True, skip_shards=[(0, 0, 0), (1, 0, 0)], noise=300.0)
    return url


def test_a_table_has_the_mean_of_the_clear_dates_of_each_pixel_and_no_other_row(holed: Path) -> None:
    table = open_table(str(holed))
    pixels = table.reader.cube.dataset(  # type: ignore[attr-defined]
        "sentinel-2-l2a", scaled=True, masked=True
    ).reflectance.mean("time", skipna=True)
    wanted = pixels.values.reshape(4, -1)
    wanted = wanted[:, np.isfinite(wanted).all(axis=0)].T
    np.testing.assert_allclose(all_rows(table), wanted, rtol=1e-6)
    assert len(wanted) < 192 * 160  # the shard that was never written has no rows
    assert len(table) == 30
    assert "2 of" in table.warnings[0]


def test_gaps_of_stacked_dates_are_filled_where_half_of_them_were_seen(holed: Path) -> None:
    table = open_table(str(holed), dates="stack")
    assert [one.label for one in table.features][::4] == ["blue 2023-08-10", "blue 2023-08-11"]
    under_cloud = 192 * 160 - 64 * 64  # seen on the other date
    assert len(all_rows(table)) == under_cloud


def test_lloyd_over_blocks_gives_the_centres_of_plain_numpy(holed: Path) -> None:
    table = open_table(str(holed))
    rows = all_rows(table)
    moments = table_moments(table, WORKERS)
    scaling, _ = make_scaling(moments)
    start = rows[[5, 900, 4000, 9000, 15000]]
    found = fit_kmeans(table, scaling, Fit(scaling.apply(start.T).T), moments, WORKERS, iterations=6, tolerance=0.0)
    np.testing.assert_allclose(scaling.invert(found.centres), lloyd(rows, start, 6), rtol=2e-5, atol=0.05)
    assert found.count is not None
    assert found.count.sum() == len(rows)


def test_centres_move_on_a_part_of_many_rows_first_and_few_passes_are_left(
    holed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = open_table(str(holed))
    moments = table_moments(table, WORKERS)
    scaling, _ = make_scaling(moments)
    start = Fit(scaling.apply(all_rows(table)[[3, 4, 5]].T).T)  # a start far off
    passes: dict[str, list[int]] = {}
    fits = {}
    real = kmeans._pass
    for name, parts in (("all", ()), ("part", (512, 6000))):
        monkeypatch.setattr(kmeans, "_PARTS", parts)
        rows = passes[name] = []

        def looked(*given: Any, rows: list[int] = rows, **chosen: Any) -> Any:
            found = real(*given, **chosen)
            rows.append(int(found[0].sum()))
            return found

        monkeypatch.setattr(kmeans, "_pass", looked)
        fits[name] = fit_kmeans(table, scaling, start, moments, WORKERS, tolerance=1e-4)
    whole = moments.count
    assert set(passes["all"]) == {whole}
    assert passes["part"].count(whole) == fits["part"].iterations
    assert min(passes["part"]) < 1024  # the smaller part
    assert fits["part"].iterations < fits["all"].iterations
    np.testing.assert_allclose(fits["part"].inertia, fits["all"].inertia, rtol=1e-3)
    # what was stopped after its first pass over all rows continues without the parts
    kept: list[Fit] = []
    fit_kmeans(table, scaling, start, moments, WORKERS, tolerance=1e-4, on_iteration=kept.append)
    again = fit_kmeans(table, scaling, Fit.from_dict(kept[0].to_dict()), moments, LocalWorkers(1), tolerance=1e-4)
    np.testing.assert_array_equal(again.centres, fits["part"].centres)


@pytest.mark.parametrize(("features", "k"), [(1, 2), (3, 5), (4, 16), (10, 6)])
def test_every_row_gets_by_cells_the_centre_that_it_gets_alone(
    features: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(features)
    mixing = rng.normal(size=(features, features)) * np.logspace(0, -2, features)
    rows = rng.normal(size=(40_000, features)) @ mixing.T + 3.0
    rows[::97] *= 30.0  # far rows lie outside the grid
    rows[5::7] = np.rint(rows[5::7])  # many equal rows
    values = np.ascontiguousarray(rows.T.astype(np.float32))
    found = make_cells(values)
    assert found is not None
    assert found.count.sum() + (found.codes == 65_535).sum() == len(rows)
    for matrix in (np.eye(features), np.diag(1 / rows.std(axis=0)), rng.normal(size=(max(1, features - 1), features))):
        scaling = Scaling(rows.mean(axis=0), matrix)
        centres = scaling.apply(values[:, rng.integers(0, len(rows), k)]).T
        centres[1] = centres[0] + 1e-7  # nearly equal centres must not be confused by rounding
        alone = assign_rows(values, scaling, centres)
        monkeypatch.setattr(cells, "_WORTH", 1.0)
        together = assign_cells(values, found, scaling, centres)
        np.testing.assert_array_equal(together.members, alone.members)
        np.testing.assert_allclose(together.total, alone.total, rtol=1e-4, atol=1e-5 * np.abs(alone.total).max())
        assert together.inertia == pytest.approx(alone.inertia, rel=1e-5)


def test_most_rows_are_not_looked_at_again(holed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = open_table(str(holed))
    moments = table_moments(table, WORKERS)
    scaling, _ = make_scaling(moments)
    start = Fit(scaling.apply(all_rows(table)[[5, 9000, 15000]].T).T)
    looked: list[int] = []

    def count(values: Any, *rest: Any, **more: Any) -> Any:
        looked.append(values.shape[1])
        return assign_rows(values, *rest, **more)

    monkeypatch.setattr(cells, "assign_rows", count)
    monkeypatch.setattr(kmeans, "assign_rows", count)
    fit = fit_kmeans(table, scaling, start, moments, WORKERS, iterations=1)
    assert sum(looked) == moments.count  # the first pass looks at all
    looked.clear()
    fit_kmeans(table, scaling, fit, moments, WORKERS, iterations=2, tolerance=0.0)
    assert 0 < sum(looked) < 0.6 * moments.count


def test_cells_of_rows_that_are_all_the_same_are_not_made() -> None:
    assert make_cells(np.full((3, 20_000), 7.0, np.float32)) is None
    assert make_cells(np.zeros((3, 100), np.float32)) is None


def test_of_two_centres_that_are_as_near_the_first_is_taken() -> None:
    values = np.linspace(-3, 3, 41, dtype=np.float32)[None]
    same = np.array([[1.0], [-1.0], [1.0]])
    found = assign_rows(values, Scaling(np.zeros(1), np.eye(1)), same, final=True)
    assert set(found.labels.tolist()) == {0, 1}
    assert found.labels[20] == 0  # the middle is as near to all three
    assert found.members.tolist() == [21, 20, 0]
    assert found.nearness[20] == 0
    expected = float(np.minimum(np.square(values - 1), np.square(values + 1)).sum())
    assert found.inertia == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def reference(holed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clusters of the cube on one device, in one thread."""
    out = tmp_path_factory.mktemp("reference") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cube_reader, "_MOST_VALUES", 1)
        patch.setattr(cells, "_LEAST", 256)
        patch.setattr(clusters, "draw_clusters", lambda *_: None)
        first = jax.local_devices()[:1]
        patch.setattr(jax, "local_devices", lambda: first)
        cluster(holed, out, OPTIONS, workers=LocalWorkers(1))
    return out


OPTIONS = ClusterOptions(k=(6,), standardise=True, tolerance=0.0, iterations=8)


def labels_of(out: Path) -> np.ndarray:
    return np.asarray(open_map(out / "clusters.zarr").read())


@pytest.mark.parametrize("devices", [2, 8])
def test_labels_are_the_same_on_any_number_of_devices(
    holed: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, devices: int
) -> None:
    there = jax.local_devices()[:devices]
    used = set()
    real = jax.device_put
    monkeypatch.setattr(jax, "local_devices", lambda: there)

    def put(x: Any, device: Any) -> Any:
        used.add(device)
        return real(x, device)

    monkeypatch.setattr(jax, "device_put", put)
    cluster(holed, tmp_path / "out", OPTIONS, workers=WORKERS)
    assert len(used) == devices  # otherwise this shows nothing
    np.testing.assert_array_equal(labels_of(tmp_path / "out"), labels_of(reference))
    assert (tmp_path / "out/model.json").read_bytes() == (reference / "model.json").read_bytes()


def test_labels_are_the_same_with_two_processes(
    holed: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads stand for the processes; what they exchange goes through the same function."""
    barrier, table, exchanged = threading.Barrier(2, timeout=60), {}, []

    def exchange(value: Any) -> list[Any]:
        table[threading.current_thread().name] = value
        barrier.wait()
        both = [table["process-0"], table["process-1"]]
        exchanged.append(1)
        barrier.wait()
        return both

    monkeypatch.setattr(work, "_exchange", exchange)

    def process(index: int) -> None:
        workers = ProcessWorkers(index, 2, LocalWorkers(1))
        cluster(holed, tmp_path / "out", OPTIONS, workers=workers, leads=index == 0)

    threads = [threading.Thread(target=process, args=(at,), name=f"process-{at}") for at in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(exchanged) > 20
    np.testing.assert_array_equal(labels_of(tmp_path / "out"), labels_of(reference))


def test_an_error_in_one_process_ends_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    failure = InvalidInput("block 1 is bad")
    monkeypatch.setattr(work, "_exchange", lambda value: [value, (failure, [])])
    with pytest.raises(InvalidInput, match="block 1 is bad"):
        list(ProcessWorkers(0, 2, LocalWorkers(1)).map(lambda number: number, range(4)))


@pytest.mark.parametrize("stop", [KeyboardInterrupt, Preempted])
def test_a_run_that_was_stopped_continues_with_its_next_pass(
    holed: Path, reference: Path, tmp_path: Path, stop: type[BaseException]
) -> None:
    out, passes = tmp_path / "out", []

    def stop_at_three(step: str, done: int, total: int) -> None:
        if step == "iterate" and done == 3:
            raise stop("stop")

    with pytest.raises(stop):
        cluster(holed, out, OPTIONS, on_progress=stop_at_three)
    assert not out.exists()

    def note(step: str, done: int, total: int) -> None:
        if step == "iterate":
            passes.append(done)

    cluster(holed, out, OPTIONS, on_progress=note)
    assert passes[0] == 4  # three passes were kept
    np.testing.assert_array_equal(labels_of(out), labels_of(reference))
    assert list(tmp_path.iterdir()) == [out]


def test_another_request_does_not_continue_a_run_that_was_stopped(holed: Path, tmp_path: Path) -> None:
    def stop(step: str, done: int, total: int) -> None:
        if step == "iterate":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cluster(holed, tmp_path / "out", OPTIONS, on_progress=stop)
    found = cluster(holed, tmp_path / "out", ClusterOptions(k=(3,), iterations=2))
    assert found.k == 3


def test_principal_components_are_those_of_lapack(holed: Path) -> None:
    table = open_table(str(holed))
    rows = all_rows(table)
    for scale in (None, rows.std(axis=0)):
        centred = (rows - rows.mean(axis=0)) / (1 if scale is None else scale)
        _, singular, vectors = np.linalg.svd(centred, full_matrices=False)
        found = principal_components(table_moments(table, WORKERS), 3, scale)
        np.testing.assert_allclose(found.variance, (singular**2 / (len(rows) - 1))[:3], rtol=1e-5)
        np.testing.assert_allclose(np.abs((found.vectors * vectors[:3]).sum(axis=1)), 1.0, rtol=1e-5)
        assert found.ratio.sum() <= 1.0


def test_a_sample_does_not_depend_on_the_cut_into_blocks(holed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = sample_rows(open_table(str(holed)), 500, 3, WORKERS)
    keep_blocks(0)
    monkeypatch.setattr(cube_reader, "_MOST_VALUES", 1 << 20)
    table = open_table(str(holed))
    assert len(table) < 30
    np.testing.assert_array_equal(sample_rows(table, 500, 3, WORKERS), small)
    assert not np.array_equal(sample_rows(table, 500, 4, WORKERS), small)
    assert len(np.unique(small, axis=0)) > 490


def test_parallel_seeding_is_as_good_as_a_converged_start(holed: Path) -> None:
    table = open_table(str(holed))
    scaling, _ = make_scaling(table_moments(table, WORKERS))
    rows = scaling.apply(all_rows(table).T).T
    centres = seed_parallel(table, scaling, 3, rows[:1], 0, WORKERS)
    assert centres.shape == (3, 4)
    _, squares = nearest_centres(rows, centres)
    noise = 300.0**2 / 1.7 * 4  # of a mean over one or two dates
    assert squares.mean() < 1.3 * noise


def test_every_way_to_fit_finds_the_three_covers(holed: Path, tmp_path: Path) -> None:
    inertia = {}
    for name, more in {
        "lloyd": {}, "mini": {"mini_batch": True, "iterations": 5}, "sample": {"sample": 2000},
        "parallel": {"seeding": "k-means||"}, "pca": {"components": 2},
    }.items():  # fmt: skip
        found = cluster(holed, tmp_path / name, ClusterOptions(k=(3,), **more))  # type: ignore[arg-type]
        inertia[name] = found.inertia
        shares = np.array(found.sizes) / found.pixels
        np.testing.assert_allclose(sorted(shares), [0.25, 0.35, 0.40], atol=0.03)
    for name in ("mini", "sample", "parallel"):
        assert inertia[name] == pytest.approx(inertia["lloyd"], rel=4e-3)


def test_the_number_of_clusters_is_suggested_with_its_reason() -> None:
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.normal(centre, 0.3, (300, 2)) for centre in ((0, 0), (5, 0), (0, 5), (5, 5))])
    found = choose_k(rng.permutation(rows), parse_k("2..7"), 0)
    assert found.suggested == 4
    assert "k = 4" in found.reason
    assert np.argmax(found.silhouette) == 2
    assert all(np.diff(found.inertia) < 0)


def test_clusters_of_one_cube_label_another_that_stores_other_numbers(tmp_path: Path) -> None:
    make_cube(tmp_path / "other.zarr", scale=0.5, offset=-1000.0)
    cluster(shared_cube(), tmp_path / "fit", ClusterOptions(k=(3,)))
    found = cluster(tmp_path / "other.zarr", tmp_path / "there", model=tmp_path / "fit")
    assert found.iterations == 0
    same = labels_of(tmp_path / "there") == labels_of(tmp_path / "fit")
    assert same.mean() > 0.999
    make_cube(tmp_path / "fewer.zarr", bands=("blue", "green"))
    with pytest.raises(InvalidInput, match=r"unknown bands 'red', 'nir'"):
        cluster(tmp_path / "fewer.zarr", tmp_path / "no", model=tmp_path / "fit")
    with pytest.raises(InvalidInput, match=r"comes without red, nir"):
        cluster(tmp_path / "fewer.zarr", tmp_path / "no", ClusterOptions(bands="blue,green"), model=tmp_path / "fit")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("kind", "refused"), [("vectors", ("--bands", "--time")), ("samples", ("--time",)), ("cube", ())]
)  # fmt: skip
def test_what_does_not_fit_a_model_is_mended_by_options_that_its_kind_has(kind: Any, refused: tuple[str, ...]) -> None:
    features = (Feature("v0"), Feature("v1"))
    model = ClusterModel(kind, features, "mean", Scaling(np.zeros(2), np.eye(2)), np.zeros((3, 2)))
    there: Any = SimpleNamespace(url="other.zarr", kind=kind, features=features[:1])
    with pytest.raises(InvalidInput, match="fit new clusters") as caught:
        model.check_table(there, "model.json")
    assert {name for name in ("--bands", "--time") if name not in str(caught.value)} == set(refused)


def test_pixels_of_samples_have_a_cluster_each(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 3, (7, 16, 16))
    images = np.array([[100, 900], [500, 500], [900, 100]], np.uint16)[truth].transpose(0, 3, 1, 2)
    valid = np.ones((16, 16), bool)
    valid[:2] = False
    spec = SampleSpec(7, ("a", "b"), (16, 16), "uint16", ("x",), masked=True)
    label = np.uint8(0)
    write_samples(tmp_path / "s.zarr", spec, [Sample(one, label, np.nan, np.nan, "n", valid) for one in images])  # type: ignore[arg-type]
    found = cluster(tmp_path / "s.zarr", tmp_path / "out", ClusterOptions(k=(3,)))
    labels = np.asarray(zarr.open_array(tmp_path / "out/clusters.zarr/cluster", mode="r")[...])
    assert (labels[:, :2] == NODATA).all()
    for at in range(3):
        assert len(np.unique(labels[:, 2:][truth[:, 2:] == at])) == 1
    assert found.pixels == 7 * 14 * 16


def test_vectors_have_a_cluster_each_and_keep_their_places(tmp_path: Path) -> None:
    root = zarr.create_group(tmp_path / "v.zarr", attributes={"terrashard_embedding": {"run": "r"}})
    vectors = np.repeat(np.eye(3, dtype=np.float32), [5, 9, 7], axis=0)
    root.create_array("embedding", data=vectors)
    root.create_array("x", data=np.arange(21.0))
    assert tables.is_embedding(str(tmp_path / "v.zarr"))
    found = cluster(tmp_path / "v.zarr", tmp_path / "out", ClusterOptions(k=(3,)))
    assert found.sizes == (9, 7, 5)
    made: Any = zarr.open_group(tmp_path / "out/clusters.zarr", mode="r")
    np.testing.assert_array_equal(made["cluster"][...], np.repeat([2, 0, 1], [5, 9, 7]))
    np.testing.assert_array_equal(made["x"][...], np.arange(21.0))


def test_decibels_stay_decibels_and_what_is_no_power_is_refused(tmp_path: Path) -> None:
    for name, decibels in (("power", None), ("db", "dB"), ("unstated", "1")):
        make_modal_cube(tmp_path / f"{name}.zarr", only=("s1",), layers=False, decibels=decibels)
    power, stated = (open_table(str(tmp_path / f"{name}.zarr"), collection="s1") for name in ("power", "db"))
    assert [one.unit for one in stated.features] == ["dB", "dB"]
    np.testing.assert_allclose(all_rows(stated), all_rows(power), atol=1e-3)
    with pytest.raises(InvalidInput, match=r"band vv of s1 has the mean -1.*must state the unit dB"):
        open_table(str(tmp_path / "unstated.zarr"), collection="s1")


def test_data_that_give_no_row_to_a_model_replace_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cube = shared_cube()
    found = cluster(cube, tmp_path / "out", ClusterOptions(k=(2,)))
    kept = (tmp_path / "out" / "clusters.json").read_bytes()
    read = cube_reader.CubeReader.read

    def nothing(self: Any, *arguments: Any) -> Any:
        values, clear = read(self, *arguments)
        return np.full_like(values, np.nan), clear

    monkeypatch.setattr(cube_reader.CubeReader, "read", nothing)
    keep_blocks(0)
    with pytest.raises(NothingFound, match=r"no row with a number .*nothing was replaced"):
        cluster(cube, tmp_path / "out", model=tmp_path / "out")
    assert (tmp_path / "out" / "clusters.json").read_bytes() == kept
    assert found.k == 2
