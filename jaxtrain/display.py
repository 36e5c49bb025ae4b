"""Results as small HTML tables, for notebooks."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

__all__ = ["html_table"]


def html_table(rows: Mapping[str, object]) -> str:
    """A table of two columns; floats in four digits, everything else as text, escaped.

    >>> html_table({"loss": 0.123456, "run": "<a>"})
    '<table><tr><th>loss</th><td>0.1235</td></tr><tr><th>run</th><td>&lt;a&gt;</td></tr></table>'
    """
    cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(_shown(value))}</td></tr>" for name, value in rows.items())
    return f"<table>{cells}</table>"


def _shown(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
