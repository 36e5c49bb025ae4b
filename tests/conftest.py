"""Settings and fixtures of all tests. The environment is set here, before any test imports JAX, GDAL or matplotlib."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib
import logging
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import zlib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import certifi
import pytest

# Eight devices on a processor, so that meshes are real; results on CPU, whatever else the machine has. Programs are
# compiled for a few steps each, so compiling them counts, and how fast they are does not: this halves the time of tests
# of training. Those of launched processes and of the mesh that is chosen unasked leave the compiler as it is.
# Without optimisation LLVM joins a product and a sum in one instruction here and in two there. An activation that two
# loops compute would be rounded in two ways, and a maximum would equal none of its numbers. So the programs of tests
# keep to instructions that never join them, which only those of x86 can be told.
QUICK_COMPILER = ["--xla_backend_optimization_level=1"]
if platform.machine() in ("x86_64", "AMD64"):
    QUICK_COMPILER = ["--xla_backend_optimization_level=0", "--xla_cpu_max_isa=SSE4_2"]
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):  # a compiler that lacks a flag ends the process
    QUICK_COMPILER += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
# A command that trains asks for the last of these. JAX keeps a program under the flags of the moment: with the same
# ones all the time, what one test or child has compiled serves all.
FLAGS = ["--xla_force_host_platform_device_count=8", *QUICK_COMPILER, "--xla_gpu_exclude_nondeterministic_ops=true"]
given = os.environ.get("XLA_FLAGS", "").split()
os.environ["XLA_FLAGS"] = " ".join([*given, *(flag for flag in FLAGS if flag not in given)])
os.environ["JAX_PLATFORMS"] = "cpu"
# Operations are lowered without the lines of Python they come from: a sixth less time, and no test reads them.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
os.environ["MPLBACKEND"] = "Agg"
# JAX and tensorboardX set these when they are imported.
for name, value in ("TF_CPP_MIN_LOG_LEVEL", "1"), ("TPU_SKIP_MDS_QUERY", "1"), ("CRC32C_SW_MODE", "auto"):
    os.environ.setdefault(name, value)
# rasterio and pyogrio set these, in whichever module of tests is the first to import them.
for name in "GDAL_CURL_CA_BUNDLE", "PROJ_CURL_CA_BUNDLE":
    os.environ.setdefault(name, certifi.where())
os.environ.pop("GDAL_NUM_THREADS", None)
# Test processes share the cores: nested thread pools would only fight.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
# Dask must not look for a configuration of this machine.
os.environ["DASK_CONFIG"] = os.devnull
# Nor may the shell, editor or CI that starts the tests decide how they end. A proxy would be asked for 127.0.0.1, and
# a narrow or colourful terminal changes what commands print; tests of such settings set them themselves.
for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
    os.environ.pop(name, None)
    os.environ.pop(name.lower(), None)
for name in (
    "COLUMNS",
    "LINES",
    "FORCE_COLOR",
    "CLICOLOR_FORCE",
    "TTY_COMPATIBLE",
    "TTY_INTERACTIVE",
    "PYTEST_ADDOPTS",
):
    os.environ.pop(name, None)
os.environ["NO_COLOR"] = "1"
os.environ["TERM"] = "dumb"
os.environ.setdefault("HOME", tempfile.gettempdir())  # mpirun does not start without one
# A shell lets a script's background jobs ignore Ctrl-C, and their children would inherit that. What is caught is not
# inherited by a program that is started: so children of tests can be interrupted, and this process still ignores it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, lambda _number, _frame: None)
# As the product does for its own workers (ingest.worker.guard): Dask's profiler can stop a process before Python 3.12.
if sys.version_info < (3, 12):
    os.environ["DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED"] = "False"

ROOT = Path(__file__).resolve().parents[1]
MOST_COMPILED = 2 << 30
"""Bytes of compiled programs that are kept from one run of the tests to the next."""
MOST_WRITTEN = 3 << 30
"""Bytes that all tests together write at most, with room to spare."""


def keep_compiled() -> None:
    """Keep what JAX compiles in the virtual environment, for all test processes, their children and later runs.

    A killed child may leave half a program, which JAX would find broken in every later run: those go at the start.
    Programs are for one compiler and one processor, which is part of the folder's name.
    """
    if sys.prefix == sys.base_prefix:  # no place that is surely ours
        folder = Path(tempfile.mkdtemp(prefix="terrashard-test-compiled-"))
    else:
        processor = Path("/proc/cpuinfo")
        flags = sorted(set(re.findall(r"^flags.*", processor.read_text(), re.MULTILINE))) if processor.exists() else []
        kind = hashlib.sha256(repr([version("jaxlib"), platform.machine(), flags]).encode()).hexdigest()[:12]
        folder = Path(sys.prefix) / "compiled" / kind
        folder.mkdir(parents=True, exist_ok=True)
        if "PYTEST_XDIST_WORKER" not in os.environ:
            drop_broken(folder)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"


def drop_broken(folder: Path) -> None:
    """Remove programs that were not written to their end since the last look, and all of them once they are many."""
    mark = folder / "looked"
    looked = mark.stat().st_mtime if mark.exists() else 0.0
    mark.touch()
    sizes = {path: path.stat() for path in folder.glob("*-cache")}
    full = sum(found.st_size for found in sizes.values()) > MOST_COMPILED
    for path, found in sizes.items():
        try:
            if not full and found.st_mtime >= looked - 1:
                zlib.decompress(path.read_bytes())
        except zlib.error:
            path.unlink(missing_ok=True)
        if full:
            path.unlink(missing_ok=True)


def write_to_memory() -> None:
    """Put the folders of tests into memory if there is room: on a disk, every write of a cube waits 10 ms.

    What waits is no part of a result. That writes are made durable, and in which order, is tested by the system calls.
    """
    memory = Path("/dev/shm")
    with contextlib.suppress(OSError, ValueError):
        if os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > MOST_WRITTEN:
            left = re.search(r"^MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
            if left is not None and int(left[1]) * 1024 > 3 * MOST_WRITTEN:
                os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(memory))


keep_compiled()
write_to_memory()
# As the command does for its own process: tracing makes many objects that stay, and Python looks through them again
# and again for circular garbage.
gc.set_threshold(20_000, 20, 20)


LIBRARIES = (
    "scipy.stats", "scipy.ndimage", "matplotlib.pyplot", "hypothesis", "optuna",
    "jax", "flax.nnx", "optax", "orbax.checkpoint", "asyncssh", "boto3",
    "distributed", "pandas", "dask.array", "xarray", "zarr", "pystac_client", "stackstac", "rioxarray", "rich.table",
)  # fmt: skip
"""What the tests import, so that each third takes about as long to parse."""


def pytest_collection() -> None:
    """Begin with other libraries in each process: in a fresh environment all would parse the same ones side by side.

    So each parses some, and finds the bytecode of the others.
    """
    number = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    if number.isdecimal():
        first = len(LIBRARIES) * int(number) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        for name in LIBRARIES[first:] + LIBRARIES[:first]:
            with contextlib.suppress(ImportError):  # what is not installed, a test says itself
                importlib.import_module(name)


def pytest_collection_finish() -> None:
    """Exclude the objects that importing the tests has made from garbage collection: they stay."""
    gc.collect()
    gc.freeze()


SHARED = "of all tests"
"""Part of the name of a cluster that lives until the session ends."""


def state_of_process() -> dict[str, Any]:
    """Return the state that a module of tests could leave to the next one in this process."""
    state: dict[str, Any] = {
        f"environment variable {name}": value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"
    }
    state["working directory"] = os.getcwd()
    for number in (signal.SIGINT, signal.SIGTERM):
        state[f"handler of {number.name}"] = signal.getsignal(number)
    if "distributed" in sys.modules:
        from distributed.client import _get_global_client
        from distributed.deploy.spec import SpecCluster

        state["current Dask client"] = _get_global_client()
        for cluster in SpecCluster._instances:
            if SHARED not in str(cluster.name) and cluster.status.name == "running":
                state[f"Dask cluster {cluster.name}"] = "running"
    return {name: value for name, value in state.items() if value is not None}


@pytest.fixture(scope="module", autouse=True)
def _process_is_left_as_it_was() -> Iterator[None]:
    """Check that a module of tests leaves nothing in this process that could change the result of another one."""
    before = state_of_process()
    yield
    after = state_of_process()
    names = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    left = [f"{name}: {before.get(name)!r} → {after.get(name)!r}" for name in names]
    assert not left, "this module changed the process that other tests use: " + "; ".join(left)


@pytest.fixture
def environment_given_back() -> Iterator[None]:
    """Undo what a test, or a library in it, changes in the environment."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


DOT = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="


@pytest.fixture
def figures_unpainted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace each figure of a report by a dot if no test looks at it: drawing takes longer than training."""
    for name in ("_curves", "_confusion", "_split_map", "draw_tiles", "draw_shown"):
        monkeypatch.setattr(f"jaxtrain.evaluation.report.{name}", lambda *_, **__: None)
    monkeypatch.setattr("jaxtrain.evaluation.report._png", lambda _figure: DOT)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real scenes that lie beside the checkout; tests that need them are skipped where they are absent."""
    folder = Path(os.environ.get("TERRASHARD_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("real data are not here; set TERRASHARD_SHARED_DATA")
    return folder.resolve()


@pytest.fixture(scope="session")
def zagreb(shared_data: Path) -> Path:
    """Static catalogue of two Sentinel-2 tiles and five dates."""
    return shared_data / "scenes" / "zagreb" / "catalog.json"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """An S3 of this machine that honours If-Match and If-None-Match."""
    from moto.server import ThreadedMotoServer

    # Its web server would otherwise log to whatever stderr the test of its first request had, closed in later ones.
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    yield f"http://{host}:{port}"
    moto.stop()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client that sees the bucket "cubes" from outside; it is empty. The environment leads to it, with secrets."""
    import boto3

    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDCANARY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary+of/the/secret")
    client = boto3.client("s3", region_name="eu-central-1", endpoint_url=s3_server)
    client.create_bucket(Bucket="cubes", CreateBucketConfiguration={"LocationConstraint": "eu-central-1"})
    yield client
    for entry in client.list_objects_v2(Bucket="cubes").get("Contents", []):
        client.delete_object(Bucket="cubes", Key=entry["Key"])
    client.delete_bucket(Bucket="cubes")
