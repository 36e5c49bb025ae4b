"""An image that is split between two real processes gives the answer of one device."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

from . import parity

MODEL = {"name": "cnn", "width": 8, "depth": 1}


def test_halos_travel_between_processes(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    base = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1", "JAX_PLATFORMS": "cpu"}
    base |= {"TERRASHARD_COORDINATOR": f"127.0.0.1:{port}", "TERRASHARD_PROCESSES": "2"}
    base["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, str(Path(parity.__file__)), json.dumps({"space": 2}), json.dumps(MODEL), str(tmp_path)]
    workers = [
        subprocess.Popen(command, env={**base, "TERRASHARD_PROCESS": str(i)}, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    try:
        one = parity.train(parity.make_program({}, MODEL))
        errors = [worker.communicate(timeout=180)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    for index, (worker, error) in enumerate(zip(workers, errors, strict=True)):
        assert worker.returncode == 0, error[-2000:]
        got = np.load(tmp_path / f"{index}.npz")
        np.testing.assert_allclose(got["losses"], one.losses, rtol=0, atol=1e-5)
        for name, expected in one.gradient.items():
            assert np.linalg.norm(got[f"gradient:{name}"] - expected) <= 1e-4 * np.linalg.norm(expected), name
        for name, expected in one.params.items():
            np.testing.assert_allclose(got[f"params:{name}"], expected, rtol=1e-4, atol=1e-5, err_msg=name)
