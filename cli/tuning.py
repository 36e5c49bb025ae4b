"""The steps of `terrashard tune`: open a search, run it here or on a cluster, and show it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.progress import Reporter
from cli.session import Session

if TYPE_CHECKING:
    from jaxtrain.launching.places import Places
    from jaxtrain.tuning.study import StudyFolder
    from jaxtrain.tuning.worker import Budget, TrialNews

__all__ = ["choose_limits", "open_search", "read_population", "run_search", "show_search"]

_OF_PLAN = ("score", "sampler", "pruner", "folds", "seed", "storage", "space", "out", "members")


def open_search(session: Session, what: Path, *, space: Path | None, out: Path | None, **options: Any) -> StudyFolder:
    """Open the search in a folder, or begin one from a configuration.

    Raises:
        InvalidInput: Options are missing, or do not fit the search.
    """
    from zarr_store.errors import InvalidInput

    try:
        from jaxtrain.tuning.search import begin_search
        from jaxtrain.tuning.study import StudyFolder
    except ModuleNotFoundError as error:
        if error.name != "optuna":
            raise
        raise InvalidInput(
            "tune needs the package optuna, which is not installed; install it with: pip install 'terrashard[tune]'"
        ) from error
    if what.is_dir():
        extra = [name for name in _OF_PLAN if name in session.given]
        if extra or session.overrides:
            named = ", ".join([f"--{name}" for name in extra] + (["--set"] if session.overrides else []))
            raise InvalidInput(f"{what} is a search with a plan of its own: leave out {named}, or begin another one")
        return StudyFolder.open(what)
    from cli.training import train_config

    config = train_config(what, session)
    missing = [name for name, value in (("--space SPACE.toml", space), ("--out STUDY", out)) if value is None]
    if missing or space is None or out is None:
        raise InvalidInput(f"a new search needs {' and '.join(missing)}")
    return begin_search(config, space, out, on_warning=session.warn, **options)


def choose_limits(
    session: Session, folder: StudyFolder, *, trials: int | None, hours: float | None, steps: int | None,
    extend: int | None,
) -> Budget:  # fmt: skip
    """Return the limits of a command; those of the last command that gave any, if this one gives none.

    The study keeps them (user attribute `budget`), so that a search that was interrupted continues to the same end.
    """
    from jaxtrain.tuning.rungs import count_begun
    from jaxtrain.tuning.worker import Budget

    limits: dict[str, Any]
    study, begun = folder.study(), count_begun(folder.trials())
    if extend is not None:
        trials = begun + extend
    known = study.user_attrs.get("budget")
    if trials is not None or hours is not None or steps is not None:
        limits = {"trials": trials, "hours": hours, "steps": steps}
    elif known is not None:
        limits = {name: known.get(name) for name in ("trials", "hours", "steps")}
        shown = ", ".join(f"--{name} {value}" for name, value in limits.items() if value is not None)
        session.note(f"limits of the last command: {shown}")
    elif folder.plan.members:
        return Budget()
    elif begun:
        session.warn(f"{folder.path} keeps no limits, as an earlier release began it; no further trial begins: give "
                     "--trials, --hours or --steps, or --extend N to run N more trials")  # fmt: skip
        return Budget(begun)
    else:
        limits = {"trials": 50, "hours": None, "steps": None}
    if limits != known:
        study.set_user_attr("budget", limits)
    return Budget(limits["trials"], None if limits["hours"] is None else 3600 * limits["hours"], limits["steps"])


def read_population(text: str) -> int | None:
    """Return the size of a population from the text of `--population`: 1 for off, None for auto.

    Raises:
        InvalidInput: It is something else.
    """
    from zarr_store.errors import InvalidInput

    if text in ("off", "auto"):
        return 1 if text == "off" else None
    if text.isascii() and text.isdecimal() and int(text) > 0:
        return int(text)
    raise InvalidInput(f"--population {text}: expected a number of trials such as 8, or auto, or off")


def run_search(
    session: Session, folder: StudyFolder, budget: Budget, *, jobs: int, dask: str | None, seeds: int,
    population: int | None = 1,
) -> None:  # fmt: skip
    """Run a search, compare its best trial with the defaults, and print what came out."""
    from jaxtrain.parallel.heap import keep_freed_memory
    from jaxtrain.runs.repeat import repeat_exactly
    from jaxtrain.shared import SharedParts
    from jaxtrain.tuning.lanes import work_together
    from jaxtrain.tuning.page import write_page
    from jaxtrain.tuning.verdict import settle, write_best
    from jaxtrain.tuning.workers import run_workers

    keep_freed_memory()
    if folder.plan.base.run.deterministic:
        repeat_exactly()
    shared, compiled = SharedParts(), {}
    total = budget.trials or 0
    with Reporter(session, "tune", unit="trials") as progress:

        def hear(news: TrialNews) -> None:
            progress.update(news.finished, max(total, news.finished), f"trial {news.number} {news.state}")
            if news.state != "begun" or session.verbosity > 0:
                progress.line(f"trial {news.number} {news.state}: {news.message}")

        if jobs == 1 and dask is None:
            compiled = {"0": work_together(folder, budget, population, on_trial=hear, on_note=progress.line,
                                           shared=shared)}  # fmt: skip
        else:
            with _places(dask, jobs) as places:
                compiled = run_workers(folder, places, budget, on_trial=hear, on_note=progress.line,
                                       population=population)  # fmt: skip
    write_best(folder)
    if seeds:
        settle(folder, seeds, shared, on_note=session.note)
    write_page(folder)
    show_search(session, folder, compiled=compiled)


@contextlib.contextmanager
def _places(dask: str | None, jobs: int) -> Iterator[Places]:
    """Yield the places of the workers: processes of this machine, which share its devices, or workers of a cluster."""
    import sys

    from jaxtrain.launching.places import ThisMachine
    from jaxtrain.tuning.workers import WORKER

    if dask is None:
        yield ThisMachine([sys.executable, "-P", *WORKER], jobs)
        return
    from cli.dask_workers import dask_workers

    with dask_workers(dask, ["-P", *WORKER], None if jobs == 1 else jobs) as places:
        yield places


def show_search(session: Session, folder: StudyFolder, *, compiled: Any = None) -> None:
    """Print the trials of a search, the best one and how it was judged, as lines or as JSON."""
    from jaxtrain.tuning.page import importances, per_worker, trial_rows
    from jaxtrain.tuning.rungs import first_of
    from jaxtrain.tuning.verdict import read_verdict

    space, trials = folder.plan.read_space(), folder.trials()
    rows, best, verdict = trial_rows(folder, space), folder.best(), read_verdict(folder)
    names = [one.name for one in space.parameters]
    more = ["generation", "member", "parent"] if folder.plan.members else ["continues"] if folder.plan.pauses else []
    header = ["trial", "state", folder.plan.score, "steps", "seconds", *more, *names]
    kept = ("number", "state", "value", "steps", "seconds", *more)
    lines = [header, *([_cell(value) for value in (*(row[name] for name in kept),
             *(row["values"].get(name) for name in names))] for row in rows)]  # fmt: skip
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        session.say("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
    failed = [row for row in rows if row["state"] == "failed"]
    for row in failed[:5]:
        session.say(f"trial {row['number']} failed: {row['reason']}")
    for row in per_worker(trials):
        session.say(f"worker {row['worker']}: {row['trials']} trials, {row['trials_per_hour'] or 0:.1f} an hour")
    if best is not None:
        session.say(f"best          trial {best.number}, {folder.plan.score} {best.value:.4f}")
        if ((run := folder.run_of(first_of(best))) / "checkpoints").is_dir():
            session.say(f"              terrashard evaluate {run}")
        if (folder.path / "best.toml").is_file():
            session.say(f"              terrashard train {folder.path / 'best.toml'} --out RUN")
    if verdict is not None:
        session.say(f"verdict       {verdict['verdict']}")
    if (folder.path / "tune.html").is_file():
        session.say(f"page          {folder.path / 'tune.html'}")
    session.emit({
        "study": str(folder.path), "score": folder.plan.score, "direction": folder.plan.direction, "trials": rows,
        "best": None if best is None else {"trial": best.number, "value": best.value,
                                           "values": space.values_of(best.params)},
        "importances": importances(folder.study()), "workers": per_worker(trials),
        **({} if compiled is None else {"compiled": compiled}), **({} if verdict is None else {"verdict": verdict}),
    })  # fmt: skip


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
