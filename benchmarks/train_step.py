"""The training step of the default U-Net compared with the same network in PyTorch, in the same run.

Float32, patches of 128², 4 bands, batches of 16, forward, backward and AdamW; PyTorch in channels_last. Both sides take
turns. Skipped, and said so, without torch.

The processor is used as `terrashard train` does by default: split into as many devices as it has cores, and with freed
memory kept for the next step (`jaxtrain.parallel.heap`). PyTorch runs in a process of its own as it comes, and beside
it in this one, where it has that memory, too. What a GPU does is measured by `train_gpu.py`.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
from harness import Row, arguments, medians, publish
from torch_side import torch_step, torch_unet

BATCH, BANDS, CLASSES, PATCH = 16, 4, 6, 128
STEPS = 4

_SPLIT: list[Any] = []
"""The mesh that the first program of this process has chosen; cores are shared out once."""


def program_of(model: dict[str, Any]) -> Any:
    from jaxtrain.config import TrainConfig
    from jaxtrain.learn.state import build_program
    from jaxtrain.parallel.heap import keep_freed_memory
    from jaxtrain.parallel.mesh import make_mesh
    from jaxtrain.parallel.processes import spread_mesh

    config = TrainConfig.model_validate(
        {
            "data": {"cube": "none", "patch": PATCH, "augment": False},
            "model": model,
            "run": {"batch_size": BATCH},
        }
    )
    keep_freed_memory()
    config = spread_mesh(config) if not _SPLIT else config.model_copy(update={"mesh": _SPLIT[0]})
    _SPLIT[:] = [config.mesh]
    return build_program(config, channels=BANDS, classes=CLASSES, mesh=make_mesh(config.mesh),
                         mean=np.full(BANDS, 2000.0), std=np.full(BANDS, 900.0))  # fmt: skip


def leaves(program: Any) -> list[Any]:
    import jax

    return jax.tree.leaves(program.shapes.params)


def our_step(model: dict[str, Any]) -> Callable[[], float]:
    """A function that trains a few steps and returns seconds per step."""
    import jax

    from jaxtrain.data.arrays import put_batch
    from jaxtrain.learn.step import make_train_step
    from jaxtrain.parallel.mesh import batch_sharding

    program = program_of(model)
    step = make_train_step(program)
    rng = np.random.default_rng(0)
    host: dict[str, np.ndarray] = {
        "image": rng.integers(300, 4000, (BATCH, BANDS, PATCH, PATCH)).astype(np.uint16),
        "label": rng.integers(0, CLASSES, (BATCH, PATCH, PATCH)).astype(np.uint8),
        "observed": np.ones((BATCH, PATCH, PATCH), np.uint8),
    }
    data = put_batch(host, batch_sharding(program.mesh), BATCH)
    state = [program.init(jax.random.key(0))]

    def run() -> float:
        began = time.perf_counter()
        for number in range(STEPS):
            state[0], metrics = step(state[0], data, key=jax.random.key(number))
        jax.block_until_ready(metrics)
        return (time.perf_counter() - began) / STEPS

    return run


def their_step() -> tuple[Any, Callable[[], float]]:
    """The network, and a function as `our_step` returns."""
    import torch

    torch.manual_seed(0)
    network = torch_unet(BANDS, CLASSES, 16, 3)
    return network, torch_step(network, PATCH, BANDS, BATCH, classes=CLASSES, scene=False, device="cpu", steps=STEPS)


_PEER: list[Callable[[], float]] = []
"""The step of PyTorch in a process of its own."""


def peer_seconds() -> float:
    """Seconds per step of the U-Net in PyTorch, in a process that has nothing else."""
    if not _PEER:
        _PEER.append(their_step()[1])
    return _PEER[0]()


def measure(repeats: int) -> list[Row]:
    unet = {"name": "unet", "width": 16, "depth": 3}
    ours = our_step(unet)  # first, as memory is kept from before anything was computed with
    network, beside = their_step()
    theirs = sum(parameter.numel() for parameter in network.parameters())
    same = sum(int(np.prod(leaf.shape)) for leaf in leaves(program_of(unet)))
    if theirs != same:
        raise SystemExit(f"not the same network: {same} parameters here, {theirs} in PyTorch")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        seconds = medians(
            {"ours": ours, "torch": lambda: pool.submit(peer_seconds).result(), "torch, memory kept": beside}, repeats
        )
    return [
        Row(
            "windows/s of the default U-Net, 128², float32", BATCH / seconds["ours"], note=f"mesh.data {_SPLIT[0].data}"
        ),
        Row("windows/s of PyTorch, channels_last", BATCH / seconds["torch"]),
        Row("ours / PyTorch on the processor", seconds["torch"] / seconds["ours"], 0.8),
        Row("ours / PyTorch with freed memory kept, too", seconds["torch, memory kept"] / seconds["ours"]),
    ]


def main() -> int:
    args = arguments(__doc__ or "")
    if importlib.util.find_spec("torch") is None:
        print('  skipped, torch is not installed (pip install "terrashard[bench]")')
        return 0
    return 0 if publish("train-step", measure(args.repeats), full=args.full) else 1


if __name__ == "__main__":
    sys.exit(main())
