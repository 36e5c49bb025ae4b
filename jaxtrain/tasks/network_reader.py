"""`NetworkReader` reads boxes of a cube through an autoencoder: the error of its reconstruction, or its code.

It takes the place of `CubeReader` in a `CubeTable`, so features of a network go the way of bands: they stream box by
box, are averaged or compared over dates, and are made on any devices, processes and Dask workers.

Windows have the size of training, lie on one lattice of the whole grid, and are blended. So no edge of a window shows,
and nothing depends on the cut into boxes.

Letters in shapes: B window, T date, F feature, H row, W column, C band, Z code.
"""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxtrain.inference.blend import taper
from jaxtrain.tasks.cube_reader import Box, CubeReader
from jaxtrain.tasks.table import Feature
from zarr_store.errors import InvalidInput
from zarr_store.read import Cube
from zarr_store.regions import Region

__all__ = ["NetworkReader", "Shows"]

Shows = Literal["residual", "code"]
"""What is read: the image less its reconstruction, in standard deviations of each band, or the code of each pixel."""


class NetworkReader:
    """Reader of the reconstruction errors or codes of a trained autoencoder on the chosen dates.

    Args:
        cube: The cube.
        run: Run directory of an autoencoder.
        shows: Which of the two is read: residual or code.
        time: Dates, ranges or positions; None for all.

    Raises:
        InvalidInput: The run is of another network, or does not fit the cube.
    """

    radar = False
    remedy = "another --run, of a network with fewer channels (model.code) or other bands"

    def __init__(self, cube: Cube, run: str | Path, shows: Shows, *, time: str | None = None) -> None:
        # tasks without a network do not load what trains one
        from jaxtrain.inference.opening import open_scene
        from jaxtrain.inference.options import MapOptions
        from jaxtrain.learn.optim import evaluation_params
        from jaxtrain.runs.rundir import load_card

        card = load_card(Path(run))
        if not card.task.rebuild or card.grid is None:
            raise InvalidInput(
                f"{run} is not a run of an autoencoder on a cube; train one (model.name = 'autoencoder' and data.cube)"
            )
        self.plain = CubeReader(cube, collection=card.config.data.collection, bands=tuple(card.bands), time=time)
        self.cube, self.spec, self.dates = cube, self.plain.spec, self.plain.dates
        self.times, self.boxes = self.plain.times, self.plain.boxes
        # one device computes a window, so the answer is the same on any number of them
        scene = open_scene(Path(run), cube.url, MapOptions(devices=1))
        self._scene = scene
        self._params = evaluation_params(scene.state.params, scene.state.opt_state)
        self.shows, self.warnings = shows, scene.warnings
        self.asked: dict[str, Any] = {"run": str(Path(run).absolute()), "shows": shows}
        self.made_by: dict[str, str] = {**self.asked, "model": scene.model}
        names = card.bands if shows == "residual" else [str(at) for at in range(card.config.model.code)]
        self.names = tuple(f"{shows} {name}" for name in names)
        side = np.maximum(taper(scene.lattice.window[0], scene.lattice.overlap), np.float32(1e-4))
        self._weight = side[:, None] * side[None, :]
        self._turn, self._lock, self._placed = itertools.count(), threading.Lock(), dict[int, Any]()
        self._compute = jax.jit(self._residual if shows == "residual" else self._code)

    @property
    def features(self) -> tuple[Feature, ...]:
        """Features that the network computes, without a date."""
        return tuple(Feature(name, "1") for name in self.names)

    def read(
        self, box: Box, dates: tuple[int, ...] | None = None
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:  # fmt: skip
        """Read one box.

        Args:
            box: Rows and columns.
            dates: Positions in the cube; None for the chosen ones.

        Returns:
            float32 (time, feature, y, x) with NaN where a pixel was not observed clear; bool (time, y, x), whether it
            was.
        """
        from jaxtrain.inference.seen import windows_seen

        wanted = self.dates if dates is None else dates
        lattice, reader = self._scene.lattice, self._scene.reader
        total = np.zeros((len(wanted), len(self.names), *box.shape), np.float32)
        weight = np.zeros((len(wanted), *box.shape), np.float32)
        clear = np.zeros(weight.shape, bool)
        places = lattice.windows(Region(0, 1, box.y0, box.y1, box.x0, box.x1), None)
        rows = np.array([(t, y, x) for y, x, _ in places for t in wanted], np.int64).reshape(-1, 3)
        rows = rows[windows_seen(reader, self._scene.index, rows, lattice.window)].astype(np.int32)
        at = {date: number for number, date in enumerate(wanted)}
        for start in range(0, len(rows), lattice.batch):
            part = rows[start : start + lattice.batch]
            filled = np.concatenate([part, np.repeat(part[-1:], lattice.batch - len(part), axis=0)])
            batch = reader.read(filled)
            made_BFHW = self._run(batch["image"], batch["observed"])
            seen_BHW = (batch["clear"] == 1) & (batch["observed"] == 1)
            for (t, y, x), made_FHW, seen_HW in zip(part.tolist(), made_BFHW, seen_BHW, strict=False):
                window = Box(y, y + lattice.window[0], x, x + lattice.window[1])
                both = Box(max(y, box.y0), min(window.y1, box.y1), max(x, box.x0), min(window.x1, box.x1))
                here, there = both.inside(window), (at[t], *both.inside(box))
                share = self._weight[here] * seen_HW[here]
                total[there[0], :, there[1], there[2]] += share * made_FHW[:, here[0], here[1]]
                weight[there] += share
                clear[there] |= seen_HW[here]
        values: npt.NDArray[np.float32] = (total / np.maximum(weight, np.float32(1e-30))[:, None]).astype(np.float32)
        values[~np.broadcast_to(clear[:, None], values.shape)] = np.nan
        return values, clear

    def bands_without_numbers(self) -> tuple[str, ...]:
        """Return the bands that hold no number anywhere."""
        return self.plain.bands_without_numbers()

    def _run(self, image: npt.NDArray[Any], observed: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        devices = jax.local_devices()
        if devices[0].platform == "cpu":  # devices of a processor share its cores, and each would compile again
            devices = devices[:1]
        number = next(self._turn) % len(devices)
        place = devices[number]
        with self._lock:
            if number not in self._placed:
                self._placed[number] = jax.device_put((self._params, self._scene.state.model_state), place)
            placed = self._placed[number]
        return np.asarray(self._compute(*placed, *jax.device_put((image, observed), place)))

    def _residual(self, params: Any, state: Any, image: jax.Array, observed: jax.Array) -> jax.Array:
        from jaxtrain.learn.step import present

        x_BHWC = present(self._scene.program, image, observed)
        given_back_BHWC, _ = self._scene.program.apply(params, state, x_BHWC, train=False)
        return jnp.moveaxis(x_BHWC - given_back_BHWC, -1, 1)

    def _code(self, params: Any, state: Any, image: jax.Array, observed: jax.Array) -> jax.Array:
        from jaxtrain.learn.step import present

        x_BHWC = present(self._scene.program, image, observed)
        code_BZHW = jnp.moveaxis(self._scene.program.embed(params, state, x_BHWC), -1, 1)
        times = x_BHWC.shape[1] // code_BZHW.shape[2]
        return jnp.repeat(jnp.repeat(code_BZHW, times, axis=2), times, axis=3)
