"""What every link to a PLC can do, whatever its protocol."""

from typing import Protocol

from stpm.edge.plc.messages import Incoming, Outgoing, State


class Link(Protocol):
    """Made by `open_link`; owns one thread from then until `close`. When the port breaks it opens it again by itself,
    with back-off, and tells so (Disconnected, Connected); after a reconnect it sends the newest State first.

    Every Part that is posted is answered by exactly one of Delivered (or Acknowledged, where the protocol has it) and
    Undelivered: nothing is lost silently. A Part that is older than its `expires_ns` is never sent.
    """

    def post(self, message: Outgoing) -> None:
        """Queue a message. Never waits, never fails; gate edges overtake results, results overtake the rest."""

    def events(self) -> list[Incoming]:
        """Everything that has come since the last call, in order."""

    def fileno(self) -> int:
        """Readable while there are events."""

    def close(self, last: State) -> bool:
        """Gate output to its safe level, `last` as the last word, then release the port; within about a second.

        True when the PLC has got it. What was still queued is Undelivered. A second call does nothing.
        """
