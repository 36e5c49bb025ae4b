"""Write `tune.html`, one file with the trials of a search and its figures; it loads nothing else."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
import optuna
from optuna.trial import FrozenTrial, TrialState

from jaxtrain.tuning.handout import worker_of
from jaxtrain.tuning.lineage import ancestors, draw_generations
from jaxtrain.tuning.plan import SearchPlan
from jaxtrain.tuning.rungs import CONTINUES, PAUSED, first_of
from jaxtrain.tuning.space import Space
from jaxtrain.tuning.study import FINISHED, StudyFolder
from jaxtrain.tuning.verdict import read_verdict

__all__ = ["importances", "per_worker", "trial_rows", "write_page"]


_OF_MEMBERS = ("generation", "member", "parent", "explores")


def trial_rows(folder: StudyFolder, space: Space) -> list[dict[str, Any]]:
    """Return a row for each trial, in the order in which they began."""
    trials = folder.trials()
    newest = {first_of(trial): trial.number for trial in trials}
    return [
        {
            "number": trial.number,
            "state": _state(trial, newest),
            "value": trial.value if trial.state in (TrialState.COMPLETE, TrialState.PRUNED) else None,
            "values": space.values_of(trial.params),
            "folds": trial.user_attrs.get("folds", []),
            "steps": trial.user_attrs.get("steps", 0),
            "seconds": trial.user_attrs.get("seconds", 0.0),
            "worker": trial.user_attrs.get("worker", ""),
            "reason": trial.user_attrs.get("reason", ""),
            **({name: trial.user_attrs.get(name) for name in _OF_MEMBERS} if folder.plan.members else {}),
            **({CONTINUES: trial.user_attrs.get(CONTINUES)} if folder.plan.pauses else {}),
        }
        for trial in trials
    ]


def _state(trial: FrozenTrial, newest: Mapping[int, int]) -> str:
    """Return the state of a trial in words; one that paused went on if its training has a newer trial."""
    if trial.state == TrialState.PRUNED and PAUSED in trial.user_attrs:
        return "paused" if newest[first_of(trial)] == trial.number else "went on"
    return trial.state.name.lower().replace("fail", "failed")


def per_worker(trials: list[FrozenTrial]) -> list[dict[str, Any]]:
    """Return for each worker its trials, their seconds, and trials and steps an hour: unequal workers show here."""
    found: dict[str, dict[str, Any]] = {}
    for trial in trials:
        if trial.state not in FINISHED:
            continue
        about = trial.user_attrs
        name = worker_of(trial)
        row = found.setdefault(name, {"worker": name, "trials": 0, "seconds": 0.0, "steps": 0})
        row["trials"] += CONTINUES not in about  # a promoted trial was counted when it began
        row["seconds"] += float(about.get("seconds", 0.0))
        row["steps"] += int(about.get("steps", 0))
    for row in found.values():
        hours = row["seconds"] / 3600
        row["trials_per_hour"] = round(row["trials"] / hours, 2) if hours else None
        row["steps_per_hour"] = round(row["steps"] / hours) if hours else None
    return [found[name] for name in sorted(found)]


def importances(study: optuna.Study) -> dict[str, float]:
    """Return the share of the spread of scores that each setting explains (PED-ANOVA, Watanabe et al. 2023)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            evaluator = optuna.importance.PedAnovaImportanceEvaluator()
            return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))
        except (ValueError, RuntimeError):  # too few trials, or all alike
            return {}


def write_page(folder: StudyFolder) -> Path:
    """Write tune.html of a search, whatever of it is finished."""
    study, space = folder.study(), folder.plan.read_space()
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    ).get_template("tune.html.j2")  # fmt: skip
    best = folder.best()
    html = template.render(
        title=f"Search of {folder.path.name}", plan=folder.plan, space=space.parameters, best=best,
        best_values={} if best is None else space.values_of(best.params), verdict=read_verdict(folder),
        rows=trial_rows(folder, space), workers=per_worker(study.get_trials(deepcopy=False)),
        importances=importances(study), figures=_figures(study, folder.plan),
        line=[] if best is None or not folder.plan.members else [
            {"generation": trial.user_attrs["generation"], "number": trial.number, "value": trial.value,
             "values": space.values_of(trial.params)} for trial in ancestors(folder.trials(), best.number)],
    )  # fmt: skip
    return folder.write("tune.html", html.encode())


def _figures(study: optuna.Study, plan: SearchPlan) -> list[tuple[str, str]]:
    """Return title and PNG of each figure that the trials allow."""
    complete = [trial for trial in study.get_trials(deepcopy=False) if trial.state == TrialState.COMPLETE]
    if not complete:
        return []
    import optuna.visualization.matplotlib as drawn

    members: Mapping[str, Callable[[optuna.Study], Any]] = {
        "Members over the generations; dashed: a copy of another member": lambda study: draw_generations(
            study.get_trials(deepcopy=False), plan.score
        ),
    }
    made: Mapping[str, Callable[[optuna.Study], Any]] = {
        **(members if plan.members else {}),
        "Score of each trial, and the best so far": drawn.plot_optimization_history,
        "Validations of each trial; lines that end early were stopped or paused": drawn.plot_intermediate_values,
        "Importance of each setting": lambda study: drawn.plot_param_importances(
            study, evaluator=optuna.importance.PedAnovaImportanceEvaluator()
        ),
        "Settings of each trial and its score": drawn.plot_parallel_coordinate,
        "Score over each setting": drawn.plot_slice,
    }
    figures = []
    for title, draw in made.items():
        try:
            figures.append((title, _png(draw, study)))
        except (ValueError, RuntimeError, IndexError):  # too few trials for this figure
            continue
    return figures


def _png(draw: Callable[[optuna.Study], Any], study: optuna.Study) -> str:
    with mpl.rc_context({"backend": "agg"}), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from matplotlib import pyplot

        axes = draw(study)
        figure = (axes.flat[0] if hasattr(axes, "flat") else axes).figure
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=100, bbox_inches="tight", metadata={"Software": None})
        pyplot.close(figure)
    return base64.b64encode(buffer.getvalue()).decode()
