"""Messages between two processes of the line: whole ones or none, and a sender never waits.

A socket pair of the kind that keeps the borders of messages; each message is a msgspec.Struct with a tag, as
MessagePack.
"""

import contextlib
import select
import socket
from typing import Any, Generic, TypeVar

import msgspec

# far below what a socket buffer holds; pixels go through the ring
LONGEST = 32 << 10

Received = TypeVar("Received")


class ChannelClosedError(Exception):
    """The process at the other end has gone, or has sent what is no message, which is then the text. Not an error of
    the line: its supervisor starts another."""


class Channel(Generic[Received]):
    """One end. `receives` is the message type, or the union of types, that the other end sends."""

    def __init__(self, end: socket.socket, receives: Any) -> None:
        self._socket = end
        self._socket.setblocking(False)
        self._decoder: msgspec.msgpack.Decoder[Received] = msgspec.msgpack.Decoder(receives)
        self._nonsense = ""

    def send(self, message: msgspec.Struct) -> bool:
        """True when it is on its way; False when the other end does not read or has gone, or the system has no memory
        for it."""
        data = msgspec.msgpack.encode(message)
        if len(data) > LONGEST:
            raise ValueError(f"{type(message).__name__} of {len(data)} bytes is longer than {LONGEST}")
        try:
            self._socket.send(data)
        except OSError:
            return False
        return True

    def receive(self, timeout: float = 0) -> list[Received]:
        """All that has arrived, after waiting up to `timeout` seconds for the first. ChannelClosedError when nothing
        is left and nothing can follow."""
        messages: list[Received] = []
        if self._nonsense or self._socket.fileno() < 0:
            raise ChannelClosedError(self._nonsense)
        if timeout > 0:
            select.select([self._socket], [], [], timeout)
        while True:
            try:
                data = self._socket.recv(LONGEST)
            except BlockingIOError:
                return messages
            except OSError:
                data = b""
            if not data:
                break
            try:
                messages.append(self._decoder.decode(data))
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                self._nonsense = f"the process has sent what is no message ({error})"
                break
        if messages:
            return messages
        raise ChannelClosedError(self._nonsense)

    def finish(self) -> None:
        """Nothing more is sent; the other end hears that, and what it says until it has ended can be received."""
        with contextlib.suppress(OSError):  # it has gone already
            self._socket.shutdown(socket.SHUT_WR)

    @property
    def broken(self) -> bool:
        """It has brought nonsense, and is not read any more."""
        return bool(self._nonsense)

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()


def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
