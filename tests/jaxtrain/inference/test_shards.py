"""Maps are made shard by shard: what is complete stays, what is missing is made, and the bytes are the same."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxtrain import predict
from jaxtrain.inference import making as module
from jaxtrain.inference.area import Area
from jaxtrain.inference.blend import Votes
from jaxtrain.inference.layers import MapLayers
from jaxtrain.inference.making import making_folder, map_progress
from jaxtrain.inference.maps import NODATA, open_map
from jaxtrain.inference.options import MapOptions
from jaxtrain.inference.scene import MapResult, help_making, join_map
from zarr_store.crash import arm, crashpoint, reached
from zarr_store.errors import InvalidInput, Locked
from zarr_store.folder import FolderStore
from zarr_store.lock import CubeLock

from ..cube_factory import make_cube, shared_cube, shared_run

SQUARE = Area((((((20.0, 30.0), (20.0, 100.0), (130.0, 100.0), (130.0, 30.0))),),))


class Killed(BaseException):
    """The process ends here."""


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty shards on the shared cube."""
    for place in ("lattice", "maps", "making"):
        monkeypatch.setattr(f"jaxtrain.inference.{place}.CHUNK", 40)
    monkeypatch.setattr("jaxtrain.inference.lattice._PATCHES_OF_SHARD", 1)
    monkeypatch.setattr("jaxtrain.inference.lattice._SHARDS_ACROSS", 8)


def tree(folder: Path) -> dict[str, bytes]:
    """All files of a folder by their path in it."""
    return {
        str(Path(top, name).relative_to(folder)): Path(top, name).read_bytes()
        for top, _, names in os.walk(folder)
        for name in names
    }


def mapped(out: Path, **options: Any) -> MapResult:
    return predict(shared_run(), shared_cube(), out, **options)


@pytest.mark.usefixtures("small_shards")
def test_a_map_that_is_killed_is_continued_and_has_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared_run()  # its training passes places of its own
    arm(10**6)
    whole = mapped(tmp_path / "whole.zarr", time="2023-08-11")
    names = reached()
    arm(0)
    assert (whole.shards_made, whole.shards_done, whole.shards_total) == (20, 20, 20)
    expected = tree(tmp_path / "whole.zarr")
    places = range(len(names))
    assert sum("map shard" in name for name in names) == 40
    assert names[-2:] == ("before the map appears", "after the map appears")
    for at in (*places[:: len(places) // 7], places[-2], places[-1]):
        countdown = iter(range(at, -1, -1))

        def die(name: str, countdown: Iterator[int] = countdown) -> None:
            if next(countdown) == 0:
                raise Killed(name)

        with monkeypatch.context() as patch:
            for module_name in ("zarr_store.durable", "zarr_store.folder", "jaxtrain.inference.making"):
                patch.setattr(f"{module_name}.crashpoint", die)
            with pytest.raises(Killed):
                mapped(tmp_path / "m.zarr", time="2023-08-11")
        rows = len(list(making_folder(tmp_path / "m.zarr").glob("map/_terrashard/ledger/map/*.json")))
        made = mapped(tmp_path / "m.zarr", time="2023-08-11").shards_made
        assert made == (0 if at == places[-1] else 20 - rows), names[at]
        assert tree(tmp_path / "m.zarr") == expected
        assert sorted(path.name for path in tmp_path.iterdir()) == ["m.zarr", "whole.zarr"]
        shutil.rmtree(tmp_path / "m.zarr")


@pytest.mark.usefixtures("small_shards")
def test_a_damaged_shard_of_an_unfinished_map_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "m.zarr"
    with monkeypatch.context() as patch:
        patch.setattr(module, "crashpoint", _die_at("before the map appears"))
        with pytest.raises(Killed):
            mapped(out)
    assert map_progress(out) == {"done": 20, "total": 20, "pending": 0, "complete": False, "running": False}
    chunk = making_folder(out) / "map" / "class" / "c" / "1" / "1"
    chunk.write_bytes(chunk.read_bytes()[:-3])
    assert mapped(out).shards_made == 1
    assert mapped(out).shards_made == 0  # the same command again finds the map that it asks for
    assert mapped(out, entropy=True).shards_made == 20
    assert map_progress(out) == {"done": 20, "total": 20, "pending": 0, "complete": True, "running": False}


def _die_at(name: str) -> Callable[[str], None]:
    def die(here: str) -> None:
        if here == name:
            raise Killed
        crashpoint(here)

    return die


def test_shards_that_another_number_of_devices_made_are_not_kept(tmp_path: Path) -> None:
    """The last digit of an answer depends on it, and the bytes must be those of a run that was not interrupted."""
    made: list[int] = []

    def make(store: FolderStore) -> None:
        made.append(len(made))
        store.write("zarr.json", b"{}")
        store.write("_terrashard/ledger/map/0-0-0.json", b"{}")

    for parts, times in ((2, 1), (2, 1), (1, 2)):
        plan = {"digest": "d", "parts": parts}
        with module.hold_making(tmp_path / "m.zarr", plan, ("class",), dated=False, make=make):
            assert len(made) == times


def test_a_second_run_on_a_map_is_refused(tmp_path: Path) -> None:
    with CubeLock(making_folder(tmp_path / "m.zarr"), "terrashard predict"):
        with pytest.raises(Locked, match="is held by terrashard predict"):
            mapped(tmp_path / "m.zarr")
        assert making_folder(tmp_path / "m.zarr").exists()
    assert not (tmp_path / "m.zarr").exists()


@pytest.mark.usefixtures("small_shards")
def test_several_processes_make_the_bytes_of_one(tmp_path: Path) -> None:
    mapped(tmp_path / "one.zarr", area=SQUARE)
    for count in (2, 4):
        out = tmp_path / f"{count}.zarr"
        filled: list[int] = []

        def fill(folder: Path, count: int = count, filled: list[int] = filled) -> None:
            filled += [help_making(folder, (number, count)).shards for number in range(count)]

        made = mapped(out, area=SQUARE, elsewhere=fill)
        assert len(filled) == count
        assert sum(filled) == made.shards_total == 20
        assert min(filled) >= 20 // count
        assert tree(out) == tree(tmp_path / "one.zarr")
    with pytest.raises(InvalidInput, match=r"20 of 20 shards of .*none.zarr were not made"):
        mapped(tmp_path / "none.zarr", elsewhere=lambda _: None)


@pytest.mark.usefixtures("small_shards")
def test_processes_that_were_started_together_make_the_bytes_of_one(tmp_path: Path) -> None:
    """Process 1 is there first, beside what a killed run has left, and waits until process 0 has begun."""
    shared_run()
    whole = mapped(tmp_path / "whole.zarr", time="2023-08-11")
    out = tmp_path / "both.zarr"
    left = making_folder(out)
    (left / "_terrashard").mkdir(parents=True)
    (left / "_terrashard/lock.json").write_text(json.dumps({"host": socket.gethostname(), "boot": "another"}))
    options = MapOptions(time="2023-08-11")
    with ThreadPoolExecutor(1) as pool:
        joined = pool.submit(join_map, shared_run(), shared_cube(), out, options, (1, 2))
        assert not wait([joined], timeout=1.5).done, "it waits for a living run"
        result = mapped(out, time="2023-08-11", part=(0, 2))
        assert (joined.result(60).shards, result.shards_done) == (10, 20)
    assert result.windows < whole.windows
    assert tree(out) == tree(tmp_path / "whole.zarr")
    assert join_map(shared_run(), shared_cube(), out, options, (1, 2)).shards == 0, (
        "the map is made: nothing to wait for"
    )


def test_a_map_of_each_date_is_the_maps_of_the_dates(tmp_path: Path) -> None:
    made = mapped(tmp_path / "days.zarr", dates="each", probabilities=True)
    days = open_map(tmp_path / "days.zarr")
    assert days.times == made.dates == ("2023-08-10T10:00:00", "2023-08-11T10:00:00")
    data = days.dataset()
    assert (data["class"].dims, data["probability"].dims) == (("time", "y", "x"), ("time", "class", "y", "x"))
    assert [str(day)[:10] for day in data["time"].values] == ["2023-08-10", "2023-08-11"]
    for at, day in enumerate(("2023-08-10", "2023-08-11")):
        mapped(tmp_path / f"{day}.zarr", time=day, probabilities=True)
        single = open_map(tmp_path / f"{day}.zarr")
        for layer in single.layers:
            np.testing.assert_array_equal(days.read(layer, time=at), single.read(layer))
    np.testing.assert_array_equal(days.read(), days.read(time=1))
    assert sum(made.pixels.values()) + made.nodata == 2 * 192 * 160


def test_new_dates_are_appended_and_the_old_ones_are_not_made_again(tmp_path: Path) -> None:
    cube, out = tmp_path / "c.zarr", tmp_path / "days.zarr"
    make_cube(cube, shape=(1, 192, 160))
    first = predict(shared_run(), cube, out, dates="each")
    with pytest.raises(InvalidInput, match="was made with another model, grid or options"):
        predict(shared_run(), cube, out, dates="each", entropy=True, append=True)
    shutil.rmtree(cube)
    make_cube(cube, shape=(3, 192, 160))  # its first date is that of the cube before
    grown = predict(shared_run(), cube, out, dates="each", append=True)
    assert (first.shards_made, grown.shards_made, grown.shards_total) == (1, 2, 3)
    predict(shared_run(), cube, tmp_path / "new.zarr", dates="each")
    assert tree(out) == tree(tmp_path / "new.zarr")
    mean = tmp_path / "mean.zarr"
    predict(shared_run(), cube, mean)
    with pytest.raises(InvalidInput, match="--append adds dates to a map of each date"):
        predict(shared_run(), cube, mean, dates="each", append=True)


def test_the_majority_is_the_class_of_most_dates(tmp_path: Path) -> None:
    cube = tmp_path / "c.zarr"
    make_cube(cube, shape=(3, 96, 96), noise=900.0)
    predict(shared_run(), cube, tmp_path / "days.zarr", dates="each")
    predict(shared_run(), cube, tmp_path / "vote.zarr", dates="majority")
    days, vote = open_map(tmp_path / "days.zarr"), open_map(tmp_path / "vote.zarr")
    each = np.stack([days.read(time=t) for t in range(3)])
    votes = np.stack([(each == value).sum(axis=0) for value in range(3)])
    clear = np.sort(votes, axis=0)[-1] > np.sort(votes, axis=0)[-2]
    assert 0.5 < clear.mean() < 1
    np.testing.assert_array_equal(vote.read()[clear], votes.argmax(axis=0)[clear])
    share = votes.max(axis=0) / np.maximum(votes.sum(axis=0), 1) * 100
    assert np.abs(vote.read("confidence")[clear] - share[clear]).max() <= 1


def test_of_as_many_votes_the_larger_probabilities_win() -> None:
    votes = Votes((0, 1, 0, 1), 3)
    for probability in ([0.1, 0.6, 0.3], [0.9, 0.1, 0.0]):
        votes.add(0, 0, np.array([[probability]], np.float32), np.ones((1, 1), np.float32))
    ((_, _, share, _),) = votes.blocks(1)
    assert share[0, 0].argmax() == 0


def test_only_the_area_is_mapped_and_as_in_the_whole_map(tmp_path: Path) -> None:
    hole = ((60.0, 40.0), (60.0, 60.0), (80.0, 60.0), (80.0, 40.0))
    area = Area(((*SQUARE.polygons[0], hole), (((140.2, 150.0), (159.0, 170.0), (150.0, 191.5)),)))
    inside = area.mask(0, 192, 0, 160)
    mapped(tmp_path / "all.zarr")
    made = mapped(tmp_path / "area.zarr", area=area)
    whole, part = open_map(tmp_path / "all.zarr").read(), open_map(tmp_path / "area.zarr").read()
    np.testing.assert_array_equal(part, np.where(inside, whole, NODATA))
    assert made.nodata == (~inside).sum()
    assert (bool(inside[35, 25]), bool(inside[50, 70]), bool(inside[175, 150])) == (True, False, True)
    assert MapOptions.from_dict(MapOptions(area=area).to_dict()).area == area


def test_layers_of_more_classes_than_a_byte_can_number() -> None:
    kind = MapLayers(300, probabilities=True, entropy=True)
    rng = np.random.default_rng(0)
    share = rng.dirichlet(np.full(300, 0.02), (5, 7)).astype(np.float32)
    share[0, 0] = 1 / 300
    seen = rng.random((5, 7)) < 0.8
    seen[0, 0] = True
    made = kind.of(share, seen)
    assert made["class"].dtype == np.uint16
    np.testing.assert_array_equal(made["class"], np.where(seen, share.argmax(-1), 65_535))
    assert made["class"][seen].max() > 255
    assert made["probability"].shape == (300, 5, 7)
    assert made["entropy"][0, 0] == 100
    np.testing.assert_array_equal(made["entropy"] == NODATA, ~seen)
    expected = -(share * np.log(np.maximum(share, 1e-30))).sum(-1) / np.log(300) * 100
    assert np.abs(made["entropy"][seen] - expected[seen]).max() <= 0.51


def test_values_are_scaled_to_int16() -> None:
    kind = MapLayers(1, values=True, scale=MapLayers.scale_for(50.0, 20.0))
    values = np.array([[[-149.0], [50.0], [249.0], [9999.0], [np.nan], [1.0]]], np.float32)
    seen = np.array([[True, True, True, True, True, False]])
    stored = kind.of(values, seen)["value"]
    assert stored.dtype == np.int16
    assert kind.scale is not None
    scale, offset = kind.scale
    np.testing.assert_allclose(stored[0, :3] * scale + offset, values[0, :3, 0], atol=scale)
    assert stored[0, 3] == 32_767
    assert stored[0, 5] == kind.nodata("value") == -32_768


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dates": "majority", "time": "2023-08-11"}, "one date is mapped"),
        ({"method": "exact", "overlap": 4}, "the overlap of windows is for a blend"),
        ({"method": "smooth"}, "unknown method 'smooth'"),
        ({"scaled": True}, "a map of classes has no values to scale"),
        ({"area": Area(()), "method": "exact"}, r"norms \(model.norm = 'group'\).*use --blend, or train with"),
    ],
)
def test_options_that_do_not_fit_are_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        mapped(tmp_path / "m.zarr", **options)
    assert not list(tmp_path.iterdir())
