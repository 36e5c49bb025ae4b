"""A GPU is asked for kernels that sum in a fixed order; compiled programs stay with the user, never with the run."""

from __future__ import annotations

import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache
from numcodecs.zstd import Zstd

from jaxtrain.runs import programs, repeat
from jaxtrain.runs.programs import program_folder
from jaxtrain.runs.repeat import programs_kept, repeat_exactly

ASKED = "--xla_gpu_exclude_nondeterministic_ops=true"
READ_AFTER_JAX_IS_IMPORTED = """
import os, jax
from jaxtrain.runs.repeat import repeat_exactly
repeat_exactly()
os.environ["XLA_FLAGS"] += " --xla_no_such_flag=1"
jax.devices()
"""


def test_the_flag_joins_what_the_user_has_and_never_contradicts() -> None:
    env = {"XLA_FLAGS": "--xla_cpu_enable_fast_math=false"}
    assert repeat_exactly(env)
    assert env["XLA_FLAGS"] == f"--xla_cpu_enable_fast_math=false {ASKED}"
    assert not repeat_exactly(env)
    empty: dict[str, str] = {}
    assert repeat_exactly(empty)
    assert empty["XLA_FLAGS"] == ASKED
    for own in ("--xla_gpu_deterministic_ops=true", "--xla_gpu_exclude_nondeterministic_ops=false"):
        theirs = {"XLA_FLAGS": own}
        assert not repeat_exactly(theirs)
        assert theirs["XLA_FLAGS"] == own


def test_the_compiler_knows_the_flag_and_reads_it_after_jax_is_imported() -> None:
    env = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    told = subprocess.run(
        [sys.executable, "-c", READ_AFTER_JAX_IS_IMPORTED], capture_output=True, text=True, timeout=120, env=env
    )
    assert told.returncode != 0
    assert "xla_no_such_flag" in told.stderr
    assert "exclude_nondeterministic" not in told.stderr.split("in XLA_FLAGS")[-1]


@pytest.fixture
def no_cache():
    """JAX keeps nothing, and whatever a test does to that ends with it; other tests share what they compile."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache, and a machine that says it has a GPU."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    return tmp_path / "cache" / "terrashard" / "programs"


def compute() -> None:
    assert float(jax.jit(lambda x: x * 3 + 1)(jnp.float32(2))) == 7


@pytest.mark.usefixtures("no_cache")
def test_programs_for_a_gpu_are_kept_for_the_user_and_taken_from_there(cache: Path) -> None:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    hits: list[str] = []
    jax.monitoring.register_event_listener(
        lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None
    )
    for turn in range(2):
        with programs_kept("run1"):
            compute()
        jax.clear_caches()
        assert len(hits) >= turn
        assert bool(hits) == bool(turn)
    assert any(path.name.startswith("jit_") for path in (cache / "run1").iterdir())
    for folder in (cache.parent, cache, cache / "run1"):
        assert folder.stat().st_mode & 0o777 == 0o700
    assert jax.config.jax_compilation_cache_dir is None  # type: ignore[attr-defined]  # set when JAX is imported


def others_may_write(folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o777)


def of_somebody_else(folder: Path) -> None:
    folder.mkdir(parents=True, mode=0o700)
    os.chown(folder, 12345, 12345)


def a_link(folder: Path) -> None:
    folder.parent.mkdir(parents=True, mode=0o700)
    (folder.parent / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to("elsewhere")


@pytest.mark.usefixtures("no_cache")
@pytest.mark.parametrize("spoil", [others_may_write, of_somebody_else, a_link])
@pytest.mark.parametrize("which", ["terrashard", "programs", "run1"])
def test_programs_are_not_loaded_from_a_folder_that_somebody_else_could_fill(
    cache: Path, spoil: Callable[[Path], None], which: str, caplog: pytest.LogCaptureFixture
) -> None:
    """FAULTS X06."""
    if spoil is of_somebody_else and os.geteuid() != 0:
        pytest.skip("only root gives folders away")
    spoil({"terrashard": cache.parent, "programs": cache, "run1": cache / "run1"}[which])
    with programs_kept("run1"):
        assert jax.config.jax_compilation_cache_dir is None  # type: ignore[attr-defined]  # set when JAX is imported
    assert "not a folder of this user alone" in caplog.text


@pytest.mark.usefixtures("no_cache")
def test_without_a_place_for_programs_a_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    for home in (str(tmp_path / "file"), "/proc/nothing"):
        assert program_folder("run1", {"XDG_CACHE_HOME": home}) is None
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert program_folder("run1", {}) is None
    assert program_folder("run1", {"XDG_CACHE_HOME": "relative"}) is None, "a relative path is ignored"
    assert caplog.text.count("compiled programs are not kept") == 4


def test_programs_take_a_bounded_place(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        folder = program_folder(f"run{number}")
        assert folder is not None
        (folder / "jit_x-cache").write_bytes(bytes(1000))
        os.utime(folder, (number, number))
    monkeypatch.setattr(programs, "MOST_BYTES", 2500)
    program_folder("run0")
    assert sorted(entry.name for entry in cache.iterdir()) == ["run0", "run3"], "those that were longest not used go"


@pytest.mark.usefixtures("no_cache")
def test_nothing_is_kept_beside_a_folder_of_the_user(cache: Path, tmp_path: Path) -> None:
    own = str(tmp_path / "own")
    jax.config.update("jax_compilation_cache_dir", own)
    with programs_kept("run1"):
        assert jax.config.jax_compilation_cache_dir == own  # type: ignore[attr-defined]  # set when JAX is imported
    assert not cache.exists()


@pytest.mark.usefixtures("no_cache")
def test_nothing_is_kept_for_other_devices(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with programs_kept("run1"):
        assert jax.config.jax_compilation_cache_dir is None  # type: ignore[attr-defined]  # set when JAX is imported
    assert not cache.exists()


@pytest.fixture
def shared(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for programs of this processor, with one program of 5 kB in it, and all programs worth keeping."""
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr(repeat, "_WORTH_S", 0.0)
    with programs_kept("run1"):
        compute()
    (folder,) = cache.iterdir()
    jax.clear_caches()
    return folder


def hits_of(key: str) -> int:
    """How many programs are taken from the cache by a run."""
    hits: list[str] = []

    def listen(event: str, **_: object) -> None:
        if event.endswith("cache_hits"):
            hits.append(event)

    jax.monitoring.register_event_listener(listen)
    with programs_kept(key):
        compute()
    jax.monitoring.unregister_event_listener(listen)
    jax.clear_caches()
    return len(hits)


@pytest.mark.usefixtures("no_cache")
def test_programs_for_a_processor_are_shared_by_all_runs(shared: Path) -> None:
    least = jax.config.jax_persistent_cache_min_compile_time_secs  # type: ignore[attr-defined]  # set by JAX
    assert shared.name.startswith("processor")
    assert shared.stat().st_mode & 0o777 == 0o700
    assert hits_of("run2") >= 1
    assert jax.config.jax_compilation_cache_dir is None  # type: ignore[attr-defined]  # set when JAX is imported
    assert jax.config.jax_persistent_cache_min_compile_time_secs == least  # type: ignore[attr-defined]  # as above


@pytest.mark.usefixtures("no_cache")
def test_a_program_that_was_half_written_is_made_again(shared: Path) -> None:
    for path in shared.glob("*-cache"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert hits_of("run2") == 0
    assert hits_of("run3") >= 1


@pytest.mark.usefixtures("no_cache")
def test_programs_for_another_number_of_cores_are_other_programs(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler cuts loops for the cores that a process may use, and sums are rounded by how they are cut."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda _: set(range(97)), raising=False)
        more = programs.shared_folder()
    with monkeypatch.context() as patch:
        patch.setenv("NPROC", "97")
        named = programs.shared_folder()
    assert len({shared, more, named, None}) == 4
    assert programs.shared_folder() == shared


@pytest.mark.usefixtures("no_cache")
def test_what_another_process_removes_meanwhile_ends_nothing(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs tidy the folder side by side: a name that is listed may be gone when it is looked at."""
    real = Path.glob
    monkeypatch.setattr(Path, "glob", lambda self, text: [self / "gone-cache", *real(self, text)])
    monkeypatch.setattr(Path, "iterdir", lambda self: (self / name for name in ["gone", *os.listdir(self)]))
    assert programs.program_folder("abc") is not None
    (shared / "broken-cache").write_bytes(zlib.compress(os.urandom(1000))[:500])
    (shared / "frame-cache").write_bytes(Zstd().encode(os.urandom(1000))[:500])
    assert programs.shared_folder() == shared
    assert not {"broken-cache", "frame-cache"} & set(os.listdir(shared))


@pytest.mark.usefixtures("no_cache")
def test_shared_programs_take_a_bounded_place(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in shared.glob("*-cache"):
        path.unlink()
    for number in range(4):
        path = shared / f"jit_{number}-cache"
        path.write_bytes(zlib.compress(os.urandom(1000)))
        os.utime(path, (number, number))
    os.utime(shared / "jit_0-cache", (9, 0))  # it was used later than it was made
    monkeypatch.setattr(programs, "MOST_SHARED_BYTES", 2500)
    assert programs.shared_folder() == shared
    assert sorted(path.name for path in shared.glob("*-cache")) == ["jit_0-cache", "jit_3-cache"]
