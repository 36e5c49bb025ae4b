"""A run and a cube become a map and its GeoTIFF; `jaxtrain` and `ingest.raster.cog` meet here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cli.map_helpers import HelperOptions, fill_elsewhere
from cli.products import Products, class_colours, estimate_map, export_cog, say_areas
from cli.progress import Reporter
from cli.session import Session
from zarr_store.errors import InvalidInput

__all__ = ["class_colours", "export_cog", "run_prediction"]


def run_prediction(
    session: Session,
    run: Path,
    cube: str,
    out: str,
    *,
    products: Products | None = None,
    time: str | None = None,
    probabilities: bool = False,
    aoi: Path | None = None,
    bbox: str | None = None,
    helpers: HelperOptions | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Predict with progress on stderr, say what was mapped, and write the files that are made of the map.

    Args:
        session: The running command.
        run: The run directory.
        cube: The cube.
        out: The map.
        products: Files that are made of it.
        time: One date.
        probabilities: Also store the probability of each class.
        aoi: File with polygons that are mapped.
        bbox: Box that is mapped, in degrees.
        helpers: Other processes that fill the map.
        options: Further options of `jaxtrain.predict`.

    Returns:
        The result of `jaxtrain.predict` as JSON, with `areas` and the files.
    """
    from cli.area import load_area
    from jaxtrain import predict
    from jaxtrain.inference.opening import share_processor
    from jaxtrain.parallel.processes import start_replica

    products = products or Products()
    products.check()
    part = _launched_part()
    if part is not None:
        start_replica()  # this process gets its share of the GPUs, and ends with the launcher
    share_processor(run, options.get("devices"))
    if part is not None and (elsewhere := {name for name, value in (helpers or {}).items() if value is not None}):
        raise InvalidInput(f"`terrashard launch` starts the processes of the map: leave --{elsewhere.pop()} out")
    if part is not None and part[0] > 0:
        return _join(session, run, cube, out, part, time=time, probabilities=probabilities,
                     area=load_area(run, cube, aoi=aoi, bbox=bbox), options=options)  # fmt: skip
    with Reporter(session, "predict", unit="batches") as progress:
        result = predict(
            run, cube, out, time=time, probabilities=probabilities, on_batch=progress.update,
            area=load_area(run, cube, aoi=aoi, bbox=bbox),
            elsewhere=fill_elsewhere(session, helpers or {}, progress.update), part=part, **options,
        )  # fmt: skip
    for text in result.warnings:
        session.warn(text)
    from jaxtrain.inference.maps import open_map

    made = open_map(out)
    document = {**result.to_dict(), "areas": estimate_map(made, run)}
    _say_map(session, out, document)
    say_areas(session, document["areas"])
    return {**document, **products.make(session, made)}


def _launched_part() -> tuple[int, int] | None:
    """Return (number, count) of this process among those of `terrashard launch`; None if it is the only one."""
    from jaxtrain.parallel.rendezvous import PROCESS, PROCESSES, read_number

    number, count = read_number(PROCESS, os.environ), read_number(PROCESSES, os.environ)
    return None if number is None or count is None or count < 2 else (number, count)


def _join(
    session: Session, run: Path, cube: str, out: str, part: tuple[int, int], *, options: dict[str, Any], **more: Any
) -> dict[str, Any]:
    """Fill the shards of one of several processes; process 0 reports on the map and makes its files."""
    from jaxtrain.inference.options import MapOptions
    from jaxtrain.inference.scene import join_map

    known = {name: value for name, value in (options | more).items() if name != "append"}
    with Reporter(session, "predict", unit="batches") as progress:
        filled = join_map(run, cube, out, MapOptions(**known), part, progress.update)
    session.say(f"process {part[0]} of {part[1]}: {filled.shards} shards in {filled.seconds:.1f} s")
    return {"process": part[0], "processes": part[1], "shards": filled.shards, "windows": filled.windows}


def _say_map(session: Session, out: str, result: dict[str, Any]) -> None:
    height, width = result["shape"]
    total = max(sum(result["pixels"].values()), 1)
    session.say(f"{out}: {height}×{width} px from {len(result['dates'])} date(s), {result['seconds']:.1f} s")
    if not result.get("shards_made", 1):
        session.say("  nothing had changed: the map that was there is the one that was asked for")
    for name, count in result["pixels"].items():
        session.say(f"  {name:24} {count / total:6.1%}")
    if result["values"] is not None:
        session.say("  " + ", ".join(f"{word} {value:.6g}" for word, value in result["values"].items()))
    for name, count in result.get("modalities", {}).items():
        session.say(f"  used: {name:18} {count / (height * width):6.1%}")
