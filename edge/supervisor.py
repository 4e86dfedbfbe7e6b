"""Keeps one child process alive: kill, start again, reap. The time is passed in, and nothing here waits.

A child that was killed is not gone at once, and what it had said may still lie in the channel. So it is heard out
until its end of the channel closes, which is after the system has taken its memory away. Another starts when it has
given back its devices too, and has ended; or after a while, because one that hangs in a driver does not end.
"""

from collections.abc import Callable
from subprocess import Popen
from typing import Any

from stpm.edge.channel import ChannelClosedError
from stpm.edge.worker import Worker

FIRST_DELAY_NS = 100_000_000
LONGEST_DELAY_NS = 1_500_000_000
# a child that was well for so long begins again with the shortest delay
WELL_NS = 10_000_000_000
# one that even SIGKILL does not end, because it hangs in a driver, is not waited for any longer
LAST_WORDS_NS = 500_000_000
GRACE_NS = 1_000_000_000  # for a child that was asked to end


class Supervisor:
    def __init__(self, start: Callable[[], Worker], longest_failing_ns: int = LONGEST_DELAY_NS) -> None:
        """`longest_failing_ns`: the longest delay after a child that has died before it was ready."""
        self._start, self._longest_failing_ns = start, longest_failing_ns
        self.worker: Worker | None = None
        self.restarts = -1  # the first start is none
        self.refused = ""  # why the system does not start a child
        self._failures = 0
        self._start_at_ns = 0
        self._well_since_ns: int | None = None
        self._killed: Worker | None = None
        self._said: list[Any] = []
        self._hear_until_ns = 0
        self._ending: list[tuple[Popen[bytes], int]] = []  # no longer listened to, and when to kill them

    def tick(self, now_ns: int) -> bool:
        """Start the child when it is due; True when that was done."""
        self.reap(now_ns)
        another = self.worker or self._killed or (self._ending and now_ns < self._hear_until_ns)
        if another or now_ns < self._start_at_ns:
            return False
        try:
            self.worker = self._start()
        except OSError as error:
            self.refused = error.strerror or str(error)
            self._back_off(now_ns, LONGEST_DELAY_NS)
            return False
        self.refused = ""
        self.restarts += 1
        return True

    def well(self, now_ns: int) -> None:
        """The child has said that it is ready."""
        self._well_since_ns = now_ns

    def down(self, now_ns: int) -> None:
        """The child has gone or must go: it is killed, and another starts after a delay that doubles."""
        if self.worker is not None:
            self.worker.process.kill()
            self._killed, self.worker = self.worker, None
            self._hear_until_ns = now_ns + LAST_WORDS_NS
            well_since_ns, self._well_since_ns = self._well_since_ns, None
            if well_since_ns is not None and now_ns - well_since_ns > WELL_NS:
                self._failures = 0
            self._back_off(now_ns, self._longest_failing_ns if well_since_ns is None else LONGEST_DELAY_NS)

    def last_words(self, now_ns: int) -> list[Any] | None:
        """Once for each child that was killed, when it is gone: what it had still said."""
        if self._killed is None:
            return None
        try:
            while more := self._killed.channel.receive():
                self._said += more
            silent = False
        except ChannelClosedError as closed:
            silent = not str(closed) or self._killed.process.poll() is not None
        if not silent and now_ns < self._hear_until_ns:
            return None
        self._killed.channel.close()
        self._ending.append((self._killed.process, now_ns))
        self._killed, said, self._said = None, self._said, []
        return said

    def dismiss(self, now_ns: int) -> None:
        """Ask the child to end, for good. It is not waited for, and killed when it has not ended in time."""
        if self.worker is not None:
            self.worker.channel.close()
            self._ending.append((self.worker.process, now_ns + GRACE_NS))
            self.worker = None

    def reap(self, now_ns: int) -> None:
        """Look after those that are on their way out."""
        self._ending = [(process, kill_ns) for process, kill_ns in self._ending if process.poll() is None]
        for process, kill_ns in self._ending:
            if now_ns >= kill_ns:
                process.kill()

    @property
    def empty(self) -> bool:
        """There is no process, not even one on its way out."""
        return self.worker is None and self._killed is None and not self._ending

    def fileno(self) -> int | None:
        """Readable when the child, or one that was killed, has said something or is gone."""
        worker = self.worker or self._killed
        # nonsense is never read out of the channel, so that it would stay readable
        return worker.channel.fileno() if worker and not (worker is self._killed and worker.channel.broken) else None

    def due_ns(self) -> int | None:
        """When another child will be started at the latest; None while there is one."""
        if self.worker is not None:
            return None
        return max(self._start_at_ns, self._hear_until_ns if self._killed or self._ending else 0)

    def close(self) -> list[Popen[bytes]]:
        """The run is over. The processes whose end is to be awaited (`worker.await_end`)."""
        for worker in (self.worker, self._killed):
            if worker is not None:
                worker.channel.close()
                self._ending.append((worker.process, 0))
        self.worker = self._killed = None
        return [process for process, _ in self._ending]

    def _back_off(self, now_ns: int, longest_ns: int) -> None:
        self._start_at_ns = now_ns + min(FIRST_DELAY_NS << min(self._failures, 10), longest_ns)
        self._failures += 1
