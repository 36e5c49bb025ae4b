"""The whole journey on a simulated world: the steps of `terrashard demo`.

Each step leaves its file in the folder. A step whose file is complete is skipped, and a step that was interrupted
continues.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.config import build, check_one_mesh, merge, override, parse_override, read_toml
from cli.session import Session
from zarr_store.errors import AccessError, CubeMismatch, InvalidInput, NotACube, UnknownName

if TYPE_CHECKING:
    from ingest.simulate import ServerHandle, SimulateConfig
    from jaxtrain.config import TrainConfig

__all__ = ["run_demo"]

BANDS = ("blue", "green", "red", "rededge2", "nir", "swir16", "swir22", "scl", "landcover")
"""Six spectral regions, the scene classes for masking, and the truth, which the simulator serves as a label layer."""

_STEPS = 6
_TABLES = ("simulate", "train")


def run_demo(session: Session, out: Path) -> int:
    """Simulate → serve and ingest → train → evaluate → predict → draw, all below `out`.

    Returns:
        The exit code: 0, or 3 where some shard is not complete.
    """
    _check_folder(out)
    began = time.monotonic()
    world_config = _world_config(session)  # settings are checked before anything is made
    out.mkdir(parents=True, exist_ok=True)
    world, cube, run = out / "world", out / "cube.zarr", out / "run"
    map_, cog = out / "map.zarr", out / "map.tif"
    step = _stepper(session)

    with step("simulate", "two tiles, four dates of Sentinel-2 over ground with known land cover"):
        from ingest.simulate import simulate

        made = simulate(world, world_config)
        session.note(f"      {made.items} STAC items, {made.bytes / 1e6:.0f} MB in {world}")
    with step("ingest", "search, plan and read through a STAC API on this machine, with Dask"):
        code = _ingest(session, world, cube)
    with step("train", "a U-Net on some blocks of the ground"):
        from cli.training import run_training

        run_training(session, _training_config(session, cube), run)
    with step("evaluate", "on held-out blocks"):
        from jaxtrain import evaluate

        scores = evaluate(run).to_dict()
    with step("predict", "a map of both tiles, as Zarr and as GeoTIFF"):
        from cli.mapping import run_prediction
        from cli.products import Products

        run_prediction(session, run, str(cube), str(map_), products=Products(cog=cog))
    with step("draw", "pictures of the cube and of the map"):
        from cli.picture import draw

        draw(str(cube), str(out / "quicklook.png"), width=1600)
        draw(str(map_), str(out / "map.png"), width=1600)
        shutil.copyfile(run / "report.html", out / "report.html")

    result = {
        "map": str(cog),
        "map_zarr": str(map_),
        "map_picture": str(out / "map.png"),
        "quicklook": str(out / "quicklook.png"),
        "report": str(out / "report.html"),
        "cube": str(cube),
        "run": str(run),
        **{name: scores[name] for name in ("accuracy", "macro_f1", "miou")},
        "seconds": round(time.monotonic() - began, 1),
    }
    session.say(f"map        {cog}")
    session.say(f"picture    {out / 'quicklook.png'}  (of the map: {out / 'map.png'})")
    session.say(f"report     {out / 'report.html'}")
    session.say(f"cube       {cube}")
    session.say(
        f"accuracy   {scores['accuracy']:.1%} on held-out blocks (macro F1 {scores['macro_f1']:.3f}, "
        f"{scores['pixels']:,} pixels), {result['seconds']:.0f} s in all"
    )
    session.emit(result)
    return code


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise InvalidInput(f"--out {out} is a file; name a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / "world").exists():
        raise InvalidInput(f"--out {out} holds other files than those of a demo; name an empty or new folder")


def _stepper(session: Session) -> Callable[[str, str], Any]:
    number = 0

    @contextmanager
    def step(name: str, what: str) -> Iterator[None]:
        nonlocal number
        number += 1
        session.note(f"[{number}/{_STEPS}] {name}: {what}")
        began = time.monotonic()
        yield
        session.note(f"      {time.monotonic() - began:.1f} s")

    return step


def _ingest(session: Session, world: Path, cube: Path) -> int:
    if _is_complete(cube):
        session.note(f"      {cube} is complete")
        return 0
    from cli.ingesting import run_plan
    from ingest.plan.making import make_plan
    from ingest.request.config import IngestConfig

    config = IngestConfig(
        collections=("sentinel-2-l2a",),
        bands=BANDS,
        datetime="2021-01-01/2022-12-31",
        workers=2,
        allow_private_hosts=True,  # the simulator's server is on this machine
    )
    with _served(world) as server:
        plan = make_plan(server.stac_url, config)
        plan.save(world.parent / "plan.json")
        for line in plan.summary().splitlines():
            session.note(f"      {line}")
        try:
            report = run_plan(session, plan, cube, config)
        except CubeMismatch:
            # an unfinished cube from a server on another port: the same scenes at other addresses
            shutil.rmtree(cube)
            report = run_plan(session, plan, cube, config)
    session.note(f"      {report.summary().splitlines()[0]}")
    return int(report.exit_code)


def _is_complete(cube: Path) -> bool:
    from zarr_store import open_cube

    try:
        opened = open_cube(cube)
    except NotACube:
        return False
    counts = [opened.states(name).count() for name in opened.collections]
    return all(one["done"] == one["total"] for one in counts)


@contextmanager
def _served(world: Path) -> Iterator[ServerHandle]:
    """Serve the world on the port of the previous run if that is free, so that an interrupted ingest continues."""
    from contextlib import ExitStack

    from ingest.simulate import serve

    memory = world.parent / "server.json"
    with ExitStack() as stack:
        try:
            port = int(json.loads(memory.read_text())["port"])
            server = stack.enter_context(serve(world, port=port))
        except (OSError, ValueError, KeyError, AccessError):
            server = stack.enter_context(serve(world))
        memory.write_text(json.dumps({"port": server.port}) + "\n")
        yield server


def _world_config(session: Session) -> SimulateConfig:
    """Return the settings of the simulator: its defaults, overridden by the table [simulate]."""
    from ingest.simulate import SimulateConfig

    return build(SimulateConfig, _table(session, "simulate"), where="[simulate]")


def _training_config(session: Session, cube: Path) -> TrainConfig:
    """Return examples/demo_landcover.toml for the cube just made, overridden by the table [train]."""
    from jaxtrain.config import TrainConfig

    file = demo_config()
    _table(session, "train")  # refuses what is no table of the demo
    settings: dict[str, Any] = {"train": merge(read_toml(file), {"data": {"cube": str(cube.resolve())}})}
    given = [(str(file), settings["train"])]
    if session.config:
        given.append((str(session.config), read_toml(session.config).get("train", {})))
        settings["train"] = merge(settings["train"], given[-1][1], TrainConfig)
    for text in session.overrides:
        given.append((f"--set {text}", parse_override(text).get("train", {})))
        settings = override(settings, text)
    check_one_mesh(given)
    settings = merge({"data": {"cube": str(cube.resolve())}}, settings["train"])
    return build(TrainConfig, settings, where=str(file))


def _table(session: Session, name: str) -> dict[str, Any]:
    settings = session.settings()
    for key, value in settings.items():
        if key not in _TABLES:
            raise UnknownName.of("table", key, _TABLES, "the settings of the demo")
        if not isinstance(value, dict):
            raise InvalidInput(f"the settings of the demo are tables such as train.run.steps=50, got {key} = {value!r}")
    return dict(settings.get(name, {}))


def demo_config() -> Path:
    """Find the demo's configuration: beside this file in an installed wheel, in examples/ in a checkout."""
    here = Path(__file__).resolve().parent
    name = "demo_landcover.toml"
    found = next((path for path in (here / name, here.parent / "examples" / name) if path.is_file()), None)
    if found is None:
        raise InvalidInput(f"{name} is not installed beside {here}; reinstall terrashard")
    return found
