"""What every link to a PLC can do, whatever its protocol, and what a protocol must bring to become one."""

from typing import Protocol

from stpm.edge.plc.messages import Incoming, Outgoing, State


class Link(Protocol):
    """Made by `open_link`; owns one thread from then until `close`. When the port breaks it opens it again by itself,
    with back-off, and tells so (Disconnected, Connected); after a reconnect it sends the newest State first.

    Every Part that is posted is answered by exactly one of Delivered (or Acknowledged, where the protocol has it) and
    Undelivered, every Gate by one of Switched and Unswitched: nothing is lost silently. A Part that is older than its
    `expires_ns` is never sent, nor a Gate away from the safe level that is older than 200 ms.
    """

    def alive(self, now_ns: int) -> None:
        """The line is at work. When it does not say so for 200 ms (gate_output.DEAD_MAN_NS) the link puts the gate
        output to its safe level by itself and tells GateReleased; from then on nothing but an edge that is posted
        after the next `alive` lets parts through. Armed by the first call, and only where a Gate was ever posted; not
        while closing. Costs nothing: for every turn of a loop.
        """

    def post(self, message: Outgoing) -> None:
        """Queue a message. Never waits, never fails; gate edges overtake results, results overtake the rest."""

    def events(self) -> list[Incoming]:
        """Everything that has come since the last call, in order. A bug in the link's thread is raised here, once; the
        link tries to leave the safe level and a FAULT behind."""

    def fileno(self) -> int:
        """Readable while there are events."""

    def close(self, last: State) -> bool:
        """Gate output to its safe level, `last` as the last word, then release the port; within half a second and
        seven times `timeout_ms` (slow lines: and the time of their last words).

        True when the PLC has got it (ASCII and pins: when the device has taken all of it). What was still queued is
        Undelivered; `events` still tells that. A second call does nothing.
        """


class Port(Protocol):
    """One protocol on one serial device. Called from the link's thread only. Every verb that talks to the outside is
    bounded by `timeout_ms` of the settings and raises PlcError when the device, or a PLC that should answer, is gone;
    the link then closes the port and opens it again. What a port knows of results that wait outlives that."""

    def open(self) -> list[Incoming]:
        """Claim the device. What is worth telling of it."""

    def send(self, message: Outgoing, now_ns: int) -> list[Incoming]:
        """Hand one message on, and what is known at once of its fate."""

    def wait(self, wake: int, timeout_s: float) -> list[Incoming]:
        """Do what is due and listen to the PLC until it says something, the descriptor `wake` is readable, or
        `timeout_s` has passed."""

    def tick(self, now_ns: int) -> list[Incoming]:
        """What has become of what waits, by now; also while the port is closed."""

    def backlog_s(self) -> float:
        """How long what was sent will still take to leave the device, as far as that can be known. The link sends
        nothing more while it is long."""

    def close(self, timeout_s: float) -> bool:
        """Release the device, after up to `timeout_s` seconds for what was sent last to arrive. True when it has."""
