"""Global RX beside the RX of the package `spectral`: seconds for mean, covariance and scores, and equal scores.

    python benchmarks/anomaly.py        # 490,000 pixels of 4, 6 and 12 bands

Both sides get the pixels in memory in the layout that each wants, as float32, and take turns. Needs `spectral`.
"""

from __future__ import annotations

import sys

import numpy as np
import spectral
from harness import Row, arguments, medians, publish

from jaxtrain.tasks.background import make_background, score_rows
from jaxtrain.tasks.moments import Moments

SIDE = 700


def rx(bands: int, repeats: int) -> list[Row]:
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
    asked = arguments(__doc__ or "")
    rows = [row for bands in (4, 6, 12) for row in rx(bands, asked.repeats)]
    return 0 if publish("anomaly-rx", rows, full=asked.full) else 1


if __name__ == "__main__":
    sys.exit(main())
