"""Write the tables and figures of docs/multimodal.md and docs/placements.md from results: `make docs-figures`.

Each table lies between two comments of its page, `<!-- NAME -->` and `<!-- /NAME -->`, and stays as it is without a
result of it. Numbers come from `results/` and from docs/placements/, which the benchmarks write.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import HERE, RESULTS
from matplotlib.figure import Figure
from survey_figures import COLOURS

DOCS = HERE.parent / "docs"
IMAGES, TABLES = DOCS / "images", DOCS / "placements"
CLOUD = re.compile(r"(?P<network>.+), (?P<share>\d+) % cloud: accuracy, %")
MIOU = re.compile(r"mIoU (?P<miou>[\d.]+) %; (?P<low>[\d.]+) … (?P<high>[\d.]+)")


def rows_of(name: str) -> list[dict[str, Any]]:
    """Return the rows of a result, of its full size where that was measured; none where neither was."""
    files = [RESULTS / f"{name}-{size}.json" for size in ("full", "quick")]
    found: list[dict[str, Any]] = next((json.loads(file.read_text(encoding="utf-8"))["rows"] for file in files
                                        if file.exists()), [])  # fmt: skip
    return found


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table of Markdown; the first column is of words, all others of numbers."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))


def put(page: Path, blocks: Mapping[str, str]) -> None:
    """Put blocks between their comments on a page."""
    text = page.read_text(encoding="utf-8")
    for name, block in blocks.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if begin not in text or end not in text:
            raise SystemExit(f"{page.name} has no place for {name}: write {begin.strip()} and {end} into it")
        before, _, rest = text.partition(begin)
        if block:
            text = f"{before}{begin}\n{block}\n\n{end}{rest.partition(end)[2]}"
    page.write_text(text, encoding="utf-8")


# ---- Where fusion pays


def clouds(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, tuple[float, float, float, float]]]:
    """Return mean, lowest and highest accuracy, and mIoU, of each network by cloud share."""
    found: dict[str, dict[int, tuple[float, float, float, float]]] = {}
    for row in rows:
        name, note = CLOUD.fullmatch(row["name"]), MIOU.match(row["note"])
        if name and note:
            values = (row["value"], float(note["low"]), float(note["high"]), float(note["miou"]))
            found.setdefault(name["network"], {})[int(name["share"])] = values
    return found


def cloud_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return accuracy and mIoU by cloud share, and the aims."""
    found = clouds(rows)
    shares = sorted({share for by_share in found.values() for share in by_share})
    head = ["accuracy (mIoU), %", *(f"{share} % cloud" for share in shares)]
    lines = [[name, *(f"{by_share[share][0]:.1f} ({by_share[share][3]:.1f})" for share in shares)]
             for name, by_share in found.items()]  # fmt: skip
    rest = [row for row in rows if not CLOUD.fullmatch(row["name"])]
    return f"{table(head, lines)}\n\n{aims(rest)}" if found else ""


def aims(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows with their aims."""
    lines = []
    for row in rows:
        sign = "≤" if row["at_most"] else "≥"
        aim = "" if row["limit"] is None else f"{sign} {row['limit']:g}"
        met = {True: "met", False: "missed", None: ""}[row["passed"]]
        lines.append([row["name"], f"{row['value']:.2f}", aim, met])
    return table(("difference", "points", "aim", ""), lines)


def draw_clouds(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Accuracy over the share of Sentinel-2 that is masked, with the range of the seeds."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for colour, (name, by_share) in zip(COLOURS, clouds(rows).items(), strict=False):
        shares = sorted(by_share)
        mean, low, high = (([by_share[share][i] for share in shares]) for i in range(3))
        axes.plot(shares, mean, "o-", markersize=3, color=colour, label=name)
        axes.fill_between(shares, low, high, color=colour, alpha=0.15)
    axes.set_xlabel("share of Sentinel-2 under cloud, %")
    axes.set_ylabel("accuracy, %")
    axes.set_xticks((0, 25, 50, 75, 100))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    return figure


def series_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the accuracy of networks and forests on the real series."""
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for row in rows:
        name = re.fullmatch(r"cropland, (?P<data>.+), (?P<side>network|forest): accuracy, %", row["name"])
        if name:
            seeds = row["note"].partition(";")[0].removeprefix("seeds ")
            found.setdefault(name["data"], {})[name["side"]] = (f"{row['value']:.2f}", seeds)
    lines = [[data, *both["network"], *both["forest"]] for data, both in found.items()]
    return table(("accuracy, %", "network", "its seeds", "forest", "its seeds"), lines) if lines else ""


# ---- Placements


def bytes_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return predicted and carried bytes of each placement."""
    lines = []
    for row in rows:
        name = re.fullmatch(r"bytes of (.+): prediction off by", row["name"])
        seen = re.match(r"predicted (\d+), carried (\d+) bytes; the payload alone (\S+)", row["note"])
        if name and seen:
            told, carried = float(seen[1]), float(seen[2])
            lines.append([name[1], f"{told / 1e6:.3f}", f"{carried / 1e6:.3f}", f"{told / carried - 1:+.1%}", seen[3]])
    return table(("placement", "predicted, MB", "carried, MB", "off", "payload alone"), lines) if lines else ""


def accuracy_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the accuracy of equal batches and steps, and of what is different in usual data parallel runs."""
    lines = []
    for row in rows:
        if row["name"].startswith("accuracy: "):
            updates, seeds, loss = row["note"].split("; ")
            lines.append([row["name"].removeprefix("accuracy: "), updates.removesuffix(" updates"),
                          f"{row['value']:.4f}", seeds, loss.removeprefix("last loss ")])  # fmt: skip
    head = ("run", "updates", "accuracy", "of the seeds", "last loss of the first")
    return table(head, lines) if lines else ""


def document_of(name: str) -> dict[str, Any]:
    """Return what `placements_table.py` kept; nothing where it did not run."""
    file = TABLES / f"{name}.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return found


def predicted_table(document: Mapping[str, Any]) -> str:
    """Return what is known of placements before anything runs."""
    lines = []
    for one in document.get("placements", ()):
        if "why_not" in one:
            continue
        lines.append([
            one["placement"], str(one["devices"]), f"{one['bytes_step'] / 1e6:.3f}", f"{one['bytes_epoch'] / 1e6:.1f}",
            f"{one['bytes_fixed'] / 1e6:.3f}", f"{one['bytes_window'] / 1e3:.1f}",
            " ".join(f"{flops / 1e9:.2f}" for flops in one["flops_devices"]),
            " ".join(f"{share:.0%}" for share in one["busy_devices"]).replace("%", " %"),
            f"{one['peak_bytes_device'] / 1e6:.0f}", f"{1e3 * one['predicted_step_s']:.1f}",
        ])  # fmt: skip
    head = ("placement", "devices", "MB/step", "MB/epoch", "of it fixed", "kB/window", "GFLOP of each", "busy",
            "peak MB", "step ms")  # fmt: skip
    return table(head, lines) if lines else ""


def measured_table(document: Mapping[str, Any]) -> str:
    """Return what was measured of placements in real processes."""
    lines = []
    for one in document.get("placements", ()):
        seen = one.get("measured")
        if not seen or "why_not" in seen:
            continue
        told, sent = one["bytes_step"] + one["header_bytes"], seen.get("bytes_step")
        steps = max(1, round(one["bytes_epoch"] / one["bytes_step"])) if one["bytes_step"] else 0
        off = f"{told / sent - 1:+.1%}" if sent and told else ""
        lines.append([
            one["placement"], f"{told / 1e6:.3f}", f"{sent / 1e6:.3f}" if sent else "",
            f"{sent * steps / 1e6:.1f}" if sent else "", off, f"{1e3 * seen['step_s']:.1f}",
            " ".join(f"{share:.0%}" for share in seen["busy"]).replace("%", " %"), f"{1e3 * seen['inference_s']:.1f}",
            f"{seen['train_s']:.1f}" if "train_s" in seen else "",
            f"{seen['accuracy']:.4f}" if "accuracy" in seen else "",
        ])  # fmt: skip
    head = ("placement", "predicted MB/step", "carried", "carried MB/epoch", "off", "step ms", "processor",
            "inference ms", "epochs s", "accuracy")  # fmt: skip
    where = f"on {document['workers']} workers of a Dask cluster" if "workers" in document else "one for each device"
    picture = "![Bytes of an epoch over the batch, for each placement](images/placements-batch.png)"
    words = f"In real processes, {where} ({document['machine']}; {document['seconds']:.0f} s in all):" if lines else ""
    return f"{words}\n\n{table(head, lines)}" + ("" if "workers" in document else f"\n\n{picture}") if lines else ""


def draw_batches(document: Mapping[str, Any]) -> Figure:
    """Bytes of an epoch over the batch, from what each placement sends whatever the batch is, and for each window."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    batches, windows = [4, 8, 16, 32, 64, 128], document["windows"]
    chosen = [one for one in document["placements"] if one.get("bytes_step")]
    for number, one in enumerate(chosen):
        sent = [(one["bytes_fixed"] * windows / batch + one["bytes_window"] * windows) / 1e6 for batch in batches]
        axes.plot(batches, sent, "o-" if number < len(COLOURS) else "o--", markersize=3,
                  color=COLOURS[number % len(COLOURS)], label=one["placement"])  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("windows of a batch")
    axes.set_ylabel("MB of an epoch")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=7)
    return figure


def main() -> None:
    """Write both pages."""
    sim, alone, series = rows_of("multimodal-sim"), rows_of("multimodal-alone"), rows_of("multimodal-series")
    table_here, table_dask = document_of("table"), document_of("table-dask")
    put(
        DOCS / "multimodal.md",
        {"clouds": cloud_table(sim), "alone": cloud_table(alone), "series": series_table(series)},
    )
    # parts that were measured before they had files of their own
    bytes_sent = rows_of("placements-bytes") or rows_of("placements")
    put(DOCS / "placements.md", {
        "bytes": bytes_table(bytes_sent), "accuracy": accuracy_table(rows_of("placements-accuracy")),
        "predicted": predicted_table(table_here), "measured": measured_table(table_here),
        "dask": measured_table(table_dask),
    })  # fmt: skip
    for name, figure in {
        "multimodal-clouds": draw_clouds(sim) if sim else None,
        "multimodal-alone": draw_clouds(alone) if alone else None,
        "placements-batch": draw_batches(table_here) if table_here else None,
    }.items():
        if figure is not None:
            figure.savefig(IMAGES / f"{name}.png", dpi=120)
            print(IMAGES / f"{name}.png")


if __name__ == "__main__":
    main()
