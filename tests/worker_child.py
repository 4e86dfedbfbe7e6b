"""The child process of test_edge_worker.py and test_edge_supervisor.py: does what its configuration says."""

import os
import signal
import threading
from contextlib import suppress

import msgspec

from stpm.edge.channel import ChannelClosedError
from stpm.edge.worker import serve


class Task(msgspec.Struct):
    what: str


class Word(msgspec.Struct, tag=True):
    text: str


def main(task, channel, ring):
    channel.send(Word(f"{os.getpid()}"))
    if task.what == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        threading.Event().wait()
    if task.what == "die":
        os._exit(3)
    if task.what == "draw":
        slot = ring.claim()
        ring.image(slot, (4, 5, 3))[:] = 7
        ring.advance()
        channel.send(Word(f"slot {slot}"))
    with suppress(ChannelClosedError):
        talk(channel)


def talk(channel):
    while True:
        for word in channel.receive(timeout=60):
            channel.send(Word(word.text.upper()))


if __name__ == "__main__":
    serve(Task, Word, main)
