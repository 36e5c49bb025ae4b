"""Who may join, who is refused and how this is said; and strangers, who do no harm."""

from __future__ import annotations

import logging
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtrain.hetero import control, wire
from jaxtrain.hetero import coordinator as coordinator_module
from jaxtrain.hetero.coordinator import Coordinator
from jaxtrain.hetero.member import Member
from jaxtrain.hetero.membership import CoordinatorLost, Identity, Refused
from jaxtrain.hetero.rounds import Round
from jaxtrain.hetero.wire import (
    BadMessage,
    WrongSecret,
    check_secret,
    format_address,
    pack,
    parse_address,
    parse_header,
)
from zarr_store.errors import AccessError, InvalidInput

from .replicas import CHUNKS, IDENTITY, SECRET, Listener, Replica, check_steps, coordinator, finish, wait_until


@pytest.fixture
def one() -> Iterator[tuple[Coordinator, Listener]]:
    """The coordinator of a group of one that is formed at once."""
    listener = Listener()
    with coordinator(listener, expected=1) as server:
        yield server, listener


def join(server: Coordinator, name: str = "a", **options: Any) -> Member:
    values = {"chunks": CHUNKS, "state_step": 0, "wait_s": 1.0, **options}
    return Member.join(server.address, values.pop("secret", SECRET), name, values.pop("identity", IDENTITY), **values)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"identity": Identity("other", "data", "code")}, "its configuration differs from that of the group"),
        ({"identity": Identity("configuration", "other", "code")}, "its data differs.*let it read the same cube"),
        ({"identity": Identity("configuration", "data", "other")}, "its code differs.*install the same version"),
        ({"chunks": 99}, "it divides a step into 99 chunks, the group into 6"),
    ],
)
def test_another_configuration_is_refused(one: Any, options: dict[str, Any], says: str) -> None:
    server, listener = one
    with join(server) as member:
        assert not member.needs_state()
        with pytest.raises(Refused, match=says) as caught:
            join(server, "b", **options)
        assert caught.value.exit_code == 2
        assert "\n" not in str(caught.value)
        assert [event.member for event in listener.of("refused")] == ["b"]
        assert member.start(0).chunks == tuple(range(CHUNKS))


def test_a_full_group_and_a_name_that_is_taken() -> None:
    with coordinator(expected=1, max_members=2) as server, join(server) as member:
        with pytest.raises(Refused, match="the name a is taken by a member that was heard"):
            join(server, silence_s=0.5)
        with join(server, "b"), pytest.raises(Refused, match=r"already has its 2 members \(--max-processes\)"):
            join(server, "c")
        assert not member.needs_state()


def test_the_wrong_secret(one: Any, caplog: pytest.LogCaptureFixture) -> None:
    server, _ = one
    with caplog.at_level(logging.WARNING):
        with pytest.raises(AccessError, match=r"has another secret.*TERRASHARD_HETERO_SECRET") as caught:
            join(server, secret="another secret of some length")
        with pytest.raises(AccessError):
            join(server, secret="another secret of some length")
        wait_until(lambda: len(caplog.records) > 0)
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "a connection from 127.0.0.1 to the group's coordinator was refused: it does not know the secret of this "
        "group, or means another group"
    ], "one line, however often it comes"
    assert SECRET not in str(caught.value)
    with pytest.raises(InvalidInput, match="has 5 characters, expected at least 16"):
        join(server, secret="short")


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(AccessError, match=r"was not reached within 0\.2 s"):
        Member.join(f"127.0.0.1:{port}", SECRET, "a", IDENTITY, chunks=1, silence_s=0.1, wait_s=0.2)


def test_somebody_else_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as web:

        def answer() -> None:
            sock, _ = web.accept()
            with sock:
                sock.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(AccessError, match=r"is not the coordinator of a group: .*HTTP/1\.1"):
            Member.join(f"127.0.0.1:{web.getsockname()[1]}", SECRET, "a", IDENTITY, chunks=1, wait_s=1.0)
        thread.join(5)


def test_a_coordinator_that_stands_still_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection stays open, and no sign of life comes; the member says so and does not wait any longer."""
    monkeypatch.setattr(control, "_FEWEST_SILENCE_S", 0.5)
    with coordinator(expected=2) as server, join(server, silence_s=0.6) as member:
        monkeypatch.setattr(server, "_send", lambda _number, _message: None)
        with pytest.raises(CoordinatorLost, match=r"does not answer any more \(silent for 1\.2 s\): the state is kept"):
            member.needs_state()


def test_a_second_coordinator_at_the_same_place(one: Any) -> None:
    server, _ = one
    with pytest.raises(InvalidInput, match="another coordinator may be there: end it, or choose another port"):
        Coordinator(server.address, SECRET)


def test_a_member_of_another_group_is_refused(one: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Two coordinators with one secret make two groups: no member of one adds to a sum of the other."""
    server, _ = one
    with join(server) as member, caplog.at_level(logging.WARNING):
        address = format_address(*member._listener.getsockname()[:2])
        with pytest.raises(WrongSecret, match="is of another group"):
            wire.connect(address, check_secret(SECRET), "peer of another group", silence_s=5)
        # the member writes its line in a thread of its own
        wait_until(lambda: "it does not know the secret of this group, or means another group" in caplog.text)


def strange(address: str, *parts: bytes, pause_s: float = 0.0) -> bytes:
    """Send bytes to a server, and return what it sends until it closes the connection."""
    got = b""
    with socket.create_connection(parse_address(address), timeout=5) as sock:
        try:
            for part in parts:
                sock.sendall(part)
                time.sleep(pause_s)
            while data := sock.recv(4096):
                got += data
        except ConnectionError:
            pass
    return got


HUGE = struct.pack(">4sIQ", b"TSg1", (1 << 32) - 1, 1 << 60)
STRANGERS = {
    "a port scanner": (),
    "a browser": (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 3,),
    "noise": (bytes(range(256)) * 100,),
    "a huge header": (HUGE,),
    "no msgpack": (struct.pack(">4sIQ", b"TSg1", 4, 0) + b"\xc1\xc1\xc1\xc1",),
    "nested msgpack": (struct.pack(">4sIQ", b"TSg1", 400, 0) + b"\x91" * 400,),
    "a list": (struct.pack(">4sIQ", b"TSg1", 1, 0) + b"\x90",),
    "another kind": (pack({"kind": "join"}),),
    "a proof of nothing": (pack({"kind": "proof", "nonce": b"", "proof": b""}),),
}


@pytest.mark.parametrize("who", STRANGERS)
@pytest.mark.parametrize("where", ["coordinator", "member"])
def test_strangers_do_no_harm(
    who: str, where: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (wire, coordinator_module):
        monkeypatch.setattr(module, "HANDSHAKE_S", 0.2)
    with coordinator(expected=1) as server, caplog.at_level(logging.WARNING), join(server) as member:
        assert not member.needs_state()
        address = server.address if where == "coordinator" else format_address(*member._listener.getsockname()[:2])
        strange(address, *STRANGERS[who])
        until = time.monotonic() + 3
        while not caplog.records and time.monotonic() < until:
            time.sleep(0.01)
        assert member.start(0).chunks == tuple(range(CHUNKS))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1, lines
    assert lines[0].startswith("a connection from 127.0.0.1 to")
    assert "was refused" in lines[0]
    assert "\n" not in lines[0]
    assert not any(record.exc_info for record in caplog.records)


@pytest.mark.parametrize("reads", [True, False])
def test_who_only_looks_whether_the_port_is_open_gets_no_line(
    reads: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `launch --join` does, and the health check of a cluster; one that has begun to speak is reported."""
    monkeypatch.setattr(coordinator_module, "HANDSHAKE_S", 5.0)
    with coordinator(expected=1) as server, caplog.at_level(logging.WARNING):
        for part in (b"", b"", b"TSg") if reads else (b"", b""):  # what is left unread turns the end into a reset
            with socket.create_connection(parse_address(server.address), timeout=5) as sock:
                if reads:
                    assert sock.recv(4096).startswith(b"TSg1")
                if part:
                    assert not caplog.records
                    sock.sendall(part)
        until = time.monotonic() + 5
        while reads and not caplog.records and time.monotonic() < until:
            time.sleep(0.01)
        with join(server) as member:  # all that came before has been dealt with
            assert not member.needs_state()
    said = [record.getMessage().partition("refused: ")[2] for record in caplog.records]
    assert said == (["it closed the connection before it proved the secret"] if reads else [])


def test_one_that_drips_is_cut_off_and_many_keep_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (wire, coordinator_module):
        monkeypatch.setattr(module, "HANDSHAKE_S", 0.3)
    with coordinator(expected=1) as server:
        host = parse_address(server.address)
        crowd = [socket.create_connection(host, timeout=5) for _ in range(80)]
        began = time.monotonic()
        for sock in crowd[:5]:
            sock.sendall(b"T")
        with join(server, wait_s=10.0) as member:
            assert not member.needs_state()
            assert time.monotonic() - began < 5
            time.sleep(0.4)
            for sock in crowd[:5]:
                sock.settimeout(2)
                while sock.recv(4096):
                    pass  # until it is closed
            assert member.start(0).step == 0
        for sock in crowd:
            sock.close()


@pytest.mark.parametrize(
    "message",
    [
        {"kind": "ready"},
        {"kind": "ready", "step": "soon"},
        {"kind": "what"},
        {"kind": "contributed", "step": 0, "attempt": 0, "chunks": [0], "size": 3},
        {"kind": "contributed", "step": 0, "attempt": 0, "chunks": 4, "size": 3},
        {"kind": "gather", "name": "x", "epoch": 1, "values": 3},
    ],
    ids=str,
)
def test_a_member_that_talks_nonsense_is_dropped(message: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    listener = Listener()
    with coordinator(listener, expected=2) as server, caplog.at_level(logging.WARNING):
        other = Replica("r0", server.address, steps=3)
        other.start()
        with join(server, "bad") as member:
            assert not member.needs_state()
            if "attempt" in message:
                member.start(0)
            member._control.tell(message)
            finish(other)
    check_steps(other, 0, 3)
    assert [event.member for event in listener.of("dropped")] == ["bad"]
    assert "was not understood" in listener.of("dropped")[0].reason


def test_a_contribution_to_other_chunks_is_not_added() -> None:
    listener = Listener()
    with coordinator(listener, expected=2) as server:
        other = Replica("r0", server.address, steps=3)
        other.start()
        with join(server, "bad") as member:
            assert not member.needs_state()
            member.start(0)
            head = {"kind": "contributed", "step": 0, "attempt": 0, "chunks": [0], "size": 30_000}
            member._control.tell({**head, "weight": 1.0, "sums": {}, "seconds": []})
            finish(other)
    check_steps(other, 0, 3)
    assert "contributed chunks (0,)" in listener.of("dropped")[0].reason


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_no_header_does_harm(data: bytes) -> None:
    try:
        header = parse_header(data)
    except BadMessage:
        return
    assert isinstance(header["kind"], str)


@given(st.binary(min_size=16, max_size=16))
def test_no_prefix_announces_more_than_its_bound(data: bytes) -> None:
    try:
        header, body = wire.parse_prefix(data, header_most=100, body_most=200)
    except BadMessage:
        return
    assert header <= 100
    assert body <= 200


def test_blocks_land_inside_their_place_or_nowhere() -> None:
    total, parts = np.zeros(100, np.float32), np.zeros((1, 100), np.float32)
    summing = Round((3, 0), [1, 2], 1, total=total, parts=parts)
    head = {"kind": "part", "s": 3, "a": 0, "o": 0}
    assert summing.place(2, head, 48 * 4) is not None
    for number, other, length in (
        (9, {}, 16), (1, {}, 16), (2, {}, 15), (2, {}, 49 * 4), (2, {"o": 16}, 16), (2, {"o": -16}, 16),
        (2, {"kind": "sum"}, 53 * 4),
    ):  # fmt: skip
        assert summing.place(number, {**head, **other}, length) is None, (number, other, length)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("host:80", ("host", 80)),
        ("[::1]:80", ("::1", 80)),
        ("10.0.0.1:0", ("10.0.0.1", 0)),
        ("[fe80::1]:9", ("fe80::1", 9)),
    ],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address
    assert format_address(*address) == text


@pytest.mark.parametrize("text", ["host", ":80", "host:", "::1:80", "host:x", "host:99999", "host:-1", ""])
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(InvalidInput, match="expected host:port"):
        parse_address(text)


def test_an_announced_name_is_where_others_connect() -> None:
    with coordinator(expected=2) as server:
        replicas = [Replica(f"r{n}", server.address, steps=2, announce="127.0.0.1") for n in range(2)]
        for replica in replicas:
            replica.start()
        finish(*replicas)
    for replica in replicas:
        check_steps(replica, 0, 2)
        assert replica.member._listener.fileno() == -1


def test_msgpack_bounds_sizes_by_what_is_there() -> None:
    with pytest.raises(ValueError, match="exceeds"):
        msgpack.unpackb(b"\xdd\xff\xff\xff\xff")
