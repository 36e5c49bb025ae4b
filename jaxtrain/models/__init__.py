"""The networks, by name: plain dicts from name to builder, one for each kind of output.

A builder takes `(config, *, channels, classes, rngs, data_shards)` and returns a Flax NNX module whose call is
`model(x_BHWC, *, train)` in float32: logits_BHWK of a network per pixel, logits_BK of one per image. `temporal` takes
`x_BHWTC`, the dates of one place as `temporal.series_of` puts them together; `multimodal` takes one such array for each
of its modalities.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from flax import nnx

from jaxtrain.config import ModelConfig
from jaxtrain.models.autoencoder import build_autoencoder
from jaxtrain.models.cnn import build_cnn, build_lenet
from jaxtrain.models.mlp import build_image_mlp, build_pixel_mlp
from jaxtrain.models.modality import Modality
from jaxtrain.models.multimodal import build_multimodal
from jaxtrain.models.resnet import build_resnet
from jaxtrain.models.temporal import build_temporal
from jaxtrain.models.unet import build_unet
from zarr_store.errors import InvalidInput, UnknownName

__all__ = ["MODELS", "PER_PIXEL", "PER_SAMPLE", "build_model"]

Builder = Callable[..., nnx.Module]

PER_PIXEL: dict[str, Builder] = {
    "autoencoder": build_autoencoder, "cnn": build_cnn, "mlp": build_pixel_mlp, "multimodal": build_multimodal,
    "temporal": build_temporal, "unet": build_unet,
}  # fmt: skip
"""Networks with a prediction for each pixel: (B, H, W, K)."""
PER_SAMPLE: dict[str, Builder] = {
    "cnn": build_lenet, "mlp": build_image_mlp, "multimodal": partial(build_multimodal, per_image=True),
    "resnet": build_resnet,
}  # fmt: skip
"""Networks with one prediction for each image: (B, K)."""
MODELS: dict[str, Builder] = {**PER_SAMPLE, **PER_PIXEL}
"""All networks by name; a name in both tables means the network for pixels."""


def build_model(
    config: ModelConfig,
    *,
    channels: int,
    classes: int,
    rngs: nnx.Rngs,
    data_shards: int = 1,
    per_image: bool | None = None,
    values: bool = False,
    modalities: Sequence[Modality] = (),
) -> nnx.Module:
    """Build the network that the configuration names.

    Args:
        config: Name, width, depth, norm and dropout.
        channels: bands of the input image.
        classes: Number of classes, the channels of the logits.
        rngs: streams `params` and `dropout`.
        data_shards: size of the mesh axis `data`; only the norm `local` depends on it.
        per_image: Whether the output is one prediction for each image; None for the first meaning of the name.
        values: Whether the output is a value in place of classes; one channel is then enough.
        modalities: What each branch of the network multimodal gets; other networks have none.

    Raises:
        UnknownName: no such network.
        InvalidInput: no bands or classes, or a network that cannot give such answers.
    """
    if config.name not in MODELS:
        raise UnknownName.of("model", config.name, MODELS, where="model.name")
    if channels < 1 or classes < (1 if values else 2):
        raise InvalidInput(
            f"a network needs at least 1 band and 2 classes, got {channels} and {classes}: "
            "name more in data.bands and data.classes"
        )
    known = MODELS if per_image is None else PER_SAMPLE if per_image else PER_PIXEL
    if config.name not in known:
        # a network of several modalities is for data of several modalities, so it is no way out for others
        others = [name for name in known if name != "multimodal"]
        given, asked = ("pixel", "image") if per_image else ("image", "pixel")
        raise InvalidInput(
            f"model.name = {config.name!r} predicts for each {given}, the data need one prediction per {asked}: choose "
            f"one of {', '.join(others)}"
        )
    branches = {"modalities": modalities} if config.name == "multimodal" else {}
    return known[config.name](
        config, channels=channels, classes=classes, rngs=rngs, data_shards=data_shards, **branches
    )
