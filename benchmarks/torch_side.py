"""The same networks and the same step in PyTorch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

__all__ = ["torch_resnet", "torch_step", "torch_unet"]


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


def torch_resnet(depth: int, bands: int, classes: int, *, small: bool) -> Any:
    """torchvision's ResNet-18 or -50 with a stem for `bands`; `small` keeps the size of the image."""
    import torch
    import torchvision

    network = getattr(torchvision.models, f"resnet{depth}")(num_classes=classes)
    size, stride = (3, 1) if small else (7, 2)
    network.conv1 = torch.nn.Conv2d(bands, 64, size, stride, padding=size // 2, bias=False)
    if small:
        network.maxpool = torch.nn.Identity()
    return network


def torch_step(
    network: Any, patch: int, bands: int, batch: int, *, classes: int, scene: bool, device: str, steps: int
) -> Callable[[], float]:
    """A function that trains some steps and returns seconds per step; on a GPU compiled, in bfloat16."""
    import torch

    network = network.to(device, memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-4)
    image = torch.randint(300, 4000, (batch, bands, patch, patch), dtype=torch.int32).to(device)
    shape = (batch,) if scene else (batch, patch, patch)
    label = torch.randint(0, classes, shape).to(device)
    fast = device == "cuda"
    if fast:
        torch.backends.cudnn.benchmark = True  # times the kernels of each convolution and takes the fastest
        network = torch.compile(network, dynamic=False)

    def run() -> float:
        began = time.perf_counter()
        for _ in range(steps):
            x = ((image.float() - 2000.0) / 900.0).contiguous(memory_format=torch.channels_last)
            with torch.autocast(device, torch.bfloat16, enabled=fast):
                loss = torch.nn.functional.cross_entropy(network(x).float(), label)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimiser.step()
        if fast:
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / steps

    return run
