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
    counts = cube.ledger(collection).counts(len(spec.shards()), spec.shards())
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

    found = {}
    for name in find_labels(cube):
        layer = open_label(cube, name)
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


def pairings(cube: Cube) -> list[dict[str, Any]]:
    """Return, for each two collections, the step of the second nearest to each step of the first, and the gap."""
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
        f"  bands      {', '.join(facts['bands'])}; layers {', '.join(facts['class_layers']) or 'none'}",
        f"  times      {', '.join(facts['times'][:8])}{' …' if t > 8 else ''}",
        f"  bounds     {', '.join(f'{v:.10g}' for v in facts['bounds'])}",
        f"  chunks     {tuple(facts['chunks'])} in shards {tuple(facts['shards'])}, layout {facts['layout']}",
        f"  items      {len(facts['items'])}; resampled pixels {resampled}; offsets "
        + (", ".join(f"{count} {word}" for word, count in sorted(verdicts.items())) or "not recorded"),
        f"  pixels     observed {facts['observed_share']:.1%}, masked {facts['masked_share']:.1%}, "
        f"missing {facts['missing_share']:.1%}, rest outside every swath",
        f"  state      {state}",
    ]


def register(app: typer.Typer) -> None:
    @command(app, examples=("terrashard info zagreb.zarr", "terrashard info zagreb.zarr --json | jq '.collections'"))
    def info(
        session: Session, cube: Annotated[str, typer.Argument(metavar="CUBE", help="Path or URL of a cube.")]
    ) -> None:
        """Show what is in a cube: grid, bands, dates, chunks, items and completeness."""
        from zarr_store import open_cube

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
        pairs = pairings(opened)
        for pair in pairs:
            widest = max(map(abs, pair["gap_days"]))
            session.say(
                f"{pair['of']} with {pair['with']}: nearest steps {', '.join(map(str, pair['steps'][:12]))}"
                f"{' …' if len(pair['steps']) > 12 else ''}; at most {widest:.1f} days apart"
            )
        document = {"url": opened.url, "collections": collections, "labels": layers, "pairings": pairs,
                    "provenance": opened.provenance}  # fmt: skip
        session.emit(document)
