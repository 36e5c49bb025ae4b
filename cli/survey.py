"""`terrashard survey` compares the costs of all parallel strategies for a network, and recommends one."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.session import Session, command

if TYPE_CHECKING:
    from jaxtrain.planner.scaling import Curve

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    @command(
        app,
        settings="own",
        examples=(
            "terrashard survey examples/zagreb_scl.toml",
            "terrashard survey examples/zagreb_scl.toml --devices 64 --profile h100-ib",
            "terrashard survey examples/multimodal.toml --measure",
        ),
    )
    def survey(
        session: Session,
        configuration: Annotated[
            Path, typer.Argument(metavar="CONFIG.toml", help="Settings: data, model, optim, mesh, run.")
        ],
        devices: Annotated[
            str | None,
            typer.Option("--devices", metavar="N,…", help="Numbers of devices; default: all devices of this machine."),
        ] = None,
        profile: Annotated[
            str,
            typer.Option(
                "--profile",
                metavar="NAME|FILE.toml",
                help="Machine profile, a name or a file; default: this machine, measured once.",
            ),
        ] = "this-machine",
        calibrate: Annotated[
            bool, typer.Option("--calibrate", help="Measure this machine again, in less than 30 s.")
        ] = False,
        measure: Annotated[
            bool, typer.Option("--measure", help="Run the quickest strategies on this machine, and compare.")
        ] = False,
        scaling: Annotated[
            bool,
            typer.Option("--scaling", help="Curves over the numbers of --devices; the batch grows with the devices."),
        ] = False,
        html: Annotated[
            Path | None, typer.Option("--html", metavar="FILE.html", help="A page with figures, in one file.")
        ] = None,
        dask: Annotated[
            str | None,
            typer.Option("--dask", metavar="ADDRESS", help="Measure placements on the workers of this Dask cluster."),
        ] = None,
        epochs: Annotated[
            float | None,
            typer.Option(
                "--epochs", metavar="N", help="Epochs of each measured placement; default: one, of 200 steps at most."
            ),
        ] = None,
    ) -> int:
        """Compare all parallel strategies for a network: bytes, operations, memory, time; and choose one.

        Programs are compiled also for machines that you do not have; nothing is trained. For a network of several
        modalities the placements of its branches are compared; with --devices, its meshes.
        """
        from cli.placing import survey_branches
        from cli.progress import Reporter
        from cli.training import train_config
        from jaxtrain.planner.machine import device_count, this_machine
        from jaxtrain.planner.measure import measure_rows
        from jaxtrain.planner.page import write_page
        from jaxtrain.planner.placements import branches_of
        from jaxtrain.planner.profile import read_profile
        from jaxtrain.planner.scaling import grown, scaling_curves
        from jaxtrain.planner.survey import describe_network, survey_run
        from jaxtrain.planner.words import curve_table, sensitivity, sensitivity_line, table, verdict
        from zarr_store.errors import InvalidInput

        if epochs is not None and not 0 <= epochs < float("inf"):
            raise InvalidInput(f"--epochs must be a number from 0, got {epochs}; 0 measures steps and trains nothing")
        if dask is not None:  # not after the minutes of a survey
            from cli.dask_workers import check_address

            check_address(dask)
        config = train_config(configuration, session)
        known = None if profile == "this-machine" else read_profile(profile)  # a wrong name costs no search for devices
        numbers = [device_count()] if devices is None else _numbers(devices)
        machine = known or this_machine(max(numbers), again=calibrate)
        network = describe_network(config)
        if len(branches_of(config)) > 1 and devices is None and not scaling:
            survey_branches(session, network, machine, measure=measure or dask is not None, dask=dask, epochs=epochs)
            return 0
        if dask is not None:
            raise InvalidInput(
                "--dask measures the placements of a network with two modalities or more; leave it out, or take "
                "model.name = 'multimodal' without --devices and --scaling"
            )
        curves: tuple[Curve, ...] = ()
        if scaling:
            with Reporter(session, "scaling", unit="programs") as progress:
                curves = scaling_curves(network, numbers, machine, on_progress=progress.update)
        surveys = []
        for number in [max(numbers)] if scaling else numbers:
            with Reporter(session, "survey", unit="strategies") as progress:
                looked_at = grown(network, number) if scaling else network
                surveys.append(survey_run(looked_at, number, machine, on_progress=progress.update))
        if measure:
            session.note("measuring the quickest strategies in turns")
            surveys = [measure_rows(one) if one.choice is not None else one for one in surveys]
        for one in surveys:
            if any(row.prediction is not None for row in one.rows):
                session.say_lines(table(one))
            if one.choice is None:
                session.fail(verdict(one))
                continue
            session.say(verdict(one))
            if line := sensitivity_line(one):
                session.say(line)
        if curves:
            session.say_lines(curve_table(curves))
        if html is not None:
            session.say(f"page: {write_page(html, surveys, curves)}")
        documents = [one.to_dict() | {"verdict": verdict(one), "sensitivity": sensitivity(one)} for one in surveys]
        more: dict[str, Any] = {"surveys": documents} if len(documents) > 1 else {}
        if curves:
            more["scaling"] = [asdict(curve) for curve in curves]
        session.emit(documents[0] | more)
        return 0 if any(one.choice is not None for one in surveys) else InvalidInput.exit_code


def _numbers(text: str) -> list[int]:
    from zarr_store.errors import InvalidInput

    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise InvalidInput(f"--devices must be whole numbers from 1, separated by commas, got {text!r}")
    return numbers
