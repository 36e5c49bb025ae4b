"""The networks, by name: one plain dict from name to builder.

A builder takes `(config, *, channels, classes, rngs, data_shards)` and returns a Flax NNX module whose call is
`model(x_BHWC, *, train)` in float32: logits_BHWK of a network per pixel, logits_BK of one per image.
"""

from __future__ import annotations

from collections.abc import Callable

from flax import nnx

from jaxtrain.config import ModelConfig
from jaxtrain.models.cnn import build_cnn
from jaxtrain.models.resnet import build_resnet
from jaxtrain.models.unet import build_unet
from zarr_store.errors import InvalidInput, UnknownName

__all__ = ["MODELS", "PER_SAMPLE", "build_model"]

MODELS: dict[str, Callable[..., nnx.Module]] = {"cnn": build_cnn, "resnet": build_resnet, "unet": build_unet}

PER_SAMPLE = frozenset({"resnet"})
"""Networks that give one answer per image, logits (B, K); the others give one per pixel, (B, H, W, K)."""


def build_model(
    config: ModelConfig, *, channels: int, classes: int, rngs: nnx.Rngs, data_shards: int = 1
) -> nnx.Module:
    """Build the network that the configuration names.

    Args:
        config: name, width, depth, norm and dropout.
        channels: bands of the input image.
        classes: number of classes, the channels of the logits.
        rngs: streams `params` and `dropout`.
        data_shards: size of the mesh axis `data`; only the norm `local` depends on it.

    Raises:
        UnknownName: no such network.
        InvalidInput: no bands or fewer than two classes.
    """
    if config.name not in MODELS:
        raise UnknownName.of("model", config.name, MODELS, where="model.name")
    if channels < 1 or classes < 2:
        raise InvalidInput(
            f"a network needs at least 1 band and 2 classes, got {channels} and {classes}: "
            "name more in data.bands and data.classes"
        )
    return MODELS[config.name](config, channels=channels, classes=classes, rngs=rngs, data_shards=data_shards)
