"""One door for errors: a line on stderr, the exit code of CONTRACT, and no traceback without --debug."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import zarr_store
from zarr_store import errors

Run = Callable[..., Any]

COMMANDS = (
    "demo", "simulate", "search", "plan", "ingest", "status", "info", "verify", "stack", "import",
    "train", "evaluate", "predict", "quicklook", "export", "doctor",
)  # fmt: skip


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (errors.InvalidInput("bad value"), 2, "bad value"),
        (errors.UnknownName.of("band", "bleu", ["blue"]), 2, "did you mean 'blue'?"),
        (errors.NothingFound("no items"), 4, "no items"),
        (errors.Locked("held"), 5, "held"),
        (errors.CorruptShard("shard (0, 0, 0)"), 6, "shard (0, 0, 0)"),
        (errors.NoSpace("full"), 7, "full"),
        (errors.AccessError("refused"), 8, "refused"),
        (errors.Preempted("stopped"), 75, "stopped"),
        (OSError(errno.ENOSPC, "No space left on device", "cube/x"), 7, "no space left: cube/x"),
        (OSError(errno.EFBIG, "File too large", "cube/x"), 7, "no space left: cube/x; raise the limit on the size"),
        (PermissionError(errno.EACCES, "Permission denied", "cube/x"), 2, "Permission denied: cube/x"),
        (RuntimeError("odd"), 1, "internal error: RuntimeError: odd (repeat with --debug for the traceback)"),
        (ValueError("first\n  second"), 1, "first; second"),
    ],
)
def test_exit_code_and_line(run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, words: str) -> None:
    monkeypatch.setattr(zarr_store, "open_cube", _raising(error))
    outcome = run("info", "x.zarr")
    assert outcome.code == code
    assert words in outcome.error_line()
    assert outcome.out == ""


def _raising(error: BaseException) -> Callable[[str], None]:
    def raise_it(_: str) -> None:
        raise error

    return raise_it


def test_json_says_the_error_as_a_document(run: Run, tmp_path: Path) -> None:
    outcome = run("info", tmp_path / "none.zarr", "--json")
    assert outcome.code == 2
    assert outcome.json == {"error": outcome.error_line().removeprefix("error: "), "exit_code": 2}


def test_debug_shows_the_traceback(run: Run, tmp_path: Path) -> None:
    outcome = run("info", tmp_path / "none.zarr", "--debug")
    assert outcome.code == 2
    assert "Traceback" in outcome.err
    assert outcome.err.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["infoo"], "Did you mean 'info'?"),
        (["info"], "CUBE"),
        (["info", "x", "--jsonn"], "--json"),
        (["verify", "x", "--share", "2"], "--share"),
        (["info", "x", "--set", "nonsense"], "KEY=VALUE"),
        (["info", "x", "--set", "cub=1"], "did you mean 'cube'"),
        (["info", "x", "--config", "absent.toml"], "absent.toml does not exist"),
    ],
)
def test_wrong_usage(run: Run, arguments: list[str], words: str) -> None:
    outcome = run(*arguments)
    assert outcome.code == 2
    assert words in outcome.error_line()


def test_interrupt_is_130_and_says_that_it_resumes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zarr_store, "open_cube", _raising(KeyboardInterrupt()))
    outcome = run("info", "x.zarr")
    assert outcome.code == 130
    assert "continues where it stopped" in outcome.err
    assert "Traceback" not in outcome.err


def test_sigterm_is_75(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(zarr_store, "open_cube", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    outcome = run("info", "x.zarr")
    assert outcome.code == 75
    assert "continues where it stopped" in outcome.error_line()
    assert signal.getsignal(signal.SIGTERM) is before


def test_secrets_in_addresses_are_not_shown(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "cannot read https://me:CANARY@host/a.tif?sig=CANARY&x=1 (403)"
    monkeypatch.setattr(zarr_store, "open_cube", _raising(errors.AccessError(text)))
    outcome = run("info", "x.zarr", "--json")
    assert "CANARY" not in outcome.out + outcome.err
    assert "https://host/a.tif (403)" in outcome.error_line()


def test_reader_that_leaves_early_is_no_error(cube: Path) -> None:
    command = [sys.executable, "-m", "cli.main", "info", str(cube)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
        assert process.wait(60) == 128 + signal.SIGPIPE


def test_an_error_without_a_reader_keeps_its_line_and_code(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cli.main", "info", str(tmp_path / "absent.zarr"), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        (line,) = process.stderr.read().splitlines()
        assert line.startswith("error: ")
        assert "absent.zarr" in line
        assert process.wait(60) == 2


def test_help_is_quick_to_import_and_names_every_exit_code() -> None:
    """Heavy libraries are imported inside commands; without that, help would take seconds."""
    code = (
        "import sys; from cli.main import main; main(['--help']); "
        "heavy = {'numpy', 'xarray', 'zarr', 'jax', 'dask', 'rasterio', 'pydantic'} & set(sys.modules); "
        "sys.exit(','.join(sorted(heavy)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "Exit codes" in done.stdout


def test_every_command_has_an_example_and_the_shared_options(run: Run) -> None:
    for name in COMMANDS:
        outcome = run(name, "--help")
        assert outcome.code == 0
        assert f"terrashard {name}" in outcome.out.partition("Example:")[2], name
        for option in ("--json", "--verbose", "--quiet", "--config", "--set", "--debug"):
            assert option in outcome.out, (name, option)
