"""Lines on the terminal, printed by a thread of their own: one that is stopped (Ctrl-S) does not stop the line."""

import queue
import threading
from types import TracebackType

from stpm.edge.command import say

WAITING = 1000


class Terminal:
    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._lines: queue.Queue[str | None] = queue.Queue(WAITING)
        self._left_out = 0
        self._thread = threading.Thread(target=self._print, name="terminal", daemon=True)
        self._thread.start()

    def report(self, text: str) -> None:
        """Never waits: what nobody reads is left out and counted."""
        if self._quiet and text.startswith("part "):
            return
        try:
            if self._left_out:
                self._lines.put_nowait(f"... {self._left_out} lines left out: the terminal was too slow")
                self._left_out = 0
            self._lines.put_nowait(text)
        except queue.Full:
            self._left_out += 1

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._lines.put(None, timeout=1)
        except queue.Full:
            return  # nobody reads; the thread ends with the process
        self._thread.join(timeout=2)

    def _print(self) -> None:
        while (line := self._lines.get()) is not None:
            say(line)
