"""`terrashard embed` writes the vectors that an autoencoder makes of windows or samples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.session import Session, command

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    @command(app, examples=("terrashard embed runs/autoencoder cube.zarr vectors.zarr",))
    def embed(
        session: Session,
        run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory of a model `autoencoder`.")],
        data: Annotated[str, typer.Argument(metavar="CUBE|STORE", help="Cube or sample store to embed.")],
        out: Annotated[str, typer.Argument(metavar="OUT.zarr", help="Where the vectors go, each with its place.")],
        allow_mismatch: Annotated[
            bool,
            typer.Option(
                "--allow-mismatch", help="Use data of another pixel size or unit than those of training, and warn."
            ),
        ] = False,
    ) -> None:
        """Turn each window of a cube, or each sample of a store, into a vector to search, cluster and compare."""
        from cli.progress import Reporter
        from jaxtrain import embed as run_embedding

        with Reporter(session, "embed", unit="batches") as progress:
            result = run_embedding(run, data, out, allow_mismatch=allow_mismatch, on_batch=progress.update)
        for text in result.warnings:
            session.warn(text)
        session.say(f"{result.out}: {result.samples:,} vectors of {result.code} numbers")
        session.emit(result.to_dict())
