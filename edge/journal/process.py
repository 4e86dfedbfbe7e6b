"""The journal process: what the line hands over goes into the database in batches, and pictures onto the disk.

A disk is slow, full or gone at any time, and the line must not notice: this process waits in its place, tries again
every second, keeps some records and pictures meanwhile and counts the rest. It gives way to the engine (nice), draws
on one core, and copies what it needs out of the ring at once, so that a slot is lent for milliseconds.
"""

import os
import time
from collections import deque
from pathlib import Path
from typing import Any

import cv2

from stpm.edge.channel import Channel, ChannelClosedError
from stpm.edge.errors import StorageError
from stpm.edge.journal.messages import (
    Event,
    JournalFailed,
    JournalSettings,
    JournalState,
    Outcome,
    PartRecord,
    Released,
    Run,
    ToJournal,
)
from stpm.edge.journal.pictures import PictureQueue, Pictures
from stpm.edge.journal.records import Records
from stpm.edge.ring import Ring
from stpm.edge.worker import serve

NICE = 10
BEAT_S = 1.0
FINISH_S = 1.5  # for pictures that wait when the line closes the channel


class Recorder:
    def __init__(self, settings: JournalSettings, channel: Channel[Any], ring: Ring) -> None:
        folder = Path(settings.folder)
        self._channel, self._ring, self._commit_s = channel, ring, settings.commit_s
        self._records = Records(folder, settings.commit_s, settings.max_days)
        self._pictures = PictureQueue(Pictures(folder, settings.max_gb * 1e9), settings.max_days, self._beat)
        self._to_release: deque[int] = deque()
        self._said: JournalState | None = None
        self._said_at = 0.0

    def run(self) -> None:
        """Until the line closes the channel, or the database turns out to be of another schema."""
        try:
            while True:
                for message in self._channel.receive(self._patience(time.monotonic())):
                    self._take(message, time.monotonic())
                self._work(time.monotonic())
        except ChannelClosedError:
            self._finish()
        except StorageError as error:
            self._channel.send(JournalFailed(str(error)))

    def _patience(self, now: float) -> float:
        """How long to wait for the next message, seconds."""
        if self._pictures.busy(now):
            return 0
        return min(max(self._commit_s, 0.01), BEAT_S) if self._records.waiting else BEAT_S

    def _take(self, message: Run | PartRecord | Outcome | Event, now: float) -> None:
        if isinstance(message, Run):
            self._records.run, self._pictures.run_at = message, message.at
            return
        if isinstance(message, PartRecord):
            if message.slot is not None:
                self._pictures.add(self._ring, message, message.slot)
                self._to_release.append(message.slot)
                self._release()
            elif message.shape != (0, 0, 0):
                self._pictures.lost += 1
        self._records.add(message, now)

    def _release(self) -> None:
        while self._to_release and self._channel.send(Released(self._to_release[0])):
            self._to_release.popleft()

    def _work(self, now: float) -> None:
        self._release()
        opened = self._records.open(now)
        if opened is not None:
            self._pictures.lost += self._records.lost_pictures
            self._channel.send(opened)
        self._records.commit(now, self._pictures.lost)
        self._records.look_after(now)
        self._pictures.work(now)
        self._say(now)

    def _say(self, now: float) -> None:
        reason = self._records.reason or self._pictures.reason
        state = JournalState(self._records.lost, self._pictures.lost, reason, self._records.through)
        said = self._said and (self._said.lost, self._said.lost_pictures, self._said.reason)
        news = said != (state.lost, state.lost_pictures, state.reason)
        if (news or now - self._said_at >= BEAT_S) and self._channel.send(state):
            self._said, self._said_at = state, now

    def _beat(self) -> None:
        """In the middle of something long."""
        self._release()
        self._say(time.monotonic())

    def _finish(self) -> None:
        """The line has closed the channel, or is gone: records first, then pictures while there is time."""
        deadline = time.monotonic() + FINISH_S
        self._records.flush(time.monotonic(), self._pictures.lost)
        while self._pictures.busy(now := time.monotonic()) and now < deadline:
            self._pictures.work(now)
        self._pictures.lost += self._pictures.waiting
        self._records.finish(time.monotonic(), self._pictures.lost)
        self._say(time.monotonic())  # a line that is not gone still listens


def main(settings: JournalSettings, channel: Channel[Any], ring: Ring) -> None:
    os.nice(NICE)
    cv2.setNumThreads(1)
    Recorder(settings, channel, ring).run()


if __name__ == "__main__":
    serve(JournalSettings, ToJournal, main)
