"""What decodes the bytes of strangers in this process: an error or an answer for any bytes, and never a crash.

A decoder that follows a place it has not read works or crashes by chance. So the memory that it gets is filled with
nonsense first, by the C library (`MALLOC_PERTURB_`), in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version

import pytest

from ingest.raster.blocks import _UNPACK
from ingest.raster.directory import COMPRESSIONS

PROGRAM = """
import resource, sys
import numpy as np
import imagecodecs
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
name, count = sys.argv[1], int(sys.argv[2])
decode, encode = getattr(imagecodecs, name + "_decode"), getattr(imagecodecs, name + "_encode")
rng = np.random.default_rng(0)
pixels = (rng.normal(0, 3, (64, 64)).cumsum(axis=1) + 900).astype(np.uint16)
good = bytes(encode(pixels if name == "png" else pixels.tobytes()))
options = {} if name == "png" else {"out": bytearray(8192)}
decode(good, **options)
print("good", flush=True)
refused = 0
for number in range(count):
    if number % 2:
        data = bytearray(good[: rng.integers(2, len(good) + 1)])
        for at in rng.integers(0, min(len(data), rng.choice([4, 64, len(data)])), rng.integers(1, 9)):
            data[at] = rng.integers(256)
    else:  # the first bytes tell what it is; behind them anything
        data = good[: rng.integers(0, 5)] + rng.bytes(64)
    try:
        decode(bytes(data), **options)
    except (RuntimeError, ValueError):
        refused += 1
assert refused > count / 10
print("done")
"""


def run(name: str, count: int = 20_000) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, name, str(count)],
        env={**os.environ, "MALLOC_PERTURB_": "165"}, timeout=120,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_every_decoder_is_tried() -> None:
    assert set(_UNPACK) == set(COMPRESSIONS.values()) == {"", "DEFLATE", "ZSTD"}


@pytest.mark.parametrize("name", ["deflate", "zstd", "png"])
def test_damaged_bytes_do_not_crash_a_decoder(name: str) -> None:
    done = run(name)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["good", "done"]


MENDED = tuple(map(int, version("imagecodecs").split(".")[:2])) >= (2026, 10)
"""Whether LZW of this imagecodecs is mended; that of the last release for Python 3.11 is not."""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc fills memory")
@pytest.mark.skipif(MENDED, reason="LZW of imagecodecs 2026.10 is mended")
def test_the_search_finds_a_decoder_that_crashes() -> None:
    """LZW, which is left to GDAL for this; it may come back where no Python has an older imagecodecs."""
    done = run("lzw")
    assert done.stdout.split()[0] == "good"
    assert done.returncode != 0, "the LZW decoder of this imagecodecs has not crashed"
