"""Processes on other hosts: two SSH servers of this test stand for two machines."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxtrain.launch import LaunchConfig, launch_at
from jaxtrain.launching import remote
from jaxtrain.launching.hosts import Host, HostOptions, parse_hosts
from jaxtrain.launching.outcome import LOST
from jaxtrain.launching.remote import RemoteHosts
from zarr_store.errors import AccessError, InvalidInput

from .ssh_host import SshHost, ssh_host

pytest.importorskip("asyncssh")


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[SshHost]]:
    with ssh_host(tmp_path_factory.mktemp("ssh")) as hosts:
        yield hosts


def names(machines: list[SshHost]) -> str:
    return ",".join(f"127.0.0.1:{machine.port}" for machine in machines)


def places(
    machines: list[SshHost], program: str, folder: Path | str, *, paths: tuple[str, ...] = (), grace_s: float = 5.0,
    environment: dict[str, str] | None = None, **more: str,
) -> RemoteHosts:  # fmt: skip
    given = machines[0].options() | {"folder": str(folder), "start_s": "60"} | more
    options = HostOptions.from_options(given, grace_s=grace_s)
    return RemoteHosts(
        parse_hosts(names(machines)), ["-c", program], paths=paths, options=options, environment=environment
    )


class Heard:
    """Lines as they come; a test may wait for one."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, str, str]] = []
        self._news = threading.Condition()

    def __call__(self, number: int, stream: str, text: str) -> None:
        with self._news:
            self.lines.append((number, stream, text))
            self._news.notify_all()

    def wait_for(self, text: str, times: int = 1) -> None:
        with self._news:
            assert self._news.wait_for(lambda: sum(text in line[2] for line in self.lines) >= times, 60), self.lines


def test_processes_of_hosts_get_their_environment_and_give_lines_and_codes(
    machines: list[SshHost], tmp_path: Path
) -> None:
    """A secret passes through standard input: no command line has it. The coordinator is on the first host."""
    program = """if True:
        import json, os, sys
        print(json.dumps([os.environ["SECRET"], os.environ["TERRASHARD_COORDINATOR"], os.getcwd()]))
        print("on stderr", file=sys.stderr)
        sys.exit(7 if os.environ["TERRASHARD_PROCESS"] == "1" else 0)
    """
    heard = Heard()
    with places(machines, program, tmp_path, environment={"SECRET": "s3cr3t"}) as hosts:
        outcome = launch_at(hosts, LaunchConfig(2, grace_s=5.0), on_line=heard)
    assert outcome.codes == (0, 7)
    assert outcome.exit_code == 7
    said = {number: json.loads(text) for number, stream, text in heard.lines if stream == "stdout" and text}
    assert sorted(said) == [0, 1]
    assert said[0] == said[1]
    secret, coordinator, folder = said[0]
    assert secret == "s3cr3t"
    assert coordinator.startswith("127.0.0.1:")
    assert folder == str(tmp_path)
    assert sum(text == "on stderr" for _, _, text in heard.lines) == 2
    commands = [command for machine in machines for command in machine.commands]
    assert len(commands) >= 4
    assert not any("s3cr3t" in command or "TERRASHARD" in command for command in commands)


def test_a_process_that_is_killed_is_named_by_its_host_and_all_start_again(
    machines: list[SshHost], tmp_path: Path
) -> None:
    program = f"""if True:
        import os, signal, time
        from pathlib import Path
        mark = Path({str(tmp_path)!r}) / "killed"
        if os.environ["TERRASHARD_PROCESS"] == "1" and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if not mark.exists() or os.environ["TERRASHARD_COORDINATOR"] == mark.read_text():
            time.sleep(60)
    """
    why: list[str] = []
    with places(machines, program, tmp_path) as hosts:
        outcome = launch_at(
            hosts, LaunchConfig(2, pause_s=0.0), on_line=Heard(), on_restart=lambda _, text: why.append(text)
        )
    assert (outcome.exit_code, outcome.restarts, outcome.codes) == (0, 1, (0, 0))
    assert len(why) == 1
    assert f"process 127.0.0.1:{machines[1].port} was killed by SIGKILL" in why[0]


SAVER = """if True:
    import os, signal, sys, time
    from pathlib import Path
    me = Path(os.environ["MARKS"]) / os.environ["TERRASHARD_PROCESS"]
    def save(*_):
        me.write_text("saved")
        print("saving", flush=True)
        sys.exit(75)
    signal.signal(signal.SIGTERM, save)
    me.write_text(str(os.getpid()))
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_host_that_is_cut_off_saves_by_itself_and_the_others_learn_of_it(
    machines: list[SshHost], tmp_path: Path
) -> None:
    """The processes see their connection end, as they do when the launcher is killed: they get SIGTERM and save."""
    heard = Heard()
    with places(machines, SAVER, tmp_path, environment={"MARKS": str(tmp_path)}) as hosts:
        running = [hosts.start(number, {"TERRASHARD_PROCESS": str(number)}, heard) for number in range(2)]
        heard.wait_for("ready", 2)
        machines[1].cut()
        assert running[1].finish() == LOST
        heard.wait_for("lost")
        wait_for_text(tmp_path / "1", "saved")
        assert running[0].code() is None
        running[0].stop()
        assert running[0].finish() == 75
        assert (tmp_path / "0").read_text() == "saved"
        # and one that is killed at once
        killed = hosts.start(0, {"TERRASHARD_PROCESS": "0"}, heard)
        heard.wait_for("ready", 3)
        killed.stop(at_once=True)
        assert killed.finish() == -signal.SIGKILL


def test_a_process_that_does_not_save_in_time_is_killed(machines: list[SshHost], tmp_path: Path) -> None:
    deaf = SAVER.replace("def save(*_):", "def save(*_):\n        return")
    heard = Heard()
    with places(machines[:1], deaf, tmp_path, environment={"MARKS": str(tmp_path)}, grace_s=0.3) as hosts:
        hosts.start(0, {"TERRASHARD_PROCESS": "0"}, heard)
        heard.wait_for("ready")
        pid = int((tmp_path / "0").read_text())
    until = time.monotonic() + 20
    while alive(pid):
        assert time.monotonic() < until
        time.sleep(0.05)


def wait_for_text(path: Path, text: str) -> None:
    until = time.monotonic() + 30
    while path.read_text() != text:
        assert time.monotonic() < until, path.read_text()
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_what_a_host_lacks_is_named_before_anything_starts(
    machines: list[SshHost], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(kind: type[Exception], message: str, **settings: Any) -> None:
        before = [len(machine.commands) for machine in machines]
        with pytest.raises(kind, match=message), places(machines, "", **({"folder": tmp_path} | settings)):
            pass
        assert all(
            len(machine.commands) - count <= 1 for machine, count in zip(machines, before, strict=True)
        )  # only the look

    first = rf"127\.0\.0\.1:{machines[0].port}"
    refused(InvalidInput, rf"{first} has no config\.toml.*under the same paths", paths=("config.toml",))
    refused(InvalidInput, rf"{first} has no /nowhere at all.*folder=PATH", folder="/nowhere at all")
    refused(InvalidInput, rf"{first}: /no/python does not run there \(exit code 127.*remote_python=PATH",
            remote_python="/no/python")  # fmt: skip
    refused(AccessError, rf"the key of {first} is not among the known hosts.*known_hosts=FILE",
            known_hosts=str(machines[0].folder / "user.pub"))  # fmt: skip
    refused(AccessError, rf"{first} refuses the login.*client_keys=FILE", client_keys=str(machines[0].folder / "host"))
    monkeypatch.setattr(remote, "_version_here", lambda name: {"terrashard": "9.9", "jax": None}[name])
    refused(InvalidInput, rf"{first} has terrashard 0\.1\.0, jax .*; this machine has python 3.*terrashard 9\.9")


def test_a_host_that_cannot_be_reached_is_named(machines: list[SshHost], tmp_path: Path) -> None:
    import socket

    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
        options = HostOptions.from_options(machines[0].options() | {"folder": str(tmp_path)})
        closed = RemoteHosts(parse_hosts(f"{names(machines)},127.0.0.1:{port}"), [], options=options)
        with pytest.raises(AccessError, match=rf"127\.0\.0\.1:{port} cannot be reached: .*try: ssh"), closed:
            pass
        nobody.listen()  # takes the call and never answers
        options = HostOptions.from_options(machines[0].options() | {"start_s": "0.5"})
        silent = RemoteHosts(parse_hosts(f"127.0.0.1:{port}"), [], options=options)
        with pytest.raises(AccessError, match=r"did not answer within 0\.5 s.*start_s"), silent:
            pass


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpu-a,gpu-a", "names gpu-a twice: one process runs on each host"),
        ("gpu-a,,gpu-b", "'' is not a host"),
        ("gpu a", "'gpu a' is not a host"),
        ("-oProxyCommand=x", "is not a host"),
        ("ssh://gpu-a", "is not a host"),
        ("gpu-a:99999", "is not a host"),
        ("fe80::1", r"is not a host; an IPv6 address stands in brackets, \[fe80::1\]"),
        ("[gpu-a]", "is not a host"),
        ("[fe80::1%]", "is not a host"),
    ],
)
def test_hosts_that_make_no_sense(text: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        parse_hosts(text)


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("[::1]", Host("[::1]", "::1")),
        ("me@[2001:db8::7]:2222", Host("me@[2001:db8::7]:2222", "2001:db8::7", "me", 2222)),
        ("[fe80::1%eth0]:22", Host("[fe80::1%eth0]:22", "fe80::1%eth0", None, 22)),
        ("[::ffff:10.0.0.5]", Host("[::ffff:10.0.0.5]", "::ffff:10.0.0.5")),
        ("10.0.0.5:22", Host("10.0.0.5:22", "10.0.0.5", None, 22)),
    ],
)
def test_forms_of_an_address(text: str, host: Host) -> None:
    assert parse_hosts(f"gpu-a,{text}") == (Host("gpu-a", "gpu-a"), host)


def test_options_that_make_no_sense() -> None:
    for options, message in (
        ({"user": "me"}, "--hosts has no option user; its options are client_keys"),
        ({"port": "ssh"}, "port and start_s are numbers"),
        ({"start_s": "nan"}, "expected seconds above 0"),
    ):
        with pytest.raises(InvalidInput, match=message):
            HostOptions.from_options(options)
