"""Eight fake CPU devices, strict dtype promotion, and one small task that the training tests share."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

FLAG = "--xla_force_host_platform_device_count"
if FLAG not in os.environ.get("XLA_FLAGS", ""):  # read when JAX first looks for devices, so it must be set before that
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}=8".strip()

import jax  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import pytest  # noqa: E402
from jax._src import compilation_cache  # noqa: E402
from jax._src.config import compilation_cache_dir  # noqa: E402

from jaxtrain.config import TrainConfig  # noqa: E402
from jaxtrain.learn.state import Program, TrainState, build_program  # noqa: E402
from jaxtrain.learn.step import TrainStep, make_train_step  # noqa: E402
from jaxtrain.parallel.mesh import make_mesh  # noqa: E402

MOST_LOADED = 64
"""Compiled programs that a process keeps at hand, beside those that are in use."""


def load_once() -> None:
    """A program that this process has compiled or loaded is not read from its file again, which takes 50 ms each time.

    Only programs in the folder of all tests: a test with a folder of its own looks at what is in there.
    """
    read, write = compilation_cache.get_executable_and_time, compilation_cache.put_executable_and_time
    loaded: OrderedDict[str, Any] = OrderedDict()  # threads of a test may use it
    folder = os.environ["JAX_COMPILATION_CACHE_DIR"]

    def keep(key: str, program: Any, seconds: Any) -> None:
        loaded[key] = (program, seconds)
        while len(loaded) > MOST_LOADED:
            loaded.popitem(last=False)

    def get(cache_key: str, compile_options: Any, backend: Any, executable_devices: Any) -> tuple[Any, int | None]:
        if compilation_cache_dir.value != folder:
            return read(cache_key, compile_options, backend, executable_devices)
        found = loaded.get(cache_key)
        if found is None:
            found = read(cache_key, compile_options, backend, executable_devices)
            if found[0] is not None:
                keep(cache_key, *found)
        return found

    def put(cache_key: str, module_name: str, executable: Any, backend: Any, compile_time: int) -> None:
        write(cache_key, module_name, executable, backend, compile_time)
        if compilation_cache_dir.value == folder:
            keep(cache_key, executable, compile_time)

    compilation_cache.get_executable_and_time, compilation_cache.put_executable_and_time = get, put


load_once()

CHANNELS, CLASSES, SIDE, BATCH, STEPS = 3, 4, 32, 8, 5
MEAN, STD = np.full(CHANNELS, 2500.0), np.full(CHANNELS, 1400.0)


@pytest.fixture(autouse=True)
def _strict_promotion() -> Iterator[None]:
    """A silent cast to another float type is an error."""
    with jax.numpy_dtype_promotion("strict"):
        yield


PAINTED = ("test_report.py", "models", "test_api.py", "test_cubes.py", "test_samples.py")
"""Folders and files whose tests look at reports with their figures, of classes, values, images, series and cubes."""


@pytest.fixture(autouse=True)
def _figures_are_not_painted(request: pytest.FixtureRequest) -> None:
    if not set(request.path.parts).intersection(PAINTED):
        request.getfixturevalue("figures_unpainted")


@pytest.fixture
def shared_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings of this test that have the settings of an earlier one are not compiled again."""
    from .cube_factory import share_programs

    share_programs(monkeypatch)


@pytest.fixture(scope="session", autouse=True)
def _eight_devices() -> None:
    assert jax.device_count() == 8, f"these tests need 8 fake devices: {FLAG}=8 was set too late"


@pytest.fixture(scope="session")
def config_of() -> Callable[..., TrainConfig]:
    """A small configuration; sections are merged over it."""

    def config(data_axis: int = 1, model_axis: int = 1, /, **sections: dict[str, Any]) -> TrainConfig:
        base: dict[str, dict[str, Any]] = {
            "data": {"cube": "none.zarr", "patch": SIDE},
            "model": {"width": 8, "depth": 1},
            "optim": {"warmup_steps": 0, "clip_norm": None, "learning_rate": 0.01},
            "mesh": {"data": data_axis, "model": model_axis},
            "run": {"batch_size": BATCH, "steps": 40},
        }
        return TrainConfig.model_validate({name: {**base[name], **sections.get(name, {})} for name in base})

    return config


@pytest.fixture(scope="session")
def program_of(config_of: Callable[..., TrainConfig]) -> Callable[..., Program]:
    """The program of such a configuration on its mesh."""

    def program(
        data_axis: int = 1, model_axis: int = 1, /, *, class_weights: Any = None, **sections: dict[str, Any]
    ) -> Program:
        config = config_of(data_axis, model_axis, **sections)
        return build_program(
            config,
            channels=CHANNELS,
            classes=CLASSES,
            mesh=make_mesh(config.mesh),
            mean=MEAN,
            std=STD,
            class_weights=class_weights,
        )

    return program


@pytest.fixture(scope="session")
def batch() -> dict[str, np.ndarray]:
    return make_batch()


class Run(NamedTuple):
    """A few steps on one mesh; compiled once for all tests."""

    program: Program
    state: TrainState
    step: TrainStep
    metrics: list[dict[str, float]]
    gradient: Any


@pytest.fixture(scope="session")
def run_of(program_of: Callable[..., Program], batch: dict[str, np.ndarray]) -> Callable[..., Run]:
    """Five steps on a mesh: metrics of each, the first gradient, the last parameters."""

    @cache
    def run(data: int, model: int) -> Run:
        program = program_of(data, model, model={"width": 8, "depth": 1, "dropout": 0.1})
        step = make_train_step(program)
        state = program.init(jax.random.key(0))
        metrics, gradient = [], None
        for index in range(STEPS):
            state, row = step(state, batch, key=jax.random.fold_in(jax.random.key(1), index))
            metrics.append({name: float(value) for name, value in row.items()})
            if gradient is None:  # Adam's first moment after one step is 0.1 of the gradient
                gradient = jax.tree.map(lambda mu: np.asarray(mu) * 10, optax.tree.get(state.opt_state, "mu"))
        return Run(program, state, step, metrics, gradient)

    return run


@cache
def make_batch() -> dict[str, np.ndarray]:
    """Blocks of four classes with their own spectra; labels are spread unevenly over the samples."""
    rng = np.random.default_rng(5)
    coarse = rng.integers(0, CLASSES, (BATCH, SIDE // 8, SIDE // 8))
    label = coarse.repeat(8, axis=1).repeat(8, axis=2).astype(np.uint8)
    spectra = rng.integers(500, 4500, (CLASSES, CHANNELS))
    image = (spectra[label] + rng.normal(0, 150, (*label.shape, CHANNELS))).clip(1, 65535).astype(np.uint16)
    observed = rng.random(label.shape) > 0.1
    image[~observed] = 0
    label[rng.random(label.shape) < np.linspace(0, 0.95, BATCH)[:, None, None]] = 255
    label[-1] = 255  # a sample, and on eight devices a device, without any label
    return {"image": np.moveaxis(image, -1, 1), "label": label, "observed": observed}
