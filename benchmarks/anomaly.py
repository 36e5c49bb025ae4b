"""Anomalies: the speed of RX, planted anomalies by method and kind, and what is unusual in real scenes.

    python benchmarks/anomaly.py --part speed      # global RX beside `spectral`: 490,000 pixels of 4, 6, 12 bands
    python benchmarks/anomaly.py --part planted    # six kinds in simulated worlds of three seeds, optical and radar
    python benchmarks/anomaly.py --part scenes     # Zagreb's clouds, and small classes of Indian Pines

Each part keeps its own result. Both sides of the speed get the pixels in memory in the layout that each wants, as
float32, and take turns. Needs `spectral` and scikit-learn.
"""

from __future__ import annotations

import sys

import numpy as np
from harness import Row, arguments, medians, publish

from jaxtrain.tasks.background import make_background, score_rows
from jaxtrain.tasks.moments import Moments

SIDE = 700
PARTS = ("speed", "planted", "scenes")
SEEDS = (1, 2, 3)


def rx(bands: int, repeats: int) -> list[Row]:
    import spectral

    rng = np.random.default_rng(bands)
    mixing = rng.normal(size=(bands, bands)) * np.logspace(0, -2, bands)
    image = (rng.normal(size=(SIDE, SIDE, bands)) @ mixing.T + 3.0).astype(np.float32)
    rows, names = np.ascontiguousarray(image.reshape(-1, bands).T), [f"b{at}" for at in range(bands)]
    scores = {}

    def ours() -> None:
        scores["ours"] = score_rows(rows, make_background(Moments.of(rows), names))

    def theirs() -> None:
        scores["theirs"] = spectral.rx(image).ravel()

    seconds = medians({"terrashard": ours, "spectral": theirs}, repeats)
    wide = image.astype(np.float64)
    exact = spectral.rx(wide).ravel()
    apart = float(np.max(np.abs(scores["ours"] - exact) / exact))
    note = f"{1000 * seconds['terrashard']:.0f} ms beside {1000 * seconds['spectral']:.0f} ms"
    return [
        Row(f"{bands} bands: rate over spectral", seconds["spectral"] / seconds["terrashard"], 1.0, note=note),
        Row(f"{bands} bands: largest relative difference of a score", apart, 1e-5, at_most=True,
            note="from spectral in float64"),
    ]  # fmt: skip


def main() -> int:
    asked = arguments(__doc__ or "", parts=PARTS)
    passed = True
    for part in [asked.part] if asked.part else PARTS:
        if part == "speed":
            name, rows = "anomaly-rx", [row for bands in (4, 6, 12) for row in rx(bands, asked.repeats)]
        elif part == "planted":
            from anomaly_planted import planted

            name, rows = "anomaly-planted", planted(SEEDS)
        else:
            from anomaly_scenes import scenes

            name, rows = "anomaly-scenes", scenes()
        passed &= publish(name, rows, full=asked.full)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
