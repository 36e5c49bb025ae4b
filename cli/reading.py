"""Options that the commands without labels share: what is read, and who computes."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

__all__ = ["Bands", "Collection", "Dask", "DateRule", "Dates", "Memory", "Standardise"]

Collection = Annotated[str | None, typer.Option("--collection", help="Collection of the cube; default: its first.")]
Bands = Annotated[
    str | None, typer.Option("--bands", metavar="A,B,…", help="Bands and stored indices; default: all bands.")
]
Dates = Annotated[
    str | None,
    typer.Option("--time", metavar="DATES", help="Dates, such as 2023-08 or 2023-04/2023-09; default: all dates."),
]
DateRule = Annotated[
    Literal["mean", "stack"],
    typer.Option("--dates", help="mean: bands are averaged over the dates. stack: each date has its own features."),
]
Standardise = Annotated[bool, typer.Option("--standardise", help="Divide each feature by its standard deviation.")]
Dask = Annotated[
    str | None, typer.Option("--dask", metavar="ADDRESS", help="Compute on the workers of this Dask scheduler.")
]
Memory = Annotated[
    str | None,
    typer.Option("--memory", metavar="SIZE", help="Data that a process keeps between passes; default 2GiB."),
]
