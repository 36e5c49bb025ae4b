"""The rate of unequal replicas beside the sum of their rates alone, beside the equal split and beside the machine.

A whole table takes longer than a machine stays quiet, so it is measured in slices. Each measurement of a ratio is
appended to `out/hetero-NETWORK-SIZE.jsonl`, also one that cannot be right, and `collect` makes the table of it.

Several replicas can never be faster together than the sum of their rates alone. A measurement that says so, or in which
a rate alone moved while it ran, was disturbed: it is **invalid**, counts as failed, and is measured again.
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
TRIES = 3
"""Measurements of a ratio until one is valid."""
DRIFT = 0.05
"""Most by which a rate alone may differ before and after the measurement."""

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
    """Return the rates of one ratio in windows a second; each is the median of its steps but the first."""
    batch, parts = crew.batch, RATIOS[ratio]
    everybody, begun = range(len(parts)), dt.datetime.now(dt.UTC)
    warm, steps = (7, 17) if full else (7, 9)
    # those beside the first share a core: where there are three, the first is slowed down with them
    crew.calibrate(parts, HEADROOM if len(parts) == 2 else 0.7)
    lengths = [max(2, round(4 * part / max(parts)) + 1) for part in parts]
    before = [crew.run([number], lengths[number]) for number in everybody]
    mine = crew.run(everybody, warm + steps)
    first = [rate(alone, batch, 0) for alone in before]
    apart = crew.apart([max(4, round(3 * own / min(first)) + 2) for own in first])
    after = [crew.run([number], lengths[number]) for number in everybody]
    equal = crew.run(everybody, 4, shares=[crew.chunks // len(parts)] * len(parts))
    used = mine[warm:]
    least = [min(line["waiting"].values()) for line in used]
    return {
        "ratio": ratio, "begun": f"{begun:%Y-%m-%d %H:%M} UTC", "load": os.getloadavg()[0],
        "before": first, "after": [rate(alone, batch, 0) for alone in after],
        "alone": [rate(one, batch, 0, other) for one, other in zip(before, after, strict=True)],
        "together": rate(mine, batch, warm), "apart": apart, "equal": rate(equal, batch, 0),
        "shares": list(mine[-1]["shares"].values()),
        "moves": sum(a["shares"] != b["shares"] for a, b in itertools.pairwise(used)),
        "least_waiting_s": statistics.median(least),
    }  # fmt: skip


def faults(found: Record) -> str:
    """Return why a measurement cannot be right; empty if nothing speaks against it."""
    alone = found["alone"]
    total, slowest = sum(alone), len(alone) * min(alone)
    said = [
        f"{what} {value:.0f} windows/s of at most {most:.0f}"
        for what, value, most in (
            ("together", found["together"], total), ("all at once", found["apart"], total),
            ("equal split", found["equal"], slowest),
        )
        if value > most
    ]  # fmt: skip
    said += [
        f"replica {number} alone {one:.0f} windows/s before and {other:.0f} after"
        for number, (one, other) in enumerate(zip(found["before"], found["after"], strict=True))
        if abs(other / one - 1) > DRIFT
    ]
    return "; ".join(said)


def make_rows(network: str, found: Record, note: str) -> list[Row]:
    """Return the rows of one measurement.

    Args:
        network: `unet` or `resnet`.
        found: Result of `measure_once`.
        note: Which measurement it is.
    """
    alone, together, why = found["alone"], found["together"], faults(found)
    total, name = sum(alone), f"{network} {found['ratio']}"
    seen = ", ".join(f"{own:.0f}" for own in alone)
    shares = " ".join(str(share) for share in found["shares"])
    busiest = "part of a step in which the busiest replica waits"
    waits_s = found["least_waiting_s"]
    ideal, step_s = total / (len(alone) * min(alone)), sum(found["shares"]) * CHUNK / together
    moves = f"{found['moves']} moves"
    return [
        Row(f"{name}: efficiency", together / total, AIM, invalid=why,
            note=f"{together:.0f} of {total:.0f} windows/s, alone {seen}; shares {shares}; {moves}; {note}"),
        Row(f"{name}: limit, all at once without any exchange", found["apart"] / total, invalid=why,
            note=f"{found['apart']:.0f} windows/s"),
        Row(f"{name}: efficiency beside the limit", together / found["apart"], invalid=why),
        Row(f"{name}: rate beside the equal split", together / found["equal"], GAINS.get(found["ratio"]), invalid=why,
            note=f"{found['equal']:.0f} windows/s; ideal {ideal:.2f}"),
        Row(f"{name}: {busiest}", waits_s / step_s, invalid=why,
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
    return float(found["together"] / sum(found["alone"]))


def _path(network: str, *, full: bool) -> Path:
    return OUT / f"hetero-{network}-{'full' if full else 'quick'}.jsonl"


def _keep(network: str, found: Mapping[str, Any], *, full: bool) -> None:
    OUT.mkdir(exist_ok=True)
    with _path(network, full=full).open("a") as file:
        file.write(json.dumps(found) + "\n")
