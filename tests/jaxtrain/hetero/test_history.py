"""Shares that were recorded, chunks that are read ahead, and memory that bounds a share."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import jax
import numpy as np
import pytest

from jaxtrain.data.order import SampleOrder
from jaxtrain.data.room import free_bytes
from jaxtrain.data.windows import Windows
from jaxtrain.hetero.history import ShareHistory, read_events, read_shares
from jaxtrain.hetero.membership import Event
from jaxtrain.hetero.memory import most_chunks
from jaxtrain.hetero.replica import join_group
from jaxtrain.hetero.stream import ChunkStream
from jaxtrain.parallel.mesh import batch_sharding


def test_a_later_line_of_a_step_counts_and_a_cut_line_does_not(tmp_path: Path) -> None:
    with ShareHistory(tmp_path) as history:
        history.write(0, {"a": (0, 1), "b": (2,)}, "a")
        history.write_event(Event("dropped", 1, "b", "was silent for 9.0 s"))
        history.write(1, {"a": (0, 1, 2)}, "a")
    with (tmp_path / "shares.jsonl").open("a") as file:
        file.write('{"step": 2, "sha')
    with ShareHistory(tmp_path) as history:  # the run continues from step 1
        history.write(1, {"a": (0,), "c": (1, 2)}, "c")
    assert read_shares(tmp_path) == {0: {"a": (0, 1), "b": (2,)}, 1: {"a": (0,), "c": (1, 2)}}
    assert read_shares(tmp_path, first=1) == {1: {"a": (0,), "c": (1, 2)}}
    assert [(event["event"], event["member"]) for event in read_events(tmp_path)] == [("dropped", "b")]
    with ShareHistory(tmp_path):
        pass
    lines = [json.loads(line) for line in (tmp_path / "shares.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 1]  # one for each step, and the event


def test_a_run_without_replicas_has_no_history(tmp_path: Path) -> None:
    assert read_shares(tmp_path) == {}
    assert read_events(tmp_path) == []


class Reader:
    """Windows whose image is their number; counts what is read."""

    shows: Literal["windows"] = "windows"

    def __init__(self) -> None:
        self.read_rows: list[int] = []
        self.lock = threading.Lock()

    def begin(self, rows: np.ndarray) -> Callable[[], dict[str, np.ndarray]]:
        with self.lock:
            self.read_rows += rows[:, 0].tolist()
        return lambda: {"image": rows[:, 0].astype(np.int32)}

    def read(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return self.begin(rows)()


@pytest.fixture
def stream(program_of: Callable[..., Any]) -> Any:
    reader = Reader()
    rows = np.zeros((20, 3), np.int32)
    rows[:, 0] = np.arange(20)
    with ChunkStream(
        reader, Windows(8, rows), order=SampleOrder(3, 20), batch_size=8, chunk=2,
        sharding=batch_sharding(program_of().mesh), last=5, ahead=1,
    ) as stream:  # fmt: skip
        yield stream, reader


def numbers(batch: Mapping[str, jax.Array]) -> list[int]:
    return np.asarray(batch["image"]).tolist()


def test_chunks_are_the_windows_of_the_batch_in_its_order(stream: Any) -> None:
    """Two epochs of 20 windows in five steps of 8: the chunks of all replicas together are the order of the run."""
    chunks, reader = stream
    order = SampleOrder(3, 20)
    for step in range(5):
        shares = ((0, 1, 2), (3,)) if step % 2 else ((0,), (1, 2, 3))
        seen: list[int] = []
        for share in shares:  # two replicas, one after the other
            chunks.expect(step, share)
            for chunk in share:
                seen += numbers(chunks.take(step, chunk))
        assert seen == order.indices(8 * step, 8).tolist()
        assert seen == chunks.rows(step)[:, 0].tolist()
    assert max(reader.read_rows) < 20


def test_what_a_moved_share_keeps_is_not_read_again(stream: Any) -> None:
    chunks, reader = stream
    chunks.expect(0, (0, 1))
    for chunk in (0, 1):
        chunks.take(0, chunk)
    chunks.expect(1, (0, 1, 2))  # chunks 0 and 1 of step 1 were read ahead
    chunks.add(1, (3,))  # of a replica that was lost
    got = [number for chunk in (0, 1, 2, 3) for number in numbers(chunks.take(1, chunk))]
    assert got == SampleOrder(3, 20).indices(8, 8).tolist()
    # two chunks of step 0, two of step 1 ahead, the third of step 1, three of step 2 ahead, and the added one
    assert len(reader.read_rows) == 2 * (2 + 2 + 1 + 3 + 1)


def test_memory_bounds_a_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    2000 kB\n")
    assert free_bytes(tmp_path / "meminfo", tmp_path) == 2_048_000
    (tmp_path / "memory.max").write_text("1000000")
    (tmp_path / "memory.current").write_text("400000")
    assert free_bytes(tmp_path / "meminfo", tmp_path) == 600_000
    (tmp_path / "memory.max").write_text("max")
    assert free_bytes(tmp_path / "meminfo", tmp_path) == 2_048_000
    assert free_bytes(tmp_path / "absent", tmp_path) is None
    monkeypatch.setattr("jaxtrain.hetero.memory.free_bytes", lambda: 30_000)
    assert most_chunks(1000, steps=3, environment={}) == 5
    two = {"TERRASHARD_LOCAL_PROCESSES": "2"}
    assert most_chunks(1000, steps=3, free=600_000, environment=two) == 50
    assert most_chunks(10**9, steps=3, free=600_000, environment=two) == 1


def test_a_replica_joins_with_the_bound_of_its_memory_and_what_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Asked(Exception):
        """Ends the joining."""

    given: dict[str, Any] = {}

    def join(*_: Any, **options: Any) -> None:
        given.update(options)
        raise Asked

    monkeypatch.setattr("jaxtrain.hetero.replica.warm_up", lambda *_: 3)
    monkeypatch.setattr("jaxtrain.hetero.replica.identify", lambda *_: None)
    monkeypatch.setattr("jaxtrain.hetero.member.Member.join", join)
    with ShareHistory(tmp_path) as history:
        for step in range(3):
            history.write(step, {"a": (0, 1), "b": (2, 3)}, "a")
    config = SimpleNamespace(
        run=SimpleNamespace(batch_size=8), chunk=2, hetero=SimpleNamespace(silence_s=7.0)
    )  # fmt: skip
    group: Any = SimpleNamespace(leads=False, address="127.0.0.1:1", secret="s", name="a")
    joining: Any = join_group(group, config, None, None, tmp_path, state_step=2)  # type: ignore[arg-type]
    with pytest.raises(Asked), joining:
        pass
    assert given == {
        "chunks": 4, "limit": 3, "state_step": 2, "silence_s": 7.0, "replay": {2: {"a": (0, 1), "b": (2, 3)}}
    }  # fmt: skip
