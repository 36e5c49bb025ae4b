"""`begin_search` makes a search from a configuration and a space that fit each other and the data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jaxtrain.config import TrainConfig
from jaxtrain.data.opening import open_training_data
from jaxtrain.prepare import absent_classes, dates_left_out, prepare
from jaxtrain.session import check_monitor
from jaxtrain.settings import read_toml
from jaxtrain.tuning.plan import Pruner, Sampler, SearchPlan, check_search, default_score
from jaxtrain.tuning.space import parse_space, trial_config
from jaxtrain.tuning.study import StudyFolder

__all__ = ["begin_search"]


def begin_search(
    config: TrainConfig, space: Path, out: Path, *, score: str | None = None, sampler: Sampler = "tpe",
    pruner: Pruner | None = None, folds: int = 0, seed: int = 0, storage: str = "", members: int = 8,
    on_warning: Callable[[str], None] | None = None,
) -> StudyFolder:  # fmt: skip
    """Begin a search, or continue the one of the same plan in this folder.

    Args:
        config: Configuration of all trials, where the space does not change it.
        space: TOML file of the space.
        out: Folder of the search.
        score: Validation score; None for that of `run.monitor`, else accuracy or R².
        sampler: Sampler, which chooses the values of a trial.
        pruner: What stops trials early; None for asha, or for none where the sampler is pbt or gp, which models
            complete trials only.
        folds: Folds of a spatial cross-validation; 0 for the validation part.
        seed: Seed of the sampler.
        storage: URL of a database; empty for a journal in the folder.
        members: Size of the population of the sampler pbt.
        on_warning: Called with each line about data that limit all trials, such as a class that a part lacks.

    Raises:
        InvalidInput: Space, sampler, pruner, score, configuration and data do not fit together, or the folder holds
            another search.
        NothingFound: No window has anything to learn.
    """
    tables = config.model_dump(mode="json", exclude_unset=True)
    known = parse_space(read_toml(space), config, where=str(space))
    pruner = pruner or ("none" if sampler in ("pbt", "gp") else "asha")
    check_search(sampler, pruner, folds, known, config, members)
    first = {"data.split.folds": folds, "data.split.fold": 0} if folds else {}
    looked_at = trial_config(tables, first, where="configuration of the search")
    card, ready = prepare(looked_at, open_training_data(config.data.cube), None)
    name = score or default_score(config, card.task)
    plan = SearchPlan(
        settings=tables, space=known.source, digest=card.cube_digest, score=name, sampler=sampler, pruner=pruner,
        folds=folds, seed=seed, storage=storage, name=out.absolute().name,
        members=members if sampler == "pbt" else 0,
    )  # fmt: skip
    monitored = plan.config_of({}, fold=0 if folds else None, where="configuration of the search")
    check_monitor(monitored, card.task, ready.plan.counts())
    folder = StudyFolder.create(out, plan)
    if on_warning is not None:
        for line in (*absent_classes(card), *dates_left_out(card)):
            on_warning(line)
    return folder
