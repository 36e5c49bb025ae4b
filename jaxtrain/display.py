"""Results as tables in notebooks: the table of `zarr_store.notebook`, with numbers in four digits."""

from __future__ import annotations

from collections.abc import Mapping

from zarr_store.notebook import facts_table

__all__ = ["result_table", "scores_text"]


def result_table(title: str, rows: Mapping[str, object]) -> str:
    """Return a title and rows of name and value as HTML; every text is escaped, and empty values are left out.

    >>> result_table("Run <a>", {"loss": 0.123456, "warnings": ""}).count("0.1235")
    1
    """
    return facts_table(title, [(name, _shown(value)) for name, value in rows.items()])


def scores_text(scores: Mapping[str, float | None]) -> str:
    """Return scores in one line; those that are None are left out.

    >>> scores_text({"accuracy": 0.75, "rmse": None, "miou": 0.5})
    'accuracy 0.7500, miou 0.5000'
    """
    return ", ".join(f"{name} {value:.4f}" for name, value in scores.items() if value is not None)


def _shown(value: object) -> object:
    return f"{value:.4f}" if isinstance(value, float) else value
