"""Write docs/survey.md and its figures: `make docs-figures`.

Every number of the page comes from docs/survey/numbers.json and from the result of `planner_scaling.py`, and every cell
of the table of frameworks from docs/survey/frameworks.toml; `--keep` draws and writes from these files alone.
"""

# ruff: noqa: E501  # sentences of the page

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from pathlib import Path
from typing import Any

import jinja2
import survey_numbers
from harness import RESULTS
from survey_figures import draw_all, published_curves

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = DOCS / "survey.md"
MANY, MAIN = survey_numbers.MANY, "h100-sxm"
NO_CLAIM = "not documented"
USABLE = 0.9

STRATEGIES = (
    ("Data parallel", "data", "two devices with the same parameters and different windows",
     "Each device computes its windows with all parameters, and an all-reduce sums the gradients. The bytes depend on the "
     "number of parameters and not on the images, and most of the exchange overlaps with the backward pass."),
    ("ZeRO-1 and ZeRO-3", "zero", "parts of the parameters and moments on two devices",
     "The moments of the optimiser (ZeRO-1), and the parameters too (ZeRO-3, FSDP), are divided among the replicas. ZeRO-1 sends as many "
     "bytes as data parallelism, and each device updates only its part. ZeRO-3 gathers parameters where they are used, and sends one and "
     "a half times as many bytes."),
    ("Filter (tensor) parallel", "filter", "filters of two convolutions on two devices",
     "Each device holds some of the filters, and all devices compute all windows. The outputs of blocks are summed over devices, so the "
     "bytes grow with the number of pixels, and this exchange does not overlap with computing."),
    ("Spatial parallel", "spatial", "one image in four parts of rows",
     "Each device holds some rows of each image and borrows halos from its neighbours. The activations of one image are divided by the "
     "number of devices; the halos are a few rows of each layer."),
    ("Pipeline, with its schedules", "pipeline", "three schedules of a pipeline of two stages and four microbatches",
     "Each stage holds some layers, and microbatches pass through the stages. GPipe computes all forward passes first; 1F1B begins backward "
     "passes early and so keeps fewer activations; the interleaved schedule gives each stage several parts and waits less."),
    ("Hybrids", "hybrid", "eight devices as two replicas of two by two",
     "Axes of a mesh can be combined. The axes that exchange most need the fastest links, so space and model lie within a node, and "
     "data parallelism goes between nodes."),
    ("Rematerialisation", "remat", "activations that are kept, and activations that are computed again",
     "This saves memory and uses no more devices: some activations are dropped and computed again in the backward pass."),
)  # fmt: skip


def number(value: float) -> str:
    """Three digits that count, and no exponent."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f}"


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def frameworks(document: dict[str, Any]) -> dict[str, Any]:
    """The table: cells with their links, and the sources in the order of their numbers."""
    order = {name: place for place, name in enumerate(document["sources"], 1)}
    sources = [
        {**one, "address": f"https://github.com/{one['repository']}/blob/{one['commit']}/{one['path']}"}
        for one in document["sources"].values()
    ]
    rows = []
    for one in document["frameworks"]:
        cells = []
        for column, title in document["columns"].items():
            cell = one[column]
            links = " ".join(f"[\\[{order[name]}\\]][s{order[name]}]" for name in cell["sources"])
            cells.append({"mark": cell["mark"], "says": cell.get("says"), "links": links, "title": title})
        rows.append({"name": one["name"], "cells": cells})
    return {"columns": document["columns"], "frameworks": rows, "sources": sources}


def at(numbers: dict[str, Any], key: str, profile: str, devices: int) -> dict[str, dict[str, Any]]:
    """The point of each strategy."""
    found = {}
    for curve in numbers["curves"][key][profile]:
        for point in curve["points"]:
            if point["devices"] == devices:
                found[curve["strategy"]] = point
    return found


def network_sections(numbers: dict[str, Any]) -> list[dict[str, Any]]:
    titles = {"unet": "U-Net", "resnet": "ResNet-50", "temporal": "Multi-date network"}
    sections = []
    for key, about in numbers["networks"].items():
        points = at(numbers, key, MAIN, MANY)
        dates = f" on {about['dates']} dates" if about["dates"] != 1 else ""
        rows = [
            {"strategy": name, "step": number(1e3 * p["step_s"]), "efficiency": percent(p["efficiency"]),
             "sent": number(p["sent_bytes"] / 1e6), "peak": number(p["peak_bytes"] / 1e9)}
            for name, p in points.items()
        ]  # fmt: skip
        missing = [c for c in numbers["curves"][key][MAIN] if not c["points"]]
        sections.append({
            "title": titles[key], "picture": f"images/survey-on-{key}.png", "rows": rows,
            "text": f"Windows of {about['patch']} × {about['patch']} pixels and {about['bands']} bands{dates}, "
            f"{about['batch']} for each replica, float32.",
            "missing": " ".join(f"No {one['strategy']}: {one['why_not']}." for one in missing),
        })  # fmt: skip
    return sections


def link_rows(numbers: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for section, found in zip(network_sections(numbers), numbers["links"].values(), strict=True):
        cells = []
        for by_strategy in found.values():
            best = max(by_strategy, key=by_strategy.__getitem__)
            cells.append(f"{best} {percent(by_strategy[best])}")
        rows.append({"name": section["title"], "cells": cells})
    return rows


def published_rows() -> tuple[list[dict[str, str]], str, str]:
    """The table of publications, and two sentences on the one with seconds."""
    document = json.loads((RESULTS / "planner-scaling-full.json").read_text(encoding="utf-8"))
    rows, growth, step = [], "", ""
    for title, (_, others) in published_curves().items():
        (first,) = [
            r for r in document["rows"] if r["name"].startswith(f"{title}: efficiency") and r["limit"] == USABLE
        ]
        predicted, published = first["note"].split(";")[0].removeprefix("predicted ").split(", published ")
        rows.append({
            "name": title, "published": "near linear" if "linear" in published else percent(float(published)),
            "predicted": percent(float(predicted)), "range": f"{percent(min(others))} to {percent(max(others))}",
        })  # fmt: skip
    for row in document["rows"]:
        if "growth of a step" in row["name"]:
            predicted, published = row["note"].removeprefix("predicted ").split(", published ")
            growth = f"steps on 352 GPUs are {predicted} times as long as on 8 by prediction, and {published} times as published"
        if "step on 8 GPUs" in row["name"]:
            predicted, published = row["note"].removeprefix("predicted ").split(", published ")
            step = f"A step on 8 GPUs takes {predicted} by prediction, and {published} as published"
    return rows, growth, step


def context(numbers: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    """All that the template shows."""
    keys = list(numbers["networks"])
    every = {(k, p): at(numbers, k, p, 1024) for k in keys for p in numbers["memory"]}
    plain = [points["data"]["efficiency"] for points in every.values()]
    filters = [points["data+filter"]["efficiency"] for points in every.values()]
    pipes = [points["data+pipeline"]["efficiency"] for points in every.values() if "data+pipeline" in points]
    spaces = [points["data+spatial"]["efficiency"] for points in every.values()]
    rows, growth, step8 = published_rows()
    slow = {key: numbers["links"][key]["100"]["data"] for key in keys}
    worst = min(slow, key=slow.__getitem__)
    quickest_by_links = {cell.split()[0] for row in link_rows(numbers) for cell in row["cells"]}
    if not quickest_by_links <= {"data", "zero-1"}:
        raise ValueError(f"the text on slow links no longer holds: {sorted(quickest_by_links)}")
    one_window = (numbers["remat"][0]["peak_bytes"] - numbers["remat"][0]["state_bytes"]) / numbers["networks"]["unet"][
        "batch"
    ]
    parameters = 4 * numbers["remat"][0]["parameters"]
    titles = {key: section["title"] for key, section in zip(keys, network_sections(numbers), strict=True)}
    memory = numbers["memory"][MAIN]
    fitting = [one for one in numbers["wide"] if one["peak_bytes"] <= USABLE * memory]
    quickest = min(fitting, key=lambda one: one["step_s"][MAIN])
    data = next(one for one in numbers["wide"] if one["strategy"] == "data")
    plain_remat, again = numbers["remat"]
    tile = [
        {"devices": one["devices"], "peak": number(one["peak_bytes"] / 1e9), "step": number(1e3 * one["step_s"][MAIN]),
         "sent": number(one["sent_bytes"] / 1e6),
         "fits": ", ".join(n for n, m in numbers["memory"].items() if one["peak_bytes"] <= USABLE * m) or "no machine"}
        for one in numbers["tile"]
    ]  # fmt: skip
    return {
        **frameworks(document),
        "short": f"Use data parallelism. On 1,024 devices, each device works at {percent(min(plain))} to {percent(max(plain))} of the rate "
        "of a single device, for all three networks on all three machines. ZeRO-1 is as fast and needs less memory. Split "
        "images only if one image does not fit a device, and filters or parameters only if the network does not fit.",
        "strategies": [{"title": t, "picture": p, "alt": a, "text": x} for t, p, a, x in STRATEGIES],
        "networks": network_sections(numbers), "many": MANY, "published": rows, "growth": growth, "step8": step8,
        "advice": f"**Data parallelism, with ZeRO-1 where the optimiser has moments.** On 1,024 devices, data parallelism reaches an "
        f"efficiency of {percent(min(plain))} to {percent(max(plain))}. Halving the images reaches {percent(min(spaces))} to "
        f"{percent(max(spaces))}, halving the filters {percent(min(filters))} to {percent(max(filters))}, and two stages of a pipeline "
        f"{percent(min(pipes))} to {percent(max(pipes))}. The reason is the shape of the networks: the U-Net of this page has "
        f"{number(parameters / 1e6)} MB of parameters, and one of its windows needs {number(one_window / 1e6)} MB of activations, so exchanging "
        "gradients is cheap and exchanging activations is not.",
        "factors": list(numbers["links"][keys[0]]), "links": link_rows(numbers),
        "links_text": f"However slow the links are, data parallelism (or ZeRO-1, which is as fast) remains the fastest: all other strategies send "
        f"more. But with links that are 100 times slower, the efficiency of {titles[worst]} is only {percent(slow[worst])}. Then use "
        "fewer devices, or larger batches on each.",
        "tile": tile,
        "tile_text": f"One device would need {tile[0]['peak']} GB. Spatial parallelism divides this by the number of devices and sends "
        f"{tile[-1]['sent']} MB in a step, so it is the way to train on whole tiles. If the network can also be trained on windows, cut the tile into windows.",
        "wide_parameters": f"{numbers['wide'][0]['parameters'] / 1e9:.1f} billion",
        "wide": [
            {"strategy": one["strategy"], "state": number(one["state_bytes"] / 1e9), "peak": number(one["peak_bytes"] / 1e9),
             "step": number(1e3 * one["step_s"][MAIN]), "sent": number(one["sent_bytes"] / 1e6)}
            for one in numbers["wide"]
        ],
        "wide_text": f"Data parallelism needs {number(data['peak_bytes'] / 1e9)} GB of a device that has {number(memory / 1e9)}, so it does "
        f"not fit. Of the strategies that fit, {quickest['strategy']} is the fastest: with few windows on a device and links within one "
        "node, exchanging activations costs less than exchanging so many parameters. No network of this project is nearly as large.",
        "remat_text": f"The planner predicts {percent(again['step_s'][MAIN] / plain_remat['step_s'][MAIN] - 1)} longer steps for the U-Net. "
        f"It cannot predict how much memory this saves: it uses the compiler for CPUs, whose program needs {number(again['peak_bytes'] / 1e9)} "
        f"GB instead of {number(plain_remat['peak_bytes'] / 1e9)} GB, because that compiler does not schedule for memory. Try `model.remat` "
        "on the accelerator before you rely on it.",
    }  # fmt: skip


def render(numbers: dict[str, Any], document: dict[str, Any]) -> str:
    """Return the page."""
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(DOCS / "survey"), undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True, autoescape=False,  # Markdown, not HTML
    ).get_template("page.md.j2")  # fmt: skip
    return template.render(**context(numbers, document))


def read_frameworks() -> dict[str, Any]:
    return tomllib.loads((DOCS / "survey" / "frameworks.toml").read_text(encoding="utf-8"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", action="store_true", help="draw from the numbers that are there; compile nothing")
    numbers = survey_numbers.read() if parser.parse_args().keep else survey_numbers.write()
    print("  figures:", ", ".join(draw_all(numbers)))
    PAGE.write_text(render(numbers, read_frameworks()), encoding="utf-8")
    print(f"  page: {PAGE.relative_to(DOCS.parent)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
