r"""Make untrusted text safe for a terminal or a log: nothing moves the cursor or reverses the reading direction.

Ids, reasons, names and bodies of answers are data from outside. Control characters in them write over other lines, set
titles and links of a terminal or send it commands; marks of direction and characters without width make one name look
like another. All are shown as escapes (`\x1b`, `\u202e`) where text leaves, and only there: names are kept as they
are. Letters of every script stay letters.
"""

from __future__ import annotations

import logging
import re
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from zarr_store.redact import redact_text

__all__ = [
    "SafeRecord",
    "make_output_safe",
    "one_line",
    "printable",
    "printable_json",
    "printable_value",
    "safe_output",
    "shown",
]

# C0 but tab and newline, DEL and C1; soft hyphen; marks of direction; no width; separators of lines; fillers; tags;
# halves of pairs, which are bytes of file names that are no UTF-8
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e"
    "\u2060-\u206f\u3164\ud800-\udfff\ufeff\uffa0\ufff0-\uffff\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
_OURS = ("cli", "ingest", "jaxtrain", "zarr_store")


def printable(text: str) -> str:
    r"""Return `text` with every unsafe character escaped; line breaks and tabs stay.

    >>> printable("é 中 \x1b[31mred \u202egnp.exe")
    'é 中 \\x1b[31mred \\u202egnp.exe'
    """
    return _UNSAFE.sub(_escape, text)


def one_line(text: str) -> str:
    r"""Return `text` as `printable` does, and on one line, so that a name cannot begin a line of its own.

    >>> one_line("S2A\nerror: gone")
    'S2A\\nerror: gone'
    """
    return printable(text).replace("\n", "\\n")


def shown(text: object) -> str:
    """Return text for a person: without secrets, printable, with its line breaks."""
    return printable(redact_text(text))


def printable_json(document: str) -> str:
    r"""Return JSON text with unsafe characters as \uXXXX: the same document, and safe to print."""

    def escape(found: re.Match[str]) -> str:
        units = found[0].encode("utf-16-be", "surrogatepass")
        return "".join(f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2))

    return _UNSAFE.sub(escape, document)


def printable_value(value: Any) -> Any:
    """Return a JSON value whose texts are made safe on one line, for a page; keys stay."""
    if isinstance(value, str):
        return one_line(redact_text(value))
    if isinstance(value, Mapping):
        return {key: printable_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [printable_value(item) for item in value]
    return value


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"


class SafeRecord(logging.LogRecord):
    """A log record whose message and traceback are safe for every handler."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.exc_info and self.exc_info[0] is not None:
            # a formatter uses a text that exists already in place of making its own
            self.exc_text = shown("".join(traceback.format_exception(*self.exc_info)).rstrip("\n"))

    def getMessage(self) -> str:
        message = redact_text(super().getMessage())
        # other libraries log tracebacks as messages; ours are one line
        return one_line(message) if self.name.partition(".")[0] in _OURS else printable(message)


def make_output_safe() -> None:
    """Make all logs and warnings of this process safe from now on; meant for a worker process."""
    logging.setLogRecordFactory(SafeRecord)
    logging.raiseExceptions = False  # a handler that cannot write would print the arguments unchecked
    warnings.formatwarning = _safe_warning


_plain_warning = warnings.formatwarning


def _safe_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return shown(_plain_warning(message, category, filename, lineno, line))


@contextmanager
def safe_output() -> Iterator[None]:
    """Make all logs and warnings of this process safe, from every logger to every handler."""
    factory, form, raising = logging.getLogRecordFactory(), warnings.formatwarning, logging.raiseExceptions
    make_output_safe()
    try:
        yield
    finally:
        logging.setLogRecordFactory(factory)
        warnings.formatwarning = form
        logging.raiseExceptions = raising
