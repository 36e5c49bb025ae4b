"""What an autoencoder makes of a cube, as anomalies: by command, without seams, on the dates that were chosen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxtrain import train
from jaxtrain.evaluation import report
from jaxtrain.evaluation.scores import restore_model
from jaxtrain.runs.rundir import load_card
from jaxtrain.tasks import cube_reader
from jaxtrain.tasks.cube_reader import Box
from jaxtrain.tasks.layers import open_layers
from jaxtrain.tasks.network_reader import NetworkReader
from jaxtrain.tasks.table import Table
from jaxtrain.tasks.tables import CubeTable, open_table
from jaxtrain.tasks.work import TableRef
from zarr_store.read import open_cube

from ..jaxtrain.cube_factory import PAINTERS, make_cube, tiny_config
from .conftest import Outcome

ODD = (slice(96, 104), slice(40, 48))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`odd.zarr`, whose ground has a spectrum that occurs nowhere else, and `run`, trained on a cube without it."""
    folder = tmp_path_factory.mktemp("network")
    make_cube(folder / "plain.zarr", shape=(1, 128, 128), masked=False, noise=20.0, seed=5)
    make_cube(folder / "odd.zarr", shape=(2, 128, 128), masked=False, noise=20.0, hole=True, odd=ODD)
    with pytest.MonkeyPatch.context() as patch:
        for name, painter in PAINTERS.items():
            patch.setattr(report, name, painter)
        train(tiny_config(
            folder / "plain.zarr", data={"classes": {}}, model={"name": "autoencoder", "code": 2, "width": 8},
            optim={"loss": "mse", "learning_rate": 2e-2}, run={"steps": 30, "evaluate_every": 30},
        ), folder / "run")  # fmt: skip
    return folder


@pytest.mark.parametrize("method", ["autoencoder", "embedding"])
def test_a_network_finds_what_it_was_not_trained_on(
    run: Callable[..., Outcome], places: Path, tmp_path: Path, method: str
) -> None:
    done = run("anomaly", places / "odd.zarr", tmp_path / "out", "--method", method, "--run", places / "run",
               "--time", "2023-08-11", "--false-alarms", "0.02", "--seed", 7, "--json")  # fmt: skip
    assert done.code == 0, done.err
    inside = [one for one in done.json["places"] if ODD[0].start <= one["row"] < ODD[0].stop
              and ODD[1].start <= one["column"] < ODD[1].stop]  # fmt: skip
    assert inside
    assert inside[0]["date"] == "2023-08-11"
    made = open_layers(tmp_path / "out/anomalies.zarr")
    score, mask = np.asarray(made["score"]), np.asarray(made["mask"])
    assert (mask[ODD] == 1).mean() > 0.5
    assert np.median(score[ODD]) > np.quantile(score, 0.98)
    assert all(name.startswith("residual" if method == "autoencoder" else "code") for name in done.json["features"])
    # the picture of a place shows the bands, not what the network made of them
    assert (tmp_path / "out/thumbnails/001.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_read_is_the_image_less_its_reconstruction_and_has_no_seams(places: Path) -> None:
    cube = open_cube(str(places / "odd.zarr"))
    reader = NetworkReader(cube, places / "run", "residual", time="2023-08-10")
    whole, clear = reader.read(Box(0, 128, 0, 128))
    assert not clear[0, -1, -1]  # the corner without data
    assert np.isnan(whole[0, :, -1, -1]).all()
    for box in (Box(0, 20, 0, 128), Box(20, 128, 13, 57)):
        np.testing.assert_array_equal(reader.read(box)[0], whole[:, :, box.y0 : box.y1, box.x0 : box.x1])
    card = load_card(places / "run")
    program, state, _, _ = restore_model(places / "run", card)
    plain, _ = reader.plain.read(Box(0, 32, 0, 32))
    normal = (plain[0] - np.array(card.mean)[:, None, None]) / np.array(card.std)[:, None, None]
    x = np.moveaxis(normal.astype(np.float32), 0, -1)[None]
    back = np.asarray(jax.jit(lambda: program.apply(state.params, state.model_state, x, train=False)[0])())
    # no other window covers these pixels
    np.testing.assert_allclose(np.moveaxis(whole[0, :, :24, :24], 0, -1), (x - back)[0, :24, :24], atol=1e-4)


def test_the_code_lies_on_the_pixels_that_it_is_of_and_dates_are_joined(places: Path) -> None:
    url = str(places / "odd.zarr")

    def rows(**chosen: str) -> np.ndarray:
        table = open_table(url, run=str(places / "run"), shows="code", **chosen)  # type: ignore[arg-type]
        assert isinstance(table, CubeTable)
        return table.read_box(Box(0, 64, 0, 64)).values

    first, last = rows(time="0"), rows(time="1")
    assert first.shape == (2, 64 * 64)
    np.testing.assert_allclose(rows(), (first + last) / 2, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(rows(dates="change"), last - first, rtol=1e-4, atol=1e-5)


def test_another_process_opens_the_same_table(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cube_reader, "_MOST_VALUES", 1)
    table: Table = open_table(str(places / "odd.zarr"), run=str(places / "run"), shows="residual", time="1")
    ref = TableRef.of(table)
    from jaxtrain.tasks import work

    again = work._open(ref.description)
    assert again.digest == table.digest
    np.testing.assert_array_equal(again.read(3).values, table.read(3).values)


@pytest.mark.parametrize("dead", [(), (0,)])
def test_a_singular_covariance_of_a_network_is_not_mended_by_bands(
    run: Callable[..., Outcome], places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dead: tuple[int, ...]
) -> None:
    """--run refuses --bands, so no message may advise it."""
    real = NetworkReader._code

    def code(self: NetworkReader, *given: Any) -> jax.Array:
        made = real(self, *given)
        return made.at[:, dead[0]].set(0.0) if dead else made.at[:, 1].set(made[:, 0])

    monkeypatch.setattr(NetworkReader, "_code", code)
    done = run("anomaly", places / "odd.zarr", tmp_path / "out", "--method", "embedding", "--run", places / "run",
               "--time", "2023-08-11", "--false-alarms", "0.02")  # fmt: skip
    assert done.code == 2, done.err
    assert "is singular" in done.error_line()
    assert ("one value everywhere" if dead else "depend on each other") in done.error_line()
    assert "--bands" not in done.error_line()
    assert "choose another --run, of a network with fewer channels (model.code)" in done.error_line()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--method", "autoencoder", "--bands", "red"], "leave out --bands and --collection"),
        (["--method", "rx", "--usual", "0,1", "--dates", "stack", "--time", "0"], "need as many dates"),
        (["--method", "rx", "--usual", "2031"], "2031"),
        (["--method", "rx", "--looks", "0"], "expected 0.5 to 1000"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    run: Callable[..., Outcome], places: Path, tmp_path: Path, options: list[str], words: str
) -> None:
    given = ["--run", places / "run"] if "autoencoder" in options else []
    done = run("anomaly", places / "odd.zarr", tmp_path / "out", *options, *given)
    assert done.code == 2, done.err
    assert words in done.error_line()
    assert not list(tmp_path.iterdir())
