"""Replicas that train together: threads of this process with a real group between them."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from jaxtrain import TrainEvent, train
from jaxtrain.config import TrainConfig
from jaxtrain.hetero.chunks import ChunkPrograms, pack_state
from jaxtrain.hetero.coordinator import Coordinator
from jaxtrain.hetero.history import read_events, read_shares
from jaxtrain.hetero.member import Member
from jaxtrain.hetero.membership import TooFewMembers
from jaxtrain.hetero.replica import Replica
from jaxtrain.runs.checkpoint import CheckpointStore, name_leaves, target_of
from jaxtrain.runs.events import TrainingResult
from jaxtrain.runs.log import read_metrics
from jaxtrain.runs.rundir import LOCK_KEY, load_card, program_of
from zarr_store.errors import InvalidInput, Locked, Preempted
from zarr_store.lock import CubeLock

from ..cube_factory import make_cube, shared_cube, tiny_config

SECRET = "a secret of this test, long enough"
STEPS, CHUNKS = 12, 4
MOVING = {step: {"a": tuple(range(step % 5)), "b": tuple(range(step % 5, CHUNKS))} for step in range(STEPS)}
"""Shares that move at every step; a replica has none now and then."""

Found = dict[str, TrainingResult | BaseException]


class Stop(Exception):
    """Stands for whatever ends a process."""


def hetero_config(**sections: Any) -> TrainConfig:
    values = tiny_config(shared_cube()).model_dump(exclude_unset=True)
    values["hetero"] = {"enabled": True, "chunk": 2, "silence_s": 60.0}
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return TrainConfig.model_validate(values)


class Crew:
    """Threads that train in one group, each under the name of its replica."""

    def __init__(self, out: Path, expected: int, on_event: Callable[[str, TrainEvent], None], least: int = 1) -> None:
        self.out, self.on_event = out, on_event
        self.found: Found = {}
        self.threads: list[threading.Thread] = []
        self.coordinator = Coordinator("127.0.0.1:0", SECRET, min_members=least, max_members=4, expected=expected)

    def start(self, name: str, config: TrainConfig) -> None:
        self.threads.append(threading.Thread(target=self._train, args=(name, config), name=name))
        self.threads[-1].start()

    def _train(self, name: str, config: TrainConfig) -> None:
        environment = {
            "TERRASHARD_HETERO_COORDINATOR": self.coordinator.address,
            "TERRASHARD_HETERO_SECRET": SECRET,
            "TERRASHARD_HETERO_NAME": name,
        }
        try:
            with jax.numpy_dtype_promotion("strict"):
                self.found[name] = train(
                    config, self.out, environment=environment, on_event=lambda event: self.on_event(name, event)
                )
        except BaseException as error:  # noqa: BLE001  looked at by the test
            self.found[name] = error

    def finish(self) -> Found:
        for thread in self.threads:  # which grows while replicas come
            thread.join(timeout=220)
            assert not thread.is_alive()
        self.coordinator.close()
        return self.found


def run_group(
    config: TrainConfig,
    out: Path,
    names: tuple[str, ...] = ("a", "b"),
    on_event: Callable[[str, TrainEvent], None] = lambda _name, _event: None,
    least: int = 1,
) -> Found:
    crew = Crew(out, len(names), on_event, least)
    for name in names:
        crew.start(name, config)
    return crew.finish()


def results(found: Mapping[str, TrainingResult | BaseException]) -> dict[str, TrainingResult]:
    for error in found.values():
        if isinstance(error, BaseException):
            raise error
    return {name: result for name, result in found.items() if isinstance(result, TrainingResult)}


def state_of(run: Path) -> dict[str, np.ndarray]:
    card = load_card(run)
    restored = CheckpointStore(run / "checkpoints").restore(target_of(program_of(card, card.config)))
    assert restored is not None
    return {name: np.asarray(leaf) for name, leaf in name_leaves(restored.state).items()}


def losses(run: Path, kind: str = "train") -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(run) if line["kind"] == kind}


class Trained(NamedTuple):
    out: Path
    found: dict[str, TrainingResult]
    told: list[tuple[str, TrainEvent]]
    compiled: list[int]
    """Steps done at each compilation."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run of two replicas whose shares move at every step."""
    out = tmp_path_factory.mktemp("hetero") / "run"
    told: list[tuple[str, TrainEvent]] = []
    compiled: list[int] = []

    def steps_done() -> int:
        return max([event.step for _, event in told if event.kind == "step"], default=0)

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(steps_done())

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("jaxtrain.hetero.replica.read_shares", lambda _out, first: MOVING)
            found = run_group(hetero_config(), out, on_event=lambda name, event: told.append((name, event)))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return Trained(out, results(found), told, compiled)


def test_replicas_train_one_run(trained: Trained) -> None:
    out, found, told, _ = trained
    (leader,) = [name for name, result in found.items() if result.leads]
    assert {result.steps for result in found.values()} == {STEPS}
    assert {name for name, event in told if event.kind != "warning"} == {leader}
    lines = [line for line in read_metrics(out) if line["kind"] == "train"]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["shares"] for line in lines] == [{n: len(c) for n, c in MOVING[s].items()} for s in range(STEPS)]
    assert all(set(line["rates"]) == {n for n, share in line["shares"].items() if share} for line in lines)
    assert set(lines[-1]["waiting"]) == {"a", "b"}
    assert lines[-1]["efficiency"] > 0
    assert lines[-1]["loss"] < 0.75 * lines[0]["loss"]
    assert [line["step"] for line in read_metrics(out) if line["kind"] == "validation"] == [6, 12]
    shown = next(event.message for _, event in told if event.kind == "step" and event.step == 12)
    assert "shares a:1 b:3" in shown
    result = found[leader].to_dict()
    assert (result["shares"], result["recompiles"]) == ({"a": 1, "b": 3}, 0)
    assert result["efficiency"] == lines[-1]["efficiency"]
    assert not (out / "run.lock").exists()
    report = (out / "report.html").read_text()
    assert "<h2>Replicas</h2>" in report
    assert "Chunks of each replica over steps" in report
    board = "".join(path.read_bytes().decode("latin-1") for path in (out / "tensorboard").glob("events*"))
    assert "train/shares/a" in board
    assert "train/waiting/b" in board


def test_each_chunk_of_each_step_is_computed_once(trained: Trained) -> None:
    recorded = read_shares(trained.out)
    assert sorted(recorded) == list(range(STEPS))
    for shares in recorded.values():
        assert Counter(chunk for chunks in shares.values() for chunk in chunks) == Counter(range(CHUNKS))


def test_nothing_is_compiled_while_shares_move(trained: Trained) -> None:
    """From the first step to the first validation, and from there to the last step; JAX itself counts."""
    assert 0 in trained.compiled  # the listener hears
    assert [step for step in trained.compiled if step not in (0, 6, STEPS)] == []
    assert {result.recompiles for result in trained.found.values()} == {0}


def test_recorded_shares_are_repeated_bit_by_bit(trained: Trained, tmp_path: Path) -> None:
    """A run that lost its last checkpoints does the steps after them with the shares that it had."""
    copy = tmp_path / "run"
    shutil.copytree(trained.out, copy)
    for step in CheckpointStore(copy / "checkpoints").steps():
        if step > 5:
            shutil.rmtree(copy / "checkpoints" / f"{step:08d}")
    found = results(run_group(hetero_config(), copy))
    assert {result.resumed_from for result in found.values()} == {5}
    assert read_shares(copy) == read_shares(trained.out) == MOVING
    assert losses(copy) == losses(trained.out)
    assert losses(copy, "validation") == losses(trained.out, "validation")
    one, other = state_of(copy), state_of(trained.out)
    for name, leaf in one.items():
        assert leaf.tobytes() == other[name].tobytes(), name


def test_replicas_come_and_die_and_the_run_ends_as_if_nothing_had_happened(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """b dies in step 3, its chunks computed; c comes after step 4; a, which leads, dies in a validation."""
    fired: list[str] = []
    joined = threading.Event()
    compute, join, share_of = Replica._compute, Member.join, Replica.share_of

    def dying(self: Replica, state: Any, step: int, *rest: Any, **more: Any) -> Any:
        seconds = compute(self, state, step, *rest, **more)
        if self.name == "b" and step == 2:
            fired.append("b died in a step")
            raise Stop
        return seconds

    def validating(self: Replica, count: int) -> tuple[int, int]:
        if self.name == "a" and len(self.member.members) == 2:
            fired.append("a died in a validation")
            raise Stop
        return share_of(self, count)

    def joining(address: str, secret: str, name: str, *rest: Any, **more: Any) -> Member:
        member = join(address, secret, name, *rest, **more)
        if name == "c":
            joined.set()
        return member

    monkeypatch.setattr(Replica, "_compute", dying)
    monkeypatch.setattr(Replica, "share_of", validating)
    monkeypatch.setattr(Member, "join", joining)

    def on_event(name: str, event: TrainEvent) -> None:
        if event.kind == "step" and event.step == 4:
            crew.start("c", config)
            crew.start("d", hetero_config(run={"seed": 1}))
            crew.start("e", hetero_config(data={"cube": str(elsewhere)}))
            assert joined.wait(timeout=100)
            until = time.monotonic() + 100
            while not {"d", "e"} <= crew.found.keys() and time.monotonic() < until:  # both answers come within the run
                time.sleep(0.01)

    config, out, elsewhere = hetero_config(), tmp_path / "run", tmp_path / "other.zarr"
    make_cube(elsewhere, seed=1)
    crew = Crew(out, 2, on_event)
    for name in ("a", "b"):
        crew.start(name, config)
    found = crew.finish()
    assert sorted(fired) == ["a died in a validation", "b died in a step"]
    assert isinstance(found["a"], Stop)
    assert isinstance(found["b"], Stop)
    # another seed is another run: it is refused, in one line, and nobody minds
    assert isinstance(found["d"], InvalidInput)
    assert "configuration differs" in str(found["d"])
    # so are other data behind the same configuration
    assert isinstance(found["e"], InvalidInput), found["e"]
    assert "its data differs from that of the group" in str(found["e"])
    assert "let it read the same cube or store, and the same split" in str(found["e"])
    last = found["c"]
    assert isinstance(last, TrainingResult), last
    assert (last.steps, last.leads) == (STEPS, True)
    shares = read_shares(out)
    assert set(shares[2]) == {"a"}  # the chunks of the dead one were done by the other, in the same step
    for step in range(STEPS):
        assert Counter(chunk for chunks in shares[step].values() for chunk in chunks) == Counter(range(CHUNKS))
    assert [line["step"] for line in read_metrics(out) if line["kind"] == "train"] == list(range(1, STEPS + 1))
    for kind in ("train", "validation"):
        expected = losses(trained.out, kind)
        assert losses(out, kind) == pytest.approx(expected, rel=1e-3), kind
    events = [(event["event"], event["member"]) for event in read_events(out)]
    assert ("dropped", "b") in events
    assert ("joined", "c") in events
    assert ("dropped", "a") in events
    assert not (out / "run.lock").exists()


def test_one_may_leave_and_all_may_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM to one replica lets the others go on; to all it saves, and the same command continues."""
    asked = {name: threading.Event() for name in ("a", "b", "c")}

    @contextlib.contextmanager
    def watch(_shared: object) -> Iterator[threading.Event]:
        yield asked[threading.current_thread().name]

    monkeypatch.setattr("jaxtrain.loop._watch_for_sigterm", watch)

    def on_event(_name: str, event: TrainEvent) -> None:
        if event.kind == "step" and event.step == 2:
            asked["c"].set()
        if event.kind == "step" and event.step == 4:
            asked["a"].set()
            asked["b"].set()

    out = tmp_path / "run"
    found = run_group(hetero_config(), out, ("a", "b", "c"), on_event)
    assert all(isinstance(error, Preempted) for error in found.values()), found
    assert "c has left" in str(found["c"])
    assert "going on without it: a, b" in str(found["c"])
    assert CheckpointStore(out / "checkpoints").steps() == [5]
    assert [f"saved at step 5 of {STEPS}" in str(found[name]) for name in ("a", "b")] == [True, True]
    assert ("left", "c") in [(event["event"], event["member"]) for event in read_events(out)]


def test_states_that_drift_apart_are_found_and_the_leaders_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two kinds of device round differently: here the parameters of the one that follows move by a last bit or two."""
    apply, compare = ChunkPrograms.apply, Replica.compare
    drifted: list[str] = []
    before: dict[int, dict[str, bytes]] = {}
    after: dict[int, dict[str, bytes]] = {}
    roles: dict[str, bool] = {}

    def rounding(self: ChunkPrograms, state: Any, *rest: Any) -> Any:
        state, metrics = apply(self, state, *rest)
        name = threading.current_thread().name
        if int(state.step) == 2 and not roles[name]:
            drifted.append(name)
            moved = jax.tree.map(lambda leaf: leaf * np.float32(1 + 2**-22), state.params)
            state = dataclasses.replace(state, params=moved)
        return state, metrics

    def comparing(self: Replica, state: Any, step: int) -> Any:
        roles[self.name] = self.leads
        before.setdefault(step, {})[self.name] = bytes(pack_state(state))
        state, line = compare(self, state, step)
        after.setdefault(step, {})[self.name] = bytes(pack_state(state))
        return state, line

    monkeypatch.setattr(ChunkPrograms, "apply", rounding)
    monkeypatch.setattr(Replica, "compare", comparing)
    told: list[TrainEvent] = []
    config = hetero_config(hetero={"compare_every": 3}, run={"steps": 6, "evaluate_every": 6, "checkpoint_every": 6})
    found = results(run_group(config, tmp_path / "run", on_event=lambda _name, event: told.append(event)))
    (leader,) = [name for name, result in found.items() if result.leads]
    assert drifted == [name for name in found if name != leader]
    kinds = {step: len(set(states.values())) for step, states in before.items()}
    assert kinds == {1: 1, 2: 2, 3: 2, 4: 1, 5: 1, 6: 1}
    assert set(after[3].values()) == {before[3][leader]}
    warnings = [
        event.message for event in told if event.kind == "warning" and "states of the replicas differ" in event.message
    ]
    assert warnings == [
        "step 3: the states of the replicas differ, as different kinds of device round differently; all go on with "
        f"that of {leader}"
    ]
    assert found[leader].steps == 6


def test_a_second_group_does_not_take_the_run_of_the_first(tmp_path: Path) -> None:
    """Two coordinators at two addresses: every replica of the second group ends, and the lock stays where it is."""
    out = tmp_path / "run"
    out.mkdir()
    with CubeLock(out, "train", key=LOCK_KEY):
        held = (out / LOCK_KEY).read_bytes()
        found = run_group(hetero_config(), out)
        assert [type(error) for error in found.values()] == [Locked, Locked], found
        assert (out / LOCK_KEY).read_bytes() == held
    assert not (out / "metrics.jsonl").exists()


def test_a_process_without_a_group_says_how_to_start_one(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"this process was started alone: use `terrashard launch -n N"):
        train(hetero_config(), tmp_path / "run", environment={})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"hetero": {"chunk": 16}}, r"hetero\.chunk 16 must divide run\.batch_size 8 .* 1, 2, 4, 8"),
        ({"hetero": {"chunk": 3}}, r"hetero\.chunk 3 must divide"),
        ({"model": {"norm": "batch"}}, r"norm = 'batch' .* use model\.norm = 'group', or 'local'"),
        ({"optim": {"loss": "dice"}}, r"'dice' is a quotient over the whole batch"),
        ({"mesh": {"data": 1, "pipe": 2}}, r"mesh\.pipe = 2 .*mesh\.data and mesh\.zero only"),
        ({"mesh": {"data": 1, "space": 2, "model": 2}}, r"mesh\.model = 2, mesh\.space = 2"),
        ({"mesh": {"data": 1}, "placement": {"kind": "stages"}}, r"placement\.kind = 'stages' \(mesh\.pipe = 2\)"),
        ({"mesh": "auto"}, r"mesh = 'auto' plans for equal devices"),
        ({"mesh": {"data": 4}}, r"a chunk of 2 windows must be a multiple of mesh\.data 4"),
    ],
)
def test_what_replicas_cannot_compute_is_refused(sections: dict[str, Any], message: str) -> None:
    values = hetero_config().model_dump(exclude_unset=True)
    for name, section in sections.items():
        own = {} if name == "mesh" else values.get(name, {})
        values[name] = {**own, **section} if isinstance(section, dict) else section
    with pytest.raises(ValueError, match=message):
        TrainConfig.model_validate(values)


def test_too_few_replicas_save_and_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The leader dies, and the run needs two: the other one saves what both had reached, and ends with 8."""
    compute = Replica._compute

    def dying(self: Replica, state: Any, step: int, *rest: Any, **more: Any) -> Any:
        if self.name == "a" and step == 3:
            raise Stop
        return compute(self, state, step, *rest, **more)

    monkeypatch.setattr(Replica, "_compute", dying)
    out = tmp_path / "run"
    found = run_group(hetero_config(), out, least=2)
    assert isinstance(found["a"], Stop)
    error = found["b"]
    assert isinstance(error, TooFewMembers), error
    assert error.exit_code == 8
    assert CheckpointStore(out / "checkpoints").steps() == [3]
    assert sorted(losses(out)) == [1, 2, 3]
