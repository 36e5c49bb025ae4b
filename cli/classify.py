"""`terrashard classify` labels images with a network that was trained on a sample store."""

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
            "terrashard classify runs/eurosat new_images labels.parquet",
            "terrashard classify runs/eurosat other.zarr labels.parquet --json",
        ),
    )
    def classify(
        session: Session,
        run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory of a network of whole images.")],
        images: Annotated[
            str,
            typer.Argument(metavar="FOLDER|STORE", help="Folder of JPEG, PNG or GeoTIFF images, or a store."),
        ],
        out: Annotated[Path, typer.Argument(metavar="OUT.parquet", help="Where the labels go; replaced if it exists.")],
        bands: Annotated[str, typer.Option(metavar="A,B,…", help="Names of the bands of a folder, in order.")] = "",
        skip_bad: Annotated[
            bool, typer.Option("--skip-bad", help="Leave out files that cannot be used, and name them.")
        ] = False,
        allow_mismatch: Annotated[
            bool,
            typer.Option("--allow-mismatch", help="Use images of another size or unit than in training; warn."),
        ] = False,
    ) -> None:
        """Write the class and the probability of each class of images that have no label.

        A row holds the path of the image in the folder, its place where it is known, its class (or classes, where an
        image may have several), and a probability for each class. The file appears when all images are classified. A
        command that was stopped leaves no file; the same command begins again.
        """
        from cli.classifying import classify_images

        named = tuple(part.strip() for part in bands.split(",") if part.strip())
        session.emit(classify_images(session, run, images, out, bands=named, skip_bad=skip_bad,
                                     allow_mismatch=allow_mismatch))  # fmt: skip
