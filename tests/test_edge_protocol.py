"""The ASCII protocol, pinned by literal bytes, both ways."""

import re
from pathlib import Path

import pytest

from stpm.edge.plc.messages import (
    STATES,
    Acknowledged,
    ClearAsked,
    Counted,
    Enabled,
    Garbage,
    GateTimes,
    PeerBeat,
    RecipeAsked,
    Triggered,
)
from stpm.edge.plc.protocol import (
    Beat,
    Gate,
    LineReader,
    Part,
    ProtocolError,
    State,
    decode,
    decode_plc,
    encode,
    encode_plc,
)

OURS = [
    (State("READY"), 2, b"STATE,2,READY*554E\r\n"),
    (State("FAULT", "PlcError"), 65535, b"STATE,65535,FAULT,PlcError*CB19\r\n"),
    (State("RUNNING", recipe=2), 7, b"STATE,7,RUNNING,recipe=2*596F\r\n"),
    (State("READY", recipe=2, enabled=False), 7, b"STATE,7,READY,recipe=2 enable=0*3442\r\n"),
    (State("DEGRADED", "a b", 12, enabled=False), 7, b"STATE,7,DEGRADED,a b recipe=12 enable=0*E9FF\r\n"),
    (State("STOPPED", enabled=False), 7, b"STATE,7,STOPPED,enable=0*508E\r\n"),
    (Part(17, "PASS", 0.0012345), 3, b"PART,3,17,PASS,1.2345e-03*53DC\r\n"),
    (Part(18, "FAIL", 1.0), 4, b"PART,4,18,FAIL,1.0000e+00*F510\r\n"),
    (Part(19, "UNKNOWN", None), 5, b"PART,5,19,UNKNOWN,NONE*4D3B\r\n"),
    (Beat(19), 6, b"BEAT,6,19*DEFE\r\n"),
    (Gate(18, True), 7, b"GATE,7,18,1*55FE\r\n"),
    (Gate(18, False), 8, b"GATE,8,18,0*80DC\r\n"),
]

THEIRS = [
    (Triggered(9), 0, b"TRIG,0*578A\r\n"),
    (Triggered(9, 4294967295), 1, b"TRIG,1,4294967295*0ECC\r\n"),
    (Acknowledged(17, 9), 2, b"ACK,2,17*DC76\r\n"),
    (PeerBeat(9), 3, b"BEAT,3*0CF2\r\n"),
    (Counted(9, 123456), 4, b"COUNT,4,123456*C21D\r\n"),
    (RecipeAsked(9, 2), 5, b"RECIPE,5,2*998E\r\n"),
    (Enabled(9, True), 6, b"ENABLE,6,1*A984\r\n"),
    (Enabled(9, False), 7, b"ENABLE,7,0*8E95\r\n"),
    (ClearAsked(9), 8, b"CLEAR,8*8AF4\r\n"),
    (GateTimes(9, 150, 40), 65535, b"TIMES,65535,150,40*3A55\r\n"),
    (GateTimes(9, 600_000, 10_000), 5, b"TIMES,5,600000,10000*9FDF\r\n"),
    (GateTimes(9, 0, 0), 6, b"TIMES,6,0,0*ADAB\r\n"),
]


DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "plc.md"


def crc16_xmodem(body: bytes) -> int:
    """Bit by bit, as the standard describes it; the product uses the standard library's table."""
    crc = 0
    for byte in body:
        crc ^= byte << 8
        for _ in range(8):
            crc = (crc << 1) ^ 0x1021 if crc & 0x8000 else crc << 1
            crc &= 0xFFFF
    return crc


def line(body: str) -> bytes:
    return f"{body}*{crc16_xmodem(body.encode()):04X}\r\n".encode()


def test_checksum_is_crc16_xmodem():
    assert crc16_xmodem(b"123456789") == 0x31C3  # the catalogue's check value
    body, checksum = encode(Beat(7), 1).rstrip().split(b"*")
    assert checksum == b"%04X" % crc16_xmodem(body)


@pytest.mark.parametrize(("message", "sequence", "text"), OURS)
def test_our_lines_are_these_bytes(message, sequence, text):
    assert encode(message, sequence) == text
    assert decode(text) == (sequence, message)
    assert decode(text.rstrip()) == (sequence, message)


@pytest.mark.parametrize(("message", "sequence", "text"), THEIRS)
def test_lines_of_the_plc_are_these_bytes(message, sequence, text):
    assert encode_plc(message, sequence) == text
    assert decode_plc(text, 9) == (sequence, message)


@pytest.mark.parametrize("state", STATES)
def test_every_state_has_a_line(state):
    assert decode(encode(State(state), 1)) == (1, State(state))


@pytest.mark.parametrize("text", [text for _, _, text in OURS + THEIRS])
def test_every_changed_byte_is_noticed(text):
    for index in range(len(text) - 2):
        for flip in (1, 4, 0x20, 0x80):
            damaged = bytearray(text)
            damaged[index] ^= flip
            for reads in (decode, lambda data: decode_plc(data, 0)):
                with pytest.raises(ProtocolError):
                    reads(bytes(damaged))


@pytest.mark.parametrize("text", [b"", b"\r\n", b"PART,1,1,PASS,1e-3", b"*0000", b"PART*", b"a*b*c", b"\xff\xfe*0000"])
def test_other_text_is_refused(text):
    with pytest.raises(ProtocolError):
        decode(text)
    with pytest.raises(ProtocolError):
        decode_plc(text, 0)


@pytest.mark.parametrize(
    "body",
    [
        "PART,1,1,MAYBE,1.0",
        "PART,1,1,PASS",
        "PART,1,x,PASS,1.0",
        "PART,1,1,PASS,much",
        "STATE,1,HAPPY",
        "BEAT,1",
        "PULSE,1,2",
        "PART,,1,PASS,1",
        "BEAT,65536,1",
        "BEAT,+1,1",
        "PART,1,1_0,PASS,1.0",
        "GATE,1,1,2",
        "GATE,1,1",
        "TRIG,1,7",  # the PLC's
    ],
)
def test_a_right_checksum_does_not_save_a_wrong_body(body):
    with pytest.raises(ProtocolError):
        decode(line(body))


@pytest.mark.parametrize(
    "body",
    [
        "TRIG",
        "TRIG,1,4294967296",
        "TRIG,1,2,3",
        "ACK,1",
        "ACK,1,-1",
        "BEAT,1,1",
        "COUNT,1,1.5",
        "COUNT,65536,1",
        "ENABLE,1,2",
        "TIMES,1,2",
        "STATE,1,READY",  # ours
        "COUNT,1," + "9" * 60,
    ],
)
def test_a_right_checksum_does_not_save_a_wrong_body_of_the_plc(body):
    with pytest.raises(ProtocolError):
        decode_plc(line(body), 0)


def test_a_reason_cannot_break_the_line_nor_pass_for_another_word():
    text = encode(State("FAULT", "a,b*c\r\nPART,1,1,PASS,0*ß" + "x" * 200), 0)
    assert text.count(b"\n") == 1
    assert len(text) < 120
    _, message = decode(text)
    assert message == State("FAULT", ("a b c  PART 1 1 PASS 0  " + "x" * 200)[:80])
    assert decode(encode(State("FAULT", "recipe=7 enable=0"), 0))[1] == State("FAULT", "recipe 7 enable 0")


@pytest.mark.parametrize(("message", "sequence", "text"), [each for each in OURS if isinstance(each[0], State)])
def test_a_parser_that_knows_nothing_of_recipe_and_enable_still_reads_the_state(message, sequence, text):
    """The grammar before these words: STATE,<seq>,<state>[,<reason>], and a reason without comma or asterisk."""
    found = re.fullmatch(r"STATE,(\d+),([A-Z_]+)(?:,([^,*]+))?\*[0-9A-F]{4}\r\n", text.decode())
    assert found is not None
    assert found[1] == str(sequence)
    assert found[2] == message.state
    assert (found[3] or "").startswith(message.reason)


def test_the_reader_puts_lines_together_and_passes_on_when_they_ended():
    reader = LineReader()
    data = encode_plc(Triggered(0, 5), 0) + b"\r\n" + encode_plc(PeerBeat(0), 1)
    seen = [message for at in range(len(data)) for message in reader.feed(data[at : at + 1], at)]
    assert seen == [Triggered(data.index(b"\n"), 5), PeerBeat(len(data) - 1)]


def test_a_gap_in_the_plcs_numbers_is_garbage_and_the_line_still_counts():
    reader = LineReader()
    reader.feed(encode_plc(PeerBeat(0), 65534), 0)
    assert reader.feed(encode_plc(PeerBeat(0), 65535) + encode_plc(PeerBeat(0), 0), 0) == [PeerBeat(0), PeerBeat(0)]
    found = reader.feed(encode_plc(Triggered(0, 9), 2), 7)
    assert isinstance(found[0], Garbage)
    assert found[0].lost
    assert "is 2, not 1" in found[0].what
    assert found[1:] == [Triggered(7, 9)]


def test_noise_is_garbage_and_costs_no_more_than_its_line():
    reader = LineReader()
    found = reader.feed(b"\x00\xfe\xff\n" + encode_plc(PeerBeat(0), 0), 3)
    # the first line after opening may be the end of one that began before
    assert found == [PeerBeat(3)]
    found = reader.feed(b"\x00\xfe\xff\n" + encode_plc(PeerBeat(0), 1), 4)
    assert [type(each) for each in found] == [Garbage, PeerBeat]
    assert found[0].lost


@pytest.mark.parametrize(
    ("body", "lost", "what"),
    [
        ("TIMES,1,600001,40", False, "delay of 600001"),
        ("TIMES,1,0,10001", False, "pulse of 10001 ms"),
        ("HELLO,1", False, "unknown message HELLO"),
        ("TRIG,1,4294967296", True, "not a number"),
    ],
)
def test_what_arrived_well_and_makes_no_sense_is_lost_only_where_it_was_a_trigger(body, lost, what):
    reader = LineReader()
    reader.feed(encode_plc(PeerBeat(0), 0), 0)
    (found,) = reader.feed(line(body), 5)
    assert isinstance(found, Garbage)
    assert found.lost == lost
    assert what in found.what
    # its number counts: nothing is missing before the next line
    assert reader.feed(encode_plc(PeerBeat(0), 2), 6) == [PeerBeat(6)]


def test_bytes_without_end_do_not_pile_up():
    reader = LineReader()
    found = [each for _ in range(100) for each in reader.feed(b"\x55" * 100, 0)]
    assert len(found) == 33
    assert all(isinstance(each, Garbage) and each.lost for each in found)


def test_what_was_missed_while_the_port_was_closed_shows_as_a_gap():
    reader = LineReader()
    reader.feed(encode_plc(PeerBeat(0), 0) + b"TRIG,1", 0)
    reader.reopened()
    found = reader.feed(b"3*1234\r\n" + encode_plc(PeerBeat(0), 4), 1)
    assert [type(each) for each in found] == [Garbage, PeerBeat]
    assert "is 4, not 1" in found[0].what


def test_the_dialogue_in_the_document_is_real():
    lines = re.findall(r"^    (line|PLC) +(\S+)$", DOCUMENT.read_text(), re.M)
    assert len(lines) > 10
    theirs = 0
    for side, text in lines:
        if side == "line":
            sequence, message = decode(text.encode())
            assert encode(message, sequence).decode().strip() == text
        else:
            sequence, event = decode_plc(text.encode(), 0)
            assert sequence == theirs
            assert encode_plc(event, sequence).decode().strip() == text
            theirs += 1
