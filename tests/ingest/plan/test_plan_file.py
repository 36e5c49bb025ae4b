"""Plan files: one document that is written and read line by line, and the older layout, which is read as a whole."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli import ingesting
from ingest.plan import plan_file
from ingest.plan.plan import Plan
from ingest.plan.plan_file import stated_digest
from ingest.plan.reach import make_tasks
from ingest.plan.task import PlannedScene, Recipe, SourceAsset, digest
from zarr_store.errors import InvalidInput
from zarr_store.grid import Grid
from zarr_store.spec import BandSpec, CubeSpec, Layout

SIDE = 16 * 30
GRID = Grid("EPSG:32633", (10.0, 0.0, 0.0, 0.0, -10.0, 0.0), (SIDE, SIDE))


def make(steps: int, *, name: str = "s2") -> Plan:
    """900 shards and one scene on each of some dates."""
    times = tuple(f"2023-01-{1 + n:02}T00:00:00" for n in range(steps))
    recipe = Recipe(
        CubeSpec(name, "reflectance", (BandSpec("red"),), GRID, times, (), Layout("t", (1, 16, 16), (1, 16, 16)))
    )
    scenes = [
        PlannedScene(n, f"s{n} “quoted” \\ {{", n, GRID,
                     (SourceAsset(f"s{n}", "red", "red", f"/a/{n}.tif", GRID, 0, "data", "uint16", "nearest", 0),))
        for n in range(steps)
    ]  # fmt: skip
    items = tuple({"id": scene.item_id, "datetime": times[scene.step], "step": scene.step} for scene in scenes)
    tasks = make_tasks(recipe, scenes)
    return Plan((recipe,), {name: items}, tuple(tasks), warnings=('mind "tasks": [',), statistics={name: {"a": 1}})


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make(4)


def test_a_file_is_one_document_with_a_line_for_each_scene_and_shard(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    assert text == plan.to_json()
    document = json.loads(text)
    assert (len(document["tasks"]), len(document["scenes"]["s2"]), len(document["items"]["s2"])) == (3600, 4, 4)
    assert 3600 + 8 < len(text.splitlines()) < 3600 + 150
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan
    assert again.digest == plan.digest == document["digest"]
    with (tmp_path / "plan.json").open("rb") as stream:
        assert stated_digest(stream) == plan.digest


def test_the_digest_is_that_of_the_whole_as_before(plan: Plan) -> None:
    parts = {
        "recipes": [[recipe.rules(), list(recipe.spec.times)] for recipe in plan.recipes],
        "items": {name: [dict(item) for item in rows] for name, rows in plan.items.items()},
        "tasks": [task.key for task in plan.tasks],
    }
    assert plan.digest == digest(parts)


@pytest.mark.parametrize("seekable", [True, False])
def test_each_long_part_is_read_from_its_place(plan: Plan, seekable: bool) -> None:
    data, lines = plan.to_json().encode(), [0]

    class Stream(io.BytesIO):
        def readline(self, size: int | None = -1) -> bytes:
            line = super().readline(size)
            lines[0] += len(line)
            return line

        def seekable(self) -> bool:
            return seekable

    assert Plan.from_file(lambda: Stream(data)) == plan
    assert len(data) < lines[0] < 2.1 * len(data), "once as a whole, and each part once more"

    files = iter([data, data.replace(b'"scenes"', b'"sceneS"')])
    with pytest.raises(InvalidInput, match="was replaced while it was read"):
        Plan.from_file(lambda: Stream(next(files)))


@pytest.mark.parametrize("how", [{"indent": 1, "sort_keys": True}, {}, {"indent": 2}])
def test_a_file_of_another_layout_is_the_same_plan(plan: Plan, how: dict[str, Any]) -> None:
    assert Plan.from_json(json.dumps(json.loads(plan.to_json()), **how)) == plan


def test_a_plan_without_shards_or_with_two_collections(plan: Plan) -> None:
    other = make(1, name="s1")
    both = Plan((*plan.recipes, *other.recipes), {**plan.items, **other.items}, (*other.tasks, *plan.tasks))
    assert Plan.from_json(both.to_json()) == both
    bare = Plan(plan.recipes, {"s2": ()}, ())
    assert Plan.from_json(bare.to_json()) == bare


def edited(text: str) -> str:
    return text.replace('"id":"s0', '"id":"s9', 1)


def cut_in_a_line(text: str) -> str:
    return text[: text.index('"tasks"') + 500]


def cut_between_lines(text: str) -> str:
    return "".join(text.splitlines(keepends=True)[:-20])


def without_a_scene(text: str) -> str:
    lines = text.splitlines(keepends=True)
    first = lines.index(' "scenes": {\n') + 2
    return "".join(lines[:first] + lines[first + 1 :])


def with_a_broken_task(text: str) -> str:
    head, _, tail = text.partition(' "tasks": [\n')
    return f'{head} "tasks": [\n  {{"collection": oops}},\n{tail}'


def with_no_number(text: str) -> str:
    return text.replace('"step":0', '"step":NaN', 1)


def without_its_digest(text: str) -> str:
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith(' "digest": '))


SPOILT = [
    edited, cut_in_a_line, cut_between_lines, without_a_scene, with_a_broken_task, with_no_number, without_its_digest,
]  # fmt: skip


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_spoilt_file_is_refused(plan: Plan, spoil: Callable[[str], str]) -> None:
    text = spoil(plan.to_json())
    assert text != plan.to_json()
    with pytest.raises(InvalidInput, match="plan again"):
        Plan.from_json(text, "plan.json")


def test_a_file_that_is_too_large_is_refused(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(plan_file, "_MOST_STREAMED", 10_000)
        with pytest.raises(InvalidInput, match="has more than the 10000 bytes that a plan may have"):
            Plan.from_json(plan.to_json(), "plan.json")
    monkeypatch.setattr(plan_file, "_MOST_BYTES", 10_000)
    for text in (json.dumps(json.loads(plan.to_json())), "1,\n" * 5000):
        with pytest.raises(InvalidInput, match=r"at most 10000 bytes|more than 10000 bytes beside its tables"):
            Plan.from_json(text, "plan.json")


@pytest.mark.parametrize(
    "filling",
    [
        lambda n: '  "a": [\n' + "   {},\n" * n + "   {}\n  ],\n",
        lambda n: '  "a": [\n  ],\n' * n,
    ],
    ids=["entries", "tables"],
)
def test_many_small_entries_are_refused_before_they_fill_the_memory(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, filling: Callable[[int], str]
) -> None:
    monkeypatch.setattr(plan_file, "_FREE_WEIGHT", 1 << 16)
    assert Plan.from_json(plan.to_json()) == plan, "what planning writes is far from the bound"
    head, _, tail = plan.to_json().partition(' "items": {\n')
    made: list[Any] = []
    file = plan_file.PlanFile(lambda: io.BytesIO(f'{head} "items": {{\n{filling(5000)}{tail}'.encode()), "plan.json")
    with pytest.raises(InvalidInput, match='bytes of "items" would take more memory'):
        file.tables("items", made.append)
    assert len(made) < 500


class Lines(io.BytesIO):
    """A file that is read by lines alone; it notes the longest one."""

    longest = 0

    def readline(self, size: int | None = -1, /) -> bytes:
        line = super().readline(size)
        Lines.longest = max(Lines.longest, len(line))
        return line

    def read(self, size: int | None = -1, /) -> bytes:
        raise AssertionError("the file is read as a whole")


def test_writing_and_reading_hold_a_piece_at_a_time(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_file, "_PIECE", 1 << 14)
    parts = list(plan.pieces())
    data = b"".join(parts)
    assert len(data) > 400_000
    assert max(map(len, parts)) < (1 << 14) + 2000, "a piece, and the line that fills it"
    assert Plan.from_file(lambda: Lines(data)) == plan
    assert 0 < Lines.longest < 2000
    with pytest.raises(AssertionError, match="as a whole"):
        Plan.from_file(lambda: Lines(json.dumps(json.loads(data)).encode()))


def test_a_plan_too_large_to_be_looked_at_as_a_whole_is_still_a_plan(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingesting, "_HEAD_BYTES", 1000)
    plan.save(tmp_path / "plan.json")
    assert ingesting.is_plan(str(tmp_path / "plan.json"))
    (tmp_path / "items.json").write_text(json.dumps({"type": "FeatureCollection", "features": ["x"] * 1000}))
    assert not ingesting.is_plan(str(tmp_path / "items.json"))
