"""Meshes that fit and meshes that do not; processes that find each other and calls that cannot."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap

import jax
import pytest
import tomli_w
from jax.sharding import AxisType

from jaxtrain import train
from jaxtrain.config import MeshConfig
from jaxtrain.parallel.mesh import batch_sharding, make_mesh, replicated, share_cores
from jaxtrain.parallel.processes import ProcessInfo, start_distributed
from jaxtrain.runs.checkpoint import CheckpointStore
from jaxtrain.runs.log import read_metrics
from zarr_store.errors import InvalidInput

from ..cube_factory import shared_cube, tiny_config


@pytest.mark.parametrize(("data", "model"), [(8, 1), (4, 2), (1, 8), (2, 1), (1, 1)])
def test_axes_and_devices(data, model):
    mesh = make_mesh(MeshConfig(data=data, model=model))
    assert dict(mesh.shape) == {"data": data, "model": model}
    assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)
    assert len({d.id for d in mesh.devices.flat}) == data * model
    shape = (8, 4)
    assert batch_sharding(mesh).shard_shape(shape) == (8 // data, 4)
    assert replicated(mesh).shard_shape(shape) == shape


def test_a_mesh_that_does_not_fit_says_how_to_get_more_devices():
    with pytest.raises(InvalidInput) as caught:
        make_mesh(MeshConfig(data=4, model=4))
    message = str(caught.value)
    for part in ("data=4", "model=4", "16 devices", "sees 8", "--xla_force_host_platform_device_count=16"):
        assert part in message
    with pytest.raises(InvalidInput, match="needs 4 devices, JAX sees 3"):
        make_mesh(MeshConfig(data=4), devices=jax.devices()[:3])


def test_a_processor_is_used_with_all_its_cores_and_gives_the_same_answer(tmp_path):
    """By `python -m jaxtrain.train` with no mesh named; here beside one device."""
    config = tiny_config(
        shared_cube(),
        # the cloud of this cube is one value: turned, it rounds otherwise, and ties of the max pooling break otherwise
        data={"augment": False},
        run={"steps": 4, "evaluate_every": 4, "checkpoint_every": 4, "batch_size": 8},
    )
    (tmp_path / "run.toml").write_text(tomli_w.dumps(config.model_dump(mode="json", exclude_unset=True)))
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    subprocess.run(
        [sys.executable, "-m", "jaxtrain.train", str(tmp_path / "run.toml"), "--out", str(tmp_path / "split")],
        env=environment, check=True, timeout=200,
    )  # fmt: skip
    train(config, tmp_path / "one")
    cores = len(os.sched_getaffinity(0))
    used = CheckpointStore(tmp_path / "split" / "checkpoints").contents(4)["extra"]["config"]["mesh"]["data"]
    assert used == max(n for n in (1, 2, 4, 8) if n <= cores)
    split, one = ([line["loss"] for line in read_metrics(tmp_path / name)] for name in ("split", "one"))
    assert split == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize("sections", [{"mesh": {"data": 1}}, {"mesh": {"space": 2}}, {"model": {"norm": "local"}}])
def test_a_named_mesh_and_the_local_norm_keep_the_processor_whole(sections, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4))
    asked = []
    monkeypatch.setattr(jax.config, "update", lambda *words: asked.append(words))
    free = tiny_config("c.zarr")
    assert share_cores(free, {}).mesh.data == 4
    assert asked == [("jax_num_cpu_devices", 4)]
    assert share_cores(free, {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}) is free
    kept = tiny_config("c.zarr", **sections)
    assert share_cores(kept, {}) is kept
    assert len(asked) == 1


def test_a_mesh_of_data_alone_gets_its_devices(monkeypatch):
    """As the config.toml of a run names it that was spread over the cores."""
    asked = []
    monkeypatch.setattr(jax.config, "update", lambda *words: asked.append(words))
    named = tiny_config("c.zarr", mesh={"data": 2})
    assert share_cores(named, {}) is named
    assert asked == [("jax_num_cpu_devices", 2)]
    for other, environment in (
        (named, {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}),
        (tiny_config("c.zarr", mesh={"data": 2, "model": 2}), {}),
        (tiny_config("c.zarr", mesh={"data": 2, "space": 2}), {}),
        (tiny_config("c.zarr", mesh={"data": 16}, run={"batch_size": 16}), {}),
    ):
        assert share_cores(other, environment) is other
    assert len(asked) == 1


def test_one_process_starts_nothing():
    assert start_distributed(environment={}) == ProcessInfo(0, 1)
    assert ProcessInfo(0, 1).is_first


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"TERRASHARD_COORDINATOR": "127.0.0.1:1"}, "needs all of"),
        ({"TERRASHARD_PROCESSES": "two"}, "TERRASHARD_PROCESSES must be a whole number, got 'two'"),
        (
            {"TERRASHARD_COORDINATOR": "here", "TERRASHARD_PROCESSES": "2", "TERRASHARD_PROCESS": "0"},
            "host:port, such as 10.0.0.1:1234, got 'here'",
        ),
        (
            {"TERRASHARD_COORDINATOR": "127.0.0.1:1", "TERRASHARD_PROCESSES": "2", "TERRASHARD_PROCESS": "2"},
            "one of 0 … 1, got 2",
        ),
    ],
)
def test_half_a_set_up_is_refused(environment, message):
    with pytest.raises(InvalidInput, match=message):
        start_distributed(environment=environment)


def test_joining_late_is_refused():
    with pytest.raises(InvalidInput, match="before any array is made"):
        start_distributed("127.0.0.1:1", processes=2, process=0)


WORKER = """
    import json, sys
    from jaxtrain.parallel.mesh import batch_sharding, make_mesh, replicated
    from jaxtrain.parallel.processes import start_distributed
    info = start_distributed(timeout_s=60)
    import jax, numpy as np
    from jaxtrain.config import MeshConfig
    mesh = make_mesh(MeshConfig(data=2))
    mine = np.arange(4.0) + 4 * info.index
    whole = jax.make_array_from_process_local_data(batch_sharding(mesh), mine)
    total = jax.jit(lambda x: (x * x).sum(), out_shardings=replicated(mesh))
    try:
        make_mesh(MeshConfig(data=1))
        refused = ""
    except ValueError as error:
        refused = str(error)
    print(json.dumps({"index": info.index, "shape": whole.shape, "total": float(total(whole)), "refused": refused}))
"""


def test_two_processes_make_one_mesh():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    base = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1", "JAX_PLATFORMS": "cpu"}
    base |= {"TERRASHARD_COORDINATOR": f"127.0.0.1:{port}", "TERRASHARD_PROCESSES": "2"}
    base["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WORKER)],
            env={**base, "TERRASHARD_PROCESS": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=90) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for index, (worker, (out, err)) in enumerate(zip(workers, outputs, strict=True)):
        assert worker.returncode == 0, err[-2000:]
        answer = json.loads(out.splitlines()[-1])
        assert "leaves some processes without any" in answer.pop("refused")
        assert answer == {"index": index, "shape": [8], "total": float(sum(i * i for i in range(8)))}
