"""The connection of one member with the coordinator: messages that come are kept until the member looks at them.

Signs of life are sent by a thread of their own, so that a long compilation is not taken for death.
"""

from __future__ import annotations

import contextlib
import math
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from jaxtrain.hetero.membership import CoordinatorLost, Dropped, GroupError, Refused, RunFinished, TooFewMembers
from jaxtrain.hetero.seats import Application
from jaxtrain.hetero.wire import CONTROL_BYTES, BadMessage, WrongSecret, connect, pack, receive
from zarr_store.errors import AccessError

__all__ = ["Control"]

_AGAIN_S = 0.3
_LOOK_S = 0.5
_FEWEST_SILENCE_S = 5.0


class Control:
    """The member's end of the connection with the coordinator.

    Args:
        sock: A connection on which the secret is proved.
        address: Address of the coordinator, for messages.
        name: Name of this member, for threads.
        silence_s: Seconds of silence after which a process counts as dead, on either side.
    """

    def __init__(self, sock: socket.socket, address: str, name: str, silence_s: float) -> None:
        self._socket, self._address, self._silence_s = sock, address, silence_s
        self._lock = threading.Lock()
        self.wake = threading.Condition()
        """Held while messages or blocks of other members are looked at; notified when one comes."""
        self._inbox: deque[dict[str, Any]] = deque()
        self._closed = threading.Event()
        self._end: GroupError | RunFinished | None = None
        sock.settimeout(max(2 * silence_s, _FEWEST_SILENCE_S))
        self._threads = [
            threading.Thread(target=run, name=f"{name} {what}", daemon=True)
            for run, what in ((self._read, "control"), (self._beat, "beats"))
        ]

    def start(self) -> None:
        """Begin to read, and to send signs of life."""
        for thread in self._threads:
            thread.start()

    # ── threads ──

    def _read(self) -> None:
        try:
            while True:
                self._await_message()
                message, _ = receive(self._socket, header_most=CONTROL_BYTES)
                if message["kind"] != "beat":
                    self._put(message)
        except OSError as error:
            self._put({"kind": "lost", "reason": str(error) or type(error).__name__})

    def _await_message(self) -> None:
        """Wait for a sign of life. Silence is counted in short waits, so that time in which this process stood still
        does not count: the coordinator's signs may only be about to arrive.
        """
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        most = max(2 * self._silence_s, _FEWEST_SILENCE_S)
        for _ in range(math.ceil(most / _LOOK_S)):
            if poll.poll(_LOOK_S * 1000):
                return
        raise TimeoutError(f"silent for {most:.1f} s")

    def _put(self, message: dict[str, Any]) -> None:
        with self.wake:
            self._inbox.append(message)
            self.wake.notify_all()

    def _beat(self) -> None:
        while not self._closed.wait(self._silence_s / 4):
            self.tell({"kind": "beat"})

    # ── for the member ──

    def tell(self, message: Mapping[str, Any]) -> None:
        """Send a message; a lost coordinator is noticed by whoever waits for an answer."""
        with self._lock, contextlib.suppress(OSError):
            self._socket.sendall(pack(message))

    def next(self, ready: Callable[[], bool] = lambda: False, *, wait: bool = True) -> dict[str, Any] | None:
        """Return the next message; None once `ready` is true, or if there is none and the call must not wait.

        Raises:
            GroupError, RunFinished: The membership has ended; every later call raises the same.
        """
        with self.wake:
            while not self._inbox:
                if self._end is not None:
                    raise self._end
                if ready() or not wait:
                    return None
                self.wake.wait()
            message = self._inbox.popleft()
        self._end = self._ending(message)
        if self._end is not None:
            raise self._end
        return message

    def _ending(self, message: Mapping[str, Any]) -> GroupError | RunFinished | None:
        kind, reason = message["kind"], message.get("reason", "")
        if kind == "dropped":
            return Dropped(f"the group goes on without this member, which {reason}")
        if kind == "ended":
            return TooFewMembers(str(reason))
        if kind == "finished":
            return RunFinished("the run has reached its end")
        if kind == "lost":
            return CoordinatorLost(
                f"the coordinator at {self._address} does not answer any more ({reason}): the state is kept, and the "
                "run continues from its newest checkpoint when it is started again"
            )
        return None

    def close(self, *, politely: bool) -> None:
        """End the connection in order, so that the coordinator reads the last message."""
        self._closed.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR if politely else socket.SHUT_RDWR)
        for thread in self._threads:
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(timeout=2.0)
        self._socket.close()


def call_coordinator(address: str, key: bytes, wait_s: float) -> socket.socket:
    """Connect to the coordinator, which may start later than its members.

    Raises:
        AccessError: Nobody answers in time, or it has another secret.
    """
    until = time.monotonic() + wait_s
    while True:
        try:
            return connect(address, key, "member", silence_s=_FEWEST_SILENCE_S)
        except WrongSecret as error:
            raise AccessError(
                f"the coordinator at {address} was reached, but {error}: set TERRASHARD_HETERO_SECRET to the text that "
                "it was started with"
            ) from error
        except BadMessage as error:
            raise AccessError(f"what answers at {address} is not the coordinator of a group: {error}") from error
        except OSError as error:
            if time.monotonic() > until:
                raise AccessError(
                    f"the coordinator at {address} was not reached within {wait_s:g} s ({error}): check that it runs, "
                    "and that its address can be reached from this machine"
                ) from error
        time.sleep(_AGAIN_S)


def ask_to_join(
    address: str, key: bytes, make: Callable[[socket.socket], Application], wait_s: float
) -> tuple[socket.socket, dict[str, Any]]:
    """Connect to the coordinator and ask to join, until there is an answer.

    Args:
        address: host:port of the coordinator.
        key: The secret.
        make: Makes the application, once the address of this side of the connection is known.
        wait_s: Seconds to wait for a coordinator, and for a name that is still taken.

    Raises:
        Refused: The group does not take this process.
        RunFinished: The run has reached its end.
        AccessError: The coordinator cannot be reached.
    """
    until = time.monotonic() + wait_s
    while True:
        sock = call_coordinator(address, key, wait_s)
        try:
            application = make(sock)
            sock.settimeout(max(2 * application.silence_s, _FEWEST_SILENCE_S))
            sock.sendall(pack(application.to_message()))
            answer, _ = receive(sock, header_most=CONTROL_BYTES)
        except OSError as error:
            sock.close()
            if time.monotonic() > until:
                raise AccessError(f"the coordinator at {address} gave no answer: {error}") from error
            time.sleep(_AGAIN_S)
            continue
        except BaseException:
            sock.close()
            raise
        if answer["kind"] == "joined":
            return sock, answer
        sock.close()
        if answer["kind"] == "finished":
            raise RunFinished("the run has reached its end")
        if not answer.get("again") or time.monotonic() > until:
            raise Refused(f"the group at {address} does not take {application.name}: {answer.get('reason')}")
        time.sleep(_AGAIN_S)
