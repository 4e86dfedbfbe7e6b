"""The link: one thread that owns the port, keeps the order, opens the port again when it breaks, and answers for every
part and gate edge exactly once, whatever the protocol."""

import os
import select
import threading
import time
from collections import Counter, deque

from stpm.edge.errors import PlcError
from stpm.edge.plc.ascii_port import AsciiPort, Nowhere
from stpm.edge.plc.base import Link, Port
from stpm.edge.plc.handshake import MS
from stpm.edge.plc.messages import (
    Acknowledged,
    Connected,
    Delivered,
    Disconnected,
    Enabled,
    Gate,
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
from stpm.edge.plc.settings import PlcSettings

FIRST_RETRY_S, LONGEST_RETRY_S = 0.05, 0.5
LONGEST_WAIT_S = 1.0
# how long `close` waits for the thread, which may be in the middle of an exchange, and the thread for the PLC
CLOSE_S, ARRIVE_S = 1.2, 0.4


def open_link(settings: PlcSettings, safe_gate: bool = False) -> Link:
    """A link over `settings.port`, "none" for one that goes nowhere. `safe_gate`: the level of the gate output that
    rejects, left behind by `close`. PlcError when the port does not open; a port that breaks later is opened again.
    ConfigError for settings that contradict each other."""
    return LinkThread(_port(settings), settings, safe_gate)


def _port(settings: PlcSettings) -> Port:
    if settings.port == "none":
        return Nowhere()
    # pymodbus takes a while to import
    match settings.protocol:
        case "modbus-master":
            from stpm.edge.plc.modbus_master import ModbusMaster

            return ModbusMaster(settings)
        case "modbus-slave":
            from stpm.edge.plc.modbus_slave import ModbusSlave

            return ModbusSlave(settings)
        case "pins":
            return PinsPort(settings)
    return AsciiPort(settings)


class LinkThread:
    def __init__(self, port: Port, settings: PlcSettings, safe_gate: bool = False) -> None:
        self._port, self._settings, self._safe_gate = port, settings, safe_gate
        self._outbox = Outbox(settings.queue, round(settings.expire_ms * MS))
        self._lock = threading.Lock()  # of the three below; never held while anything waits
        self._posted: deque[tuple[Outgoing, int]] = deque()
        self._events: list[Incoming] = []
        self._closed = False
        self._wake, self._news = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)
        self._unanswered: Counter[int] = Counter()  # parts
        self._last: State | None = None  # set by `close`
        self._wanted: Gate | None = None  # newest edge that was posted
        self._level: bool | None = None  # of the output, as far as it is known
        self._connected, self._retry_s, self._retry_at_ns = False, FIRST_RETRY_S, 0
        self._got_last = False
        self._bug: BaseException | None = None
        try:
            self._tell(port.open())
        except BaseException:
            self._close_descriptors()
            raise
        self._thread = threading.Thread(target=self._run, name="PLC link", daemon=True)
        self._thread.start()

    # --- from any thread

    def post(self, message: Outgoing) -> None:
        with self._lock:
            if not self._closed:
                self._posted.append((message, time.monotonic_ns()))
                os.eventfd_write(self._wake, 1)
                return
        self._refuse(message, "the link is closed")

    def events(self) -> list[Incoming]:
        with self._lock:
            events, self._events = self._events, []
            if events and not self._closed:
                os.eventfd_read(self._news)
        if self._bug is not None:
            bug, self._bug = self._bug, None
            raise bug
        return events

    def fileno(self) -> int:
        return self._news

    def close(self, last: State) -> bool:
        with self._lock:
            if self._closed:
                return self._got_last
            self._last = last
            os.eventfd_write(self._wake, 1)
        self._thread.join(CLOSE_S)
        with self._lock:
            self._closed = True
            left = [message for message, _ in self._posted]
            self._posted.clear()
        if not self._thread.is_alive():
            self._close_descriptors()
        for message in left:
            self._refuse(message, "the link is closed")
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
            self._finish(self._last)
        except BaseException as bug:
            self._bug = bug  # raised again by `events`
            os.eventfd_write(self._news, 1)
        finally:
            self._port.close(0)
            self._collect()
            self._give_up("the link is closed")

    def _greet(self) -> None:
        """The port has just been opened: the newest state first, then the gate as it should be."""
        try:
            if self._outbox.newest is not None:
                self._send(self._outbox.newest)
            if self._outbox.gate is None and self._wanted is not None and self._level != self._wanted.active:
                # that edge has had its answer, and it was not that the output is where it should be
                self._learn(self._port.send(self._wanted, time.monotonic_ns()))
        except PlcError as error:
            self._lost(error)
            return
        self._connected, self._retry_s = True, FIRST_RETRY_S
        self._tell([Connected(time.monotonic_ns())])

    def _work(self) -> None:
        try:
            self._collect()
            while self._last is None and (message := self._outbox.next()) is not None:
                self._send(message)
                self._collect()
            if self._last is None:
                self._tell(self._port.wait(self._wake, LONGEST_WAIT_S))
        except PlcError as error:
            self._lost(error)

    def _retry(self) -> None:
        """Wait for the time of the next attempt, and make it."""
        self._collect()
        self._outbox.only_the_newest()
        now_ns = time.monotonic_ns()
        if now_ns < self._retry_at_ns:
            due_ns = min(self._retry_at_ns, self._outbox.due_ns() or self._retry_at_ns)
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
        self._level = None
        if self._connected:
            self._tell([Disconnected(now_ns, str(error))])
        self._connected = False
        self._retry_at_ns = now_ns + round(self._retry_s * 1e9)
        self._retry_s = min(2 * self._retry_s, LONGEST_RETRY_S)

    def _send(self, message: Outgoing) -> None:
        """What fails half-way is not sent again: the PLC may have got it."""
        try:
            self._tell(self._port.send(message, time.monotonic_ns()))
        except PlcError as error:
            self._refuse(message, str(error))
            raise

    def _collect(self) -> None:
        """What was posted since, and what came of what waits."""
        with self._lock:
            posted = list(self._posted)
            self._posted.clear()
            if select.select([self._wake], [], [], 0)[0]:
                os.eventfd_read(self._wake)
        for message, at_ns in posted:
            match message:
                case Part(id):
                    self._unanswered[id] += 1
                case Gate():
                    self._wanted = message
            self._tell(self._outbox.put(message, at_ns))
        now_ns = time.monotonic_ns()
        self._tell(self._outbox.expired(now_ns))
        self._tell(self._port.tick(now_ns))

    def _finish(self, last: State) -> None:
        """The safe level, the last word."""
        self._collect()
        wanted, self._wanted = self._wanted, None
        self._give_up("the link was closed first")
        try:
            if not self._connected:
                self._tell(self._port.open())
            if wanted is not None and self._level != self._safe_gate:
                self._send(Gate(wanted.id, self._safe_gate))
            self._send(last)
        except PlcError:
            return  # the PLC hears the silence
        self._got_last = self._port.close(ARRIVE_S)

    def _give_up(self, reason: str) -> None:
        """Whatever still waits gets its answer."""
        while (message := self._outbox.next()) is not None:
            self._refuse(message, reason)
        now_ns = time.monotonic_ns()
        self._tell([Undelivered(id, now_ns, reason) for id in self._unanswered.elements()])

    def _refuse(self, message: Outgoing, reason: str) -> None:
        now_ns = time.monotonic_ns()
        match message:
            case Part(id):
                self._tell([Undelivered(id, now_ns, reason)])
            case Gate(id, active):
                self._tell([Unswitched(id, active, now_ns, reason)])

    # --- to the line

    def _tell(self, events: list[Incoming]) -> None:
        self._learn(events)
        told = [event for event in events if self._is_news(event)]
        if not told:
            return
        with self._lock:
            self._events += told
            if not self._closed:
                os.eventfd_write(self._news, 1)

    def _is_news(self, event: Incoming) -> bool:
        match event:
            case Delivered(id) | Acknowledged(id) | Undelivered(id):
                # one answer for each part
                if self._unanswered[id] == 0:
                    return self._closed
                self._unanswered[id] -= 1
                self._unanswered += Counter()  # without those at 0
            case Enabled():
                return self._settings.enable
        return True

    def _learn(self, events: list[Incoming]) -> None:
        for event in events:
            if isinstance(event, Switched | Unswitched):
                self._level = event.active if isinstance(event, Switched) else None

    def _close_descriptors(self) -> None:
        os.close(self._wake)
        os.close(self._news)
