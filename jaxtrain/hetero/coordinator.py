"""`Coordinator` forms the group of a run, watches over its members and begins their steps.

It passes on small messages only; gradients and states go from member to member. So it may live in the launcher, or
beside the first member: a thread with an event loop inside. It needs no JAX.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from jaxtrain.hetero.group import Group
from jaxtrain.hetero.membership import Event
from jaxtrain.hetero.seats import Application
from jaxtrain.hetero.wire import (
    CONTROL_BYTES,
    GREETING_BYTES,
    HANDSHAKE_S,
    SHAPE_ERRORS,
    ServerProof,
    WrongSecret,
    check_secret,
    format_address,
    pack,
    parse_address,
    read_message,
    tune,
)
from zarr_store.errors import InvalidInput

__all__ = ["Coordinator"]

_TICK_S = 0.1
_BEAT_S = 0.5
_STRANGERS = 64
"""Most connections at a time that have not yet proved the secret."""
_REPORT_EVERY_S = 60.0
"""Seconds in which one refused address gets at most one line in the log."""
_UNSENT_BYTES = 16 << 20
"""Most bytes that wait for a member that does not read."""

logger = logging.getLogger(__name__)


class Coordinator:
    """The server of one group, in a thread.

    Args:
        bind: host:port to listen at; port 0 takes a free one. Only 127.0.0.1 is safe without a trusted network.
        secret: Known to all members, and to nobody else.
        min_members: Fewest members with which the run goes on.
        max_members: Most members; None is no limit.
        expected: Members to wait for before the first step.
        form_s: Seconds after the first joining until fewer members, but at least the minimum, may begin.
        stall_s: Seconds after which a member is dropped for which all others wait, though it shows signs of life.
        on_event: Called with each change of the group, from the coordinator's thread.

    Raises:
        InvalidInput: The numbers contradict each other, the secret is too short, or the address is in use.
    """

    def __init__(
        self,
        bind: str,
        secret: str,
        *,
        min_members: int = 1,
        max_members: int | None = None,
        expected: int = 1,
        form_s: float = 300.0,
        stall_s: float = 1800.0,
        on_event: Callable[[Event], None] = lambda _event: None,
    ) -> None:
        most = expected if max_members is None else max_members
        if not 1 <= min_members <= expected <= most:
            raise InvalidInput(
                f"expected 1 ≤ fewest ≤ expected ≤ most members, got {min_members}, {expected} and {max_members}"
            )
        self._key = check_secret(secret)
        self._on_event = on_event
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._strangers = 0
        self._reported: dict[str, float] = {}
        self._group = Group(
            min_members=min_members, max_members=max_members, expected=expected, form_s=form_s, stall_s=stall_s,
            send=self._send, close=self._close_member, on_event=self._tell,
        )  # fmt: skip
        self._socket, self.address = _listen(bind)
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="coordinator", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def members(self) -> tuple[str, ...]:
        """Names of the members that take part in steps."""
        return self._group.members

    @property
    def finished(self) -> bool:
        """Whether a member has said that the run reached its end."""
        return self._group.finished

    def close(self) -> None:
        """End the server; members that are left find the coordinator lost."""
        if self._thread.is_alive():
            with contextlib.suppress(RuntimeError):  # the loop has just ended by itself
                self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(timeout=10)

    # ── the thread ──

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._accept, sock=self._socket)
        beats = asyncio.create_task(self._tick())
        try:
            await self._stop.wait()
        finally:
            beats.cancel()
            server.close()
            for writer in list(self._writers.values()):
                writer.close()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(beats, *self._tasks, return_exceptions=True)

    async def _tick(self) -> None:
        """Tell the group the time, and send signs of life."""
        last = beat = time.monotonic()
        while True:
            await asyncio.sleep(_TICK_S)
            now = time.monotonic()
            if now - last > 5 * _TICK_S:  # this process was paused: what members sent in that time was not read
                self._group.forgive(now - last)
            last = now
            self._group.tick(now)
            if now - beat > _BEAT_S:
                beat = now
                for number in list(self._writers):
                    self._send(number, {"kind": "beat"})

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection from its proof to its end."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        number = 0
        try:
            application = await self._greet(reader, writer)
            if application is not None:
                number = self._seat(application, writer)
            if number:
                await self._listen_to(number, reader)
        except asyncio.CancelledError:  # the server ends; before Python 3.12 a cancelled handler is logged as a fault
            return
        finally:
            self._tasks.discard(task)
            self._writers.pop(number, None)
            if number:
                self._group.drop(number, "its connection ended", time.monotonic())
            writer.close()

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Application | None:
        """Check that a stranger knows the secret, and return its application; None if there is none."""
        peer = writer.get_extra_info("peername")
        host = str(peer[0]) if peer else "?"
        if self._strangers >= _STRANGERS:
            return None
        self._strangers += 1
        spoke = False
        try:
            async with asyncio.timeout(HANDSHAKE_S):
                proof = ServerProof(self._key, "member")
                writer.write(proof.challenge)
                answer = await read_message(reader, header_most=GREETING_BYTES)
                spoke = True
                writer.write(proof.check(answer))
                message = await read_message(reader, header_most=CONTROL_BYTES)
            if message["kind"] != "join":
                raise ValueError(f"expected a request to join, got {message['kind'][:40]!r}")
            return Application.from_message(message)
        except WrongSecret as error:
            writer.write(pack({"kind": "refused", "reason": str(error)}))
            self._report(host, str(error))
        except TimeoutError:
            self._report(host, f"it did not prove the secret within {HANDSHAKE_S:g} s")
        except (asyncio.IncompleteReadError, ConnectionResetError) as error:
            # who looks whether the port is open, as another launcher does, sends nothing
            if spoke or (isinstance(error, asyncio.IncompleteReadError) and error.partial):
                self._report(host, "it closed the connection before it proved the secret")
        except (OSError, *SHAPE_ERRORS) as error:
            self._report(host, str(error))
        finally:
            self._strangers -= 1
        return None

    def _report(self, host: str, why: str) -> None:
        """Log at most once a minute that an address was refused, so that a port scanner cannot fill the log."""
        now = time.monotonic()
        if now - self._reported.get(host, -_REPORT_EVERY_S) < _REPORT_EVERY_S:
            return
        if len(self._reported) > 1000:
            self._reported.clear()
        self._reported[host] = now
        logger.warning("a connection from %s to the group's coordinator was refused: %s", host, why[:300])

    def _seat(self, application: Application, writer: asyncio.StreamWriter) -> int:
        """Give an applicant its seat, or tell it why it gets none."""
        now = time.monotonic()
        number, reason, again = self._group.join(application, now)
        if not number:
            answer = (
                {"kind": "finished"} if reason == "finished" else {"kind": "refused", "reason": reason, "again": again}
            )
            writer.write(pack(answer))
            return 0
        tune(writer.get_extra_info("socket"), application.silence_s)
        self._writers[number] = writer
        self._send(number, {"kind": "joined", "number": number, "group": self._group.id})
        self._group.welcome(number, now)
        return number

    async def _listen_to(self, number: int, reader: asyncio.StreamReader) -> None:
        while number in self._writers:
            try:
                message = await read_message(reader, header_most=CONTROL_BYTES)
            except (asyncio.IncompleteReadError, OSError):
                return
            try:
                self._group.receive(number, message, time.monotonic())
            except SHAPE_ERRORS as error:
                logger.warning("a message of %s was not understood: %s", self._group.names(number), error)
                self._group.drop(number, f"sent a message that was not understood: {error}", time.monotonic())
                return

    # ── what the group wants ──

    def _send(self, number: int, message: Mapping[str, Any]) -> None:
        writer = self._writers.get(number)
        if writer is None or writer.is_closing():
            return
        if writer.transport.get_write_buffer_size() > _UNSENT_BYTES:
            writer.transport.abort()  # it reads nothing, and is dropped when its connection is found to be gone
            return
        writer.write(pack(message))

    def _close_member(self, number: int) -> None:
        writer = self._writers.pop(number, None)
        if writer is not None:
            writer.close()  # sends what is left first

    def _tell(self, event: Event) -> None:
        try:
            self._on_event(event)
        except Exception:  # a listener's fault must not end the run of all members
            logger.exception("a listener of the group's events failed")


def _listen(bind: str) -> tuple[socket.socket, str]:
    """Return a listening socket and its address."""
    host, port = parse_address(bind)
    try:
        info = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        server = socket.create_server(info[4][:2], family=info[0], backlog=128)
    except OSError as error:
        raise InvalidInput(
            f"the coordinator cannot listen at {bind}: {error.strerror or error}; another coordinator may be there: "
            "end it, or choose another port"
        ) from error
    return server, format_address(host, server.getsockname()[1])
