"""Tiny sample stores for the tests of training: classes that differ in colour and texture, at known places."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from zarr_store.samples import Sample, SampleSpec, write_samples

CLASSES = ("field", "lake", "town")
BANDS = ("red", "green", "blue")


def make_samples(url: Path, *, count: int = 96, side: int = 16, seed: int = 0, classes=CLASSES, several=False) -> Path:
    """A store of `count` patches; every four lie within 100 m of each other, in a cell of their own."""
    rng = np.random.default_rng(seed)
    colours = {"field": (90, 160, 60), "lake": (20, 40, 120), "town": (150, 140, 140)}
    spec = SampleSpec(count, BANDS, (side, side), "uint8", tuple(classes), "several" if several else "one")

    def samples():
        for i in range(count):
            label = (i // 4 + i) % len(classes)
            noise = rng.normal(0, 30 if classes[label] == "town" else 12, (3, side, side))
            image = np.clip(np.array(colours[classes[label]])[:, None, None] + noise, 0, 255).astype(np.uint8)
            group, inside = divmod(i, 4)
            answer = np.eye(len(classes), dtype=np.uint8)[label] if several else np.uint8(label)
            yield Sample(image, np.asarray(answer), 10 + 0.9 * group, 45 + 0.0002 * inside, f"sample-{i}")

    write_samples(url, spec, samples())
    return url


def make_scene(url: Path, *, side: int = 40, bands: int = 6, seed: int = 0) -> Path:
    """A labelled scene of squares of 5 pixels: three classes with their own spectra, and a margin without labels."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(1, 4, (side // 5, side // 5))
    label = coarse.repeat(5, axis=0).repeat(5, axis=1).astype(np.uint8)
    spectra = rng.integers(1000, 5000, (4, bands))
    image = spectra[label].transpose(2, 0, 1) + rng.normal(0, 100, (bands, side, side))
    label[:2] = 0
    spec = SampleSpec(1, tuple(f"b{i}" for i in range(bands)), (side, side), "uint16", CLASSES, "pixels")
    write_samples(url, spec, [Sample(image.astype(np.uint16), label, float("nan"), float("nan"), "scene")])
    return url
