"""Messages between two processes, over a real socket."""

import errno
import time

import msgspec
import pytest
from worker_child import Word

from stpm.edge.channel import LONGEST, Channel, ChannelClosedError, pair


@pytest.fixture
def channels():
    ends = [Channel(end, Word) for end in pair()]
    yield ends
    for end in ends:
        end.close()


def test_messages_keep_their_borders_and_their_order(channels):
    ours, theirs = channels
    for number in range(50):
        assert ours.send(Word(str(number)))
    assert [word.text for word in theirs.receive()] == [str(number) for number in range(50)]
    assert theirs.receive() == []


def test_a_sender_never_waits_for_one_who_does_not_read(channels):
    ours, theirs = channels
    started = time.monotonic()
    sent = 0
    while ours.send(Word("x" * 1000)):
        sent += 1
    assert 10 < sent < 10_000
    assert time.monotonic() - started < 5
    assert len(theirs.receive()) == sent
    assert ours.send(Word("again"))


def test_sending_to_nobody_is_no_error_and_is_told(channels):
    ours, theirs = channels
    theirs.close()
    assert not ours.send(Word("hello"))
    with pytest.raises(ChannelClosedError):
        ours.receive()


def test_a_message_that_is_too_long_is_refused_whole(channels):
    ours, theirs = channels
    with pytest.raises(ValueError, match="longer than"):
        ours.send(Word("x" * LONGEST))
    assert theirs.receive() == []


def test_receive_waits_for_the_first_message_only(channels):
    ours, theirs = channels
    started = time.monotonic()
    assert theirs.receive(0.05) == []
    assert time.monotonic() - started >= 0.05
    ours.send(Word("now"))
    started = time.monotonic()
    assert len(theirs.receive(5)) == 1
    assert time.monotonic() - started < 1


def test_what_is_no_message_is_the_end_of_the_channel_after_what_came_before_it():
    ours, theirs = pair()
    channel = Channel(ours, Word)
    theirs.send(msgspec.msgpack.encode(Word("good")))
    theirs.send(b"\xc1 rubbish")
    theirs.send(msgspec.msgpack.encode(Word("too late")))
    assert [word.text for word in channel.receive()] == ["good"]
    for _ in range(2):
        with pytest.raises(ChannelClosedError, match=r"has sent what is no message \(.+\)"):
            channel.receive()
    theirs.close()
    channel.close()


def test_who_has_finished_is_still_told_the_last_word(channels):
    ours, theirs = channels
    ours.send(Word("the last"))
    ours.finish()
    assert theirs.receive(1) == [Word("the last")]
    with pytest.raises(ChannelClosedError):
        theirs.receive(1)
    assert theirs.send(Word("so be it"))
    assert ours.receive(1) == [Word("so be it")]
    theirs.close()
    ours.finish()  # nobody is there any more


def test_a_message_of_another_type_is_none():
    ours, theirs = pair()
    channel = Channel(ours, Word)
    theirs.send(msgspec.msgpack.encode({"type": "Word", "text": 7}))
    with pytest.raises(ChannelClosedError, match="Expected `str`"):
        channel.receive()
    theirs.close()
    channel.close()


def test_a_system_without_memory_for_a_message_is_as_one_who_does_not_read():
    class Refuses:
        setblocking = close = lambda *_: None

        def send(self, data):
            raise OSError(errno.ENOBUFS, "No buffer space available")

    assert not Channel(Refuses(), Word).send(Word("hello"))


def test_text_that_is_none_is_no_message_either():
    ours, theirs = pair()
    channel = Channel(ours, Word)
    with theirs:
        theirs.send(msgspec.msgpack.encode(Word("abc")).replace(b"abc", b"\xff\xfe\xfd"))
        with pytest.raises(ChannelClosedError, match="no message"):
            channel.receive(1)
    assert channel.broken
    channel.close()
