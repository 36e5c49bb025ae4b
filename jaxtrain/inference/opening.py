"""`open_scene` opens a run and a cube together, and describes the map of them, its shards and their origin.

The network is only read where shards are missing (`OpenScene.scene`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax

from jaxtrain.config import MeshConfig
from jaxtrain.data.mismatch import check_pixels
from jaxtrain.data.modality_reader import ModalityReader, hide
from jaxtrain.data.modality_source import open_sources
from jaxtrain.data.numbers import convert_to, cube_numbers, unlike_training
from jaxtrain.data.reader import WindowReader, series_dates
from jaxtrain.evaluation.scores import restore_model
from jaxtrain.inference.field import image_stride, receptive_radius
from jaxtrain.inference.filling import Scene
from jaxtrain.inference.lattice import Lattice
from jaxtrain.inference.layers import MapLayers
from jaxtrain.inference.making import digest_of
from jaxtrain.inference.options import MapOptions
from jaxtrain.inference.seen import anything_seen
from jaxtrain.learn.state import Program, TrainState
from jaxtrain.learn.step import make_predict_step
from jaxtrain.parallel.heap import keep_freed_memory
from jaxtrain.parallel.mesh import processor_parts, share_cores, split_processor
from jaxtrain.runs.checkpoint import CheckpointStore
from jaxtrain.runs.rundir import ModelCard, inference_program, load_card, program_of
from zarr_store.errors import InvalidInput, NothingFound
from zarr_store.index import TrainingIndex
from zarr_store.ledger import LedgerRow, ShardIndex
from zarr_store.read import Cube, open_cube
from zarr_store.regions import Region
from zarr_store.spec import CubeSpec

__all__ = ["OpenScene", "open_scene", "share_processor"]


_NOT_IN_PIXELS = ("time", "devices", "allow_mismatch")
"""Options that do not change the pixels of a date: how numbers are converted is in the identity of a map by itself."""
_BATCHES = 2
"""Version of the rule by which windows are put into batches, on which the last digit of an answer may depend."""
_CACHE_BYTES = 32 << 20
"""Decoded chunks that are kept: two rows of chunks across a shard; a chunk is needed again for the next row only."""


@dataclass(frozen=True)
class OpenScene:
    """A run and a cube, and the map that they give.

    Attributes:
        run: The run directory.
        card: Its model.
        cube: The open cube.
        spec: The collection that is mapped.
        index: Counts of its chunks.
        reader: Reads windows.
        program, state, step: The network and the step of its checkpoint.
        options: Options of the map.
        kind: Layers of the map.
        lattice: Places of windows and shards.
        groups: Dates of each map: one group of all, or a group for each date.
        model: Digest of the checkpoint.
        warnings: Warnings about limits of the map.
    """

    run: Path
    card: ModelCard
    cube: Cube
    spec: CubeSpec
    index: TrainingIndex
    reader: WindowReader | ModalityReader
    program: Program
    state: TrainState
    step: int
    options: MapOptions
    kind: MapLayers
    lattice: Lattice
    groups: tuple[tuple[int, ...], ...]
    model: str
    warnings: tuple[str, ...]

    def scene(self) -> Scene:
        """Return the scene that fills shards."""
        return Scene(
            self.card, self.spec, self.index, self.reader, self.program, make_predict_step(self.program), self.state,
            self.options, self.kind, self.lattice, self.groups,
        )  # fmt: skip

    @property
    def dates(self) -> tuple[str, ...]:
        """Dates that the map is made of."""
        return tuple(self.spec.times[t + i] for group in self.groups for t in group for i in range(self.series))

    @property
    def series(self) -> int:
        """Dates of the collection that gives the windows at which the network looks at once."""
        return self.reader.dates if isinstance(self.reader, WindowReader) else 1

    @property
    def times(self) -> tuple[str, ...]:
        """Dates along the axis `time`, of a series its last one; none without that axis."""
        if self.options.dates != "each":
            return ()
        return tuple(self.spec.times[group[0] + self.series - 1] for group in self.groups)

    @cached_property
    def identity(self) -> str:
        """Digest of all that determines the map except its dates and what the cube holds."""
        options = {name: value for name, value in self.options.to_dict().items() if name not in _NOT_IN_PIXELS}
        return digest_of({
            "model": self.model, "options": options, "grid": self.spec.grid.to_dict(), "bands": list(self.card.bands),
            "collection": self.card.config.data.collection, "shard": self.lattice.shard,
            "conversion": _converted(self.reader),
        })  # fmt: skip

    @property
    def attributes(self) -> dict[str, Any]:
        """Origin of the map."""
        return {
            "run": str(self.run.absolute()),
            "step": self.step,
            "cube": self.cube.url,
            "collection": self.card.config.data.collection,
            "dates": self.dates,
            "bands": self.card.bands,
            "method": self.options.method,
            "joined": self.options.dates,
            "made_with": self.identity,
            **({"modalities": self.kind.modalities, "without": self.options.without} if self.card.modalities else {}),
        }

    @property
    def stated(self) -> dict[str, Any]:
        """Attributes as an opened map has them."""
        scale = {} if self.kind.scale is None else {"scale": list(self.kind.scale)}
        stated: dict[str, Any] = json.loads(json.dumps({**self.attributes, **scale}))
        return stated

    @cached_property
    def plan(self) -> dict[str, Any]:
        """Description of the map to make, as JSON, for processes that help and for a run that continues."""
        plan = {
            "run": str(self.run.absolute()), "cube": self.cube.url, "options": self.options.to_dict(),
            "layers": list(self.kind.names), "dated": bool(self.times), "shards": len(self.shards),
            "attributes": self.stated, "times": list(self.times),
            "grid": self.spec.grid.to_dict(), "side": self.lattice.shard,
        }  # fmt: skip
        # not in the digest, which a process with accelerators finds, too
        return {**plan, "digest": digest_of(plan), "parts": processor_parts(), "batches": _BATCHES}

    @cached_property
    def shards(self) -> dict[ShardIndex, Region]:
        """Region of each shard of the map."""
        return self.lattice.shards(len(self.groups))

    @cached_property
    def keys(self) -> dict[ShardIndex, str]:
        """Digest of all that determines the pixels of each shard: model, options, and the shards of the cube."""
        times = self.spec.layout.shard[0]
        if isinstance(self.reader, ModalityReader):
            everything = [source.digest for source in self.reader.sources]
            return {
                index: digest_of([self.identity, [self.spec.times[t] for t in self.groups[index[0]]],
                                  region.to_list()[2:], everything])
                for index, region in self.shards.items()
            }  # fmt: skip
        by_time: dict[int, list[tuple[Region, str]]] = {}
        for row in self.cube.ledger(self.card.config.data.collection).rows().values():
            by_time.setdefault(row.index[0], []).append((row.region, _made_of(row)))
        height, width = self.lattice.window
        keys = {}
        for index, region in self.shards.items():
            group = self.groups[index[0]]
            dates = [t + i for t in group for i in range(self.series)]
            sources = [
                made
                for time in sorted({t // times for t in dates})
                for there, made in by_time.get(time, ())
                if there.y0 < region.y1 + height and there.y1 > region.y0 - height
                and there.x0 < region.x1 + width and there.x1 > region.x0 - width
            ]  # fmt: skip
            keys[index] = digest_of([self.identity, [self.spec.times[t] for t in dates], region.to_list()[2:], sources])
        return keys


def _converted(reader: WindowReader | ModalityReader) -> Any:
    """Return how stored numbers are converted, as JSON."""
    if isinstance(reader, ModalityReader):
        return [None if one.conversion is None else [one.conversion.gain, one.conversion.shift]
                for one in reader.sources]  # fmt: skip
    return None if reader.conversion is None else [reader.conversion.gain, reader.conversion.shift]


def _made_of(row: LedgerRow) -> str:
    return digest_of([list(row.index), row.key, row.state, row.checksums or {}])


def open_scene(run: Path, cube: str | Path, options: MapOptions) -> OpenScene:
    """Open a run and a cube for a map.

    Raises:
        InvalidInput: The run makes no maps, or the options do not fit it or the cube.
        NothingFound: Nothing was observed on the dates.
        UnknownName: The cube lacks the collection, a band or the date.
    """
    card = load_card(run)
    if card.grid is None:
        raise InvalidInput(
            f"{run} was trained on a sample store and predicts for whole images, so it makes no map; "
            "evaluate it on another store with `terrashard evaluate --data STORE`"
        )
    opened = open_cube(cube, cache_bytes=_CACHE_BYTES)
    config = card.config.data
    spec = opened.spec(config.collection)
    other_pixels = check_pixels(spec.grid, card.grid, opened.url, insist=options.allow_mismatch)
    patch = config.patch
    overlap = patch // 4 if options.overlap is None else options.overlap
    if not 0 <= overlap <= patch // 2:
        raise InvalidInput(f"overlap {overlap} must be between 0 and half a patch ({patch // 2} pixels)")
    series = series_dates(config, spec)
    groups = _groups(run, spec, series, options)
    index = opened.index(config.collection)
    kind = _layers(card, options)
    height, width = spec.grid.shape
    if options.method == "blend" and patch > min(height, width):
        raise InvalidInput(
            f"the cube's grid of {height}×{width} pixels is smaller than the model's patch {patch}; train with a "
            "smaller data.patch, or use --exact"
        )
    program, state, step, passed_over = restore_model(run, card, _program(card, options))
    lattice = _lattice(run, card, spec, options, overlap, kind, program, state)
    reader, notes = _open_reader(card, opened, spec, index, lattice, series, options)
    warnings = [*passed_over, *notes, *other_pixels]
    absent = int((~index.present).sum())
    if absent and not card.modalities:
        warnings.append(f"{absent} of {index.present.size} chunks of {opened.url} were never written: no data there")
    found = OpenScene(
        run, card, opened, spec, index, reader, program, state, step, options, kind, lattice, groups,
        CheckpointStore(run / "checkpoints").digest(step), tuple(warnings),
    )  # fmt: skip
    if not anything_seen(reader, index, [t for group in groups for t in group]):
        raise NothingFound(f"{opened.url} has nothing observed on {len(found.dates)} dates; is the ingest complete?")
    return replace(found, options=replace(options, overlap=overlap if options.method == "blend" else None))


def _open_reader(
    card: ModelCard,
    cube: Cube,
    spec: CubeSpec,
    index: TrainingIndex,
    lattice: Lattice,
    series: int,
    options: MapOptions,
) -> tuple[WindowReader | ModalityReader, list[str]]:
    """Open the reader of the windows; return it with lines about numbers that are converted or unusual."""
    config = card.config.data
    if card.modalities:
        sources, notes = open_sources(
            config, cube, trained=card.modalities, numbers=card.numbers, usual=(card.mean, card.std),
            without=options.without, insist=options.allow_mismatch,
        )  # fmt: skip
        several: ModalityReader = hide(ModalityReader(sources, max(lattice.window)), options.without)
        return several, notes
    bands = spec.find_bands(card.bands)
    conversion, notes = convert_to(card.numbers, cube_numbers(spec, bands), cube.url,
                                   insist=options.allow_mismatch)  # fmt: skip
    reader = WindowReader(cube, config.collection, bands, max(lattice.window), config.learn_masked, index=index,
                          lenient=True, dates=series, conversion=conversion)  # fmt: skip
    hide(reader, options.without)
    return reader, [*notes, *unlike_training(card.mean, card.std, index, bands, conversion, cube.url)]


def _groups(run: Path, spec: CubeSpec, series: int, options: MapOptions) -> tuple[tuple[int, ...], ...]:
    """Return the dates, or first dates of series, that each map is made of."""
    if series > 1:
        if options.time is not None:
            raise InvalidInput(f"{run} looks at {series} dates at once, so --time does not apply: leave it out")
        dates: Sequence[int] = range(0, len(spec.times) - series + 1, series)
    else:
        dates = range(len(spec.times)) if options.time is None else (spec.find_time(options.time),)
    return tuple((date,) for date in dates) if options.dates == "each" else (tuple(dates),)


def _layers(card: ModelCard, options: MapOptions) -> MapLayers:
    task = card.task
    if task.values and options.dates == "majority":
        raise InvalidInput("values have no majority: map their mean over dates, or each date")
    scale = None
    if options.scaled:
        mean, std = task.value or (0.0, 1.0)
        scale = MapLayers.scale_for(mean, std)
    return MapLayers(len(card.classes), task.values, options.probabilities, options.entropy, scale,
                     tuple(one.name for one in card.modalities))  # fmt: skip


def _program(card: ModelCard, options: MapOptions) -> Program:
    """Return the network on its devices: those of the run, if they are here, or as many as were asked for."""
    if options.devices is not None:
        return program_of(card, _on_mesh(card, options.devices), jax.local_devices())
    parts = processor_parts()
    if parts > 1 and may_share(card):
        return program_of(card, _on_mesh(card, parts))
    program = inference_program(card)
    if options.method == "exact" and set(program.mesh.shape.values()) != {1, int(program.mesh.shape["data"])}:
        # where images or the network are split, windows must have the size of training
        return program_of(card, _on_mesh(card, 1))
    return program


def share_processor(run: Path, devices: int | None) -> None:
    """Split the processor into a device for each core, or into as many as were asked for; nothing on accelerators.

    XLA leaves a part of the cores idle where it computes on one device. Call it before anything touches a device. The
    last digit of an answer depends on the number, so all processes of a map use that of the first one.

    Args:
        run: The run directory.
        devices: Number of devices that was asked for.
    """
    keep_freed_memory()
    card = load_card(run)
    if devices is not None:
        split_processor(devices)
    elif may_share(card):
        share_cores(card.config.model_copy(update={"mesh": MeshConfig()}))


def may_share(card: ModelCard) -> bool:
    """Return whether a network may be placed on another number of devices: neither it nor its images are split."""
    mesh = card.config.mesh
    return mesh.size == mesh.data and card.config.model.norm != "local"


def _on_mesh(card: ModelCard, devices: int) -> Any:
    return card.config.model_copy(update={"mesh": MeshConfig(data=devices, model=1)})


def _lattice(
    run: Path,
    card: ModelCard,
    spec: CubeSpec,
    options: MapOptions,
    overlap: int,
    kind: MapLayers,
    program: Program,
    state: TrainState,
) -> Lattice:
    patch, devices = card.config.data.patch, int(program.mesh.shape["data"])
    batch = -(-card.config.run.batch_size // devices) * devices
    votes = options.dates == "majority"
    if options.method == "blend":
        ratio = math.lcm(*(one.ratio for one in card.modalities))
        return Lattice.blended(spec.grid.shape, patch, overlap, batch, kind, votes=votes, stride=ratio)
    if card.modalities:
        raise InvalidInput(
            f"--exact: {run} has several modalities, and how far each is looked at is not known: use --blend"
        )
    stride = image_stride(program)
    radius = receptive_radius(program, state, stride)
    if radius is None:
        norm = card.config.model.norm
        raise InvalidInput(
            f"--exact: each answer of {run} depends on the whole window"
            + (f", because its norms (model.norm = {norm!r}) take their mean over it" if norm == "group" else "")
            + ", so no window gives what the whole scene would: use --blend, or train with model.norm = 'batch'"
        )
    lattice = Lattice.exact(spec.grid.shape, radius, stride, patch, batch, devices, kind, votes=votes)
    if card.config.model.turns and lattice.window[0] != lattice.window[1]:
        raise InvalidInput(
            f"--exact: {run} turns its images (model.turns), which must be squares, and the scene of "
            f"{spec.grid.shape[0]}×{spec.grid.shape[1]} pixels is narrower than a window of {max(lattice.window)}; use "
            "--blend"
        )
    return lattice
