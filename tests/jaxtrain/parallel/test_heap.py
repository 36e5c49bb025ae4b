"""Memory that a step frees serves the next one."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from jaxtrain.parallel.heap import keep_freed_memory

PAGES = 200 << 20 >> 12
FAULTS_OF_A_SECOND_STEP = f"""
import resource, sys, threading
import numpy as np
from jaxtrain.parallel.heap import keep_freed_memory
print(keep_freed_memory({{}}) if sys.argv[1] == "kept" else False)
def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones({PAGES} << 12, np.uint8)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
faults = []
for _ in range(2):  # of two threads, as a device's are not the first one
    thread = threading.Thread(target=step)
    thread.start()
    thread.join()
print(faults[1])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc")
def test_a_second_step_faults_no_page_in() -> None:
    faults = {}
    for how in ("kept", "given back"):
        told = subprocess.run(
            [sys.executable, "-c", FAULTS_OF_A_SECOND_STEP, how],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        asked, count = told.stdout.split()
        assert asked == str(how == "kept")
        faults[how] = int(count)
    assert faults["kept"] < PAGES // 100
    assert faults["given back"] > faults["kept"]


def test_settings_of_the_user_stay() -> None:
    assert not keep_freed_memory({"MALLOC_ARENA_MAX": "4"})
    assert not keep_freed_memory({"GLIBC_TUNABLES": "glibc.malloc.arena_max=4"})
