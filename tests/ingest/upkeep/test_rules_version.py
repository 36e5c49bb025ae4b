"""A cube keeps the version of the rules for pixels that it was begun with; a new cube gets the newest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import ingest.run.task as making
from ingest.plan.plan import Plan
from ingest.plan.stored import PLAN_KEY, kept_plan
from ingest.plan.task import RULES_VERSION
from ingest.run.loop import run
from zarr_store.errors import InvalidInput

from ..growing import NAME, extend_with, plan_of, scene, tree


def test_a_cube_of_before_is_continued_by_its_own_rules(
    tmp_path: Path, local_client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenes = [scene(tmp_path / "s", day) for day in (10, 12)]
    fresh, cube = plan_of(scenes[:1]), tmp_path / "cube.zarr"
    old = fresh.under_rules({NAME: 1})
    assert (old.recipes[0].exact_edges, fresh.recipes[0].exact_edges) == (False, True)
    assert [task.key for task in old.tasks] != [task.key for task in fresh.tasks]
    text = json.loads(old.to_json())
    assert "rules" not in text["recipes"][0], "as releases of before wrote it"
    assert Plan.from_json(old.to_json()).recipes[0].version == 1
    run(old, cube, client=local_client)
    before = tree(cube)
    with monkeypatch.context() as patch:
        patch.setattr(making, "fill_shard", lambda *_, **__: pytest.fail("a pixel was read"))
        assert len(run(fresh, cube, client=local_client).skipped) == len(fresh.tasks)
        assert tree(cube) == before
        (cube / PLAN_KEY).unlink()  # a release before that kept no plan
        assert len(run(fresh, cube, client=local_client).skipped) == len(fresh.tasks)
        assert tree(cube) == before
    report = extend_with(cube, scenes, local_client)
    assert len(report.written) == len(report.skipped) == len(fresh.tasks)
    assert kept_plan(cube).recipes[0].version == 1
    run(fresh, tmp_path / "new.zarr", client=local_client)
    assert kept_plan(tmp_path / "new.zarr").recipes[0].version == RULES_VERSION


def test_a_plan_of_a_newer_release_is_refused(tmp_path: Path) -> None:
    text = json.loads(plan_of([scene(tmp_path / "s", 10)]).to_json())
    text["recipes"][0]["rules"] = RULES_VERSION + 1
    known = f"version {RULES_VERSION + 1} of the rules for pixels; this release knows 1 … {RULES_VERSION}"
    with pytest.raises(InvalidInput, match=known):
        Plan.from_json(json.dumps(text))
