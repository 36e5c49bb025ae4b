"""The column of `docs/parallelism.md` with what travels of the default U-Net, beside theory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxtrain.config import TrainConfig
from jaxtrain.learn.state import build_program
from jaxtrain.parallel.mesh import make_mesh

PAGE = Path(__file__).parents[3] / "docs" / "parallelism.md"
DEVICES, BANDS, CLASSES, WINDOWS, SIDE = 8, 4, 6, 32, 128
MIB = 2.0**20
HALVES = 0.0051
"""The page has two decimals."""


@pytest.fixture(scope="module")
def moved() -> dict[str, dict[str, float]]:
    """Mebibytes of each mesh by kind of exchange, as the page has them."""
    table = PAGE.read_text().partition("## What was measured")[2].partition("\n## ")[0]
    column = (
        next(line for line in table.splitlines() if line.startswith("| mesh"))
        .split("|")
        .index(" sent by a device, MiB ")
    )
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| `")]
    return {
        row[1].strip(" `"): {kind: float(size) for kind, size in re.findall(r"([a-z][a-z -]*) ([\d.]+)", row[column])}
        for row in rows
        if len(row) > column
    }


@pytest.fixture(scope="module")
def leaves() -> list[Any]:
    """Shapes of the parameters of the default U-Net."""
    config = TrainConfig.model_validate({"data": {"cube": "none", "patch": SIDE}, "mesh": {"data": 1}})
    program = build_program(config, channels=BANDS, classes=CLASSES, mesh=make_mesh(config.mesh),
                            mean=np.full(BANDS, 2000.0), std=np.full(BANDS, 900.0))  # fmt: skip
    found: list[Any] = jax.tree.leaves(program.shapes.params)
    return found


def test_gradients_and_parameters_travel_as_rings_send_them(moved: Any, leaves: list[Any]) -> None:
    whole = 4 * sum(leaf.size for leaf in leaves) / MIB
    split = 4 * sum(leaf.size for leaf in leaves if any(side % DEVICES == 0 for side in leaf.shape)) / MIB
    share = (DEVICES - 1) / DEVICES
    for mesh in ("data=8", "data=8 zero=1", "data=8 zero=3"):
        assert moved[mesh]["all-reduce"] == pytest.approx(2 * share * whole, abs=HALVES)
    assert moved["data=8 zero=1"]["all-gather"] == pytest.approx(share * split, abs=HALVES)
    # gathered for both passes, but what only one of them needs
    assert 1.95 * share * split < moved["data=8 zero=3"]["all-gather"] <= 2 * share * split


def test_halos_travel_as_the_convolutions_borrow_them(moved: Any) -> None:
    """Two rows of each image for each convolution, forward and, but for the image itself, backward."""
    width, depth = 16, 3
    borrowed = [(SIDE, BANDS)]
    for level in range(depth + 1):
        borrowed += [(SIDE >> level, width << level)] + ([(SIDE >> level, width << (level - 1))] if level else [])
    for level in range(depth):
        borrowed += 2 * [(SIDE >> level, width << level)]
    size = sum(4 * WINDOWS * 2 * side * channels * (2 if number else 1) for number, (side, channels) in
               enumerate(borrowed))  # fmt: skip
    assert moved["space=8"]["collective-permute"] == pytest.approx(size / MIB, abs=HALVES)
