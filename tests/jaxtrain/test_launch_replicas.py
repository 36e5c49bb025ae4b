"""Replicas that come and go: places are fakes whose processes end when the test says so; one test has real ones."""

from __future__ import annotations

import itertools
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from jaxtrain.launching import replicas
from jaxtrain.launching.group import GroupPoint, address_towards, find_group_point, group_file, hold_group
from jaxtrain.launching.outcome import Outcome
from jaxtrain.launching.places import ThisMachine
from jaxtrain.launching.process import OnLine
from jaxtrain.launching.replicas import ReplicaConfig, launch_replicas
from zarr_store.errors import AccessError, InvalidInput, Locked


class Fake:
    """A process that ends with the next code of its plan: at once, or when it is asked to stop."""

    def __init__(self, plan: int | str) -> None:
        self.plan, self.stopped = plan, False

    def code(self) -> int | None:
        if isinstance(self.plan, int):
            return self.plan
        return 75 if self.stopped else None

    def stop(self, *, at_once: bool = False) -> None:
        self.stopped = True

    def finish(self) -> int:
        code = self.code()
        assert code is not None
        return code


class Plans:
    """Places whose processes follow a plan: exit codes in order, "waits" for one that runs until it is stopped."""

    def __init__(self, *plans: list[int | str]) -> None:
        self.names = [f"host-{number}" for number in range(len(plans))]
        self.plans = [list(plan) for plan in plans]
        self.started: list[tuple[str, dict[str, str]]] = []
        self.running: list[Fake] = []

    def meeting(self) -> str:
        raise AssertionError("replicas meet at the coordinator")

    def start(self, number: int, environment: Mapping[str, str], on_line: OnLine) -> Fake:
        self.started.append((environment["TERRASHARD_HETERO_NAME"], dict(environment)))
        plan = self.plans[number].pop(0)
        if plan == "away":
            raise AccessError(f"host-{number} cannot be reached")
        self.running.append(Fake(plan))
        return self.running[-1]


def run(places: Any, *, members: Callable[[], int] = lambda: 0, **settings: Any) -> tuple[Outcome, list[str]]:
    said: list[str] = []
    config = ReplicaConfig(len(places.names), **({"pause_s": 0.0} | settings))
    outcome = launch_replicas(
        places, config, {"X": "1"}, on_line=lambda *_: None, on_event=said.append, members=members
    )
    return outcome, said


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "_POLL_S", 0.005)


def end_soon(places: Plans, starts: int, code: int = 0) -> None:
    """Let all that run end with a code, some moments after so many processes were started."""

    def look() -> None:
        until = time.monotonic() + 20
        while len(places.started) < starts and time.monotonic() < until:
            time.sleep(0.005)
        time.sleep(0.1)
        for fake in places.running:
            if fake.plan == "waits":
                fake.plan = code

    threading.Thread(target=look, daemon=True).start()


def test_one_that_dies_is_replaced_and_nobody_else_is_touched() -> None:
    places = Plans(["waits"], [-9, 1, "waits"], ["waits"])
    end_soon(places, 5)
    outcome, said = run(places)
    assert outcome == Outcome(0, 2, (0, 0, 0))
    assert [name for name, _ in places.started] == ["host-0", "host-1", "host-2", "host-1.1", "host-1.2"]
    assert not any(fake.stopped for fake in places.running)
    assert said == [
        "process host-1 was killed by SIGKILL; the others go on, and a new process starts in 0 s (1 of 3)",
        "process host-1 ended with code 1; the others go on, and a new process starts in 0 s (2 of 3)",
    ]
    assert all(environment["X"] == "1" for _, environment in places.started)


def test_replacements_are_bounded_and_the_rest_goes_on_until_it_is_done() -> None:
    places = Plans(["waits"], [1, 1, 1])
    end_soon(places, 4)
    outcome, said = run(places, restarts=2)
    assert outcome == Outcome(0, 2, (0, 1))  # the run is done, by those that were left
    joined = Plans([0])
    run(joined, prefix="laptop-17-")
    assert joined.started[0][0] == "laptop-17-host-0"  # the names of two launchers of a group differ
    assert said[-1] == "process host-1 ended with code 1; no process takes its place after 2 new ones, the others go on"


def test_the_pause_grows_and_steady_work_starts_the_count_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda _s: now.__setitem__(0, now[0] + 0.5))
    began: list[float] = []

    class Lives(Plans):
        def start(self, number: int, environment: Mapping[str, str], on_line: OnLine) -> Fake:
            fake = super().start(number, environment, on_line)
            began.append(now[0])
            if fake.plan == 9:  # it works for two minutes, then it dies
                fake.plan = "waits"
                until = now[0] + 120
                fake.code = lambda: 1 if now[0] >= until else None  # type: ignore[method-assign]
            return fake

    outcome, _ = run(Lives([1, 1, 1, 9, 1, 1, 0]), pause_s=4.0, restarts=3)
    assert outcome == Outcome(0, 6, (0,))
    pauses = [later - earlier for earlier, later in itertools.pairwise(began)]
    assert pauses == pytest.approx([4, 8, 16, 124, 8, 16], abs=1.1)


def test_without_replacement_and_with_too_few_left_the_others_save_and_end() -> None:
    places = Plans(["waits"], ["waits"], [-9])
    outcome, said = run(places, replace=False, least=3)
    assert outcome == Outcome(1, 0, (75, 75, -9))
    assert [fake.stopped for fake in places.running[:2]] == [True, True]
    assert said[0] == "process host-2 was killed by SIGKILL; no process takes its place, the others go on"
    assert "2 processes are left and the run needs 3 (--min-processes): they save and end" in said[1]
    # with fewer needed they go on
    places = Plans(["waits"], ["waits"], [1])
    end_soon(places, 3)
    outcome, _ = run(places, replace=False, least=2)
    assert outcome == Outcome(0, 0, (0, 0, 1))


@pytest.mark.parametrize(("code", "words"), [(75, "asked to leave"), (2, "would end the same way")])
def test_one_that_was_asked_to_leave_or_cannot_work_is_not_replaced(code: int, words: str) -> None:
    places = Plans(["waits"], [code])
    end_soon(places, 2)
    outcome, said = run(places)
    assert outcome == Outcome(0, 0, (0, code))
    assert len(said) == 1
    assert words in said[0]


def test_all_that_fail_alike_end_the_launch_with_their_code() -> None:
    outcome, _ = run(Plans([2], [2]))
    assert outcome == Outcome(2, 0, (2, 2))
    outcome, _ = run(Plans([1, 1], [1, 1]), restarts=1)
    assert outcome == Outcome(1, 2, (1, 1))


def test_a_failure_after_the_run_was_done_is_no_success() -> None:
    places = Plans(["waits"], [0])
    end_soon(places, 2, code=-9)
    outcome, said = run(places)
    assert outcome == Outcome(1, 0, (-9, 0))
    assert said == ["process host-0 was killed by SIGKILL after the run was done"]


def test_a_place_that_cannot_be_reached_is_tried_again() -> None:
    outcome, said = run(Plans(["away", 0]))
    assert outcome == Outcome(0, 1, (0,))
    assert said[0].startswith("host-0 cannot be reached; the others go on, and a new process starts")
    outcome, said = run(Plans(["away", "away"]), restarts=1)
    assert outcome == Outcome(255, 1, (255,))  # not without end where nobody works
    # while others work, a host may come back at any time
    places = Plans(["waits"], ["away", "away", "away", 255, 255, "waits"])
    end_soon(places, 7)
    outcome, said = run(places, restarts=2)
    assert outcome == Outcome(0, 5, (0, 0))


def test_the_launcher_stays_while_members_that_others_started_are_at_work() -> None:
    left = [5]

    def members() -> int:
        left[0] -= 1
        return max(left[0], 0)

    outcome, _ = run(Plans([75]), members=members)
    assert outcome.exit_code == 75
    assert left[0] <= 0


def test_signals_reach_all_and_the_second_one_ends_them(monkeypatch: pytest.MonkeyPatch) -> None:
    places = Plans(["waits"], ["waits"])
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
    outcome, _ = run(places)
    assert outcome == Outcome(75, 0, (75, 75))


def test_numbers_that_make_no_sense() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"least": 3, "most": 2}, "--min-processes 3 --max-processes 2: expected 1 ≤ min ≤ max"),
        ({"most": 1}, "2 processes are more than --max-processes 1"),
        ({"least": 0}, "expected 1 ≤ min ≤ max"),
    ]
    for settings, message in cases:
        with pytest.raises(InvalidInput, match=message):
            ReplicaConfig(2, **settings)


def test_real_processes_get_their_part_of_the_machine_and_a_new_name(tmp_path: Path) -> None:
    program = """if True:
        import os, signal, sys, time
        from pathlib import Path
        name = os.environ["TERRASHARD_HETERO_NAME"]
        assert "TERRASHARD_PROCESS" not in os.environ
        print(name, os.environ["TERRASHARD_LOCAL_PROCESS"], os.environ["TERRASHARD_LOCAL_PROCESSES"], flush=True)
        if name == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        done = Path(os.environ["FOLDER"]) / "done"
        if name == "1.1":
            done.touch()
        while not done.exists():
            time.sleep(0.02)
    """
    lines: list[str] = []
    outcome = launch_replicas(
        ThisMachine([sys.executable, "-c", program], 2), ReplicaConfig(2, pause_s=0.0), {"FOLDER": str(tmp_path)},
        on_line=lambda _number, _stream, text: lines.append(text),
    )  # fmt: skip
    assert outcome == Outcome(0, 1, (0, 0))
    assert sorted(lines) == ["0 0 2", "1 1 2", "1.1 1 2"]


# ---- The group: one coordinator for each run, and a file by which others find it.


class Event:
    def __init__(self, kind: str, text: str) -> None:
        self.kind, self.text = kind, text

    def __str__(self) -> str:
        return self.text


class Server:
    """Stands for the coordinator: it listens, and keeps what it was given."""

    made: list[Server] = []

    def __init__(self, bind: str, secret: str, **settings: Any) -> None:
        import socket

        host, _, port = bind.rpartition(":")
        self.socket = socket.create_server((host, int(port)))
        self.address = f"{host}:{self.socket.getsockname()[1]}"
        self.secret, self.settings, self.members = secret, settings, ("a", "b")
        Server.made.append(self)
        settings["on_event"](Event("refused", "step 3: a stranger was refused"))
        settings["on_event"](Event("shares", "step 3: shares moved"))

    def close(self) -> None:
        self.socket.close()


def held(run: Path | None, said: list[str], **more: Any) -> Any:
    return hold_group(
        run, "127.0.0.1:0", expected=2, least=1, most=4, on_event=said.append, make=Server,
        **({"environment": {}} | more),
    )  # fmt: skip


def test_a_group_is_found_by_the_file_beside_its_run_and_held_once(tmp_path: Path) -> None:
    folder, said = tmp_path / "runs" / "zagreb", []  # type: ignore[var-annotated]
    with held(folder, said) as point:
        assert stat.S_IMODE(group_file(folder).stat().st_mode) == 0o600
        assert not folder.exists()
        assert point.members() == 2
        assert said == ["step 3: a stranger was refused"]
        variables = point.environment(expected=2, least=1, most=4)
        assert variables["TERRASHARD_HETERO_COORDINATOR"] == point.address
        assert len(variables["TERRASHARD_HETERO_SECRET"]) == 64
        assert variables["TERRASHARD_HETERO_SECRET"] not in repr(point)
        joined = find_group_point(point.address, folder, {})
        assert joined.secret == point.secret
        assert find_group_point(f"tcp://{point.address}", None, {"TERRASHARD_HETERO_SECRET": "s"}).secret == "s"
        with (
            pytest.raises(Locked, match=rf"trained by a group already.*launch --join {point.address}"),
            held(folder, []),
        ):
            pass
        with pytest.raises(InvalidInput, match=r"needs the secret of the group: .*none for this address.*--out RUN"):
            find_group_point("127.0.0.1:9", folder, {})
    assert not group_file(folder).exists()
    with pytest.raises(AccessError, match=f"no coordinator answers at {point.address}"):
        find_group_point(point.address, None, {"TERRASHARD_HETERO_SECRET": "s"})
    # after the end its file is gone, so no secret is known either: what has ended comes first
    with pytest.raises(AccessError, match=r"the run has ended \(the same command without --join continues it\)"):
        find_group_point(point.address, folder, {})
    for address in ("somewhere", "host:port", "http://h:1", "a b:1", "h:0", "h:99999", "::1:7000", "[::1]", "[g::1]:7"):
        with pytest.raises(InvalidInput, match="expected HOST:PORT"):
            find_group_point(address, folder, {"TERRASHARD_HETERO_SECRET": "s"})


def test_the_file_of_a_launcher_that_was_killed_is_no_hindrance(tmp_path: Path) -> None:
    with held(tmp_path / "run", []) as point:
        left = group_file(tmp_path / "run").read_text()
    group_file(tmp_path / "run").write_text(left)
    with held(tmp_path / "run", [], environment={"TERRASHARD_HETERO_SECRET": "given by the user"}) as again:
        assert again.secret == "given by the user"
        assert again.address != point.address
    assert not group_file(tmp_path / "run").exists()
    assert address_towards("127.0.0.1", 9) == "127.0.0.1"
    assert isinstance(again, GroupPoint)
