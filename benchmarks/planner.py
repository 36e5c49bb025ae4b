"""Predicted and measured steps of the planner: U-Net, ResNet and temporal network, every strategy, two devices.

Two devices are two parts of the processor in one process, or two processes that exchange over the loopback interface.
`terrashard survey --measure` takes the same way: a machine that is measured once, one device and copies of it that
exchange nothing for each network, then every strategy in turns. The profile knows none of these networks.

Slices of a few minutes are measured one by one and kept (`--only unet-1`: the U-Net in one process); the table is made
of all that are kept. Measure on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

from harness import OUT, Row, machine, publish

DEVICES = 2
WHERE = OUT / "planner-time.json"
"""Turns of all slices measured so far, so that one slice can be measured alone."""
AIM, AIM_DATA, AIM_CHOICE = 0.13, 0.05, 0.05
NETWORKS: dict[str, dict[str, Any]] = {
    "unet": {"bands": 7, "classes": 7, "config": {
        "data": {"patch": 64}, "model": {"name": "unet", "width": 16, "depth": 3}, "run": {"batch_size": 16}}},
    "resnet": {"bands": 13, "classes": 10, "task": {"per_image": True}, "config": {
        "data": {"patch": 64, "jitter": 0.25, "zoom": 0.15}, "run": {"batch_size": 64},
        "model": {"name": "resnet", "width": 16, "blocks": [1, 1, 1, 1], "stem": "patch"}}},
    "temporal": {"bands": 4, "classes": 6, "config": {
        "data": {"patch": 32, "dates": 8}, "run": {"batch_size": 16},
        "model": {"name": "temporal", "width": 32, "depth": 3, "taps": 3}}},
}  # fmt: skip
STRATEGIES: dict[str, dict[str, Any]] = {
    "data": {"data": 2},
    "zero-1": {"data": 2, "zero": 1},
    "zero-3": {"data": 2, "zero": 3},
    "filter": {"data": 1, "model": 2},
    "spatial": {"data": 1, "space": 2},
    "pipeline": {"data": 1, "pipe": 2, "schedule": "1f1b"},
    "data+remat": {"data": 2},
}
SLICES = [f"{name}-{processes}" for name in NETWORKS for processes in (1, 2)]


@dataclass(frozen=True)
class Figure:
    """One configuration: what was predicted, and every measured step."""

    slice: str
    strategy: str
    predicted_s: float
    corrected_s: float
    turns: tuple[float, ...]

    @property
    def measured_s(self) -> float:
        return statistics.median(self.turns)

    @property
    def spread(self) -> float:
        """Mean distance of a measured step from their median, as a share: no error can be told to be below it."""
        return statistics.mean(abs(one / self.measured_s - 1) for one in self.turns)

    @property
    def error(self) -> float:
        return self.corrected_s / self.measured_s - 1

    @property
    def raw_error(self) -> float:
        return self.predicted_s / self.measured_s - 1


def network(name: str) -> Any:
    """The network as a survey knows it, without a cube: nothing that costs time depends on the pixels."""
    from jaxtrain.config import TrainConfig
    from jaxtrain.planner.survey import Network

    wanted = NETWORKS[name]
    config = TrainConfig.model_validate({**wanted["config"], "data": {"cube": "none", **wanted["config"]["data"]}})
    card = {
        "format": 1, "config": config.model_dump(mode="json"), "cube": {"path": "none", "digest": ""},
        "bands": [f"band {i}" for i in range(wanted["bands"])],
        "classes": [{"index": i, "name": f"class {i}", "colour": "#808080", "values": [i]}
                    for i in range(wanted["classes"])],
        "mean": [2000.0] * wanted["bands"], "std": [900.0] * wanted["bands"], "class_weights": None, "grid": None,
        "times": [], "split": {"block": [1, 1], "parts": [[0]]}, "windows": {}, "statistics": {},
        "task": {"per_image": False, "several": False, "value": None, "rebuild": False, **wanted.get("task", {})},
        "edges": True,
    }  # fmt: skip
    dtypes = {"image": "uint16", "label": "uint8", "observed": "uint8", "day": "uint16"}
    return Network(config, card, dtypes, 1000)


def measured(name: str) -> dict[str, Any]:
    """Run all strategies of one slice, and what is measured beside them; those that cannot be have a reason."""
    from jaxtrain.planner.measure import request_of, run_measurer

    began = time.perf_counter()
    net, profile, wanted, _known, probes, _refused = prepared(name)
    spent = time.perf_counter() - began
    requests = [*(probe.request for probe in probes), *(request_of(net, one.config) for one in wanted)]
    answers = run_measurer(requests, DEVICES, profile.processes)
    turns = {one.strategy: answer.get("every", []) for one, answer in zip(wanted, answers[len(probes) :], strict=True)}
    compute = [one["seconds"] for one in answers[: len(probes)]]
    return {"turns": turns, "compute_s": compute, "prepared_s": spent, "machine": machine()} | predicted(name, compute)


def prepared(name: str) -> tuple[Any, ...]:
    """The network, the machine, strategies with what their programs do, what is measured beside them, and reasons."""
    from jaxtrain.planner.candidates import Candidate, with_mesh
    from jaxtrain.planner.machine import this_machine
    from jaxtrain.planner.measure import compute_probes
    from jaxtrain.planner.survey import compile_candidates

    which, _, processes = name.rpartition("-")
    net, profile = network(which), this_machine(DEVICES, processes=int(processes))
    wanted, refused = [], {}
    for strategy, mesh in STRATEGIES.items():
        config = with_mesh(net.config, mesh)
        if isinstance(config, str):
            refused[strategy] = config
            continue
        if strategy.endswith("remat"):
            config = config.model_copy(update={"model": config.model.model_copy(update={"remat": True})})
        wanted.append(Candidate(strategy, DEVICES, config))
    found = compile_candidates(net, wanted, profile, 2, lambda _done, _all: None)
    known = {one.strategy: found[id(one)] for one in wanted}
    refused |= {strategy: facts for strategy, facts in known.items() if isinstance(facts, str)}
    wanted = [one for one in wanted if one.strategy not in refused]
    return net, profile, wanted, known, compute_probes(net, DEVICES, profile), refused


def predicted(name: str, compute: list[float]) -> dict[str, Any]:
    """What the planner predicts for one slice, from the profile alone and corrected by the measured computing."""
    from jaxtrain.planner.cost import predict
    from jaxtrain.planner.measure import compute_ratios, corrected
    from jaxtrain.planner.survey import Row as Strategy
    from jaxtrain.planner.survey import Survey
    from jaxtrain.planner.words import sensitivity

    net, profile, wanted, known, probes, refused = prepared(name)
    ratios = compute_ratios(probes, compute, profile)
    before, after, parts = {}, {}, {}
    moved: dict[str, float] = {}
    for one in wanted:
        prediction = predict(known[one.strategy], profile, net.config.model.precision)
        before[one.strategy] = prediction.step_s
        after[one.strategy] = corrected(
            prediction, ratios.of(one.mesh, profile.processes), ratios.exchange_of(one.mesh)
        ).step_s
        parts[one.strategy] = [prediction.compute_s, prediction.memory_s, prediction.collective_s, prediction.idle_s]
        row = Strategy(one, known[one.strategy], prediction, True)
        for number, share in sensitivity(Survey(net, DEVICES, profile, (row,))).items():
            moved[number] = max(moved.get(number, 0.0), share, key=abs)
    return {
        "predicted_s": before, "corrected_s": after, "parts_s": parts,
        "ratios": [ratios.alone, ratios.shared, ratios.exchange], "sensitivity": moved,
        "refused": refused, "profile": profile.model_dump(mode="json"),
    }  # fmt: skip


def figures_of(kept: dict[str, Any]) -> list[Figure]:
    return [Figure(name, strategy, one["predicted_s"][strategy], one["corrected_s"][strategy], tuple(turns))
            for name, one in kept.items() for strategy, turns in one["turns"].items() if turns]  # fmt: skip


def summary(figures: list[Figure]) -> list[dict[str, Any]]:
    """What is asked of the planner, beside the spread of the measurement itself."""
    data = [one for one in figures if one.strategy == "data"]
    rows = []
    for text, some, limit in (
        ("mean error over strategies", figures, AIM), ("mean error of data parallel", data, AIM_DATA)
    ):  # fmt: skip
        rows.append({"name": text, "value": statistics.mean(abs(one.error) for one in some), "aim": limit,
                     "by the profile alone": statistics.mean(abs(one.raw_error) for one in some),
                     "spread": statistics.mean(one.spread for one in some), "configurations": len(some)})  # fmt: skip
    lost = []
    for name in dict.fromkeys(one.slice for one in figures):
        mine = [one for one in figures if one.slice == name]
        chosen = min(mine, key=lambda one: one.corrected_s)
        lost.append(chosen.measured_s / min(one.measured_s for one in mine) - 1)
    rows.append({"name": "the choice behind the best measured, at worst", "value": max(lost), "aim": AIM_CHOICE,
                 "spread": statistics.mean(one.spread for one in figures), "configurations": len(lost)})  # fmt: skip
    return rows


def show(kept: dict[str, Any], topic: str) -> bool:
    figures = figures_of(kept)
    print(f"{'':12} {'strategy':12} {'profile':>9} {'error':>6} {'corrected':>10} {'error':>6} {'measured':>9} spread")
    for one in figures:
        print(
            f"{one.slice:12} {one.strategy:12} {1e3 * one.predicted_s:6.1f} ms {one.raw_error:+6.0%} "
            f"{1e3 * one.corrected_s:7.1f} ms {one.error:+6.0%} {1e3 * one.measured_s:6.1f} ms {one.spread:5.1%}"
        )
    for name in kept:
        refused = "; ".join(f"{strategy}: {why}" for strategy, why in kept[name]["refused"].items())
        moves = ", ".join(f"{number} {share:+.1%}" for number, share in kept[name]["sensitivity"].items())
        print(f"{name}: computing in predictions {kept[name]['ratios'][0]:.2f} alone, "
              f"{kept[name]['ratios'][1]:.2f} together, exchanges {kept[name]['ratios'][2]:.2f}; "
              f"20 % slower moves the step at most: {moves}"
              f"{'; cannot be: ' + refused if refused else ''}")  # fmt: skip
    for name in kept:
        print(f"{name}: prepared in {kept[name]['prepared_s']:.0f} s")
    rows = [
        Row(row["name"], row["value"], row["aim"], at_most=True,
            note=f"{row['configurations']} of them; measurements spread by {row['spread']:.1%}")
        for row in summary(figures)
    ]  # fmt: skip
    rows += [
        Row(f"error, {one.slice}, {one.strategy}", one.error,
            note=f"predicted {1e3 * one.corrected_s:.1f} ms, measured {1e3 * one.measured_s:.1f} ms, "
            f"spread {one.spread:.1%}; "
            f"{one.raw_error:+.1%} by the profile alone")
        for one in figures
    ]  # fmt: skip
    rows += [
        Row(f"sensitivity, {name}, {number} 20 % slower", share)
        for name in kept for number, share in kept[name]["sensitivity"].items()
    ]  # fmt: skip
    return publish(topic, rows, full=all(name in kept for name in SLICES))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", choices=SLICES, help="measure this slice; may be repeated")
    parser.add_argument("--predict", action="store_true", help="measure nothing, and predict what was measured again")
    parser.add_argument("--full", action="store_true", help="all slices; only the first if not given")
    parser.add_argument("--topic", default="planner-time", help="name of the result file; another one for few slices")
    wanted = parser.parse_args()
    kept = json.loads(WHERE.read_text())["slices"] if WHERE.exists() else {}
    for name in wanted.only or (SLICES if wanted.full or wanted.predict else SLICES[:1]):
        if wanted.predict:
            kept |= {name: kept[name] | predicted(name, kept[name]["compute_s"])} if name in kept else {}
            continue
        print(f"  {name}", flush=True)
        kept[name] = measured(name)
        kept = {one: kept[one] for one in SLICES if one in kept}
        OUT.mkdir(exist_ok=True)
        WHERE.write_text(json.dumps({"slices": kept}))
    return 0 if show(kept, wanted.topic) else 1


if __name__ == "__main__":
    sys.exit(main())
