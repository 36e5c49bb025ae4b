"""Messages between the processes of a group: their form, their bounds, and the proof that both sides know the secret.

A message is a prefix (a mark, the length of the header, the length of the body), a msgpack map as header, and a body of
raw little-endian bytes. Nothing is unpickled. Lengths are compared with their bounds before memory is taken, and before
the secret is proved only very short messages are read, within seconds.

Proof: the server sends a nonce; the client answers with a nonce of its own and HMAC-SHA256(secret, "client", both
nonces, purpose); the server answers with the same for "server". The secret itself is never sent. This keeps strangers
out; it does not hide or sign what is sent afterwards, so the network between the machines must be a trusted one.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import socket
import struct
import time
from collections.abc import Mapping
from typing import Any

import msgpack

from zarr_store.errors import InvalidInput

__all__ = [
    "BLOCK_BYTES",
    "CONTROL_BYTES",
    "HANDSHAKE_S",
    "SHAPE_ERRORS",
    "BadMessage",
    "ClientProof",
    "ServerProof",
    "WrongSecret",
    "check_secret",
    "connect",
    "format_address",
    "greet",
    "new_secret",
    "pack",
    "parse_address",
    "parse_header",
    "parse_prefix",
    "read_message",
    "receive",
    "receive_into",
    "send",
    "tune",
]

BLOCK_BYTES = 1 << 21
"""Most bytes of one body: small enough that receiving, adding and sending overlap, and to throw away a late one."""
CONTROL_BYTES = 8 << 20
"""Most bytes of a header from a member whose secret is proved; a recorded history of shares is the largest."""
BULK_HEADER_BYTES = 1024
GREETING_BYTES = 512
"""Most bytes of a header from a client that has not yet proved the secret."""
HANDSHAKE_S = 5.0
"""Seconds from the connection to the proof."""
PREFIX = struct.Struct(">4sIQ")
_MARK = b"TSg1"
_VERSION = 1
_NONCE = 32
_FEWEST_SECRET = 16

SHAPE_ERRORS = (KeyError, TypeError, ValueError, IndexError, AttributeError)
"""What reading a message of another shape than expected raises."""


class BadMessage(ConnectionError):
    """Received bytes are not a message of this protocol, or exceed its bound."""


class WrongSecret(ConnectionError):
    """The other side does not know the secret of this group."""


def new_secret() -> str:
    """Return a new secret for one group: 256 random bits as text."""
    return secrets.token_urlsafe(32)


def check_secret(secret: str) -> bytes:
    """Return the secret as a key.

    Raises:
        InvalidInput: It is too short to keep strangers out.
    """
    if len(secret) < _FEWEST_SECRET:
        raise InvalidInput(
            f"the group's secret has {len(secret)} characters, expected at least {_FEWEST_SECRET}: "
            "set TERRASHARD_HETERO_SECRET to a long random text, the same for all processes"
        )
    return hashlib.sha256(secret.encode()).digest()


def parse_address(text: str) -> tuple[str, int]:
    """Read host:port; an IPv6 address stands in brackets.

    >>> parse_address("[::1]:8476"), parse_address("gpu-a:0")
    (('::1', 8476), ('gpu-a', 0))
    """
    host, _, port = text.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    plain = not text.startswith("[") and ":" in host
    if not host or plain or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise InvalidInput(f"expected host:port (an IPv6 address as [address]:port), got {text!r}")
    return host, int(port)


def format_address(host: str, port: int) -> str:
    """Write host:port, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


# ── the form of a message ──


def pack(header: Mapping[str, Any], body_bytes: int = 0) -> bytes:
    """Return prefix and header of a message whose body has this many bytes."""
    packed: bytes = msgpack.packb(header)
    return PREFIX.pack(_MARK, len(packed), body_bytes) + packed


def parse_prefix(data: bytes | bytearray, *, header_most: int, body_most: int = 0) -> tuple[int, int]:
    """Return the lengths of header and body.

    Raises:
        BadMessage: The mark is another one, or a length exceeds its bound.
    """
    mark, header, body = PREFIX.unpack(data)
    if mark != _MARK:
        raise BadMessage(f"expected a message of a group of replicas, got bytes that start with {bytes(data[:8])!r}")
    if header > header_most or body > body_most:
        raise BadMessage(f"expected at most {header_most} + {body_most} bytes, a message announces {header} + {body}")
    return header, body


def parse_header(data: bytes | bytearray) -> dict[str, Any]:
    """Return the header of a message.

    Raises:
        BadMessage: It is not a msgpack map with a kind.
    """
    try:
        header = msgpack.unpackb(data, strict_map_key=True, use_list=True)
    except (ValueError, msgpack.UnpackException) as error:
        raise BadMessage(f"the header of a message cannot be read: {error}") from error
    if not isinstance(header, dict) or not isinstance(header.get("kind"), str):
        raise BadMessage("expected a header with a kind, got something else")
    return header


# ── sockets that wait ──


def tune(sock: socket.socket, silence_s: float) -> None:
    """Send small messages at once, and let the kernel find idle connections whose other end is gone.

    TCP_USER_TIMEOUT is not set: it also ends the connection with a member that computes for long and lets data wait.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", max(1, round(silence_s))),
        ("TCP_KEEPINTVL", max(1, round(silence_s / 4))),
        ("TCP_KEEPCNT", 4),
    ):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def receive_into(sock: socket.socket, view: memoryview) -> None:
    """Fill a buffer from a socket.

    Raises:
        ConnectionError: The other side closed the connection before it was full.
    """
    done = 0
    while done < len(view):
        count = sock.recv_into(view[done:], 0, socket.MSG_WAITALL)
        if not count:
            raise ConnectionResetError("the other side closed the connection")
        done += count


def receive(sock: socket.socket, *, header_most: int, body_most: int = 0) -> tuple[dict[str, Any], int]:
    """Return the next header and the length of the body that follows it."""
    prefix = bytearray(PREFIX.size)
    receive_into(sock, memoryview(prefix))
    header_bytes, body_bytes = parse_prefix(prefix, header_most=header_most, body_most=body_most)
    header = bytearray(header_bytes)
    receive_into(sock, memoryview(header))
    return parse_header(header), body_bytes


def send(sock: socket.socket, head: bytes, body: memoryview | None = None) -> None:
    """Send a packed header and its body, without copying them together."""
    if body is None or not len(body):
        sock.sendall(head)
        return
    sent = sock.sendmsg([head, body])
    if sent < len(head):
        sock.sendall(head[sent:])
        sent = len(head)
    if sent < len(head) + len(body):
        sock.sendall(body[sent - len(head) :])


# ── the proof ──


def _proof(key: bytes, side: str, first: bytes, second: bytes, purpose: str) -> bytes:
    text = b"|".join((b"terrashard group", side.encode(), first, second, purpose.encode()))
    return hmac.digest(key, text, "sha256")


class ServerProof:
    """The server's side of one handshake: send `challenge`, then send what `check` returns.

    Args:
        key: The secret as `check_secret` returns it.
        purpose: Purpose of the connection; the client must mean the same.
    """

    def __init__(self, key: bytes, purpose: str) -> None:
        self._key, self._purpose = key, purpose
        self._nonce = secrets.token_bytes(_NONCE)
        self.challenge = pack({"kind": "hello", "version": _VERSION, "nonce": self._nonce})

    def check(self, header: Mapping[str, Any]) -> bytes:
        """Return the answer to a client's proof.

        Raises:
            WrongSecret: The client does not know the secret, or means another group.
            BadMessage: It sent something else.
        """
        nonce, proof = header.get("nonce"), header.get("proof")
        if header["kind"] != "proof" or not isinstance(nonce, bytes) or not isinstance(proof, bytes):
            raise BadMessage("expected the proof that the secret is known, got another message")
        if len(nonce) != _NONCE or not hmac.compare_digest(
            proof, _proof(self._key, "client", self._nonce, nonce, self._purpose)
        ):
            raise WrongSecret("it does not know the secret of this group, or means another group")
        return pack({"kind": "welcome", "proof": _proof(self._key, "server", nonce, self._nonce, self._purpose)})


class ClientProof:
    """The client's side of one handshake: send what `answer` returns, then `check` what comes back."""

    def __init__(self, key: bytes, purpose: str) -> None:
        self._key, self._purpose = key, purpose
        self._nonce, self._theirs = secrets.token_bytes(_NONCE), b""

    def answer(self, header: Mapping[str, Any]) -> bytes:
        """Return the proof for a server's challenge.

        Raises:
            BadMessage: The server is something else, or of another version.
        """
        nonce = header.get("nonce")
        if header["kind"] == "refused":
            raise BadMessage(str(header.get("reason"))[:GREETING_BYTES])
        if header["kind"] != "hello" or header.get("version") != _VERSION or not isinstance(nonce, bytes):
            raise BadMessage(f"expected the greeting of a group of version {_VERSION}, got another message")
        self._theirs = nonce
        proof = _proof(self._key, "client", nonce, self._nonce, self._purpose)
        return pack({"kind": "proof", "nonce": self._nonce, "proof": proof})

    def check(self, header: Mapping[str, Any]) -> None:
        """Check that the server knows the secret too.

        Raises:
            WrongSecret: It does not, or says that we do not.
        """
        proof = header.get("proof")
        expected = _proof(self._key, "server", self._nonce, self._theirs, self._purpose)
        if header["kind"] != "welcome" or not isinstance(proof, bytes) or not hmac.compare_digest(proof, expected):
            raise WrongSecret("the other side has another secret, or is of another group")


def _greet(sock: socket.socket, deadline: float) -> dict[str, Any]:
    """Receive one short message before a point in time, however slowly its bytes come."""
    data, wanted, lengths = bytearray(), PREFIX.size, False
    while len(data) < wanted:
        try:
            sock.settimeout(max(deadline - time.monotonic(), 0.001))
            part = sock.recv(wanted - len(data))
        except TimeoutError:
            raise TimeoutError(f"no proof of the secret within {HANDSHAKE_S:g} s") from None
        if not part:
            raise ConnectionResetError("the other side closed the connection before the proof")
        data += part
        if len(data) == PREFIX.size and not lengths:
            lengths = True
            wanted += parse_prefix(data, header_most=GREETING_BYTES)[0]
    return parse_header(data[PREFIX.size :])


def connect(address: str, key: bytes, purpose: str, *, silence_s: float, wait_s: float = HANDSHAKE_S) -> socket.socket:
    """Connect to a server of this group, and prove the secret to each other.

    Raises:
        OSError: Nobody answers there, or somebody else.
        WrongSecret: The other side has another secret.
    """
    sock = socket.create_connection(parse_address(address), timeout=wait_s)
    try:
        proof, deadline = ClientProof(key, purpose), time.monotonic() + HANDSHAKE_S
        sock.sendall(proof.answer(_greet(sock, deadline)))
        proof.check(_greet(sock, deadline))
        sock.settimeout(None)
        tune(sock, silence_s)
    except BaseException:
        sock.close()
        raise
    return sock


def greet(sock: socket.socket, key: bytes, purpose: str, *, silence_s: float) -> None:
    """Check that a client that has just connected knows the secret.

    Raises:
        OSError: It did not, in time.
    """
    proof, deadline = ServerProof(key, purpose), time.monotonic() + HANDSHAKE_S
    sock.settimeout(HANDSHAKE_S)
    sock.sendall(proof.challenge)
    try:
        answer = proof.check(_greet(sock, deadline))
    except WrongSecret as error:
        sock.sendall(pack({"kind": "refused", "reason": str(error)}))
        raise
    sock.sendall(answer)
    sock.settimeout(None)
    tune(sock, silence_s)


async def read_message(reader: asyncio.StreamReader, *, header_most: int) -> dict[str, Any]:
    """Return the next message without a body.

    Raises:
        BadMessage: It is not a message, or too long.
        asyncio.IncompleteReadError: The other side closed the connection.
    """
    header, _ = parse_prefix(await reader.readexactly(PREFIX.size), header_most=header_most)
    return parse_header(await reader.readexactly(header))
