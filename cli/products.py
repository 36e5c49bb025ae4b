"""Write a finished map as files for other programs; `jaxtrain.inference.maps` and `ingest.products` meet here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cli.session import Session
from zarr_store.errors import InvalidInput, TerrashardError

if TYPE_CHECKING:
    import numpy.typing as npt

    from ingest.products.layer import ClassLayer
    from jaxtrain.inference.maps import Map

_ELSEWHERE = "the map errs there as it does where the samples lie"

__all__ = ["Products", "class_colours", "class_layer", "estimate_map", "export_cog", "export_map", "say_areas"]


@dataclass(frozen=True)
class Products:
    """Files to write from a map.

    Attributes:
        cog: GeoTIFF.
        polygons: GeoParquet, GeoJSON or GeoPackage, by its suffix.
        min_area: Patches below this area, m², go into a neighbour.
        simplify: How far borders of polygons may move, in units of the CRS.
        pmtiles: Tiles of a web map.
    """

    cog: Path | None = None
    polygons: Path | None = None
    min_area: float = 0.0
    simplify: float = 0.0
    pmtiles: Path | None = None

    def check(self) -> None:
        """Raise an error for files that could not be written, before minutes of work.

        Raises:
            InvalidInput: One of them cannot be written, or an option is given without the file that it is for.
        """
        for option, path, suffixes in (("--cog", self.cog, (".tif", ".tiff")),
                                       ("--pmtiles", self.pmtiles, (".pmtiles",))):  # fmt: skip
            if path is not None and path.suffix.lower() not in suffixes:
                raise InvalidInput(f"{option} needs a {suffixes[0]} file, got {path}")
            if path is not None and path.is_dir():
                raise InvalidInput(f"{option} {path} is a folder; name a {suffixes[0]} file in it")
        for option, number in (("--min-area", self.min_area), ("--simplify", self.simplify)):
            if number and self.polygons is None:
                raise InvalidInput(f"{option} is for polygons; add --polygons FILE")
        if self.polygons is not None:
            from ingest.products.vector_file import check_vector_target

            check_vector_target(self.polygons)
        if self.pmtiles is not None:
            from ingest.products.web_tiles import check_pmtiles

            check_pmtiles()

    def make(self, session: Session, made: Map, *, time: int = -1) -> dict[str, Any]:
        """Write the files of a finished map and say what they hold; return them as JSON.

        Args:
            session: The running command.
            made: The map.
            time: Position of the date in a map of each date; the GeoTIFF holds all dates.
        """
        written: dict[str, Any] = {"cog": None if self.cog is None else str(self.cog)}
        if self.cog is not None:
            export_cog(made, self.cog)
            held = "values, in their unit" if made.values else "classes, with colours and class names"
            session.say(f"{self.cog}: cloud-optimised GeoTIFF of {held}")
        if self.polygons is not None:
            from ingest.products.vector_file import write_polygons

            done = write_polygons(class_layer(made, time), self.polygons, min_area=self.min_area,
                                  tolerance=self.simplify)  # fmt: skip
            small = f"; {done['merged']:,} smaller patches went into a neighbour" if self.min_area else ""
            session.say(f"{self.polygons}: {done['polygons']:,} polygons{small}")
            written["polygons"] = done
        if self.pmtiles is not None:
            from ingest.products.web_tiles import write_pmtiles

            tiles = write_pmtiles(class_layer(made, time), self.pmtiles)
            session.say(f"{self.pmtiles}: {tiles['tiles']:,} tiles, zoom {tiles['zooms'][0]} to {tiles['zooms'][1]}")
            written["pmtiles"] = tiles
        return written


def class_layer(made: Map, time: int = -1) -> ClassLayer:
    """Return the classes of a map, of one date of a map of each date, as the products read them.

    Raises:
        InvalidInput: The map holds values.
    """
    from ingest.products.layer import ClassLayer

    if made.values:
        raise InvalidInput(f"{made.url} holds values and has no classes; write it as a GeoTIFF")
    return ClassLayer(
        made.grid,
        made.classes.names,
        tuple((red, green, blue) for red, green, blue in made.classes.rgb().tolist()),
        int(made.kind.nodata("class")),
        lambda rows: made.read("class", rows, time=time),
        (lambda rows: made.read("confidence", rows, time=time)) if "confidence" in made.layers else None,
    )


def estimate_map(made: Map, run: Path | None, *, time: int = -1) -> dict[str, Any] | None:
    """Estimate the area of each class of a map, from the errors on the test part of its run.

    Args:
        made: The map.
        run: The run directory; None if it is not known.
        time: Position of the date in a map of each date.

    Returns:
        The mapped and estimated areas in hectares, with standard errors and 95 % confidence intervals; mapped areas
        alone, and `why_not`, where the run has no scores of its test part; None for a map of values or without pixels.
        `other_ground` says whether some or all of the test samples lie outside the map.
    """
    from jaxtrain.evaluation.areas import estimate_areas
    from jaxtrain.runs.evaluations import own_evaluation, read_evaluations

    if made.values:
        return None
    names = made.classes.names
    mapped = class_layer(made, time).areas()
    if not mapped.sum():
        return None
    scores = own_evaluation(read_evaluations(run)) if run is not None and run.is_dir() else None
    matrix = None if scores is None or scores["split"] != "test" else scores.get("confusion_matrix")
    tested = matrix is not None and scores is not None and tuple(scores["classes"]) == names
    counts = np.asarray(matrix, np.int64) if tested else np.zeros((len(names), len(names)), np.int64)
    document = estimate_areas(counts, mapped, names).to_dict(per_unit=10_000)
    if tested and run is not None:
        document["other_ground"] = _is_other_ground(made, run)
        if document["other_ground"]:
            document["assumes"] += f"; {_ELSEWHERE}"
        return document
    place = "its run is not known" if run is None else f"{run} has no scores of its test part"
    return {**document, "why_not": f"{place}: `terrashard evaluate RUN` writes them"}


def _is_other_ground(made: Map, run: Path) -> bool | None:
    """Return whether some or all of the test samples of a run lie outside a map; None if unknown."""
    from jaxtrain.runs.rundir import load_card

    try:
        card = load_card(run)
    except TerrashardError:  # scores without the card of their run
        return None
    several = isinstance(card.config.data.cube, (list, tuple)) and len(card.config.data.cube) > 1
    return several or card.grid != made.grid


def say_areas(session: Session, areas: dict[str, Any] | None) -> None:
    """Write a line for each class: the mapped area, and the estimated one with its 95 % interval."""
    if areas is None:
        return
    for name, row in areas["classes"].items():
        line = f"  {name:24} {row['mapped_ha']:>14,.2f} ha mapped"
        low, high = row["ci95"]
        if row["area_ha"] is not None and low is not None:
            line += f"  {row['area_ha']:>14,.2f} ± {high - row['area_ha']:,.2f} ha estimated (95 %)"
        session.say(line)
    if "why_not" in areas:
        session.say(f"  no estimate: {areas['why_not']}")
    elif areas["untested"]:
        session.say(f"  no estimate: no test sample lies in {', '.join(areas['untested'])}")
    elif areas.get("other_ground"):
        session.warn(f"the estimated areas come from test samples on other ground, and hold only if {_ELSEWHERE}")


def export_map(session: Session, url: str, products: Products, *, run: Path | None, time: str | None) -> dict[str, Any]:
    """Write the files of a finished map, and print the areas of its classes.

    Args:
        session: The running command.
        url: The map.
        products: The files.
        run: The run whose scores correct the areas; None for the one that made the map, if it is still there.
        time: Date of a map of each date, or its position; None for the last.

    Returns:
        map, areas and the files, as JSON.
    """
    from jaxtrain.inference.maps import open_map

    products.check()
    made = open_map(url)
    at = _find_date(made, time)
    if products.cog is not None and products.cog.suffix.lower() not in (".tif", ".tiff"):
        raise InvalidInput(f"the target must be a .tif file, got {products.cog}")
    origin = made.attributes.get("run")
    if run is None and isinstance(origin, str) and Path(origin).is_dir():
        run = Path(origin)
    areas = estimate_map(made, run, time=at)
    session.say(f"{url}: {made.grid.height}×{made.grid.width} px" + (f", {made.times[at]}" if made.times else ""))
    say_areas(session, areas)
    return {"map": url, "areas": areas, **products.make(session, made, time=at)}


def _find_date(made: Map, asked: str | None) -> int:
    if asked is None:
        return -1
    if not made.times:
        raise InvalidInput(f"--time: {made.url} is one map of {len(made.attributes.get('dates', ()))} dates")
    found = [at for at, date in enumerate(made.times) if date.startswith(asked) or str(at) == asked]
    if len(found) != 1:
        raise InvalidInput(f"--time {asked}: expected one of {', '.join(made.times[:8])}")
    return found[0]


def export_cog(made: Map, path: Path) -> None:
    """Write the classes or values of a map as a COG, in strips of its chunks; a map of each date has a band for each.

    Classes of one date have a colour table and class names, as far as a byte can number them.
    """
    from ingest.raster.cog import write_cog
    from jaxtrain.inference.maps import CHUNK

    layer, kind = ("value" if made.values else "class"), made.kind
    tags = {"terrashard_run": str(made.attributes.get("run", "")),
            "terrashard_step": str(made.attributes.get("step", ""))}  # fmt: skip
    count = len(made.times) or 1

    def strips() -> Iterator[tuple[int, int, npt.NDArray[Any]]]:
        for row in range(0, made.grid.height, CHUNK):
            rows = slice(row, min(row + CHUNK, made.grid.height))
            bands = [made.read(layer, rows, time=time) for time in range(count)]
            yield row, 0, np.stack(bands) if count > 1 else bands[0]

    named = count == 1 and kind.dtype(layer) == "uint8"
    names = made.classes.names if made.values else ("class",)
    write_cog(
        path,
        strips(),
        made.grid,
        dtype=kind.dtype(layer),
        count=count,
        nodata=kind.nodata(layer),
        colours=class_colours(made) if named else None,
        class_names=dict(enumerate(made.classes.names)) if named else None,
        descriptions=made.times or names,
        overviews=None if made.values else "mode",
        tags=tags,
        scales=[kind.scale] * count if kind.scale is not None else (),
        statistics=True,
    )


def class_colours(made: Map) -> dict[int, tuple[int, int, int]]:
    """Return class value → (red, green, blue)."""
    return {value: (red, green, blue) for value, (red, green, blue) in enumerate(made.classes.rgb().tolist())}
