"""Few programs stand for many numbers of devices, and what was compiled before an interruption is kept."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from jaxtrain.planner import children
from jaxtrain.planner.collectives import Collective
from jaxtrain.planner.cost import collective_seconds
from jaxtrain.planner.profile import Link, read_profile
from jaxtrain.planner.scale import representative
from jaxtrain.planner.scaling import Curve, Point
from jaxtrain.planner.words import curve_table


def request_of(data: int, zero: int = 0) -> dict[str, Any]:
    """A request for a mesh, with two windows for each replica."""
    return {"config": {"mesh": {"data": data, "zero": zero}, "run": {"batch_size": 2 * data}}, "card": {}}


def test_many_replicas_share_the_program_of_few() -> None:
    assert representative(request_of(16)) == representative(request_of(1024)) == request_of(4)
    assert representative(request_of(8)) == request_of(8)
    assert representative(request_of(16, zero=3)) != representative(request_of(16))


class _Fake:
    """Stands for the processes that compile: each thread has its own, which knows the last program."""

    asked: list[dict[str, Any]] = []
    die_at: int | None = None

    def __init__(self, devices: int, flags: str) -> None:
        self.devices, self.flags = devices, flags

    def __enter__(self) -> _Fake:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if len(_Fake.asked) == _Fake.die_at:
            raise KeyboardInterrupt
        _Fake.asked.append(request)
        return {"facts": {"data": request["config"]["mesh"]["data"]}}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[_Fake]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(children, "_Compilers", _Fake)
    monkeypatch.setattr(_Fake, "asked", [])
    monkeypatch.setattr(_Fake, "die_at", None)
    return _Fake


def test_requests_of_one_program_are_asked_one_after_the_other(fake: type[_Fake]) -> None:
    requests = [request_of(16), request_of(16, 1), request_of(64), request_of(64, 1), request_of(256), request_of(8)]
    told: list[int] = []
    answers = children.compile_all(requests, 8, processes=1, on_answer=told.append)
    assert [one["facts"]["data"] for one in answers] == [16, 16, 64, 64, 256, 8], "in the order of the requests"
    asked = [representative(one) for one in fake.asked]
    changes = sum(a != b for a, b in pairwise(asked))
    assert changes == 2, "three programs, each compiled once"
    assert sorted(told) == list(range(6))


def test_an_interrupted_survey_keeps_what_it_compiled(fake: type[_Fake]) -> None:
    requests = [request_of(2), request_of(3), request_of(5), request_of(6), request_of(7)]
    fake.die_at = 3
    with pytest.raises(KeyboardInterrupt):
        children.compile_all(requests, 8, processes=1, on_answer=lambda _number: None)
    assert len(fake.asked) == 3, "nothing new begins after the interruption"
    kept = list(fake.asked)
    fake.asked.clear()
    fake.die_at = None
    answers = children.compile_all(requests, 8, processes=1, on_answer=lambda _number: None)
    assert [one["facts"]["data"] for one in answers] == [2, 3, 5, 6, 7]
    assert len(fake.asked) == 2
    assert all(one not in kept for one in fake.asked), "what was compiled is not compiled again"


def test_slow_links_delay_once_for_each_node() -> None:
    profile = read_profile("tpu-v5e").model_copy(
        update={
            "links": (
                Link(name="in", devices=8, bandwidth=1e9, latency=1.0),
                Link(name="out", bandwidth=1e9, latency=10.0),
            )
        }
    )

    def seconds(devices: int, kind: str = "all-reduce") -> float:
        one = Collective(kind, ((1,),), ("f32",), 4, 1, ("data",), devices, 1e-9, 1e-9, "")
        return collective_seconds(one, {"data": devices}, profile)

    assert seconds(8) == pytest.approx(2 * 7 * 1.0)
    assert seconds(32) == pytest.approx(2 * (7 * 1.0 + 3 * 10.0))
    assert seconds(32, "all-gather") == pytest.approx(7 * 1.0 + 3 * 10.0)
    gpu = profile.model_copy(update={"device": profile.device.model_copy(update={"kind": "gpu"})})
    one = Collective("all-reduce", ((1,),), ("f32",), 4, 1, ("data",), 32, 1e-9, 1e-9, "")
    assert collective_seconds(one, {"data": 32}, gpu) == pytest.approx(2 * (3 * 1.0 + 2 * 10.0)), "a tree at each level"


def test_curves_have_the_cost_of_an_epoch_and_say_when_it_is_no_step() -> None:
    def point(devices: int, cost: float | None) -> Point:
        return Point(devices, 16 * devices, 0.01, 1600.0 * devices, 1.0, 0.0, 10**9, True, 1000 / (1600 * devices),
                     1000 / 1600 / 3600, cost)  # fmt: skip

    plain = curve_table([Curve("data", (point(1, None), point(128, None)))])
    assert "device hours" in plain
    assert "cost" not in plain
    assert "an epoch has 1000 windows, fewer than the batch of 128 devices" in plain
    assert "2.50" in curve_table([Curve("data", (point(1, 2.5),))])
