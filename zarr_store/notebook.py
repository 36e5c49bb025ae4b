"""Tables that show objects in a notebook, with every text escaped, and whether this process is one and shows bars."""

from __future__ import annotations

import html
import importlib.util
import sys
from collections.abc import Iterable, Sequence

__all__ = ["facts_table", "is_notebook", "rows_table", "shows_bars"]

_HEAD = "text-align: left; padding: 0.1em 0.8em 0.1em 0; vertical-align: top"
_CELL = "text-align: left; padding: 0.1em 0.8em 0.1em 0; white-space: pre-wrap"


def is_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    return "ipykernel" in sys.modules


def shows_bars() -> bool:
    """Return whether a live bar can be drawn: in a terminal, and in a notebook that has widgets."""
    return sys.stderr.isatty() or (is_notebook() and importlib.util.find_spec("ipywidgets") is not None)


def facts_table(title: str, facts: Iterable[tuple[str, object]]) -> str:
    """Return a title and rows of (name, value) as HTML; empty values are left out.

    >>> facts_table("Cube <a>", [("grid", "EPSG:32633"), ("none", "")]).count("<tr>")
    1
    """
    rows = "".join(
        f'<tr><th style="{_HEAD}">{html.escape(name)}</th><td style="{_CELL}">{html.escape(str(value))}</td></tr>'
        for name, value in facts
        if value not in (None, "", ())
    )
    return f"<div><strong>{html.escape(title)}</strong><table>{rows}</table></div>"


def rows_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a title and a table with named columns as HTML.

    >>> rows_table("2 scenes", ["id"], [["a&b"]]).count("a&amp;b")
    1
    """
    head = "".join(f'<th style="{_HEAD}">{html.escape(name)}</th>' for name in columns)
    body = "".join(
        "<tr>" + "".join(f'<td style="{_CELL}">{html.escape(str(cell))}</td>' for cell in row) + "</tr>" for row in rows
    )
    return f"<div><strong>{html.escape(title)}</strong><table><tr>{head}</tr>{body}</table></div>"
