"""`terrashard export-model` writes a trained network for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.session import Session, command

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    @command(
        app,
        examples=(
            "terrashard export-model runs/zagreb zagreb_model",
            "terrashard export-model runs/zagreb zagreb_model --formats safetensors,stablehlo --batch 8",
        ),
    )
    def export_model(
        session: Session,
        run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory of `terrashard train`.")],
        folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where the files go; nothing may be there.")],
        formats: Annotated[
            str, typer.Option(metavar="A,B,…", help="Which files: safetensors, stablehlo, onnx.")
        ] = "safetensors,stablehlo,onnx",
        batch: Annotated[int, typer.Option(min=1, metavar="N", help="Number of windows of one call.")] = 1,
        side: Annotated[
            int | None,
            typer.Option(min=1, metavar="PX", help="Side of a window, in pixels; default: that of training."),
        ] = None,
    ) -> None:
        """Write a trained network as safetensors, StableHLO and ONNX, with a description (STAC item, MLM extension).

        The network takes stored numbers and normalises them itself. Needs the extra `export`.
        """
        from jaxtrain.inference.exported import export_model as export_run

        chosen = tuple(name.strip() for name in formats.split(",") if name.strip())
        made = export_run(run, folder, formats=chosen, batch=batch, side=side)
        for text in made.warnings:
            session.warn(text)
        session.say(f"{made.folder}: {', '.join(made.files)}; step {made.step}, {made.parameters:,} parameters")
        for name, shape in made.inputs.items():
            session.say(f"  {name:24} {'×'.join(map(str, shape))}")
        session.emit(made.to_dict())
