"""The rate of unequal replicas compared with the sum of their rates alone, with the equal split and with the machine.

The speed of a shared machine moves by a tenth within a minute, and what is compared must meet the same speed. So a
ratio is measured in turns: each replica alone, all together, all at once without exchange, the equal split, and again.
Each turn compares with the rates alone just before and just after it, and the median of the turns counts.

A whole table takes longer than a machine stays quiet. Each measurement of a ratio is appended to
`out/hetero-NETWORK-SIZE-turns.jsonl`, also one that cannot be right, and `collect` makes the table of it. Several
replicas can never be faster together than the sum of their rates alone. A measurement that says so, or whose turns
differ by too much, was disturbed: it is **invalid**, counts as failed, and is measured again.
"""

from __future__ import annotations

import datetime as dt
import itertools
import json
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import OUT, Row
from hetero_crew import CHUNK, Crew, rate

RATIOS: dict[str, tuple[float, ...]] = {
    "1:1": (1, 1), "2:1": (2, 1), "3:1": (3, 1), "5:1": (5, 1), "4:2:1:1": (4, 2, 1, 1),
}  # fmt: skip
HEADROOM = 0.85
"""Part of a core that the fastest replica gets: the system, the coordinator and the measurement need some time too."""
AIM = 0.92
GAINS = {"3:1": 1.84, "5:1": 2.76}
"""Least rate beside the equal split."""
TRIES = 2
"""Measurements of a ratio until one is valid."""
TURNS = 4
ERROR = 0.03
"""Largest standard error of the efficiency over the turns of a measurement that is valid."""

Record = dict[str, Any]


def measure(network: str, ratios: Sequence[str], batch: int, *, full: bool) -> Iterator[Record]:
    """Measure each ratio until it is valid, at most `TRIES` times; yield every measurement once it is kept."""
    with Crew(network, max(len(RATIOS[name]) for name in ratios), batch) as crew:
        for ratio in ratios:
            for _ in range(TRIES):
                found = measure_once(crew, ratio, full=full)
                _keep(network, found, full=full)
                print(f"  {network} {ratio}: {faults(found) or 'valid'}", flush=True)
                yield found
                if not faults(found):
                    break


def measure_once(crew: Crew, ratio: str, *, full: bool) -> Record:
    """Return the rates of one ratio in windows a second, turn by turn: medians of all steps but the first."""
    batch, parts = crew.batch, RATIOS[ratio]
    everybody, begun = range(len(parts)), dt.datetime.now(dt.UTC)
    warm, steps = (7, 9) if full else (7, 5)
    # those beside the first share a core: where there are three, the first is slowed down with them
    crew.calibrate(parts, HEADROOM if len(parts) == 2 else 0.7)
    lengths = [max(3, round(4 * part / max(parts)) + 1) for part in parts]

    def each_alone() -> list[float]:
        return [rate(crew.run([number], lengths[number]), batch, 0) for number in everybody]

    found: Record = {"ratio": ratio, "begun": f"{begun:%Y-%m-%d %H:%M} UTC", "load": os.getloadavg()[0],
                     "alone": [each_alone()], "together": [], "apart": [], "equal": []}  # fmt: skip
    waiting: list[float] = []
    for _ in range(TURNS if full else 2):
        first = found["alone"][-1]
        mine = crew.run(everybody, warm + steps)
        found["together"].append(rate(mine, batch, warm))
        found["apart"].append(crew.apart([max(4, round(3 * own / min(first)) + 1) for own in first]))
        found["equal"].append(rate(crew.run(everybody, 3, shares=[crew.chunks // len(parts)] * len(parts)), batch, 0))
        found["alone"].append(each_alone())
        waiting += [min(line["waiting"].values()) for line in mine[warm:]]
    return found | {
        "shares": list(mine[-1]["shares"].values()),
        "moves": sum(a["shares"] != b["shares"] for a, b in itertools.pairwise(mine[warm:])),
        "least_waiting_s": statistics.median(waiting),
    }


def by_turn(found: Record) -> dict[str, list[float]]:
    """Return the ratios of each turn, by name; the rates alone of a turn are those before and after it, averaged."""
    means = [
        [(one + other) / 2 for one, other in zip(before, after, strict=True)]
        for before, after in itertools.pairwise(found["alone"])
    ]
    together, apart, equal = found["together"], found["apart"], found["equal"]
    return {
        "efficiency": [rate / sum(own) for rate, own in zip(together, means, strict=True)],
        "limit": [rate / sum(own) for rate, own in zip(apart, means, strict=True)],
        "beside the limit": [rate / most for rate, most in zip(together, apart, strict=True)],
        "beside the equal split": [rate / other for rate, other in zip(together, equal, strict=True)],
        "equal split beside its slowest": [
            rate / (len(own) * min(own)) for rate, own in zip(equal, means, strict=True)
        ],
        "ideal": [sum(own) / (len(own) * min(own)) for own in means],
    }  # fmt: skip


def faults(found: Record) -> str:
    """Return why a measurement cannot be right; empty if nothing speaks against it."""
    turns = by_turn(found)
    said = [
        f"{what} at {statistics.median(turns[name]):.2f} of what is possible"
        for what, name in (
            ("together", "efficiency"), ("all at once", "limit"), ("the equal split", "equal split beside its slowest"),
        )
        if statistics.median(turns[name]) > 1
    ]  # fmt: skip
    error = error_of(turns["efficiency"])
    if error > ERROR:
        said.append(f"turns differ: {', '.join(f'{value:.2f}' for value in turns['efficiency'])}")
    return "; ".join(said)


def error_of(values: Sequence[float]) -> float:
    """Return the standard error of the median of values that are spread normally."""
    return 1.2533 * statistics.stdev(values) / len(values) ** 0.5


def make_rows(network: str, found: Record, note: str) -> list[Row]:
    """Return the rows of one measurement.

    Args:
        network: `unet` or `resnet`.
        found: Result of `measure_once`.
        note: Which measurement it is.
    """
    why, turns, name = faults(found), by_turn(found), f"{network} {found['ratio']}"
    middle = {what: statistics.median(values) for what, values in turns.items()}
    together = statistics.median(found["together"])
    alone = ", ".join(f"{statistics.median(own):.0f}" for own in zip(*found["alone"], strict=True))
    shares = " ".join(str(share) for share in found["shares"])
    waits_s, step_s = found["least_waiting_s"], sum(found["shares"]) * CHUNK / together
    seen = ", ".join(f"{value:.3f}" for value in turns["efficiency"])
    return [
        Row(f"{name}: efficiency", middle["efficiency"], AIM, invalid=why,
            note=f"turns {seen}; {together:.0f} windows/s, alone {alone}; shares {shares}; "
                 f"{found['moves']} moves; {note}"),
        Row(f"{name}: limit, all at once without any exchange", middle["limit"], invalid=why,
            note=f"{statistics.median(found['apart']):.0f} windows/s"),
        Row(f"{name}: efficiency beside the limit", middle["beside the limit"], invalid=why),
        Row(f"{name}: rate beside the equal split", middle["beside the equal split"], GAINS.get(found["ratio"]),
            invalid=why, note=f"{statistics.median(found['equal']):.0f} windows/s; ideal {middle['ideal']:.2f}"),
        Row(f"{name}: part of a step in which the busiest replica waits", waits_s / step_s, invalid=why,
            note=f"{1000 * waits_s:.1f} of {1000 * step_s:.0f} ms: what overlap could save at most"),
    ]  # fmt: skip


def collect(network: str, *, full: bool) -> list[Row]:
    """Return the table: of each ratio the valid measurement of median efficiency; the newest where none is valid.

    Of two, the lower one is shown.
    """
    by_ratio: dict[str, list[Record]] = {}
    for text in _path(network, full=full).read_text().splitlines():
        found = json.loads(text)
        by_ratio.setdefault(found["ratio"], []).append(found)
    rows = []
    for ratio in (name for name in RATIOS if name in by_ratio):
        records = by_ratio[ratio]
        valid = sorted((found for found in records if not faults(found)), key=_efficiency)
        shown = valid[(len(valid) - 1) // 2] if valid else records[-1]
        known = ", ".join(f"{_efficiency(found):.3f}" for found in valid) or "none"
        note = f"begun {shown['begun']}; valid measurements: {known}; invalid: {len(records) - len(valid)}"
        rows += make_rows(network, shown, note)
    return rows


def _efficiency(found: Record) -> float:
    return statistics.median(by_turn(found)["efficiency"])


def _path(network: str, *, full: bool) -> Path:
    return OUT / f"hetero-{network}-{'full' if full else 'quick'}-turns.jsonl"


def _keep(network: str, found: Mapping[str, Any], *, full: bool) -> None:
    OUT.mkdir(exist_ok=True)
    with _path(network, full=full).open("a") as file:
        file.write(json.dumps(found) + "\n")
