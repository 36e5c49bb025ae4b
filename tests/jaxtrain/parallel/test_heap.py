"""Memory that a step frees serves the next one."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxtrain.parallel import heap
from jaxtrain.parallel.heap import FreedMemory, keep_freed_memory, resident_bytes

PAGES = 200 << 20 >> 12
FAULTS_OF_A_SECOND_STEP = f"""
import resource, sys, threading
import numpy as np
from jaxtrain.parallel import heap
from jaxtrain.parallel.heap import FreedMemory, keep_freed_memory, resident_bytes
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


def test_memory_goes_back_when_a_process_of_equal_steps_has_grown(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [50, 90, 100, 95, 120, 123, 125, 60, 98, 100, 100, 124, 130]
    held = iter(sizes)
    returned: list[int] = []
    monkeypatch.setattr(heap, "resident_bytes", lambda: next(held))
    monkeypatch.setattr(heap, "return_freed_memory", lambda: returned.append(1))
    freed = FreedMemory(growth_bytes=24)
    # the first four steps show what is needed, and so do the four after memory went back
    assert [step for step in range(len(sizes)) if freed.after_step()] == [6, 12]
    assert len(returned) == 2


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="another system has no /proc")
def test_the_memory_that_a_process_holds_is_read() -> None:
    before = resident_bytes()
    held = np.ones(64 << 20, np.uint8)
    assert held.sum() == 64 << 20
    assert 56 << 20 < resident_bytes() - before < 80 << 20


def test_settings_of_the_user_stay() -> None:
    assert not keep_freed_memory({"MALLOC_ARENA_MAX": "4"})
    assert not keep_freed_memory({"GLIBC_TUNABLES": "glibc.malloc.arena_max=4"})


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="another system has no /proc")
def test_the_peak_of_a_process_is_not_that_of_the_one_that_started_it() -> None:
    told = """
import resource
from jaxtrain.parallel.heap import process_peak_bytes
own = bytearray(b"1") * (30 << 20)
print(process_peak_bytes() >> 20, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
"""
    held = np.ones(500 << 20, np.uint8)
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True, close_fds=False)
    peak, inherited = map(int, done.stdout.split())
    assert held.sum() >> 20 == 500
    assert inherited > 450, "the fault that this is about"
    assert 30 < peak < 400
