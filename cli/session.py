"""`Session`: what every command shares (options, output, exit code), and `command`, which adds it to a function.

Human text goes to stdout, or to stderr where `--json` claims stdout for its one document. Progress, warnings and
errors always go to stderr. All of it leaves through here without secrets, and with control characters as escapes: ids
and reasons are written by strangers.
"""

from __future__ import annotations

import inspect
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO, get_type_hints

import typer

__all__ = ["Session", "command", "speak", "write_document"]

_PANEL = "Every command"
_COMMON: dict[str, tuple[Any, Any]] = {
    "json_output": (
        Annotated[bool, typer.Option("--json", help="One JSON document on stdout.", rich_help_panel=_PANEL)],
        False,
    ),
    "verbose": (
        Annotated[
            int,
            typer.Option(
                "--verbose", "-v", count=True, help="Show more; -vv shows everything.", rich_help_panel=_PANEL
            ),
        ],
        0,
    ),
    "quiet": (
        Annotated[
            bool, typer.Option("--quiet", "-q", help="Only results, warnings and errors.", rich_help_panel=_PANEL)
        ],
        False,
    ),
    "config": (
        Annotated[
            Path | None,
            typer.Option(
                "--config", metavar="FILE.toml", help="Settings file; options override it.", rich_help_panel=_PANEL
            ),
        ],
        None,
    ),
    "set_": (
        Annotated[
            list[str] | None,
            typer.Option(
                "--set", metavar="KEY=VALUE", help="One setting, such as run.steps=50.", rich_help_panel=_PANEL
            ),
        ],
        None,
    ),
    "debug": (
        Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=_PANEL)],
        False,
    ),
}


@dataclass
class Session:
    """One run of one command.

    Attributes:
        json: stdout belongs to one JSON document.
        verbosity: -1 quiet, 0 normal, 1 and 2 more.
        config: Settings file.
        overrides: "a.b=c" texts, in the order given.
        given: Names of the options that stood on the command line.
        options: Values of a command's `extra` options that were given.
    """

    json: bool = False
    verbosity: int = 0
    config: Path | None = None
    overrides: tuple[str, ...] = ()
    given: frozenset[str] = field(default_factory=frozenset)
    options: dict[str, Any] = field(default_factory=dict)

    def say(self, text: str = "") -> None:
        """Write one line of the result, for people."""
        speak(text, sys.stderr if self.json else sys.stdout)

    def say_lines(self, text: str) -> None:
        """Write a result of several lines; each quoted text must be on one line (`zarr_store.printable.one_line`)."""
        for line in text.split("\n"):
            self.say(line)

    def note(self, text: str) -> None:
        """Write one line of progress; not with --quiet."""
        if self.verbosity >= 0:
            speak(text)

    def warn(self, text: str) -> None:
        """Write a warning: something that a person should know and that is not an error."""
        speak(f"warning: {text}")

    def fail(self, text: str) -> None:
        """Write what went wrong, where the command still has a result."""
        speak(f"error: {text}")

    def emit(self, document: Mapping[str, Any]) -> None:
        """Write the JSON document if --json is given."""
        if self.json:
            write_document(document)

    def settings(self) -> dict[str, Any]:
        """Return the settings of --config, overridden by those of --set."""
        from cli.config import read_settings

        return read_settings(self.config, self.overrides)


def speak(text: str, stream: TextIO | None = None) -> None:
    """Write one line for a person, to stderr unless another stream is named; all human text passes here."""
    from zarr_store.printable import one_line
    from zarr_store.redact import redact_text

    stream = stream or sys.stderr
    stream.write(f"{one_line(redact_text(text))}\n")
    stream.flush()


def write_document(document: Mapping[str, Any], *, indent: int | None = 2) -> None:
    """Write one JSON document to stdout; all output for programs passes here.

    It is valid JSON whatever it quotes. Letters of every script stay as they are. Characters that a terminal would obey
    become escapes of JSON, and numbers that JSON does not have become null.
    """
    from zarr_store.printable import printable_json
    from zarr_store.redact import redact_value

    text = json.dumps(redact_value(_plain(document)), indent=indent, ensure_ascii=False, allow_nan=False)
    sys.stdout.write(printable_json(text) + "\n")
    sys.stdout.flush()


def command(
    app: typer.Typer,
    *,
    examples: tuple[str, ...],
    settings: Literal["options", "own"] = "options",
    extra: Mapping[str, Any] | None = None,
) -> Callable[[Any], Any]:
    """Register a function `f(session, …) -> exit code | None` as a command with the options that all share.

    Args:
        app: The application.
        examples: Command lines for the end of `--help`.
        settings: "options": --config and --set name the command's own options; "own": the command reads them itself.
        extra: Further options, name → annotation; those that were given go into `session.options`.
    """
    extra = extra or {}

    def register(function: Callable[..., int | None]) -> Callable[..., int]:
        hints = get_type_hints(function, include_extras=True)
        signature = inspect.signature(function)
        own = [p.replace(annotation=hints[n]) for n, p in signature.parameters.items() if n != "session"]
        shared = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for name, (annotation, default) in ({n: (a, None) for n, a in extra.items()} | _COMMON).items()
        ]
        context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)

        def run(context: typer.Context, **values: Any) -> int:
            common = {name: values.pop(name) for name in _COMMON}
            further = {name: values.pop(name) for name in extra}
            verbosity = -1 if common["quiet"] else common["verbose"]
            session = Session(
                json=common["json_output"],
                verbosity=verbosity,
                config=common["config"],
                overrides=tuple(common["set_"] or ()),
                given=frozenset(n for n in values if _was_given(context, n)),
                options={name: value for name, value in further.items() if _was_given(context, name)},
            )
            _configure_logging(verbosity)
            if settings == "options" and (session.config or session.overrides):
                from cli.config import apply_to_options

                options = {p.name: p.annotation for p in own}
                values |= apply_to_options(session.settings(), options, session.given, context.info_name or "")
            from zarr_store.printable import safe_output

            with safe_output():
                return function(session, **values) or 0

        everything = [context, *[p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own], *shared]
        run.__signature__ = inspect.Signature(everything, return_annotation=int)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in everything}
        run.__name__ = function.__name__
        name = function.__name__.strip("_").replace("_", "-")
        app.command(name, help=_help(function, examples))(run)
        return run

    return register


def _help(function: Callable[..., Any], examples: tuple[str, ...]) -> str:
    paragraphs = inspect.cleandoc(function.__doc__ or "").split("\n\n")
    text = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)  # the terminal wraps the lines
    return f"{text}\n\n\b\nExample:\n" + "\n".join(f"  {line}" for line in examples)


def _was_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name in ("COMMANDLINE", "ENVIRONMENT")


def _configure_logging(verbosity: int) -> None:
    ours = {-1: logging.ERROR, 0: logging.WARNING, 1: logging.INFO}.get(verbosity, logging.DEBUG)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    # Dask reports workers that took a moment longer to end; that is shown with --verbose only
    os.environ.setdefault("DASK_LOGGING__DISTRIBUTED", "error" if verbosity <= 0 else "info")
    for name in ("ingest", "zarr_store", "jaxtrain", "cli"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(ours)
        logger.propagate = False


def _plain(value: object) -> Any:
    """Return the JSON form of numpy numbers and arrays, paths and sets; None for nan and infinities."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | int | bool):
        return value
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, set | frozenset):
        return _plain(sorted(value))
    raise TypeError(f"{type(value).__name__} has no JSON form")
