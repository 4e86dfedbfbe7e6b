"""A serial cable made of two pseudo-terminals and a thread that carries bytes between them, to be cut, plugged and
disturbed. Nothing of a serial line that is electrical is in it: no speed, no parity, no RTS and DTR."""

import contextlib
import os
import queue
import select
import tempfile
import threading
import time
import tty
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Literal

End = Literal["ours", "theirs"]


class PtyCable:
    """`ours` and `theirs` are the paths to open: symbolic links, so that an end that is unplugged and plugged in again
    comes back under its name. Every method has done its work when it returns."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="cable")
        self.ours, self.theirs = (str(Path(self._folder.name) / name) for name in ("ours", "theirs"))
        self.delay_s = 0.0  # of every byte
        self.stalled = False  # nobody takes what our end writes: its buffer fills up
        self.garble: Callable[[bytes], bytes] | None = None  # what becomes of bytes on their way
        self.halved = 0  # how often `half_line` has done its work
        self._cut = False
        self._halve: set[End] = set()
        self._terminals: dict[End, tuple[int, int]] = {}  # master, and our handle on the slave that keeps it alive
        self._late: list[tuple[float, End, bytes]] = []
        self._orders: queue.SimpleQueue[tuple[Callable[[], None], threading.Event]] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self._ended = False
        self._thread = threading.Thread(target=self._carry, name="cable", daemon=True)
        self._thread.start()
        for end in ("ours", "theirs"):
            self.plug(end)

    def __enter__(self) -> "PtyCable":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for end in ("ours", "theirs"):
            self.unplug(end)
        self._do(lambda: setattr(self, "_ended", True))
        self._thread.join()
        os.close(self._wake)
        self._folder.cleanup()

    def cut(self) -> None:
        """Bytes are lost in both directions; the devices stay."""
        self._do(lambda: setattr(self, "_cut", True))

    def splice(self) -> None:
        self._do(lambda: setattr(self, "_cut", False))

    def noise(self, data: bytes, to: End = "ours") -> None:
        """These bytes arrive at that end as if the other had sent them."""
        self._do(lambda: self._deliver(to, data))

    def half_line(self, to: End = "theirs") -> None:
        """Of the next bytes on their way to that end only the first half arrives."""
        self._do(lambda: self._halve.add(to))

    def unplug(self, end: End = "ours") -> None:
        """The device at that end vanishes, as a USB adapter does."""
        self._do(lambda: self._unplug(end))

    def plug(self, end: End = "ours") -> None:
        self._do(lambda: self._plug(end))

    # --- in the thread

    def _do(self, order: Callable[[], None]) -> None:
        done = threading.Event()
        self._orders.put((order, done))
        os.eventfd_write(self._wake, 1)
        done.wait()

    def _unplug(self, end: End) -> None:
        handles = self._terminals.pop(end, None)
        if handles is not None:
            os.unlink(getattr(self, end))
            for handle in handles:
                os.close(handle)

    def _plug(self, end: End) -> None:
        if end not in self._terminals:
            master, slave = os.openpty()
            tty.setraw(slave)
            os.set_blocking(master, False)
            os.symlink(os.ttyname(slave), getattr(self, end))
            self._terminals[end] = master, slave

    def _carry(self) -> None:
        while not self._ended:
            masters = {handles[0]: end for end, handles in self._terminals.items()}
            if self.stalled and "ours" in self._terminals:
                masters.pop(self._terminals["ours"][0])
            timeout = max(0.0, min(self._late)[0] - time.monotonic()) if self._late else 0.05
            readable, _, _ = select.select([self._wake, *masters], [], [], timeout)
            for master in readable:
                if master in masters:
                    self._forward("theirs" if masters[master] == "ours" else "ours", os.read(master, 65536))
            now = time.monotonic()
            for each in sorted(each for each in self._late if each[0] <= now):
                self._late.remove(each)
                self._deliver(*each[1:])
            if self._wake in readable:
                os.eventfd_read(self._wake)
                while not self._orders.empty():
                    order, done = self._orders.get()
                    order()
                    done.set()

    def _forward(self, to: End, data: bytes) -> None:
        if to in self._halve:
            self._halve.discard(to)
            self.halved += 1
            data = data[: len(data) // 2]
        if self._cut:
            return
        if self.garble is not None:
            data = self.garble(data)
        if self.delay_s:
            self._late.append((time.monotonic() + self.delay_s, to, data))
        else:
            self._deliver(to, data)

    def _deliver(self, to: End, data: bytes) -> None:
        if to in self._terminals:
            # what nobody reads is lost, as on a wire
            with contextlib.suppress(BlockingIOError):
                os.write(self._terminals[to][0], data)
