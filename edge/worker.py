"""A child process of the line, and the channel to it.

The child is `python -m MODULE`, started afresh (never forked, so that it inherits no engine, camera or lock). It gets
the ring and its end of the channel as descriptors and its configuration as the first message. It dies with its parent,
whatever becomes of that, and leaves Ctrl-C and SIGTERM to it.

It is asked to end by closing the channel. Nothing here waits for that, but for `await_end`, which is for the end of a
run.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from stpm.edge.channel import Channel, ChannelClosedError, pair
from stpm.edge.ring import Ring

REAP_S = 0.5  # for the end of a child that was killed; one that hangs in a driver is left to the system

_PR_SET_PDEATHSIG = 1
# `-m` alone puts the current folder first on the child's path, where a socket.py of somebody's would be taken for
# Python's. Python 3.10 has no option for just that: its -I leaves out PYTHONPATH and the user's own packages too.
_SAFE_PATH = ["-P"] if sys.version_info >= (3, 11) else []


class Worker:
    """Started with the constructor, which does not wait for the child to be ready: it says so itself. OSError when
    the system has no process, memory or descriptor for it."""

    def __init__(self, module: str, configuration: msgspec.Struct, receives: Any, ring: Ring) -> None:
        ours, theirs = pair()
        with theirs:
            numbers = (theirs.fileno(), ring.descriptor, ring.slots, os.getpid())
            try:
                self.process = subprocess.Popen(
                    [sys.executable, *_SAFE_PATH, "-m", module, *map(str, numbers)],
                    stdin=subprocess.DEVNULL,
                    pass_fds=numbers[:2],
                    start_new_session=True,
                )
            except OSError:
                ours.close()
                raise
        self.channel: Channel[Any] = Channel(ours, receives)
        self.channel.send(configuration)

    def end(self, grace_s: float) -> list[Any]:
        """Ask it to end and wait, at the end of a run; kill it when it has not ended after `grace_s` seconds. What it
        had still to say."""
        self.channel.finish()
        await_end([self.process], grace_s)
        try:
            return self.channel.receive()
        except ChannelClosedError:
            return []
        finally:
            self.channel.close()


def await_end(processes: Iterable[subprocess.Popen[bytes]], grace_s: float) -> None:
    """Wait for children whose channels are closed, for all of them together. Those that have not ended after `grace_s`
    seconds are killed."""
    left = _left(processes, grace_s)
    for process in left:
        process.kill()
    _left(left, REAP_S)


def _left(processes: Iterable[subprocess.Popen[bytes]], wait_s: float) -> list[subprocess.Popen[bytes]]:
    """Those that are still there after so many seconds."""
    deadline = time.monotonic() + wait_s
    while (left := [each for each in processes if each.poll() is None]) and time.monotonic() < deadline:
        time.sleep(0.002)
    return left


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
