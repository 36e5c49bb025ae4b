"""`settle` trains the best trial and the defaults again, with several seeds, and compares their test scores.

A search takes the best of many validation scores, so that a lucky trial wins. The test part was not used by any trial.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import tomli_w

from jaxtrain.config import TrainConfig
from jaxtrain.evaluation.scores import evaluate
from jaxtrain.loop import train
from jaxtrain.shared import SharedParts
from jaxtrain.tuning.study import StudyFolder, toml_tables
from zarr_store.errors import NothingFound

__all__ = ["Contender", "Verdict", "read_verdict", "settle", "write_best"]

_FILE = "verdict.json"


@dataclass(frozen=True)
class Contender:
    """One configuration, trained with several seeds.

    Attributes:
        name: "best" or "defaults".
        validation: Best validation score of each seed.
        test: Test score of each seed; none where the split has no test part.
        trial_value: Score of the trial in the search; None of the defaults.
    """

    name: str
    validation: tuple[float, ...]
    test: tuple[float, ...]
    trial_value: float | None = None


@dataclass(frozen=True)
class Verdict:
    """The comparison of the best trial and the defaults.

    Attributes:
        score: Name of the score.
        lower: Whether a smaller score is better.
        seeds: Seeds of the trainings.
        best: The best trial's configuration.
        defaults: The configuration without the search.
    """

    score: str
    lower: bool
    seeds: tuple[int, ...]
    best: Contender
    defaults: Contender

    def words(self) -> str:
        """Return one line: by how much the best is better, compared with the spread over seeds."""
        sides = [side.test or side.validation for side in (self.best, self.defaults)]
        part = "test" if self.best.test else "validation"
        means = [statistics.fmean(side) for side in sides]
        gain = (means[1] - means[0]) if self.lower else (means[0] - means[1])
        spread = max(statistics.stdev(side) if len(side) > 1 else 0.0 for side in sides)
        shown = (
            f"{part} {self.score} {means[0]:.4f} for the best, {means[1]:.4f} for the defaults, {len(self.seeds)} seeds"
        )
        if not math.isfinite(gain):
            return shown
        if gain <= 0:
            return f"{shown}: the best trial was lucky, it is no better than the defaults"
        if gain < 2 * spread:
            return f"{shown}: the gain of {gain:.4f} is within the spread of seeds ({spread:.4f})"
        return f"{shown}: better by {gain:.4f}; spread of seeds {spread:.4f}"

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {**asdict(self), "verdict": self.words()}


def write_best(folder: StudyFolder) -> TrainConfig | None:
    """Write the configuration of the best trial to best.toml, fit for `terrashard train`; None if there is none."""
    best = folder.best()
    if best is None:
        return None
    plan = folder.plan
    values = plan.read_space().values_of(best.params)
    config = plan.config_of(values, where=f"trial {best.number}")
    tables = config.model_dump(mode="json", exclude_unset=True)
    header = f"# Trial {best.number} of {plan.name}: validation {plan.score} {best.value:.4f}\n"
    folder.write("best.toml", (header + tomli_w.dumps(toml_tables(tables))).encode())
    return config


def settle(
    folder: StudyFolder, seeds: int, shared: SharedParts, on_note: Callable[[str], None] = lambda _: None
) -> Verdict | None:
    """Train best and defaults with `seeds` seeds each and evaluate them on the test part; None without a best trial.

    What an earlier call trained is not trained again; runs that were interrupted go on.
    """
    best = folder.best()
    if best is None:
        return None
    plan = folder.plan
    values = plan.read_space().values_of(best.params)
    first = plan.base.run.seed
    numbers = tuple(first + number for number in range(seeds))
    sides = []
    for name, chosen in (("best", values), ("defaults", {})):
        folder_name = f"{name}-{best.number:04d}" if name == "best" else name
        validation, test = [], []
        for seed in numbers:
            config = plan.config_of({**chosen, "run.seed": seed}, where=name)
            out = folder.path / "final" / f"{folder_name}-seed-{seed}"
            on_note(f"training the {name} configuration with seed {seed}")
            result = train(config, out, progress=False, shared=shared, report=False)
            score = result.best_score if result.best_score is not None else result.validation.get(plan.score)
            if score is not None:
                validation.append(float(score))
            try:
                found = evaluate(out).to_dict().get(plan.score)
            except NothingFound:  # the split keeps nothing for a test
                found = None
            if found is not None:
                test.append(float(found))
        value = best.value if name == "best" else None
        sides.append(Contender(name, tuple(validation), tuple(test), value))
    verdict = Verdict(plan.score, plan.direction == "minimize", numbers, *sides)
    folder.write(_FILE, json.dumps({**verdict.to_dict(), "trial": best.number}, indent=1).encode())
    return verdict


def read_verdict(folder: StudyFolder) -> Mapping[str, Any] | None:
    """Return verdict.json; None if there is none.

    Its key `current` tells whether it judges the best trial, and its words name the trial if it is another one.
    """
    path = folder.path / _FILE
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    best = folder.best()
    current = best is not None and best.number == found["trial"]
    words = found["verdict"] if current else f"of trial {found['trial']}, the best before: {found['verdict']}"
    return {**found, "verdict": words, "current": current}
