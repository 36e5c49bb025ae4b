"""Every strategy gives the answer of one device also where its devices belong to two or four real processes."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from jaxtrain.learn.step import make_eval_step

from . import parity

TWO = [
    ("data=4 zero=1", "resnet batch"),
    ("space=4", "unet"),
    ("pipe=2 data=2 zero=3", "unet"),
    ("groups=s2,fusion/s1 data=2", "multimodal"),
]
"""Of two processes with two devices each."""
FOUR = [
    ("data=2 model=2 zero=3", "unet"),
    ("pipe=2 space=2 schedule=interleaved", "resnet"),
]
"""Of four processes with one device each."""
CASES = {2: TWO, 4: FOUR}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], list[dict[str, np.ndarray]]]:
    """What each process came to, by number of processes and of the case; all cases in one start of the processes."""

    begun: dict[int, tuple[Path, str]] = {}

    def start(processes: int) -> Path:
        if processes not in begun:
            out = tmp_path_factory.mktemp(f"of-{processes}")
            begun[processes] = (out, "the processes did not end in time")
            begun[processes] = (out, run_processes(processes, CASES[processes], out))
        out, errors = begun[processes]
        assert not errors, errors
        return out

    def outcome(processes: int, number: int) -> list[dict[str, np.ndarray]]:
        return [dict(np.load(start(processes) / f"{number}-{i}.npz")) for i in range(processes)]

    return outcome


def run_processes(processes: int, cases: list[tuple[str, str]], out: Path) -> str:
    """Run all cases one after the other; what went wrong, in words."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = re.sub(r"(?<=device_count=)\d+", str(4 // processes), os.environ["XLA_FLAGS"])
    base = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    base |= {"TERRASHARD_COORDINATOR": f"127.0.0.1:{port}", "TERRASHARD_PROCESSES": str(processes)}
    base["TERRASHARD_PARENT"] = str(os.getpid())
    base["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, str(Path(parity.__file__)), json.dumps(cases), str(out)]
    workers = [
        subprocess.Popen(command, env={**base, "TERRASHARD_PROCESS": str(i)}, stderr=subprocess.PIPE, text=True)
        for i in range(processes)
    ]
    try:
        errors = [worker.communicate(timeout=380)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    return "\n".join(error[-2000:] for worker, error in zip(workers, errors, strict=True) if worker.returncode)


@cache
def sums_of_one_device(model: str) -> dict[str, np.ndarray]:
    outcome = parity.of_one_device(model)
    sums = make_eval_step(outcome.program)(outcome.state, parity.put(outcome.program))
    return {name: np.asarray(value) for name, value in sums.items()}


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("processes", "number"),
    [pytest.param(n, i, id=f"{n} processes, {' of '.join(case)}") for n, cases in CASES.items()
     for i, case in enumerate(cases)],
)  # fmt: skip
def test_the_answer_of_several_processes_is_that_of_one_device(outcomes, processes, number):
    model = CASES[processes][number][1]
    expected = parity.of_one_device(model)
    seen = dict.fromkeys(expected.params, 0)
    for got in outcomes(processes, number):
        trees = {
            kind: {n.partition(":")[2]: leaf for n, leaf in got.items() if n.startswith(f"{kind}:")}
            for kind in ("gradient", "params", "statistics", "sums")
        }
        found = expected._replace(
            losses=got["losses"].tolist(),
            gradient=trees["gradient"],
            params=trees["params"],
            statistics=trees["statistics"],
        )
        parity.assert_same(found, expected, complete=False)
        if trees["sums"]:
            sums = sums_of_one_device(model)
            assert trees["sums"]["labelled"] == sums["labelled"]
            np.testing.assert_allclose(trees["sums"]["loss_sum"], sums["loss_sum"], rtol=1e-4)
        for name, leaf in found.params.items():
            seen[name] += np.isfinite(leaf).sum()
    # a process may hold a part; together they hold all
    assert all(seen[name] >= leaf.size for name, leaf in expected.params.items())
