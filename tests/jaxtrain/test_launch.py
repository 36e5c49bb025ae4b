"""The launcher with commands that stand for training: what one does to the others, and how often all restart."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from jaxtrain.launch import LaunchConfig, Outcome, describe, first_cause, launch, restart_wanted
from zarr_store.errors import InvalidInput


def run(program: str, folder: Path, processes: int = 2, restarts: int = 2) -> tuple[Outcome, list[str], list[str]]:
    """Launch a Python text; `me` is the process, `attempt` counts its starts."""
    head = f"""
        import os, signal, sys, time
        from pathlib import Path
        me = int(os.environ["TERRASHARD_PROCESS"])
        count = Path({str(folder)!r}) / f"count-{{me}}"
        attempt = len(count.read_text()) if count.exists() else 0
        count.write_text("x" * (attempt + 1))
    """
    lines: list[str] = []
    why: list[str] = []
    outcome = launch(
        [sys.executable, "-c", textwrap.dedent(head) + textwrap.dedent(program)],
        LaunchConfig(processes, restarts, grace_s=5.0, pause_s=0.0),
        on_line=lambda number, stream, text: lines.append(f"{number} {stream} {text}"),
        on_restart=lambda _, text: why.append(text),
    )
    return outcome, lines, why


def starts(folder: Path, process: int) -> int:
    return len((folder / f"count-{process}").read_text())


def test_all_well(tmp_path: Path) -> None:
    outcome, lines, why = run("print('hello'); print('there', file=sys.stderr)", tmp_path)
    assert outcome == Outcome(0, 0, (0, 0))
    assert sorted(lines) == ["0 stderr there", "0 stdout hello", "1 stderr there", "1 stdout hello"]
    assert why == []


def test_one_that_is_killed_ends_all_and_all_start_again(tmp_path: Path) -> None:
    program = """
        if attempt == 0:
            if me == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
    """
    began = time.monotonic()
    outcome, _, why = run(program, tmp_path)
    assert time.monotonic() - began < 20  # nobody waited for the sleeper
    assert outcome == Outcome(0, 1, (0, 0))
    assert why == ["process 0 was killed by SIGKILL, process 1 was killed by SIGKILL"]
    assert (starts(tmp_path, 0), starts(tmp_path, 1)) == (2, 2)


def test_restarts_are_bounded(tmp_path: Path) -> None:
    outcome, _, why = run("sys.exit(1)", tmp_path, restarts=2)
    assert outcome == Outcome(1, 2, (1, 1))
    assert len(why) == 2
    assert starts(tmp_path, 0) == 3


@pytest.mark.parametrize("code", [2, 5, 6, 7, 75])
def test_what_would_fail_again_is_not_started_again(tmp_path: Path, code: int) -> None:
    outcome, _, why = run(f"sys.exit({code} if me == 0 else 1)", tmp_path)
    assert (outcome.exit_code, outcome.restarts) == (code, 0)
    assert why == []
    assert starts(tmp_path, 0) == 1


def test_sigterm_is_handed_on_and_answered_with_75(tmp_path: Path) -> None:
    """The launcher is a process of its own here, since it is the one that gets the signal."""
    child = """
        import os, signal, sys, time
        def save(*_):
            print("saved", flush=True)
            sys.exit(75)
        signal.signal(signal.SIGTERM, save)
        print("ready", flush=True)
        time.sleep(60)
    """
    program = f"""
        import sys
        from jaxtrain.launch import LaunchConfig, launch
        outcome = launch([sys.executable, "-c", {textwrap.dedent(child)!r}], LaunchConfig(2),
                         on_line=lambda n, _, text: (sys.stdout.write(f"{{n}} {{text}}\\n"), sys.stdout.flush()))
        print(outcome)
        sys.exit(outcome.exit_code)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert sorted(process.stdout.readline() for _ in range(2)) == ["0 ready\n", "1 ready\n"]
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
        assert process.wait(timeout=20) == 75
    assert "0 saved" in rest
    assert "1 saved" in rest
    assert "exit_code=75, restarts=0, codes=(75, 75)" in rest


def test_words_and_limits() -> None:
    assert describe([0, 0]) == "all processes ended well"
    assert first_cause([0, 0]) == 0
    assert first_cause([1, 7, -9]) == 7
    assert [restart_wanted(code) for code in (0, 1, -9, 8, 70, 2, 75)] == [False, True, True, True, True, False, False]
    with pytest.raises(InvalidInput, match="processes ≥ 1"):
        LaunchConfig(0)


def test_the_launcher_knows_no_jax() -> None:
    """T20: it starts processes, so it must not hold the threads of JAX."""
    text = "import sys, cli.launching, jaxtrain.launch; print(*sys.modules)"
    here = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    printed = subprocess.run([sys.executable, "-c", text], check=True, env=here, capture_output=True, text=True)
    loaded = set(printed.stdout.split())
    assert "jaxtrain.launch" in loaded
    assert "jax" not in loaded
