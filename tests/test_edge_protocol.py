"""The ASCII protocol, pinned by literal bytes."""

import pytest

from stpm.edge.plc.protocol import Beat, Part, ProtocolError, State, decode, encode

GOLDEN = [
    (State("READY"), 2, b"STATE,2,READY*554E\r\n"),
    (State("FAULT", "PlcError"), 65535, b"STATE,65535,FAULT,PlcError*CB19\r\n"),
    (Part(17, "PASS", 0.0012345), 3, b"PART,3,17,PASS,1.2345e-03*53DC\r\n"),
    (Part(18, "FAIL", 1.0), 4, b"PART,4,18,FAIL,1.0000e+00*F510\r\n"),
    (Part(19, "UNKNOWN", None), 5, b"PART,5,19,UNKNOWN,NONE*4D3B\r\n"),
    (Beat(19), 6, b"BEAT,6,19*DEFE\r\n"),
]


def crc16_xmodem(body: bytes) -> int:
    """Bit by bit, as the standard describes it; the product uses the standard library's table."""
    crc = 0
    for byte in body:
        crc ^= byte << 8
        for _ in range(8):
            crc = (crc << 1) ^ 0x1021 if crc & 0x8000 else crc << 1
            crc &= 0xFFFF
    return crc


def test_checksum_is_crc16_xmodem():
    assert crc16_xmodem(b"123456789") == 0x31C3  # the catalogue's check value
    body, checksum = encode(Beat(7), 1).rstrip().split(b"*")
    assert checksum == b"%04X" % crc16_xmodem(body)


@pytest.mark.parametrize(("message", "sequence", "line"), GOLDEN)
def test_lines_are_these_bytes(message, sequence, line):
    assert encode(message, sequence) == line
    assert decode(line) == (sequence, message)
    assert decode(line.rstrip()) == (sequence, message)


@pytest.mark.parametrize("line", [line for _, _, line in GOLDEN])
def test_every_changed_byte_is_noticed(line):
    for index in range(len(line) - 2):
        for flip in (1, 4, 0x20, 0x80):
            damaged = bytearray(line)
            damaged[index] ^= flip
            with pytest.raises(ProtocolError):
                decode(bytes(damaged))


@pytest.mark.parametrize("line", [b"", b"\r\n", b"PART,1,1,PASS,1e-3", b"*0000", b"PART*", b"a*b*c", b"\xff\xfe*0000"])
def test_other_text_is_refused(line):
    with pytest.raises(ProtocolError):
        decode(line)


@pytest.mark.parametrize(
    "body",
    [
        "PART,1,1,MAYBE,1.0",
        "PART,1,1,PASS",
        "PART,1,x,PASS,1.0",
        "STATE,1,HAPPY",
        "BEAT,1",
        "PULSE,1,2",
        "PART,,1,PASS,1",
        "BEAT,65536,1",
        "BEAT,+1,1",
        "PART,1,1_0,PASS,1.0",
    ],
)
def test_a_right_checksum_does_not_save_a_wrong_body(body):
    with pytest.raises(ProtocolError):
        decode(f"{body}*{crc16_xmodem(body.encode()):04X}".encode())


def test_a_reason_cannot_break_the_line():
    line = encode(State("FAULT", "a,b*c\r\nPART,1,1,PASS,0*ß" + "x" * 200), 0)
    assert line.count(b"\n") == 1
    assert len(line) < 120
    _, message = decode(line)
    assert message == State("FAULT", ("a b c  PART 1 1 PASS 0  " + "x" * 200)[:80])
