"""The training step of the default U-Net beside the same network in PyTorch, in the same run.

On the processor: float32, patches of 128², 4 bands, batches of 16, forward, backward and AdamW; PyTorch in
channels_last. Both sides take turns. On a GPU: ResNet-18 (64², 13 bands), ResNet-50 (224²) and the U-Net (256²) in
bf16 beside `torch.compile`, with the share of the device's peak that the operations of the compiled step make up (MFU);
where there is none, that part says so and is skipped, as all of it is without torch.

The processor is used as `terrashard train` does by default: split into as many devices as it has cores, and with freed
memory kept for the next step (`jaxtrain.heap`). PyTorch runs in a process of its own as it comes, and beside it in this
one, where it has that memory, too.
"""

from __future__ import annotations

import importlib.util
import math
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
from harness import Row, arguments, medians, publish

BATCH, BANDS, CLASSES = 16, 4, 6
STEPS = 4
PEAKS = {"H100": 989e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
"""Dense bfloat16 operations a second by device kind, of their makers' data sheets."""


_SPLIT: list[Any] = []
"""The mesh that the first program of this process has chosen; cores are shared out once."""


def program_of(model: dict[str, Any], patch: int, bands: int, batch: int) -> Any:
    from jaxtrain.config import TrainConfig
    from jaxtrain.heap import keep_freed_memory
    from jaxtrain.parallel.mesh import make_mesh
    from jaxtrain.parallel.processes import spread_mesh
    from jaxtrain.state import build_program

    config = TrainConfig.model_validate(
        {
            "data": {"cube": "none", "patch": patch, "augment": False},
            "model": model,
            "run": {"batch_size": batch},
        }
    )
    keep_freed_memory()
    config = spread_mesh(config) if not _SPLIT else config.model_copy(update={"mesh": _SPLIT[0]})
    _SPLIT[:] = [config.mesh]
    return build_program(config, channels=bands, classes=CLASSES, mesh=make_mesh(config.mesh),
                         mean=np.full(bands, 2000.0), std=np.full(bands, 900.0))  # fmt: skip


def leaves(program: Any) -> list[Any]:
    import jax

    return jax.tree.leaves(program.shapes.params)


def our_step(
    model: dict[str, Any], patch: int, bands: int, batch: int, *, scene: bool
) -> tuple[Callable[[], float], Callable[[], float]]:
    """A function that trains a few steps and returns seconds per step; and one that counts operations of a step."""
    import jax

    from jaxtrain.data.arrays import put_batch
    from jaxtrain.parallel.mesh import batch_sharding
    from jaxtrain.step import make_train_step

    program = program_of(model, patch, bands, batch)
    step = make_train_step(program)
    rng = np.random.default_rng(0)
    shape = (batch, patch, patch)
    host = {
        "image": rng.integers(300, 4000, (shape[0], bands, *shape[1:])).astype(np.uint16),
        "label": rng.integers(0, CLASSES, shape[:1] if scene else shape).astype(np.uint8),
        "observed": np.ones(shape, np.uint8),
    }
    data = put_batch(host, batch_sharding(program.mesh), batch)
    state = [program.init(jax.random.key(0))]

    def run() -> float:
        began = time.perf_counter()
        for number in range(STEPS):
            state[0], metrics = step(state[0], data, key=jax.random.key(number))
        jax.block_until_ready(metrics)
        return (time.perf_counter() - began) / STEPS

    def operations() -> float:
        compiled = step.jitted.lower(state[0], data, jax.random.key(0)).compile()
        return float((compiled.cost_analysis() or {}).get("flops", math.nan))

    return run, operations


def torch_unet(bands: int, classes: int, width: int, depth: int, *, norm: str = "group") -> Any:
    """The network of `jaxtrain.models.unet`: residual blocks, 1 × 1 before the nearest repeat, skips added."""
    import torch
    from torch import nn

    def make_norm(channels: int) -> nn.Module:
        groups = math.gcd(channels, min(8, max(1, channels // 4)))
        return nn.GroupNorm(groups, channels) if norm == "group" else nn.BatchNorm2d(channels)

    class Block(nn.Module):
        def __init__(self, given: int, out: int) -> None:
            super().__init__()
            self.conv1, self.norm1 = nn.Conv2d(given, out, 3, padding=1, bias=False), make_norm(out)
            self.conv2, self.norm2 = nn.Conv2d(out, out, 3, padding=1, bias=False), make_norm(out)
            self.skip = nn.Conv2d(given, out, 1) if given != out else nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.relu(self.norm1(self.conv1(x)))
            return torch.relu(self.norm2(self.conv2(y)) + self.skip(x))

    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            widths = [width << level for level in range(depth + 1)]
            self.down = nn.ModuleList([Block(bands if i == 0 else widths[i - 1], w) for i, w in enumerate(widths)])
            self.narrow = nn.ModuleList([nn.Conv2d(widths[i + 1], widths[i], 1) for i in range(depth)])
            self.up = nn.ModuleList([Block(widths[i], widths[i]) for i in range(depth)])
            self.head = nn.Conv2d(width, classes, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            skips = []
            for i, stage in enumerate(self.down):
                x = stage(x if i == 0 else nn.functional.max_pool2d(x, 2))
                skips.append(x)
            for i in reversed(range(depth)):
                x = nn.functional.interpolate(self.narrow[i](x), scale_factor=2, mode="nearest")
                x = self.up[i](x + skips[i])
            return self.head(x)

    return UNet()


def torch_step(network: Any, patch: int, bands: int, batch: int, *, scene: bool, device: str) -> Callable[[], float]:
    import torch

    network = network.to(device, memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-4)
    image = torch.randint(300, 4000, (batch, bands, patch, patch), dtype=torch.int32).to(device)
    shape = (batch,) if scene else (batch, patch, patch)
    label = torch.randint(0, CLASSES, shape).to(device)
    fast = device == "cuda"
    if fast:
        network = torch.compile(network)

    def run() -> float:
        began = time.perf_counter()
        for _ in range(STEPS):
            x = ((image.float() - 2000.0) / 900.0).contiguous(memory_format=torch.channels_last)
            with torch.autocast(device, torch.bfloat16, enabled=fast):
                loss = torch.nn.functional.cross_entropy(network(x).float(), label)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimiser.step()
        if fast:
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / STEPS

    return run


_PEER: list[Callable[[], float]] = []
"""The step of PyTorch in a process of its own."""


def peer_seconds() -> float:
    """Seconds per step of the U-Net in PyTorch, in a process that has nothing else."""
    import torch

    if not _PEER:
        torch.manual_seed(0)
        _PEER.append(torch_step(torch_unet(BANDS, CLASSES, 16, 3), 128, BANDS, BATCH, scene=False, device="cpu"))
    return _PEER[0]()


def on_the_processor(repeats: int) -> list[Row]:
    import torch

    torch.manual_seed(0)
    unet = {"name": "unet", "width": 16, "depth": 3}
    network = torch_unet(BANDS, CLASSES, 16, 3)
    theirs = sum(parameter.numel() for parameter in network.parameters())
    same = sum(int(np.prod(leaf.shape)) for leaf in leaves(program_of(unet, 128, BANDS, BATCH)))
    if theirs != same:
        raise SystemExit(f"not the same network: {same} parameters here, {theirs} in PyTorch")
    ours, _ = our_step(unet, 128, BANDS, BATCH, scene=False)
    beside = torch_step(network, 128, BANDS, BATCH, scene=False, device="cpu")
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


def on_a_gpu(repeats: int) -> list[Row]:
    """ResNet-18, ResNet-50 and U-Net in bf16 beside `torch.compile`; needs both frameworks on the GPU."""
    import torch

    try:
        import jax

        seen = jax.devices("gpu")
    except RuntimeError:
        seen = []
    if not seen or not torch.cuda.is_available():
        print("  GPU part: skipped, JAX sees", len(seen), "GPUs and PyTorch", torch.cuda.device_count())
        return []
    if importlib.util.find_spec("torchvision") is None:
        print("  GPU part: skipped, torchvision is not installed")
        return []
    from torchvision.models import resnet18, resnet50

    def twin(make: Callable[..., Any], bands: int, *, small: bool) -> Any:
        network = make(num_classes=CLASSES)
        size, stride = (3, 1) if small else (7, 2)
        network.conv1 = torch.nn.Conv2d(bands, 64, size, stride, padding=size // 2, bias=False)
        if small:
            network.maxpool = torch.nn.Identity()
        return network

    rows = []
    for name, model, twin_network, patch, bands, batch, scene in (
        ("ResNet-18 64² 13 bands", {"name": "resnet", "depth": 18, "width": 64}, twin(resnet18, 13, small=True),
         64, 13, 512, True),
        ("ResNet-50 224²", {"name": "resnet", "depth": 50, "width": 64}, twin(resnet50, 3, small=False),
         224, 3, 128, True),
        ("U-Net 256²", {"name": "unet", "width": 32, "depth": 4}, torch_unet(4, CLASSES, 32, 4, norm="batch"),
         256, 4, 64, False),
    ):  # fmt: skip
        ours, operations = our_step(
            model | {"precision": "bfloat16", "norm": "batch"}, patch, bands, batch, scene=scene
        )
        peer = torch_step(twin_network, patch, bands, batch, scene=scene, device="cuda")
        seconds = medians({"ours": ours, "torch": peer}, repeats)
        used = (seen[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30
        rows += [
            Row(f"{name}: images/s", batch / seconds["ours"], note=f"peak {used:.1f} GiB"),
            Row(f"{name}: ours / torch.compile", seconds["torch"] / seconds["ours"], 1.0),
        ]
        peak = max((rate for kind, rate in PEAKS.items() if kind in seen[0].device_kind), default=None)
        if peak is None:
            print(f"  {name}: no MFU, the peak of {seen[0].device_kind} is not known here")
        else:
            share = operations() / seconds["ours"] / peak
            rows.append(
                Row(f"{name}: MFU in bfloat16", share, note=f"{peak / 1e12:.0f} TFLOP/s, {seen[0].device_kind}")
            )
    return rows


def main() -> int:
    args = arguments(__doc__ or "")
    if importlib.util.find_spec("torch") is None:
        print('  skipped, torch is not installed (pip install "terrashard[bench]")')
        return 0
    rows = on_the_processor(args.repeats) + on_a_gpu(args.repeats)
    return 0 if publish("train-step", rows, full=args.full) else 1


if __name__ == "__main__":
    sys.exit(main())
