"""`terrashard tune` searches for the settings of a training with the best validation score."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cli.session import Session, command

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    @command(
        app,
        settings="own",
        examples=(
            "terrashard tune CONFIG.toml --space space.toml --trials 50 --out studies/first",
            "terrashard tune studies/first --show",
            "terrashard tune studies/first --extend 50 --jobs 2",
        ),
    )
    def tune(
        session: Session,
        what: Annotated[
            Path, typer.Argument(metavar="CONFIG.toml|STUDY", help="Settings of all trials; or a search to continue.")
        ],
        space: Annotated[
            Path | None, typer.Option("--space", metavar="SPACE.toml", help="Settings that trials change, and how.")
        ] = None,
        out: Annotated[Path | None, typer.Option("--out", metavar="STUDY", help="Folder of the search.")] = None,
        trials: Annotated[int | None, typer.Option("--trials", min=1, metavar="N", help="Trials in all.")] = None,
        hours: Annotated[
            float | None, typer.Option("--hours", min=0.0, metavar="H", help="Begin no trial after this many hours.")
        ] = None,
        steps: Annotated[
            int | None,
            typer.Option("--steps", min=1, metavar="N", help="Begin no trial after this many training steps in all."),
        ] = None,
        extend: Annotated[
            int | None, typer.Option("--extend", min=1, metavar="N", help="Run N more trials than there are.")
        ] = None,
        show: Annotated[bool, typer.Option("--show", help="Print the trials of STUDY; run nothing.")] = False,
        score: Annotated[
            str | None,
            typer.Option("--score", metavar="NAME", help="Validation score to compare; default: that of run.monitor."),
        ] = None,
        sampler: Annotated[
            Literal["tpe", "random", "cmaes", "gp", "pbt"],
            typer.Option("--sampler", help="What chooses the values; pbt: population-based training."),
        ] = "tpe",
        members: Annotated[
            int, typer.Option("--members", min=2, metavar="N", help="Networks that --sampler pbt trains side by side.")
        ] = 8,
        pruner: Annotated[
            Literal["asha", "hyperband", "median", "wilcoxon", "none"] | None,
            typer.Option("--pruner", help="What stops or pauses trials; default: asha, none with --sampler gp or pbt."),
        ] = None,
        folds: Annotated[
            int, typer.Option("--folds", min=0, metavar="N", help="Spatial folds of a cross-validation.")
        ] = 0,
        seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the sampler.")] = 0,
        storage: Annotated[
            str, typer.Option("--storage", metavar="URL", help="Database of the study; default: a journal in STUDY.")
        ] = "",
        jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, metavar="N", help="Trials at the same time.")] = 1,
        dask: Annotated[
            str | None,
            typer.Option("--dask", metavar="ADDRESS", help="Run trials on the workers of this cluster."),
        ] = None,
        population: Annotated[
            str,
            typer.Option(
                "--population",
                metavar="N|auto|off",
                help="Run N trials of equal shapes as one program; auto: if that is measured to be faster.",
            ),
        ] = "off",
        seeds: Annotated[
            int,
            typer.Option(
                "--seeds",
                min=0,
                metavar="N",
                help="At the end, train best and default settings with N seeds each; 0: skip this.",
            ),
        ] = 3,
    ) -> None:
        """Search for the best settings of a training. The same command again continues the search.

        Trials that differ only in numbers share data and compiled programs. The score is of the validation part; the
        test part is used once, to compare the best with the defaults.
        """
        from cli.tuning import choose_limits, open_search, read_population, run_search, show_search

        together = read_population(population)
        folder = open_search(
            session, what, space=space, out=out, score=score, sampler=sampler, pruner=pruner, folds=folds, seed=seed,
            storage=storage, members=members,
        )  # fmt: skip
        if show:
            show_search(session, folder)
            return
        limits = choose_limits(session, folder, trials=trials, hours=hours, steps=steps, extend=extend)
        run_search(session, folder, limits, jobs=jobs, dask=dask, seeds=seeds, population=together)
