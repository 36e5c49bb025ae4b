"""The numbers of docs/survey.md, all by the planner: curves of three networks, and what changes the recommendation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from imagined import imagine

from jaxtrain.data.task import Task
from jaxtrain.planner.candidates import Candidate, name_of, with_mesh
from jaxtrain.planner.cost import peak_bytes, predict
from jaxtrain.planner.facts import Facts
from jaxtrain.planner.profile import Profile, read_profile
from jaxtrain.planner.scaling import FAMILIES, Curve, scaling_curves
from jaxtrain.planner.survey import Network, bytes_on_wire, compile_candidates

NUMBERS = Path(__file__).resolve().parent.parent / "docs" / "survey" / "numbers.json"
PROFILES = ("h100-sxm", "a100", "tpu-v5e")
DEVICES = (1, 4, 32, 64, 128, 256, 512, 1024)
"""All but the first two share the programs of four replicas, so that ten programs do for a network."""
MANY = 64
SLOWER = (1, 10, 100, 1000)
"""Factors by which links between nodes are slower."""
DIGITS = 6


def networks() -> dict[str, Network]:
    """The three networks, on windows as users of Sentinel-2 cut them."""
    return {
        "unet": imagine(bands=4, classes=6, windows=100_000, data={"patch": 128}, run={"batch_size": 16}),
        "resnet": imagine(bands=12, classes=19, windows=354_196, task=Task(per_image=True, several=True),
                          data={"patch": 128}, run={"batch_size": 32},
                          model={"name": "resnet", "depth": 50, "width": 64, "stem": "large"}),
        "temporal": imagine(bands=10, classes=12, windows=50_000, dates=24, data={"patch": 32},
                            run={"batch_size": 8}, model={"name": "temporal", "width": 64, "depth": 3}),
    }  # fmt: skip


def whole_tile(space: int) -> tuple[Network, dict[str, Any]]:
    """A U-Net on one image of nearly a whole Sentinel-2 tile, split by rows."""
    network = imagine(bands=4, classes=6, windows=1000, data={"patch": 10_240, "augment": False}, run={"batch_size": 1})
    return network, {"data": 1, "space": (space, 1)} if space > 1 else {"data": 1}


def wide(batch: int) -> Network:
    """A U-Net whose state is large beside its windows."""
    return imagine(bands=4, classes=6, windows=100_000, data={"patch": 128}, run={"batch_size": batch},
                   model={"width": 384, "depth": 5})  # fmt: skip


def costs(network: Network, meshes: Sequence[Mapping[str, Any]], profiles: Sequence[Profile]) -> list[dict[str, Any]]:
    """What some meshes cost: one entry for each, with the step on each profile."""
    wanted = []
    for values in meshes:
        made = with_mesh(network.config, dict(values))
        if isinstance(made, str):
            raise ValueError(f"{values}: {made}")
        wanted.append(Candidate(name_of(dict(values)), made.mesh.size, made))
    found = compile_candidates(network, wanted, profiles[0], 2, lambda _done, _all: None)
    rows = []
    for one, values in zip(wanted, meshes, strict=True):
        facts = found[id(one)]
        if not isinstance(facts, Facts):
            raise ValueError(f"{values}: {facts}")
        seconds = {p.name: predict(facts, p, network.config.model.precision).step_s for p in profiles}
        sent = sum(size for kinds in bytes_on_wire(facts).values() for size in kinds.values())
        rows.append({
            "strategy": one.strategy, "devices": one.devices, "step_s": seconds, "sent_bytes": sent,
            "peak_bytes": peak_bytes(facts), "state_bytes": facts.parameter_bytes + facts.optimizer_bytes,
            "parameters": facts.parameters // 4,
        })  # fmt: skip
    return rows


def curve_numbers(curves: Sequence[Curve]) -> list[dict[str, Any]]:
    keys = ("devices", "batch", "step_s", "images_per_s", "efficiency", "sent_bytes", "peak_bytes", "fits",
            "epoch_device_hours")  # fmt: skip
    return [
        {"strategy": one.strategy, "why_not": one.why_not,
         "points": [{key: getattr(point, key) for key in keys} for point in one.points]}
        for one in curves
    ]  # fmt: skip


def slower_links(profile: Profile, factor: float) -> Profile:
    """The profile with slower links between nodes; those within a node stay."""
    links = [link if link.devices else replace_bandwidth(link, factor) for link in profile.links]
    return profile.model_copy(update={"links": tuple(links)})


def replace_bandwidth(link: Any, factor: float) -> Any:
    return link.model_copy(update={"bandwidth": link.bandwidth / factor})


def with_remat(network: Network) -> Network:
    model = network.config.model.model_copy(update={"remat": True})
    return replace(network, config=network.config.model_copy(update={"model": model}))


def rounded(value: Any) -> Any:
    """The same with floats of few digits, so that the file changes only where a number does."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, list) else value


def compute() -> dict[str, Any]:
    """All numbers of the page; what was compiled before is read from the user's cache."""
    profiles = [read_profile(name) for name in PROFILES]
    curves: dict[str, Any] = {}
    links: dict[str, Any] = {}
    about: dict[str, Any] = {}
    for key, network in networks().items():
        config = network.config
        about[key] = {
            "name": config.model.name, "patch": config.data.patch, "batch": config.run.batch_size,
            "dates": config.data.dates, "bands": len(network.card["bands"]), "windows": network.windows,
        }  # fmt: skip
        curves[key] = {p.name: curve_numbers(scaling_curves(network, DEVICES, p)) for p in profiles}
        links[key] = {}
        for factor in SLOWER:
            slow = curve_numbers(scaling_curves(network, (1, MANY), slower_links(profiles[0], factor)))
            links[key][str(factor)] = {
                one["strategy"]: point["efficiency"] for one in slow for point in one["points"] if point["devices"] > 1
            }
        print(f"  {key}: done", flush=True)
    tiles = [costs(*_meshes(*whole_tile(space)), profiles)[0] for space in (1, 2, 4, 8)]
    print("  whole tile: done", flush=True)
    large = costs(
        wide(8), [{"data": 8}, {"data": 8, "zero": 1}, {"data": 8, "zero": 3}, {"data": 1, "model": 8}], profiles
    )
    print("  wide network: done", flush=True)
    plain = networks()["unet"]
    again = [costs(one, [{"data": 1}], profiles)[0] for one in (plain, with_remat(plain))]
    memory = {p.name: p.device.memory for p in profiles}
    numbers: dict[str, Any] = rounded({
        "devices": list(DEVICES), "families": [name_of({**values, "data": 2}) for values in FAMILIES],
        "memory": memory, "networks": about, "curves": curves, "links": links, "tile": tiles, "wide": large,
        "remat": again,
    })  # fmt: skip
    return numbers


def _meshes(network: Network, values: dict[str, Any]) -> tuple[Network, list[dict[str, Any]]]:
    return network, [values]


def write() -> dict[str, Any]:
    numbers = compute()
    NUMBERS.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    return numbers


def read() -> dict[str, Any]:
    numbers: dict[str, Any] = json.loads(NUMBERS.read_text(encoding="utf-8"))
    return numbers


if __name__ == "__main__":
    write()
