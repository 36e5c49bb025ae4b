"""`terrashard quicklook` draws a cube (all dates, or one) or a map, without any other program."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.session import Session, command

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    @command(
        app,
        examples=(
            "terrashard quicklook zagreb.zarr zagreb.png",
            "terrashard quicklook zagreb.zarr one_day.png --time 2023-08-18 --bands nir,red,green",
            "terrashard quicklook zagreb_map.zarr map.png",
        ),
    )
    def quicklook(
        session: Session,
        store: Annotated[str, typer.Argument(metavar="CUBE|MAP", help="Path or URL of a cube or a map.")],
        out: Annotated[str, typer.Argument(metavar="OUT.png", help="Where the picture goes.")],
        collection: Annotated[str | None, typer.Option(help="Collection of the cube; default: its first.")] = None,
        time: Annotated[
            str | None, typer.Option(metavar="DATE|N", help="One date, or its position; default: all.")
        ] = None,
        bands: Annotated[
            str | None,
            typer.Option(
                metavar="R,G,B", help="Bands for red, green and blue; default: true colour where the cube has it."
            ),
        ] = None,
        width: Annotated[int, typer.Option(min=64, max=16384, help="Largest width of the picture, pixels.")] = 2000,
    ) -> None:
        """Draw a cube in true colour, one panel for each date, or the classes of a map with their names."""
        from cli.picture import draw

        picture = draw(store, out, collection=collection, time=time, bands=bands, width=width)
        session.say(f"{picture['path']}: {picture['width']}×{picture['height']} px, {picture['what']}")
        session.emit(picture)
