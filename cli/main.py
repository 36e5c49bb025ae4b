"""The `terrashard` command: dispatch, and the one place where errors become a line and an exit code.

0 done · 1 internal error · 2 invalid input · 3 partly done · 4 nothing found · 5 locked · 6 integrity failure
7 no space · 8 network or authorisation · 75 preempted, resumable · 130 interrupted, resumable
"""

from __future__ import annotations

import contextlib
import gc as garbage
import io
import os
import signal
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from types import FrameType
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from cli import (
    anomaly,
    audit,
    change,
    classify,
    demo,
    doctor,
    embed,
    evaluate,
    export,
    export_model,
    gc,
    import_file,
    info,
    kmeans,
    labels,
    launch,
    pca,
    plan,
    predict,
    preview,
    quicklook,
    repair,
    samples,
    search,
    simulate,
    stack,
    status,
    survey,
    train,
    tune,
    verify,
)
from cli import ingest as ingest_command
from cli.session import speak, write_document

__all__ = ["app", "main"]

_STOPPED_CODES = (75, 130)
_LEAVE_S = 3.0


class _Commands(TyperGroup):
    """Prints the list of commands as plain text, as Rich would take longer to import than all commands together."""

    def format_help(self, ctx: typer.Context, formatter: Any) -> None:  # type: ignore[override]
        """Write the help of the command without a command."""
        self.format_usage(ctx, formatter)
        self.format_help_text(ctx, formatter)
        self.format_options(ctx, formatter)
        self.format_epilog(ctx, formatter)

    def format_commands(self, ctx: typer.Context, formatter: Any) -> None:  # type: ignore[override]
        """Write the name and the first sentence of each command."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, one.get_short_help_str(limit=1000)) for name, one in self.commands.items()])


app = typer.Typer(
    name="terrashard",
    cls=_Commands,
    help="From Sentinel scenes to a trained model and a map.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


def _show_version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(f"terrashard {version('terrashard')}")
        raise typer.Exit


@app.callback(
    epilog="Start with `terrashard demo`. Exit codes: 0 done, 2 invalid input, 3 partly done, 4 nothing found, "
    "5 locked, 6 integrity, 7 no space, 8 network, 75 and 130 stopped and resumable."
)
def _root(
    version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Print the version."),
) -> None:
    pass


for module in (
    demo,
    simulate,
    search,
    preview,
    plan,
    ingest_command,
    status,
    info,
    verify,
    repair,
    audit,
    gc,
    samples,
    labels,
    stack,
    import_file,
    survey,
    train,
    tune,
    launch,
    evaluate,
    predict,
    classify,
    embed,
    kmeans,
    pca,
    anomaly,
    change,
    quicklook,
    export,
    export_model,
    doctor,
):
    module.register(app)


@cache
def _command() -> Callable[..., Any]:
    """Return the commands and their options, built once; Typer would build them for every call in one process."""
    return get_command(app)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: Arguments without the program's name; None takes those of the process.

    Returns:
        The exit code.
    """
    args = list(sys.argv[1:] if arguments is None else arguments)
    _tolerate_narrow_encodings()
    _call_waits("allow_waits")
    if arguments is None:  # the process is this command's
        _collect_less_often()
        code = _run(args)
    else:
        with _restored_environment():
            code = _run(args)
    # a run that failed may leave threads that wait for a slow server
    busy = any(thread.name.startswith("terrashard-shard") for thread in threading.enumerate())
    if code in _STOPPED_CODES or (code and busy):
        _call_waits("end_waits")
        if arguments is None:
            _leave_within(_LEAVE_S, code)
    return code


def _run(args: list[str]) -> int:
    _keep_loopback_direct()
    try:
        with _preemptible():
            code = _command()(args=args, prog_name="terrashard", standalone_mode=False)
            sys.stdout.flush()
        return _interrupted() if code == 130 else int(code or 0)
    except BrokenPipeError:
        return _reader_left()
    except SystemExit as leaving:
        # Typer turns a broken pipe into SystemExit(1) itself
        if isinstance(leaving.__context__, BrokenPipeError):
            return _reader_left()
        return leaving.code if isinstance(leaving.code, int) else 1
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except Exception as error:  # noqa: BLE001  the one place that turns any error into a line and a code
        if "--debug" in args:
            from zarr_store.printable import shown

            # errors of libraries show the URLs they were given; set in, so that no line looks like one of ours
            sys.stderr.write(textwrap.indent(shown(traceback.format_exc()), "  "))
        code, message = _explain(error)
        if code == 0:  # nothing is wrong: there was nothing left to do, such as for a replica that comes too late
            speak(message)
            return 0
        speak(f"error: {message}")
        if "--json" in args:
            try:
                write_document({"error": message, "exit_code": code}, indent=None)
            except BrokenPipeError:  # nobody reads the output; the line on stderr and the exit code remain
                _reader_left()
        return code


def _call_waits(what: str) -> None:
    """Call `allow_waits` or `end_waits` for the threads of this process; do nothing if no thread can wait."""
    module = sys.modules.get("ingest.trust.waits")
    if module is not None:
        getattr(module, what)()


def _leave_within(seconds: float, code: int) -> None:
    """End the process after this time at the latest: a thread may still be connecting, and Python waits for it."""

    def leave() -> None:
        time.sleep(seconds)
        os._exit(code)

    threading.Thread(target=leave, daemon=True, name="terrashard-leave").start()


def _explain(error: Exception) -> tuple[int, str]:
    """Return the exit code of an error and its message on one line."""
    from zarr_store.errors import TerrashardError, space_advice

    if isinstance(error, TerrashardError):
        return error.exit_code, _one_line(str(error))
    if isinstance(error, typer.TyperException):
        return 2, _one_line(error.format_message()) + " (see --help)"
    if isinstance(error, OSError):
        name = f": {error.filename}" if error.filename else ""
        if advice := space_advice(error.errno):
            return 7, f"no space left{name}; {advice} and repeat the command, it continues where it stopped"
        if isinstance(
            error, FileNotFoundError | PermissionError | NotADirectoryError | IsADirectoryError | FileExistsError
        ):
            return 2, _one_line(f"{error.strerror or error}{name}")
    kind = type(error).__name__
    return 1, f"internal error: {kind}: {_one_line(str(error))} (repeat with --debug for the traceback)"


def _one_line(text: str) -> str:
    """Join a message of several lines into one."""
    parts = (part.strip() for part in text.split("\n") if part.strip())
    return "; ".join(parts).replace(":; ", ": ").replace(";; ", "; ")


def _interrupted() -> int:
    sys.stderr.write("interrupted; the same command continues where it stopped\n")
    return 130


def _reader_left() -> int:
    """End quietly when the reader of the output has left (`| head`): the interpreter's last flush must not fail."""
    with contextlib.suppress(OSError, io.UnsupportedOperation):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE


@contextlib.contextmanager
def _restored_environment() -> Iterator[None]:
    """Restore the environment after a command that Python called: commands set variables for their libraries."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})


def _collect_less_often() -> None:
    """Collect circular garbage after 20,000 new objects, not after hundreds: importing and tracing make many that stay.

    Python's own threshold costs a tenth of a short training's time.
    """
    garbage.set_threshold(20_000, 20, 20)


def _tolerate_narrow_encodings() -> None:
    """Print a replacement character on a terminal without × or –, in place of an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _keep_loopback_direct() -> None:
    """Keep every library from using a proxy of the environment for servers on this machine.

    A proxy runs on another machine, where 127.0.0.1 is that machine. Workers that are started inherit the setting.
    """
    proxies = ("http_proxy", "https_proxy", "all_proxy")
    if not any(os.environ.get(name) or os.environ.get(name.upper()) for name in proxies):
        return
    excluded = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if excluded.strip() == "*":
        return
    hosts = [host.strip() for host in excluded.split(",") if host.strip()]
    hosts += [host for host in ("localhost", "127.0.0.1", "::1") if host not in hosts]
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(hosts)


@contextlib.contextmanager
def _preemptible() -> Iterator[None]:
    """End the command with code 75 and consistent files on SIGTERM, by which batch systems take a machine back."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        from zarr_store.errors import Preempted

        raise Preempted("stopped by SIGTERM; the same command continues where it stopped")

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread: signals are not ours
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
