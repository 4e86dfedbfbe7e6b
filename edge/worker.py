"""A child process of the line, and the channel to it.

The child is `python -m MODULE`, started afresh (never forked, so that it inherits no engine, camera or lock). It gets
the ring and its end of the channel as descriptors and its configuration as the first message. It dies with its parent,
whatever becomes of that, and leaves Ctrl-C and SIGTERM to it.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import msgspec

from stpm.edge.channel import Channel, ChannelClosedError, pair
from stpm.edge.ring import Ring

_PR_SET_PDEATHSIG = 1


class Worker:
    """Started with the constructor, which does not wait for the child to be ready: it says so itself."""

    def __init__(self, module: str, configuration: msgspec.Struct, receives: Any, ring: Ring) -> None:
        ours, theirs = pair()
        with theirs:
            numbers = (theirs.fileno(), ring.descriptor, ring.slots, os.getpid())
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, *map(str, numbers)],
                stdin=subprocess.DEVNULL,
                pass_fds=numbers[:2],
                start_new_session=True,
            )
        self.channel: Channel[Any] = Channel(ours, receives)
        self.channel.send(configuration)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def end(self, grace_s: float) -> None:
        """Close the channel, which asks the child to end; kill it when it has not after `grace_s` seconds."""
        self.channel.close()
        try:
            self.process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def kill(self) -> list[Any]:
        """At once; what the child had still said. One that even SIGKILL does not end, because it hangs in a driver, is
        left to the system."""
        self.process.kill()
        deadline = time.monotonic() + 0.5
        while self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        try:
            return self.channel.receive()
        except ChannelClosedError:
            return []
        finally:
            self.channel.close()


def serve(configuration: type[msgspec.Struct], receives: Any, main: Callable[[Any, Channel[Any], Ring], None]) -> None:
    """What a child module runs: `main(configuration, channel, ring)`, until it returns."""
    end, descriptor, slots, parent = (int(word) for word in sys.argv[1:5])
    _die_with(parent)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    connection = socket.socket(fileno=end)
    first = connection.recv(1 << 16)
    if first:
        main(
            msgspec.msgpack.decode(first, type=configuration),
            Channel(connection, receives),
            Ring(slots, descriptor),
        )


def _die_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)  # it had gone before
