"""`terrashard samples` makes a sample store from folders of labelled images, or from one labelled scene."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cli.session import Session, command

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    @command(
        app,
        examples=(
            "terrashard samples EuroSAT_RGB eurosat.zarr",
            "terrashard samples Indian_pines_corrected.npy pines.zarr --labels Indian_pines_gt.npy",
        ),
    )
    def samples(
        session: Session,
        source: Annotated[
            Path,
            typer.Argument(
                metavar="DIR", help="A folder that holds one folder of images for each class; or a scene (.npy, .tif)."
            ),
        ],
        store: Annotated[str, typer.Argument(metavar="STORE", help="Where the sample store is written.")],
        labels: Annotated[
            Path | None,
            typer.Option(metavar="FILE", help="For a scene: the class of each pixel (.npy, .tif), 0 for none."),
        ] = None,
        names: Annotated[str, typer.Option(metavar="A,B,…", help="For a scene: names of label 1, 2, ….")] = "",
        bands: Annotated[str, typer.Option(metavar="A,B,…", help="Names of the bands, in order.")] = "",
        skip_bad: Annotated[
            bool, typer.Option("--skip-bad", help="Leave out files that cannot be used, and name them.")
        ] = False,
    ) -> None:
        """Import labelled images for scene classification: JPEG, PNG or GeoTIFF, with coordinates where they are known.

        The folder may hold coordinates.csv (file, latitude, longitude), so that training and test samples can be split
        by place. It may hold labels.csv (file, labels) in place of folders of classes; an image may then have several.
        """
        from cli.progress import Reporter
        from ingest.labels.labelled_scene import import_scene
        from ingest.labels.patches import import_patches
        from zarr_store.errors import InvalidInput

        named, banded = _split(names), _split(bands)
        if source.is_dir():
            if labels or named:
                raise InvalidInput("--labels and --names belong to a scene; a folder names its classes itself")
            with Reporter(session, "samples", unit="images") as progress:
                report = import_patches(
                    source, store, bands=banded, skip_bad=skip_bad,
                    # the import counts an image when it is checked and again when it is written
                    on_progress=lambda done, total: progress.update(done // 2, total // 2),
                )  # fmt: skip
        elif labels is None:
            raise InvalidInput(f"{source} is not a folder: expected a folder of classes, or a scene with --labels FILE")
        else:
            report = import_scene(source, labels, store, bands=banded, names=named)
        for line in report.left_out:
            session.warn(f"left out: {line}")
        for line in report.passed_over:
            session.warn(f"passed over: {line}")
        for line in report.warnings:
            session.warn(line)
        if report.without_place and labels is None:
            session.warn(
                f"{report.without_place} of {report.samples} samples have no coordinates: they cannot be split by "
                "place; add a coordinates.csv with columns file, latitude, longitude"
            )
        height, width = report.size
        session.say(
            f"{report.store}: {report.samples:,} samples of {len(report.classes)} classes, {len(report.bands)} bands, "
            f"{height} × {width} pixels"
        )
        if report.invalid_pixels:
            session.say(f"  {report.invalid_pixels:,} pixels hold no data by nodata value, mask, alpha or nan")
        for name, count in report.classes.items():
            session.say(f"  {name:32} {count:,}")
        session.emit(asdict(report))


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())
