"""`terrashard evaluate` scores a run on held-out data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cli.session import Session, command

__all__ = ["register", "table"]


def table(scores: dict[str, Any]) -> list[str]:
    """Return the scores as lines: totals, then a row for each class."""
    known = ("accuracy", "macro_f1", "miou", "r2", "rmse", "mae", "bias")
    totals = [f"{name} {scores[name]:.4f}" for name in known if scores.get(name) is not None]
    lines = [f"{', '.join(totals) or 'no score'} on {_counted(scores)}, {_named(scores)} ({scores['seconds']:.1f} s)"]
    per_class = scores.get("per_class") or {}
    rows = per_class.items() if isinstance(per_class, dict) else ((row.get("name", "?"), row) for row in per_class)
    for name, row in rows:
        values = "  ".join(
            f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value:,}"
            for key, value in row.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        )
        lines.append(f"  {name:24} {values}")
    return lines


def error_lines(errors: dict[str, Any] | None, scores: dict[str, Any]) -> list[str]:
    """Return the accuracies of each class with their 95 % intervals, as lines."""
    if errors is None or errors["overall_accuracy_se"] is None:
        return []
    what = scores["unit"] if _whole(scores) else "pixels"
    lines = [f"overall accuracy {_interval(errors, 'overall_accuracy')} (95 %, if {what} are independent)"]
    for name, row in errors["classes"].items():
        users, producers = _interval(row, "users_accuracy"), _interval(row, "producers_accuracy")
        lines.append(f"  {name:24} user's {users}  producer's {producers}")
    return lines


def _interval(row: dict[str, Any], key: str) -> str:
    value, error = row[key], row[f"{key}_se"]
    if value is None:
        return "unknown"
    return f"{value:.3f}" + ("" if error is None else f" ± {1.96 * error:.3f}")


def _counted(scores: dict[str, Any]) -> str:
    unit, samples, pixels = scores.get("unit", "windows"), scores["samples"], scores["pixels"]
    return f"{samples:,} {unit}" if _whole(scores) else f"{pixels:,} pixels of {samples:,} {unit}"


def _whole(scores: dict[str, Any]) -> bool:
    """Return whether a sample has one answer for the whole image."""
    return bool(scores.get("unit", "windows") != "windows" and scores["pixels"] == scores["samples"])


def _named(scores: dict[str, Any]) -> str:
    if scores.get("own_data", True):
        return f"split {scores['split']}"
    return f"other data {scores['cube']}, split {scores['split']}"


def register(app: typer.Typer) -> None:
    @command(
        app,
        examples=(
            "terrashard evaluate runs/zagreb",
            "terrashard evaluate runs/zagreb --data other.zarr --json",
            "terrashard evaluate runs/fused --without s2",
        ),
    )
    def evaluate(
        session: Session,
        run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory of `terrashard train`.")],
        data: Annotated[
            str | None,
            typer.Option(metavar="STORE", help="Cube or sample store to score instead of the run's own."),
        ] = None,
        split: Annotated[str, typer.Option(help="Split to score: train, validation or test.")] = "test",
        without: Annotated[
            list[str] | None,
            typer.Option(metavar="MODALITY", help="Score as if this modality were missing; may be repeated."),
        ] = None,
        allow_mismatch: Annotated[
            bool,
            typer.Option(
                "--allow-mismatch", help="Use data of another pixel size or unit than those of training, and warn."
            ),
        ] = False,
    ) -> None:
        """Score a run on the data that were held out of training.

        With --data, the scores on other data get their own file and their own row in the report.
        """
        from cli.progress import Reporter
        from jaxtrain import evaluate as evaluate_run

        with Reporter(session, "evaluate", unit="batches") as progress:
            report = evaluate_run(
                run, data=data, split=split, without=tuple(without or ()), allow_mismatch=allow_mismatch,
                on_batch=progress.update,
            )  # fmt: skip
        for text in report.warnings:
            session.warn(text)
        scores = report.to_dict()
        for line in table(scores):
            session.say(line)
        for line in error_lines(report.accuracy_errors, scores):
            session.say(line)
        if report.seen:
            session.say("  used: " + ", ".join(f"{name} on {share:.1%}" for name, share in report.seen.items()))
        session.emit(scores)
