"""Measure the receptive field: `receptive_radius` finds the pixels that an answer depends on, by running the network.

One column of the input is made not-a-number. Every operation hands that on to all that it computes from it, so the
answers that are not numbers are those that depend on the column. Networks that halve images look at blocks of pixels,
so each position in a block has its turn.

Letters: B position in a block, H row, W column, C band, K class.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.learn.optim import evaluation_params
from jaxtrain.learn.state import Program, TrainState
from jaxtrain.models.temporal import series_of
from zarr_store.errors import InvalidInput, TerrashardError

__all__ = ["image_stride", "receptive_radius"]

_MOST_STRIDE = 256
_REACHES = (64, 256, 1024)
"""Columns on either side of the one that is not a number; more where those were not enough."""


def image_stride(program: Program) -> int:
    """Return the pixels by which the window of a network may be moved without changing which pixels it pools together.

    Raises:
        InvalidInput: The network gives no answer for each pixel.
    """
    stride = 1
    while stride <= _MOST_STRIDE:
        try:
            image = jax.ShapeDtypeStruct((1, stride, stride, program.channels), jnp.float32)  # type: ignore[no-untyped-call]
            shape = jax.eval_shape(lambda x: _answers(program, None, x), image).shape
        except TerrashardError:  # an image of that size cannot be halved often enough
            shape = ()
        if shape[1:3] == (stride, stride):
            return stride
        stride *= 2
    raise InvalidInput(f"the network gives no answer for each pixel of images up to {_MOST_STRIDE} pixels")


def receptive_radius(program: Program, state: TrainState, stride: int) -> int | None:
    """Return the radius in pixels of the receptive field of an answer; None where it covers the whole image.

    Args:
        program: The network.
        state: Its parameters.
        stride: Result of `image_stride`.
    """
    for reach in _REACHES:
        reach = -(-reach // stride) * stride
        radius = max(_radius(program, state, stride, reach, across) for across in (True, False))
        if radius < reach - stride:
            return radius
        if program.config.model.norm == "group":
            break
    return None


def _radius(program: Program, state: TrainState, stride: int, reach: int, across: bool) -> int:
    at = reach + np.arange(stride)
    x_BHWC = np.zeros((stride, stride, 2 * reach + stride, program.channels), np.float32)
    x_BHWC[np.arange(stride), :, at] = np.nan
    answers = jax.jit(lambda x: _answers(program, state, x))(x_BHWC if across else x_BHWC.swapaxes(1, 2))
    reached_BHW = np.isnan(np.asarray(answers)).any(axis=-1)
    reached_BW = reached_BHW.any(axis=1 if across else 2)
    away = np.abs(np.arange(reached_BW.shape[1]) - at[:, None])
    return int(np.where(reached_BW, away, 0).max())


def _answers(program: Program, state: TrainState | None, x_BHWC: Any) -> Any:
    """Return the logits of images in the form that the network takes."""
    if state is None:
        state = program.shapes
        params, model_state = _zeros(evaluation_params(state.params, state.opt_state)), _zeros(state.model_state)
    else:
        params, model_state = evaluation_params(state.params, state.opt_state), state.model_state
    if program.config.data.dates != 1:
        b, h, w, _ = x_BHWC.shape
        x_BHWC = series_of(x_BHWC[:, :, :, None], jnp.ones((b, h, w, 1), jnp.float32), jnp.ones((b, 1), jnp.float32))
    return program.apply(params, model_state, x_BHWC, train=False)[0]


def _zeros(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)
