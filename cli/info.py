"""`terrashard info` shows what is in a cube."""

from __future__ import annotations

from itertools import permutations
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.session import Session, command

if TYPE_CHECKING:
    from zarr_store import Cube

__all__ = ["describe", "pairings", "register"]


def describe(cube: Cube, collection: str) -> dict[str, Any]:
    """Return the documented keys of `info --json` for one collection, with the shares of pixels by status."""
    spec = cube.spec(collection)
    items = cube.items(collection)
    counts = cube.states(collection).count()
    index = cube.index(collection)
    pixels = max(int(index.pixels.sum()), 1)
    times, height, width = spec.shape
    made = cube.provenance.get("collections", {}).get(collection, {})
    chunk_t, chunk_y, chunk_x = spec.layout.chunk
    shard_t, shard_y, shard_x = spec.layout.shard
    return {
        "dims": {"time": times, "band": len(spec.bands), "y": height, "x": width},
        "bands": list(spec.band_names),
        "dtype": spec.array(spec.kind).dtype,
        "crs": spec.grid.crs,
        "transform": list(spec.grid.transform),
        "shape": [times, len(spec.bands), height, width],
        "times": list(spec.times),
        "chunks": [chunk_t, len(spec.bands), chunk_y, chunk_x],
        "shards": [shard_t, len(spec.bands), shard_y, shard_x],
        "layout": spec.layout.name,
        "kind": spec.kind,
        "class_layers": list(spec.class_layers),
        "indices": [index.name for index in spec.derived],
        "reduce": spec.reduce,
        "bounds": list(spec.grid.bounds),
        "items": [item["id"] for item in items],
        "complete": counts["done"] == counts["total"],
        "shards_done": counts["done"],
        "shards_partial": counts["partial"],
        "shards_failed": counts["failed"],
        "shards_total": counts["total"],
        "resampled_share": made.get("resampled_share"),
        "offset_verdicts": made.get("offset_verdicts", {}),
        "observed_share": float(index.observed.sum()) / pixels,
        "masked_share": float(index.masked.sum()) / pixels,
        "missing_share": float(index.missing.sum()) / pixels,
    }


def label_layers(cube: Cube) -> dict[str, dict[str, Any]]:
    """Return what each label layer holds and where it comes from."""
    from zarr_store.labels import find_labels, open_label
    from zarr_store.layers import is_static

    found = {}
    for name in find_labels(cube):
        layer = open_label(cube, name)
        if is_static(layer):
            continue
        height, width = layer.array().shape
        found[name] = {
            "kind": layer.spec.kind,
            "classes": {label: {"value": value, "pixels": layer.counts[label]} for value, label in layer.spec.classes},
            "labelled": layer.labelled,
            "labelled_share": layer.labelled / (height * width),
            "digest": layer.digest,
            "origin": dict(layer.spec.origin),
        }
    return found


def static_layers(cube: Cube) -> dict[str, dict[str, Any]]:
    """Return what each static layer holds and where it comes from."""
    from dataclasses import asdict

    from zarr_store.layers import find_layers, open_layer

    found = {}
    for name in find_layers(cube):
        layer = open_layer(cube, name)
        height, width = layer.shape
        found[name] = {
            "kind": layer.kind,
            "unit": layer.unit,
            "classes": {label: value for value, label in layer.classes},
            "statistics": None if layer.statistics is None else asdict(layer.statistics),
            "data_share": layer.stored.labelled / (height * width),
            "digest": layer.digest,
            "origin": dict(layer.origin),
        }
    return found


def pairings(cube: Cube) -> list[dict[str, Any]]:
    """Return, for each ordered pair of collections, the step of the second nearest to each step of the first."""
    from zarr_store.steps import pair_collections

    found = []
    for ours, theirs in permutations(cube.collections, 2):
        pairing = pair_collections(cube, ours, theirs)
        gaps = [round(gap / 86_400, 3) for gap in pairing.gap_s.tolist()]
        found.append({"of": ours, "with": theirs, "steps": pairing.index.tolist(), "gap_days": gaps})
    return found


def _lines(name: str, facts: dict[str, Any]) -> list[str]:
    t, b, y, x = facts["shape"]
    a = facts["transform"][0]
    crs = facts["crs"].partition("\n")[0][:60]
    state = (
        "complete"
        if facts["complete"]
        else (
            f"{facts['shards_done']} of {facts['shards_total']} shards done, {facts['shards_partial']} partial, "
            f"{facts['shards_failed']} failed"
        )
    )
    verdicts: dict[str, int] = {}
    for verdict in facts["offset_verdicts"].values():
        word = verdict["verdict"] if isinstance(verdict, dict) else str(verdict)
        verdicts[word] = verdicts.get(word, 0) + 1
    resampled = "unknown" if facts["resampled_share"] is None else f"{facts['resampled_share']:.1%}"
    return [
        f"{name}: {t} times × {b} bands × {y} × {x} px {facts['dtype']} at {a:g} ({crs})",
        f"  bands      {', '.join(facts['bands'])}; layers {', '.join(facts['class_layers']) or 'none'}"
        + (f"; indices {', '.join(facts['indices'])}" if facts["indices"] else ""),
        f"  times      {', '.join(facts['times'][:8])}{' …' if t > 8 else ''}",
        f"  bounds     {', '.join(f'{v:.10g}' for v in facts['bounds'])}",
        f"  chunks     {tuple(facts['chunks'])} in shards {tuple(facts['shards'])}, layout {facts['layout']}",
        f"  items      {len(facts['items'])}; resampled pixels {resampled}; offsets "
        + (", ".join(f"{count} {word}" for word, count in sorted(verdicts.items())) or "not recorded"),
        f"  pixels     observed {facts['observed_share']:.1%}, masked {facts['masked_share']:.1%}, "
        f"missing {facts['missing_share']:.1%}, rest outside every swath",
        f"  state      {state}",
    ]


def _show_samples(session: Session, url: str) -> None:
    """Show what a sample store holds: samples, classes, bands and places."""
    import numpy as np

    from zarr_store.samples import open_samples

    store = open_samples(url)
    spec, label = store.spec, store.label
    if spec.labelled == "several":
        counts = label.sum(axis=0, dtype=np.int64).tolist()
    else:
        first = 1 if spec.labelled == "pixels" else 0
        counts = np.bincount(label.ravel(), minlength=len(spec.classes) + first)[first:].tolist()
    classes = dict(zip(spec.classes, counts, strict=False))
    placed = int((np.isfinite(store.longitude) & np.isfinite(store.latitude)).sum())
    height, width = spec.size
    what = {"one": "one class each", "several": "several classes each", "pixels": "a class for each pixel"}
    session.say(store.url)
    session.say(
        f"sample store: {spec.count:,} samples × {len(spec.bands)} bands × {height} × {width} px {spec.dtype}, "
        f"{what[spec.labelled]}"
    )
    session.say(f"  bands      {', '.join(spec.bands)}")
    session.say(f"  places     {placed:,} of {spec.count:,} samples have coordinates")
    for name, count in classes.items():
        session.say(f"  {name:24} {count:,}")
    session.emit({
        "url": store.url, "kind": "sample store", "samples": spec.count, "bands": list(spec.bands),
        "dtype": spec.dtype, "size": list(spec.size), "labelled": spec.labelled, "classes": classes,
        "placed": placed, "digest": store.digest,
    })  # fmt: skip


def _refuse_others(url: str) -> None:
    """Raise an error for a map or a run; the message names the command that shows it."""
    from pathlib import Path

    from zarr_store.errors import NotACube

    folder = Path(url)
    if "://" not in url and (folder / "model.json").is_file():
        raise NotACube(f"{url} is a training run, not a cube: its scores and settings are in {folder / 'report.html'}")
    if "://" not in url and (folder / "zarr.json").is_file():
        from jaxtrain.inference.maps import is_map

        if is_map(url):
            raise NotACube(f"{url} is a map, not a cube: show it with `terrashard quicklook {url} OUT.png`")


def register(app: typer.Typer) -> None:
    @command(app, examples=("terrashard info zagreb.zarr", "terrashard info zagreb.zarr --json | jq '.collections'"))
    def info(
        session: Session,
        cube: Annotated[str, typer.Argument(metavar="CUBE", help="Path or URL of a cube or sample store.")],
    ) -> None:
        """Show what is in a cube: grid, bands, dates, chunks, items and completeness; or what a sample store holds."""
        from zarr_store import open_cube
        from zarr_store.read import kind_of

        kind = kind_of(cube)
        if kind == "sample store":
            _show_samples(session, cube)
            return
        if kind != "cube":
            _refuse_others(cube)
        opened = open_cube(cube)
        collections = {name: describe(opened, name) for name in opened.collections}
        session.say(opened.url)
        for name, facts in collections.items():
            for line in _lines(name, facts):
                session.say(line)
        layers = label_layers(opened)
        for name, layer in layers.items():
            held = ", ".join(layer["classes"]) or "values"
            session.say(f"label layer {name}: {layer['labelled_share']:.1%} labelled; {held}")
        static = static_layers(opened)
        for name, layer in static.items():
            known = layer["statistics"]
            held = (
                f"values {known['least']:.6g} … {known['most']:.6g} {layer['unit']}".rstrip()
                if known
                else f"{len(layer['classes'])} classes"
            )
            source = layer["origin"].get("file", "an array")
            session.say(f"static layer {name}: {layer['data_share']:.1%} with data; {held}; from {source}")
        pairs = pairings(opened)
        for pair in pairs:
            widest = max(map(abs, pair["gap_days"]))
            session.say(
                f"{pair['of']} with {pair['with']}: nearest steps {', '.join(map(str, pair['steps'][:12]))}"
                f"{' …' if len(pair['steps']) > 12 else ''}; at most {widest:.1f} days apart"
            )
        document = {"url": opened.url, "collections": collections, "labels": layers, "layers": static,
                    "pairings": pairs, "provenance": opened.provenance}  # fmt: skip
        session.emit(document)
