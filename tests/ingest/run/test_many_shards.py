"""Runs of many shards: nothing is read, made or kept for each of all shards, where one shard is meant."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import zarr_store.states as keeping
from cli.status import examine
from ingest.plan.plan import Plan
from ingest.request.config import IngestConfig
from ingest.run.loop import IngestEvent, run
from zarr_store.backends import open_store
from zarr_store.folder import FolderStore
from zarr_store.read import open_cube
from zarr_store.spec import CubeSpec
from zarr_store.states import read_states

from ..growing import NAME, plan_of, scene, tree

KEPT = f"_terrashard/states/{NAME}.bin"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """What is read from any folder, and how often all shards of a collection are listed, by kind."""
    found: Counter[str] = Counter()
    real, shards = FolderStore.read, CubeSpec.shards

    def read(self: FolderStore, key: str) -> bytes | None:
        kind = "row" if "/ledger/" in key else "metadata" if key.endswith("zarr.json") else "other"
        found[kind] += 1
        return real(self, key)

    def listed(self: CubeSpec) -> Any:
        found["all shards"] += 1
        return shards(self)

    monkeypatch.setattr(FolderStore, "read", read)
    monkeypatch.setattr(CubeSpec, "shards", listed)
    monkeypatch.setattr(keeping, "KEPT_FROM", 4)
    return found


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Plan]:
    """Plans of one date and of three: 4 and 12 shards."""
    folder = tmp_path_factory.mktemp("scenes")
    scenes = [scene(folder, day) for day in (1, 2, 3)]
    return plan_of(scenes[:1]), plan_of(scenes)


def test_metadata_and_lists_of_shards_are_read_for_a_run_and_not_for_each_shard(
    plans: tuple[Plan, Plan], reads: Counter[str], local_client: Any, tmp_path: Path
) -> None:
    counts = []
    for number, plan in enumerate(plans):
        reads.clear()
        assert run(plan, tmp_path / str(number), client=local_client).exit_code == 0
        counts.append(Counter(reads))
    few, many = counts
    assert many["row"] > few["row"], "each shard looks for its own row"
    assert many["metadata"] == few["metadata"]
    assert many["all shards"] == few["all shards"]


def test_a_run_leaves_the_states_and_the_next_one_and_status_read_no_row(
    plans: tuple[Plan, Plan], reads: Counter[str], local_client: Any, tmp_path: Path
) -> None:
    plan, url = plans[1], tmp_path / "c.zarr"
    report = run(plan, url, client=local_client)
    assert [(len(row.stats), row.state) for row in report.written] == [(0, "done")] * 12
    assert (url / KEPT).exists()
    before = tree(url)
    reads.clear()
    again = run(plan, url, client=local_client)
    assert (len(again.skipped), again.written, reads["row"]) == (12, (), 0)
    assert tree(url) == before
    assert examine(open_cube(url), NAME) == {
        "done": 12, "partial": 0, "failed": 0, "pending": 0, "total": 12, "complete": True, "unfinished": [],
    }  # fmt: skip
    assert reads["row"] == 0
    assert len(open_cube(url).ledger(NAME).get((0, 0, 0)).stats) == 4


def test_kept_states_are_those_of_the_rows_after_faults_limits_and_another_try(
    plans: tuple[Plan, Plan], local_client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "KEPT_FROM", 4)
    plan, url = plans[1], tmp_path / "c.zarr"
    hidden = Path(plan.tasks[0].sources[0].assets[0].href)

    def check(counts: dict[str, int]) -> None:
        kept = open_cube(url).states(NAME)
        assert (url / KEPT).exists()
        (url / KEPT).rename(tmp_path / "aside")
        rows = read_states(open_store(url), plan.specs[0])
        (tmp_path / "aside").rename(url / KEPT)
        assert kept.count() == rows.count() == counts | {"total": 12}
        assert (kept.codes == rows.codes).all()
        assert (kept.keys == rows.keys).all()

    try:
        hidden.rename(hidden.with_suffix(".away"))
        run(plan, url, client=local_client, config=IngestConfig(retries=0))
    finally:
        hidden.with_suffix(".away").rename(hidden)
    check({"done": 8, "partial": 4, "failed": 0, "pending": 0})
    found = examine(open_cube(url), NAME)
    assert [one["missing"][0]["asset"] for one in found["unfinished"]] == ["red"] * 4
    run(plan, url, client=local_client)
    check({"done": 12, "partial": 0, "failed": 0, "pending": 0})


def test_a_run_that_is_interrupted_leaves_no_states(
    plans: tuple[Plan, Plan], local_client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "KEPT_FROM", 4)
    plan, url = plans[1], tmp_path / "c.zarr"
    config = IngestConfig(limit=8)
    run(plan, url, client=local_client, config=config)
    assert open_cube(url).states(NAME).count()["done"] == 8
    assert (url / KEPT).exists()

    def stop(event: IngestEvent) -> None:
        if event.kind == "shard":
            assert not (url / KEPT).exists(), "the states are removed before a row changes"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(plan, url, client=local_client, on_event=stop)
    assert not (url / KEPT).exists()
    assert open_cube(url).states(NAME).count()["done"] >= 9
    assert run(plan, url, client=local_client).exit_code == 0
    assert open_cube(url).states(NAME).count()["done"] == 12


def test_a_plan_that_was_replaced_by_another_key_is_made_again(
    plans: tuple[Plan, Plan], local_client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "KEPT_FROM", 4)
    plan, url = plans[1], tmp_path / "c.zarr"
    run(plan, url, client=local_client)
    states = open_cube(url).states(NAME)
    task = plan.tasks[3]
    assert states.has_key(task.index, task.key)
    assert not states.has_key(task.index, replace(task, key="f" * 32).key)
