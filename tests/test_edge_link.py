"""The serial link on a real pseudo-terminal: torn lines, slow readers, closing."""

import os
import select

import pytest
import serial

from stpm.edge.errors import PlcError
from stpm.edge.plc import NoLink, SerialLink, open_plc
from stpm.edge.plc.protocol import Beat, Part, State, encode
from stpm.tools.plc_sim import Gate


@pytest.fixture
def terminal():
    ours, theirs = os.openpty()
    yield ours, os.ttyname(theirs)
    os.close(ours)
    os.close(theirs)


def drain(handle):
    data = b""
    while select.select([handle], [], [], 0.1)[0]:
        data += os.read(handle, 65536)
    return data


def test_lines_are_numbered_and_the_first_is_set_apart(terminal):
    ours, name = terminal
    link = SerialLink(name)
    link.send(State("BOOT"))
    link.send(Beat(0))
    link.close()
    assert drain(ours) == b"\r\n" + encode(State("BOOT"), 0) + encode(Beat(0), 1)


def test_a_reader_that_stops_is_noticed(terminal):
    link = SerialLink(terminal[1])
    try:
        with pytest.raises(PlcError, match="did not take a line"):  # noqa: PT012 (the last of many writes)
            for number in range(100_000):
                link.send(Part(number + 1, "PASS", 0.25))
    finally:
        link.close()


def test_what_follows_a_torn_line_is_still_understood(terminal, monkeypatch):
    """A write fails half-way: FAULT must not be glued to the half that is out."""
    ours, name = terminal
    link = SerialLink(name)
    link.send(State("READY"))
    whole = link._port.write

    def half(data):
        whole(data[: len(data) // 2])
        raise serial.SerialTimeoutException("Write timeout")

    with monkeypatch.context() as torn:
        torn.setattr(link._port, "write", half)
        with pytest.raises(PlcError, match="Write timeout"):
            link.send(Part(1, "PASS", 0.25))
    link.send(State("FAULT", "PlcError"))
    link.close()
    gate = Gate()
    gate.feed(drain(ours), 0)
    assert gate.states == ["READY", "FAULT"]
    assert gate.damaged == 1
    assert gate.passed == []


def test_closing_twice_is_fine(terminal):
    link = SerialLink(terminal[1])
    link.close()
    link.close()


def test_a_port_is_not_shared(terminal):
    link = SerialLink(terminal[1])
    with pytest.raises(PlcError, match="does not open"):
        SerialLink(terminal[1])
    link.close()


@pytest.mark.parametrize("baud", [-1, 10**12])
def test_an_impossible_speed_is_a_sentence(terminal, baud):
    with pytest.raises(PlcError, match="does not open"):
        SerialLink(terminal[1], baud)


def test_none_numbers_and_encodes_all_the_same():
    lines = []
    link = open_plc("none", trace=lines.append)
    assert isinstance(link, NoLink)
    link.send(State("BOOT"))
    link.send(Beat(0))
    link.close()
    assert lines == [encode(State("BOOT"), 0), encode(Beat(0), 1)]
