"""The link: one thread that owns the port, keeps the order, opens the port again when it breaks, and leaves the gate
output at its safe level whatever happens: to the line, to the port, or to itself."""

import contextlib
import os
import select
import threading
import time
from collections import deque
from dataclasses import replace

from stpm.edge.errors import PlcError
from stpm.edge.plc.ascii_port import AsciiPort, Nowhere
from stpm.edge.plc.base import Link, Port
from stpm.edge.plc.gate_output import DEAD_MAN_NS, MS, GateOutput
from stpm.edge.plc.inbox import Inbox
from stpm.edge.plc.messages import (
    Connected,
    Disconnected,
    Gate,
    GateReleased,
    Incoming,
    Outgoing,
    Part,
    State,
    Switched,
    Undelivered,
    Unswitched,
)
from stpm.edge.plc.outbox import Outbox
from stpm.edge.plc.pins import PinsPort
from stpm.edge.plc.serial_port import character_s
from stpm.edge.plc.settings import PlcSettings

FIRST_RETRY_S, LONGEST_RETRY_S = 0.05, 0.5
LONGEST_WAIT_S = 1.0
# more than that of line time may not wait in the device: there nothing expires, and nothing overtakes
LONGEST_BACKLOG_S = 0.1
LOOK_AGAIN_S = 0.001, 0.05  # least and longest, while it does
ARRIVE_S = 0.4  # how long the last words may take to arrive, or two timeouts,
LAST_WORDS = 200  # and so many characters on a slow line
# what `close` waits for besides: opening and a state, or one exchange of work; the gate; the last state; its arrival
LAST_VERBS, MARGIN_S = 5, 0.1


def open_link(settings: PlcSettings, safe_gate: bool = False) -> Link:
    """A link over `settings.port`, "none" for one that goes nowhere. `safe_gate`: the level of the gate output that
    rejects, left behind by `close`. PlcError when the port does not open; a port that breaks later is opened again.
    ConfigError for settings that contradict each other."""
    return LinkThread(_port(settings, safe_gate), settings, safe_gate)


def _port(settings: PlcSettings, safe_gate: bool) -> Port:
    if settings.port == "none":
        return Nowhere()
    # pymodbus takes a while to import
    match settings.protocol:
        case "modbus-master":
            from stpm.edge.plc.modbus_master import ModbusMaster

            return ModbusMaster(settings, safe_gate)
        case "modbus-slave":
            from stpm.edge.plc.modbus_slave import ModbusSlave

            return ModbusSlave(settings)
        case "pins":
            return PinsPort(settings)
    return AsciiPort(settings)


class LinkThread:
    def __init__(self, port: Port, settings: PlcSettings, safe_gate: bool = False) -> None:
        self._port = port
        self._outbox = Outbox(settings.queue, round(settings.expire_ms * MS))
        self._gate = GateOutput(safe_gate)
        self._inbox = Inbox(settings.enable)
        self._lock = threading.Lock()  # of the two below; never held while anything waits
        self._posted: deque[tuple[Outgoing, int]] = deque()
        self._closed = False
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self._last: State | None = None  # set by `close`
        self._connected, self._retry_s, self._retry_at_ns = False, FIRST_RETRY_S, 0
        self._got_last = False
        self._bug: BaseException | None = None
        try:
            self._tell(port.open())
            self._arrive_s = max(ARRIVE_S, 2 * settings.timeout_ms / 1000) + LAST_WORDS * character_s(settings)
        except BaseException:
            self._close_descriptors()
            raise
        self._close_s = LAST_VERBS * settings.timeout_ms / 1000 + self._arrive_s + MARGIN_S
        self._thread = threading.Thread(target=self._run, name="PLC link", daemon=True)
        self._thread.start()

    # --- from any thread

    def post(self, message: Outgoing) -> None:
        with self._lock:
            if not self._closed:
                self._posted.append((message, time.monotonic_ns()))
                os.eventfd_write(self._wake, 1)
                return
        self._inbox.put(_refusal(message, "the link is closed"))

    def alive(self, now_ns: int) -> None:
        self._gate.alive_ns = now_ns

    def events(self) -> list[Incoming]:
        if self._bug is not None:
            bug, self._bug = self._bug, None
            raise bug
        return self._inbox.take()

    def fileno(self) -> int:
        return self._inbox.fileno()

    def close(self, last: State) -> bool:
        with self._lock:
            if self._closed:
                return self._got_last
            self._last = last
            os.eventfd_write(self._wake, 1)
        self._thread.join(self._close_s)
        with self._lock:
            self._closed = True
            left = [message for message, _ in self._posted]
            self._posted.clear()
        if not self._thread.is_alive():
            self._close_descriptors()
        for message in left:
            self._inbox.put(_refusal(message, "the link is closed"))
        return self._got_last

    # --- the thread

    def _run(self) -> None:
        try:
            self._greet()
            while self._last is None:
                if self._connected:
                    self._work()
                else:
                    self._retry()
            self._collect()
            self._refuse_waiting("the link was closed first")
            self._got_last = self._say_last(self._last, PlcError)
        except BaseException as bug:
            self._bug = bug  # raised again by `events`
            self._inbox.wake()
            newest = self._outbox.newest or State("")
            fault = replace(newest, state="FAULT", reason=f"unexpected {type(bug).__name__}", code=1)
            with contextlib.suppress(Exception):  # the port may be what is broken
                self._say_last(fault, Exception)
        finally:
            with contextlib.suppress(Exception):
                self._port.close(0)
            self._take_posted()
            self._refuse_waiting("the link is closed")
            self._inbox.give_up(time.monotonic_ns(), "the link is closed")

    def _greet(self) -> None:
        """The port has just been opened: the newest state first, then the gate as it should be."""
        try:
            if self._outbox.newest is not None:
                self._send(self._outbox.newest)
            self._release()
            if self._outbox.gate is None and (edge := self._gate.restored()) is not None:
                self._hear(self._port.send(edge, time.monotonic_ns()))
        except PlcError as error:
            self._lost(error)
            return
        self._connected, self._retry_s = True, FIRST_RETRY_S
        self._tell([Connected(time.monotonic_ns())])

    def _work(self) -> None:
        try:
            while True:
                self._release()
                self._collect()
                if self._last is not None:
                    return
                backlog_s = self._port.backlog_s()
                if backlog_s > LONGEST_BACKLOG_S:
                    self._outbox.condense()
                    break
                if (message := self._outbox.next()) is None:
                    break
                self._send(message)
            self._hear(self._port.wait(self._wake, self._wait_s(backlog_s)))
        except PlcError as error:
            self._lost(error)

    def _wait_s(self, backlog_s: float) -> float:
        """Until something is due, or there is room for more."""
        times = [self._gate.due_ns(), self._inbox.due_ns(), self._outbox.due_ns()]
        now_ns = time.monotonic_ns()
        wait_s = min([LONGEST_WAIT_S, *(max(0, due - now_ns) / 1e9 for due in times if due is not None)])
        if backlog_s > LONGEST_BACKLOG_S:
            least, longest = LOOK_AGAIN_S
            wait_s = min(wait_s, longest, max(least, backlog_s - LONGEST_BACKLOG_S))
        return wait_s

    def _retry(self) -> None:
        """Wait for the time of the next attempt, and make it."""
        self._release()
        self._collect()
        self._outbox.only_the_newest()
        now_ns = time.monotonic_ns()
        if now_ns < self._retry_at_ns:
            times = [self._retry_at_ns, self._inbox.due_ns(), self._outbox.due_ns()]
            due_ns = min(due for due in times if due is not None)
            select.select([self._wake], [], [], max(0, due_ns - now_ns) / 1e9)
            return
        try:
            self._tell(self._port.open())
        except PlcError as error:
            self._lost(error)
        else:
            self._greet()

    def _lost(self, error: PlcError) -> None:
        now_ns = time.monotonic_ns()
        self._port.close(0)
        self._gate.lost()
        if self._connected:
            self._tell([Disconnected(now_ns, str(error))])
        self._connected = False
        self._retry_at_ns = now_ns + round(self._retry_s * 1e9)
        self._retry_s = min(2 * self._retry_s, LONGEST_RETRY_S)

    def _send(self, message: Outgoing) -> None:
        """What fails half-way is not sent again: the PLC may have got it."""
        if isinstance(message, Gate):
            self._gate.sends(message)
        try:
            self._hear(self._port.send(message, time.monotonic_ns()))
        except PlcError as error:
            self._tell(_refusal(message, str(error)))
            raise

    def _release(self) -> None:
        """When the line is not heard from any more its gate lets nothing through."""
        now_ns = time.monotonic_ns()
        newly = self._gate.release(now_ns)
        done = False
        try:
            # while the port is closed `_greet` will
            if self._connected and (edge := self._gate.owed(now_ns)) is not None:
                heard = self._port.send(edge, now_ns)
                self._hear(heard)
                done = any(isinstance(event, Switched) and event.active == edge.active for event in heard)
        finally:
            if newly:
                what = f"the link {'has put' if done else 'puts'} the gate output to its safe level"
                why = f"the line had not been heard from for {DEAD_MAN_NS // MS} ms"
                self._tell([GateReleased(now_ns, f"{what}: {why}")])

    def _collect(self) -> None:
        """What was posted since, and what came of what waits."""
        self._take_posted()
        now_ns = time.monotonic_ns()
        edge = self._outbox.gate
        if edge is not None and (why := self._gate.refuses(edge, self._outbox.gate_ns, now_ns)):
            self._outbox.gate = None
            self._tell(_refusal(edge, why))
        self._tell(self._outbox.expired(now_ns))
        self._hear(self._port.tick(now_ns))

    def _take_posted(self) -> None:
        with self._lock:
            posted = list(self._posted)
            self._posted.clear()
            if select.select([self._wake], [], [], 0)[0]:
                os.eventfd_read(self._wake)
        for message, at_ns in posted:
            if isinstance(message, Part | Gate):
                self._inbox.awaits(message)
            if isinstance(message, Gate):
                self._gate.posted(message)
            self._tell(self._outbox.put(message, at_ns))

    def _say_last(self, last: State, expected: type[Exception]) -> bool:
        """The safe level, the last state; what fails does not keep the rest from its chance. True when that state has
        arrived."""
        if not self._connected:
            try:
                self._tell(self._port.open())
            except expected:
                return False  # the PLC hears the silence
        for message in (self._gate.last(), last):
            if message is not None:
                with contextlib.suppress(expected):
                    self._hear(self._port.send(message, time.monotonic_ns()))
        return self._port.close(self._arrive_s)

    def _refuse_waiting(self, reason: str) -> None:
        while (message := self._outbox.next()) is not None:
            self._tell(_refusal(message, reason))

    # --- to the line

    def _hear(self, events: list[Incoming]) -> None:
        """What the port says."""
        self._gate.hear(events)
        self._tell(events)

    def _tell(self, events: list[Incoming]) -> None:
        self._inbox.tell(events, time.monotonic_ns())

    def _close_descriptors(self) -> None:
        os.close(self._wake)
        self._inbox.close()


def _refusal(message: Outgoing, reason: str) -> list[Incoming]:
    """The answer to what is not sent, where it wants one."""
    now_ns = time.monotonic_ns()
    match message:
        case Part(id):
            return [Undelivered(id, now_ns, reason)]
        case Gate(id, active):
            return [Unswitched(id, active, now_ns, reason)]
    return []
