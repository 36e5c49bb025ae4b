"""A strategy that cannot fit is refused by a bound, before anything is compiled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jaxtrain.planner import children, compiler
from jaxtrain.planner.cost import peak_bytes
from jaxtrain.planner.facts import Facts


def request_of(mesh: dict[str, Any] | None = None, *, width: int = 4, **run: Any) -> dict[str, Any]:
    """A small U-Net on imagined data."""
    classes = [{"index": i, "name": f"class {i}", "colour": "#808080", "values": [i]} for i in range(3)]
    config = {"data": {"cube": "none", "patch": 16}, "model": {"width": width, "depth": 1}, "mesh": mesh or {},
              "run": {"batch_size": 8} | run}  # fmt: skip
    card = {
        "format": 1, "config": config, "cube": {"path": "none", "digest": ""}, "bands": ["a", "b"], "classes": classes,
        "mean": [1.0] * 2, "std": [1.0] * 2, "class_weights": None, "grid": None, "times": [],
        "split": {"block": [1, 1], "parts": [[0]]}, "windows": {}, "statistics": {}, "edges": True,
        "task": {"per_image": False, "several": False, "value": None, "rebuild": False},
    }  # fmt: skip
    from jaxtrain.config import TrainConfig

    filled = TrainConfig.model_validate(config).model_dump(mode="json")
    return {"config": filled, "card": card, "dtypes": {}, "dialect": {}}


def test_the_bound_is_the_state_and_the_largest_layer_and_below_what_the_program_needs() -> None:
    request = request_of()
    least = compiler.answer({**request, "limit": 1})["least"]
    facts = Facts.from_dict(compiler.answer(request)["facts"])
    assert least["state"] == facts.parameter_bytes + facts.optimizer_bytes
    # a convolution of the first level makes 4 channels of 4, for 8 windows of 16 × 16
    assert least["layer"] == 8 * 16 * 16 * (4 + 4) * 4
    assert least["state"] + least["layer"] <= peak_bytes(facts)
    assert "facts" in compiler.answer({**request, "limit": peak_bytes(facts)})


@pytest.mark.parametrize(
    ("mesh", "state", "layer"),
    [({"data": 4}, 1, 1 / 4), ({"space": [4, 1]}, 1, 1 / 4), ({"data": 2, "space": [2, 1]}, 1, 1 / 4)],
)
def test_what_devices_share_is_divided_and_what_each_holds_is_not(
    mesh: dict[str, Any], state: float, layer: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "compile_facts", lambda *_: pytest.fail("it was compiled"))
    one, many = (compiler.answer({**request_of(shape), "limit": 1})["least"] for shape in ({}, mesh))
    assert many["state"] == state * one["state"]
    assert many["layer"] == layer * one["layer"]


def test_zero_divides_the_state_among_all_replicas_also_of_those_that_are_not_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compiler, "compile_facts", lambda *_: pytest.fail("it was compiled"))
    states = [
        compiler.answer({**request_of({"data": n, "zero": 3}, width=64, batch_size=64), "limit": 1})["least"]["state"]
        for n in (2, 8, 32)
    ]
    assert states[0] > 2 * states[1] > 2 * states[2]


def test_a_batch_that_no_compiler_can_count_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "compile_facts", lambda *_: pytest.fail("it was compiled"))
    few, many = (
        compiler.answer({**request_of(batch_size=size), "limit": limit})["least"]
        for size, limit in ((8, 1), (1 << 40, 1e12))
    )
    assert many["layer"] == (1 << 37) * few["layer"]


class _Fake:
    """Stands for the processes that compile."""

    started: list[str] = []
    asked: list[dict[str, Any]] = []

    def __init__(self, _devices: int, flags: str) -> None:
        _Fake.started.append(flags)

    def __enter__(self) -> _Fake:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        _Fake.asked.append(request)
        large = request.get("limit") is not None and request["limit"] < 100
        return {"least": {"state": 60, "layer": 40}} if large else {"facts": {}}


def test_a_bound_is_kept_for_smaller_devices_and_a_larger_one_is_compiled_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(children, "_Compilers", _Fake)
    monkeypatch.setattr(_Fake, "asked", [])
    monkeypatch.setattr(_Fake, "started", [])

    def ask(limit: float | None, *, exact: bool = True) -> dict[str, Any]:
        request = {"config": {"mesh": {"data": 2}, "run": {"batch_size": 4}}}
        (found,) = children.compile_all(
            [request], 2, processes=1, on_answer=lambda _: None, exact=exact, limit=limit
        )  # fmt: skip
        return dict(found)

    assert "least" in ask(50.0)
    assert "least" in ask(50.0)
    assert "least" in ask(99.0)
    assert len(_Fake.asked) == 1, "the bound was kept"
    assert "facts" in ask(100.0)
    assert "facts" in ask(None)
    assert "facts" in ask(50.0), "what was compiled is an answer for every machine"
    assert len(_Fake.asked) == 2
    assert "limit" in _Fake.asked[0]
    # another compiler's machine takes the quicker options, and the two are kept apart
    assert "facts" in ask(None, exact=False)
    assert [children.PLAINER in flags for flags in _Fake.started] == [False, False, True]
    names = [json.loads(path.read_text()) for path in tmp_path.rglob("*.json")]
    assert len(names) == 2
