"""`detect_breaks` compares each observation of a pixel with a harmonic model of its own history.

The rules are those of CCDC and COLD (Zhu & Woodcock 2014, doi:10.1016/j.rse.2014.01.011; Zhu et al. 2020,
doi:10.1016/j.rse.2019.03.009): a model with trend and harmonics of the year is fitted robustly to the first clear
observations; later ones are predicted, and as long as they agree they refine the model. A break is where `consecutive`
observations in a row lie outside the stated probability and deviate in the same direction.

All pixels of a piece go through their observations together. Where COLD fits by lasso, coefficients here follow from
recursive least squares: every new observation costs one update of rank one.

Letters in shapes: T clear observation, B band, P coefficient, N pixel, C observation of the row that decides.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

__all__ = ["Breaks", "HarmonicModel", "detect_breaks"]

F32 = npt.NDArray[np.float32]
YEAR = 365.2425
_PIECE = 256
"""Pixels that one compiled program follows at once: their windows stay in the cache of a core."""
_WINDOW = 48
"""Most observations of a first fit."""
_BISQUARE = 4.685
"""Spreads beyond which the robust fit gives an observation no weight (Beaton & Tukey 1974)."""
_RIDGE = 1e-3
"""Added to the diagonal of the normal equations, so that few observations cannot give wild harmonics."""
_COS_45 = 0.7071067811865476


@dataclass(frozen=True)
class HarmonicModel:
    """The harmonic model of a pixel, and the rules by which a break is detected.

    Attributes:
        harmonics: Number of harmonics of the year, 1 to 3.
        consecutive: Observations in a row that must deviate.
        probability: Share of usual observations within the limit.
        first: Clear observations of a first fit, at least.
        most: Most breaks of a pixel that are kept.
    """

    harmonics: int = 2
    consecutive: int = 6
    probability: float = 0.99
    first: int = 12
    most: int = 4

    @property
    def coefficients(self) -> int:
        """Number of coefficients of each band."""
        return 2 + 2 * self.harmonics

    @property
    def least(self) -> int:
        """Clear observations that a pixel needs before any break can be found."""
        return max(self.first, 2 * self.coefficients) + self.consecutive

    def limits(self, bands: int) -> tuple[float, float]:
        """Return the squared deviation of a break, and that of an outlier."""
        from scipy.stats import chi2

        return float(chi2.ppf(self.probability, bands)), float(chi2.ppf(1.0 - 1e-6, bands))


@dataclass(frozen=True)
class Breaks:
    """The breaks of many pixels.

    Attributes:
        day: float32 (most, pixel): day of the first observation after each break; nan for none.
        change: float32 (most, band, pixel): median deviation of the observations that decided.
        before: float32 (most, band, pixel): prediction at the break.
        magnitude: float32 (most, pixel): median deviation in spreads of the model, over all bands.
        count: int32 (pixel,): number of breaks, kept or not.
        fitted: bool (pixel,): whether a model was ever fitted.
        observations: int32 (pixel,): clear observations.
    """

    day: F32
    change: F32
    before: F32
    magnitude: F32
    count: npt.NDArray[np.int32]
    fitted: npt.NDArray[np.bool_]
    observations: npt.NDArray[np.int32]


def detect_breaks(days: npt.NDArray[np.float64], values: F32, model: HarmonicModel, *, device: int = 0) -> Breaks:
    """Find the breaks of each pixel.

    Args:
        days: (time,) days since any day, ascending.
        values: float32 (time, band, pixel), with NaN where a pixel was not clear.
        model: The rules for the model of a pixel.
        device: Number of the device.
    """
    devices = jax.local_devices()
    place = devices[device % len(devices)]
    origin = float(days[0])
    pixels, limits = values.shape[2], model.limits(values.shape[1])
    size = min(_PIECE, 1 << max(pixels - 1, 0).bit_length())
    pending = []
    for start in range(0, pixels, size):
        piece = values[:, :, start : start + size]
        here = piece.shape[2]
        if here < size:
            piece = np.pad(piece, ((0, 0), (0, 0), (0, size - here)), constant_values=np.nan)
        times, compact, count = _compact((days - origin).astype(np.float32), piece)
        put = [jax.device_put(one, place) for one in (times, compact, count, np.array(limits, np.float32))]
        pending.append((here, _follow(*put, model=model)))
    parts = []
    for here, found in pending:
        parts.append([np.asarray(one)[..., :here] for one in found])
    day, *rest = (np.concatenate(one, axis=-1) for one in zip(*parts, strict=True))
    return Breaks(day + np.float32(origin), *rest)


def _compact(days: F32, values: F32) -> tuple[F32, F32, npt.NDArray[np.int32]]:
    """Move the clear observations of each pixel to the front: (T, N), (T, B, N) and their number."""
    clear = np.isfinite(values).all(axis=1)
    order = np.argsort(~clear, axis=0, kind="stable")
    times = np.take(days, order)
    count = clear.sum(axis=0, dtype=np.int32)
    compact = np.take_along_axis(values, order[:, None], axis=0)
    there = np.arange(len(days))[:, None] < count[None]
    return times, np.where(there[:, None], compact, np.float32(0)), count


def _rows(time_N: jax.Array, harmonics: int) -> jax.Array:
    """Return the row of the design matrix of a time, (P, …): one, trend, and cosine and sine of each harmonic."""
    turn = (2.0 * np.pi / YEAR) * time_N
    parts = [jnp.ones_like(time_N), time_N / YEAR]
    for number in range(1, harmonics + 1):
        parts += [jnp.cos(number * turn), jnp.sin(number * turn)]
    return jnp.stack(parts)


@functools.partial(jax.jit, static_argnames="model")
def _follow(
    time_TN: jax.Array, y_TBN: jax.Array, count_N: jax.Array, limits: jax.Array, *, model: HarmonicModel
) -> tuple[jax.Array, ...]:
    steps, bands, pixels = y_TBN.shape
    p, consecutive, first = model.coefficients, model.consecutive, max(model.first, 2 * model.coefficients)
    at_T = jnp.arange(steps)
    # the spread between neighbouring observations bounds that of the model from below, as in COLD
    apart_TBN = jnp.where((at_T[1:, None] < count_N)[:, None], jnp.abs(y_TBN[1:] - y_TBN[:-1]), jnp.nan)
    floor_BN = jnp.nan_to_num(jnp.nanmedian(apart_TBN, axis=0))
    floor_BN = jnp.maximum(floor_BN, 1e-6)
    x_TPN = jnp.moveaxis(_rows(time_TN, model.harmonics), 0, 1)
    room = ((0, consecutive), (0, 0), (0, 0))
    x_more, y_more = jnp.pad(x_TPN, room), jnp.pad(y_TBN, room)
    window = min(_WINDOW, steps)

    def begin(state: dict[str, Any], i: jax.Array) -> dict[str, Any]:
        """Fit the first model of pixels that have none, and enough observations up to number i."""
        lowest = jnp.clip(i + 1 - window, 0, steps - window)
        x_WPN = jax.lax.dynamic_slice_in_dim(x_TPN, lowest, window)
        y_WBN = jax.lax.dynamic_slice_in_dim(y_TBN, lowest, window)
        at_W = lowest + jnp.arange(window)
        inside_WN = (at_W[:, None] >= state["start"]) & (at_W[:, None] <= i) & (i < count_N)
        inside_WN = inside_WN.astype(jnp.float32)
        weight_WN = inside_WN

        def solve(weight_WN: jax.Array) -> tuple[jax.Array, jax.Array]:
            normal = (x_WPN[:, :, None] * x_WPN[:, None] * weight_WN[:, None, None]).sum(axis=0) + _RIDGE * jnp.eye(p)[
                :, :, None
            ]
            inverse = _invert(normal)
            right = (x_WPN[:, :, None] * y_WBN[:, None] * weight_WN[:, None, None]).sum(axis=0)
            return inverse, (inverse[:, :, None] * right[None]).sum(axis=1)

        def again(_: jax.Array, weight_WN: jax.Array) -> jax.Array:
            _, coefficients = solve(weight_WN)
            off_WBN = (y_WBN - _predict(x_WPN, coefficients)) / floor_BN
            far_WN = jnp.sqrt(jnp.square(off_WBN).mean(axis=1)) / _BISQUARE
            found_WN: jax.Array = inside_WN * jnp.square(jnp.maximum(1.0 - jnp.square(far_WN), 0.0))
            return found_WN

        weight_WN = jax.lax.fori_loop(0, 4, again, weight_WN)
        kept_WN = (weight_WN > 0).astype(jnp.float32)
        inverse, coefficients = solve(kept_WN)
        number_N = kept_WN.sum(axis=0)
        off_WBN = (y_WBN - _predict(x_WPN, coefficients)) * kept_WN[:, None]
        squares_BN = jnp.square(off_WBN).sum(axis=0)
        spread_BN = jnp.maximum(jnp.sqrt(squares_BN / jnp.maximum(number_N - p, 1.0)), floor_BN)
        # stable: neither the ends nor the trend of the window deviate
        least_N = jnp.where(kept_WN > 0, at_W[:, None], steps).min(axis=0) - lowest
        last_N = jnp.where(kept_WN > 0, at_W[:, None], -1).max(axis=0) - lowest
        ends = [
            jnp.take_along_axis(off_WBN, jnp.clip(end_N, 0, window - 1)[None, None], axis=0)[0]
            for end_N in (least_N, last_N)
        ]
        years_N = (time_TN[i] - _pick(time_TN, state["start"])) / YEAR
        unstable_BN = (jnp.abs(ends[0]) + jnp.abs(ends[1]) + jnp.abs(coefficients[1]) * years_N) / (3.0 * spread_BN)
        whole_N = (number_N >= first) & (years_N * YEAR >= model_span) & ~state["ready"] & (i < count_N)
        stable_N = jnp.square(unstable_BN).sum(axis=0) < limits[0]
        chosen_N = whole_N & stable_N
        return {
            **state,
            "ready": state["ready"] | chosen_N,
            "fitted": state["fitted"] | chosen_N,
            "fresh": chosen_N,
            "start": jnp.where(whole_N & ~stable_N, state["start"] + 1, state["start"]),
            "inverse": jnp.where(chosen_N, inverse, state["inverse"]),
            "coefficients": jnp.where(chosen_N, coefficients, state["coefficients"]),
            "squares": jnp.where(chosen_N, squares_BN, state["squares"]),
            "number": jnp.where(chosen_N, number_N, state["number"]),
        }

    def step(state: dict[str, Any], i: jax.Array) -> tuple[dict[str, Any], None]:
        state = {**state, "fresh": jnp.zeros(pixels, bool)}
        # most steps have no pixel to begin with
        waits_N = ~state["ready"] & (i + 1 - state["start"] >= first) & (i < count_N)
        state = jax.lax.cond(waits_N.any(), lambda s: begin(s, i), lambda s: s, state)
        follows_N = state["ready"] & ~state["fresh"] & (i < count_N)
        x_CPN = jax.lax.dynamic_slice_in_dim(x_more, i, consecutive)
        y_CBN = jax.lax.dynamic_slice_in_dim(y_more, i, consecutive)
        predicted_CBN = _predict(x_CPN, state["coefficients"])
        off_CBN = y_CBN - predicted_CBN
        model_BN = jnp.sqrt(state["squares"] / jnp.maximum(state["number"] - p, 1.0))
        spread_BN = jnp.maximum(model_BN, floor_BN)
        # a prediction is as uncertain as its observation and its coefficients together
        gain_CPN = (state["inverse"][None] * x_CPN[:, None]).sum(axis=2)
        widening_CN = jnp.sqrt(1.0 + (x_CPN * gain_CPN).sum(axis=1))
        scaled_CBN = off_CBN / (spread_BN * widening_CN[:, None])
        far_CN = jnp.square(scaled_CBN).sum(axis=1)
        # directions alone: one missed cloud, many times as far off as the others, must not turn their mean
        unit_CBN = scaled_CBN / jnp.maximum(jnp.sqrt(far_CN), 1e-12)[:, None]
        mean_BN = unit_CBN.mean(axis=0)
        mean_BN = mean_BN / jnp.maximum(jnp.sqrt(jnp.square(mean_BN).sum(axis=0)), 1e-12)
        along_CN = (unit_CBN * mean_BN).sum(axis=1)
        broken_N = follows_N & (i + consecutive <= count_N) & (far_CN > limits[0]).all(axis=0)
        broken_N = broken_N & (along_CN.mean(axis=0) > _COS_45)
        keep_N = follows_N & ~broken_N & (far_CN[0] <= limits[1])
        state = _refine(state, x_CPN[0], off_CBN[0], keep_N)
        return jax.lax.cond(
            broken_N.any(), lambda s: note(s, i, broken_N, off_CBN, predicted_CBN[0], far_CN), lambda s: s, state
        ), None

    def note(
        state: dict[str, Any], i: jax.Array, broken_N: jax.Array, off_CBN: jax.Array, predicted_BN: jax.Array,
        far_CN: jax.Array,
    ) -> dict[str, Any]:  # fmt: skip
        """Record the breaks of a step, after which these pixels start again."""
        slot_KN = (jnp.arange(model.most)[:, None] == state["count"]) & broken_N
        return {
            **state,
            "ready": state["ready"] & ~broken_N,
            "start": jnp.where(broken_N, i, state["start"]),
            "count": state["count"] + broken_N.astype(jnp.int32),
            "day": jnp.where(slot_KN, time_TN[i], state["day"]),
            "change": jnp.where(slot_KN[:, None], jnp.median(off_CBN, axis=0), state["change"]),
            "before": jnp.where(slot_KN[:, None], predicted_BN, state["before"]),
            "magnitude": jnp.where(slot_KN, jnp.sqrt(jnp.median(far_CN, axis=0)), state["magnitude"]),
        }

    model_span = jnp.float32(YEAR * 0.95)
    empty_K = jnp.full((model.most, pixels), jnp.nan, jnp.float32)
    state = {
        "ready": jnp.zeros(pixels, bool), "fitted": jnp.zeros(pixels, bool), "fresh": jnp.zeros(pixels, bool),
        "start": jnp.zeros(pixels, jnp.int32), "count": jnp.zeros(pixels, jnp.int32),
        "inverse": jnp.zeros((p, p, pixels), jnp.float32), "coefficients": jnp.zeros((p, bands, pixels), jnp.float32),
        "squares": jnp.zeros((bands, pixels), jnp.float32), "number": jnp.zeros(pixels, jnp.float32),
        "day": empty_K, "magnitude": empty_K,
        "change": jnp.full((model.most, bands, pixels), jnp.nan, jnp.float32),
        "before": jnp.full((model.most, bands, pixels), jnp.nan, jnp.float32),
    }  # fmt: skip
    state, _ = jax.lax.scan(step, state, jnp.arange(steps, dtype=jnp.int32))
    names = ("day", "change", "before", "magnitude", "count", "fitted")
    return (*(state[name] for name in names), count_N)


def _refine(state: dict[str, Any], x_PN: jax.Array, off_BN: jax.Array, keep_N: jax.Array) -> dict[str, Any]:
    """Take one observation into the models of the pixels that keep it, by recursive least squares."""
    gain_PN = (state["inverse"] * x_PN[None]).sum(axis=1)
    scale_N = 1.0 + (x_PN * gain_PN).sum(axis=0)
    inverse = state["inverse"] - gain_PN[:, None] * gain_PN[None] / scale_N
    coefficients = state["coefficients"] + gain_PN[:, None] * off_BN[None] / scale_N
    return {
        **state,
        "inverse": jnp.where(keep_N, inverse, state["inverse"]),
        "coefficients": jnp.where(keep_N, coefficients, state["coefficients"]),
        "squares": jnp.where(keep_N, state["squares"] + jnp.square(off_BN) / scale_N, state["squares"]),
        "number": state["number"] + keep_N.astype(jnp.float32),
    }


def _invert(matrix_PPN: jax.Array) -> jax.Array:
    """Invert symmetric positive matrices, all pixels at once (Gauss and Jordan, without exchange of rows)."""
    size = matrix_PPN.shape[0]
    wide = jnp.concatenate([matrix_PPN, jnp.broadcast_to(jnp.eye(size)[:, :, None], matrix_PPN.shape)], axis=1)
    for k in range(size):
        row = wide[k] / wide[k, k]
        wide = (wide - wide[:, k][:, None] * row[None]).at[k].set(row)
    return wide[:, size:]


def _predict(x_TPN: jax.Array, coefficients_PBN: jax.Array) -> jax.Array:
    """Return the model at some times, (T, B, N)."""
    # products and a sum along an axis become one loop over pixels, where a product of matrices would make one for each
    return (x_TPN[:, :, None] * coefficients_PBN[None]).sum(axis=1)


def _pick(time_TN: jax.Array, at_N: jax.Array) -> jax.Array:
    return jnp.take_along_axis(time_TN, at_N[None], axis=0)[0]
