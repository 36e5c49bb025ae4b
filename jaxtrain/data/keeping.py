"""`choose_keeping` decides where the training data are kept between epochs: on the devices, on the host, or nowhere."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np

from jaxtrain.config import TrainConfig
from jaxtrain.data.arrays import Reader, Rows
from jaxtrain.data.kept import KeptReader
from jaxtrain.data.room import free_bytes, free_device_bytes
from jaxtrain.data.splits import Part
from jaxtrain.data.windows import Windows
from jaxtrain.parallel.rendezvous import LOCAL_COUNT, read_number
from zarr_store.errors import IntegrityError, InvalidInput

__all__ = ["Keeping", "choose_keeping", "keep_on_host"]

_DEVICE_SHARE = 0.3
"""Part of the free memory of a device that the data may fill by themselves; activations and moments need the rest."""
_HOST_SHARE = 0.25
"""Part of the free memory of a host that the data of its processes may fill by themselves."""


@dataclass(frozen=True)
class Keeping:
    """The place where rows are kept after they were read, with its size and the reason.

    Attributes:
        place: `device`, `host` or `none`.
        nbytes: Bytes of the rows of the training part.
        why: The reason, for people.
    """

    place: Literal["device", "host", "none"]
    nbytes: int
    why: str

    @property
    def told(self) -> str:
        """End of the line that describes a run; empty where nothing is kept."""
        where = {"device": "on each device", "host": "in memory"}.get(self.place)
        megabytes = self.nbytes / 1e6
        size = f"{megabytes:,.0f}" if megabytes >= 10 else f"{megabytes:.1f}"
        return "" if where is None else f"; {size} MB of training data are kept {where}"


def choose_keeping(
    config: TrainConfig,
    reader: Reader,
    rows: Rows,
    mesh: jax.sharding.Mesh,
    *,
    host_free: int | None = None,
    device_free: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> Keeping:
    """Decide where the rows of the training part are kept.

    `auto` keeps rows that the run reads more than once, on the devices if they fill at most 30 % of what is free there,
    else on the host if they fill at most 25 %. A processor has no memory of its own, so there it is the host.

    Args:
        config: The run; `data.cache` is what is asked for.
        reader: Reads rows.
        rows: int32 (N, columns), the rows of the training part.
        mesh: Devices of the run.
        host_free: Free bytes of the host; None to look.
        device_free: Free bytes of the fullest device; None to look.
        environment: Replaces `os.environ`, which may say how many processes this host has.

    Raises:
        InvalidInput: `device` is asked for, and the data do not fit there, or the run consists of unequal replicas.
    """
    asked, run = config.data.cache, config.run
    if asked == "none":
        return Keeping("none", 0, "data.cache = 'none'")
    if asked == "device" and config.hetero.enabled:
        raise InvalidInput(
            "data.cache = 'device', but unequal replicas read the chunks that they are given: use 'host' or 'auto'"
        )
    try:
        sample = reader.read(rows[:1])
    except IntegrityError:  # it is met again in training, where the run's policy holds
        return Keeping("none", 0, "the first window cannot be read")
    nbytes = len(rows) * sum(int(array.nbytes) for array in sample.values())
    there = free_device_bytes(mesh.local_devices) if device_free is None else device_free
    if asked == "device":
        if there is not None and nbytes > there:
            raise InvalidInput(
                f"data.cache = 'device': the training data need {nbytes / 1e9:.1f} GB on each device, and "
                f"{there / 1e9:.1f} GB are free: use 'host' or 'auto'"
            )
        return Keeping("device", nbytes, "data.cache = 'device'")
    if asked == "host":
        return Keeping("host", nbytes, "data.cache = 'host'")
    if run.steps * run.batch_size <= len(rows):
        return Keeping("none", nbytes, "nothing is read twice")
    # every process must decide alike, and may see other devices: only an accelerator of one process is filled by itself
    if there is not None and jax.process_count() == 1 and not config.hetero.enabled and nbytes <= _DEVICE_SHARE * there:
        return Keeping("device", nbytes, "read more than once, and it fits the devices")
    free = free_bytes() if host_free is None else host_free
    processes = read_number(LOCAL_COUNT, os.environ if environment is None else environment) or 1
    if free is not None and nbytes * processes <= _HOST_SHARE * free:
        return Keeping("host", nbytes, "read more than once, and it fits the host")
    return Keeping("none", nbytes, "it does not fit")


def keep_on_host(keeping: Keeping, reader: Reader, parts: Mapping[Part, Windows]) -> Reader:
    """Return a reader that keeps what is read again and again: the rows of training and validation.

    Training rows that the devices keep are not kept twice.
    """
    kept = {"host": ("train", "validation"), "device": ("validation",)}.get(keeping.place, ())
    rows = [parts[name].rows for name in kept if len(parts[name])]  # type: ignore[index]
    return KeptReader(reader, np.concatenate(rows)) if rows else reader
