"""A finished map becomes files of other programs; `jaxtrain.inference.maps` and `ingest.products` meet here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.session import Session
from zarr_store.errors import InvalidInput

if TYPE_CHECKING:
    from ingest.products.layer import ClassLayer
    from jaxtrain.inference.maps import Map

__all__ = ["class_layer", "estimate_map", "say_areas"]


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
    """
    import numpy as np

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
    if tested:
        return document
    place = "its run is not known" if run is None else f"{run} has no scores of its test part"
    return {**document, "why_not": f"{place}: `terrashard evaluate RUN` writes them"}


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
