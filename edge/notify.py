"""What systemd is told (sd_notify(3)): ready, alive, stopping. Without systemd it goes nowhere."""

import contextlib
import os
import socket


class Notify:
    def __init__(self) -> None:
        address = os.environ.get("NOTIFY_SOCKET", "")
        # an @ stands for the NUL of an abstract address
        self._address = "\0" + address[1:] if address.startswith("@") else address
        # half of what systemd allows, as its manual advises; it sets the variable for the main process only
        allowed = (
            os.environ.get("WATCHDOG_USEC", "") if os.environ.get("WATCHDOG_PID", "") in ("", str(os.getpid())) else ""
        )
        self._interval_ns = int(allowed) * 1000 // 2 if allowed.isdecimal() else 0
        self._next_ns = 0

    def say(self, *lines: str) -> None:
        if not self._address:
            return
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
            out.setblocking(False)
            out.sendto("\n".join(lines).encode(), self._address)

    def alive(self, now_ns: int) -> None:
        """Called by the loop that does the work, and only while it does."""
        if self._interval_ns and now_ns >= self._next_ns:
            self._next_ns = now_ns + self._interval_ns
            self.say("WATCHDOG=1")
