"""The file of a station: what is in it, what overrides it, and what is said of a mistake."""

import re
from pathlib import Path

import msgspec
import pytest

from stpm.edge.config import Station, checked, read_station
from stpm.edge.errors import ConfigError

STATION = """
recipe = 2
[station]
name = "line 1"
[camera]
source = "0"
exposure = 200.0
policy = "every"
[gate]
mode = "delay"
delay_ms = 350
[plc]
port = "/dev/ttyUSB0"
protocol = "modbus-master"
[plc.io]
gate_coil = 3
[recipes]
1 = "bundles/screw"
2 = "bundles/nut"
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "line1.toml"
    path.write_text(STATION)
    return path


def test_the_file_is_read_and_the_rest_is_default(file):
    station = read_station(file, {})
    assert (station.station.name, station.camera.exposure, station.recipe) == ("line 1", 200.0, 2)
    assert station.plc.io.gate_coil == 3
    assert station.recipes == {"1": "bundles/screw", "2": "bundles/nut"}
    assert station.parts == Station().parts
    assert checked(station) is station


def test_options_override_the_file(file):
    station = read_station(file, {"camera.exposure": 9.5, "plc.pins.gate": "dtr", "parts.limit": 7})
    assert (station.camera.exposure, station.plc.pins.gate, station.parts.limit) == (9.5, "dtr", 7)
    assert station.camera.source == "0"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ({"camera.exposre": 1}, ["exposre", "[camera]", "did you mean `exposure`"]),
        ({"plc.pins.gat": "rts"}, ["[plc.pins]", "`gate`"]),
        ({"plc.io.gate_col": 1}, ["[plc.io]", "`gate_coil`"]),
        ({"jurnal.folder": "x"}, ["did you mean `journal`"]),
        ({"camera.zzzzzz": 1}, ["known are", "exposure", "stall_s"]),
        ({"camera.exposure": "bright"}, ["float", "camera.exposure"]),
        ({"gate.mode": "magic"}, ["magic", "gate.mode"]),
        ({"parts.queue": 0}, ["parts.queue", "1"]),
        ({"gate.pulse_ms": -5}, ["gate.pulse_ms"]),
        ({"parts.queue": 25}, ["parts.queue", "24"]),
        ({"parts.deadline_ms": float("inf")}, ["parts.deadline_ms", "1000000000"]),
        ({"gate.delay_ms": float("nan")}, ["gate.delay_ms"]),
        ({"plc.map.status_bits": 65536}, ["plc.map.status_bits", "65535"]),
        ({"plc.map.status_registers": -1}, ["plc.map.status_registers", "0"]),
        ({"plc.io.gate_coil": 70000}, ["plc.io.gate_coil", "65535"]),
        ({"camera.source": 1.5}, ["camera.source", "str"]),
        ({"station": 3, "station.name": "x"}, ["`station` is 3", "[station]"]),
    ],
)
def test_a_mistake_is_named_with_the_file_and_the_nearest_known_key(file, override, words):
    with pytest.raises(ConfigError) as raised:
        read_station(file, override)
    for word in [*words, file.name]:
        assert word in str(raised.value)


def test_a_file_that_is_not_toml_or_not_there(tmp_path):
    (tmp_path / "broken.toml").write_text("[camera\nsource = 0")
    with pytest.raises(ConfigError, match=r"broken.toml is not TOML"):
        read_station(tmp_path / "broken.toml", {})
    with pytest.raises(ConfigError, match=r"cannot read the station file .*missing.toml"):
        read_station(tmp_path / "missing.toml", {})


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ({"camera.source": ""}, "camera.source is missing"),
        ({"plc.port": ""}, "plc.port is missing"),
        ({"gate.delay_ms": 0}, "needs gate.delay_ms"),
        ({"gate.mode": "encoder"}, "needs gate.counts"),
        ({"gate.mode": "encoder", "gate.counts": 100}, "needs a PLC that sends counts"),
        ({"gate.mode": "plc"}, r"\[plc.io\] need gate.mode \"delay\""),
        ({"plc.io.gate_coil": None, "plc.io.ready_coil": 1}, "needs an output"),
        ({"plc.protocol": "pins", "plc.io": None, "plc.pins.gate": "none"}, "needs an output"),
        ({"plc.protocol": "ascii"}, r'\[plc.io\] is for plc.protocol = "modbus-master", found ascii'),
        *(
            ({**other, key: value}, words)
            for key, value, words in (
                ("plc.enable", True, "plc.enable needs a PLC"),
                ("plc.peer_timeout_s", 1.0, "peer_timeout_s needs a PLC"),
            )
            for other in ({}, {"plc.port": "none"}, {"plc.protocol": "pins", "plc.io": None})
        ),
        ({"plc.protocol": "modbus-slave", "plc.io": None, "plc.map.status_bits": 65530}, "beyond 65535"),
        ({"plc.protocol": "modbus-master", "plc.io": None, "plc.map.status_registers": 65535}, "beyond 65535"),
        ({"gate.mode": "encoder", "gate.counts": 100, "plc.port": "none"}, "needs a PLC that sends counts"),
        ({"plc.protocol": "pins", "plc.io": None, "gate.mode": "plc"}, "pins.* need gate.mode"),
        ({"camera.policy": "latest"}, "a gate needs every part"),
        ({"camera.trigger": "software", "plc.port": "none"}, "needs a PLC that triggers"),
        ({"camera.trigger": "software", "plc.protocol": "pins", "plc.io": None}, "needs a PLC that triggers"),
        ({"camera.trigger": "software"}, "needs a PLC that triggers.*plc.io.trigger_input"),
        *(({"recipes": {key: "bundle"}}, "recipes have numbers") for key in ("one", "0", "01", "65536", "-1")),
        ({"recipe": 7}, r"recipe 7 is not in \[recipes\]: known are 1, 2"),
        ({"recipe": 2, "recipes": {}}, r"recipe 2 is not in \[recipes\]: known are 1"),
        ({"plc.protocol": "pins", "plc.io": None, "plc.pins.ready": "rts"}, "gate and ready are both rts"),
        ({"plc.protocol": "modbus-master", "plc.io": None, "plc.map.status_bits": 3}, "overlap"),
        ({"plc.protocol": "modbus-slave", "plc.io": None, "plc.map.mirror_registers": 3}, "overlap"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(file, override, words):
    with pytest.raises(ConfigError, match=words):
        checked(read_station(file, override))


@pytest.mark.parametrize(
    "override",
    [
        {"camera.trigger": "software", "camera.policy": "latest", "plc.io.trigger_input": 0},
        {"plc.enable": True, "plc.peer_timeout_s": 2.0, "plc.io": None},
        {"plc.protocol": "pins", "plc.io": None, "camera.trigger": "software", "plc.pins.trigger": "cts"},
        {"plc.port": "none", "gate.mode": "plc"},
    ],
)
def test_settings_that_belong_together_are_taken(file, override):
    assert checked(read_station(file, override))


def test_a_journal_may_be_kept_for_ever(file):
    journal = read_station(file, {"journal.max_days": float("inf"), "journal.max_gb": float("inf")}).journal
    assert journal.max_days == journal.max_gb == float("inf")


def test_a_camera_may_be_given_by_its_number(file):
    file.write_text(STATION.replace('source = "0"', "source = 0"))
    assert read_station(file, {}).camera.source == "0"
    assert read_station(file, {"camera.source": 2}).camera.source == "2"


def remote_io_of_the_document():
    text = (Path(__file__).parents[1] / "docs" / "plc.md").read_text()
    return text.split("### Remote I/O instead of a PLC")[1].split("```toml\n")[1].split("```")[0]


def test_the_remote_io_of_the_document_is_a_whole_station(tmp_path):
    (tmp_path / "io.toml").write_text(remote_io_of_the_document())
    station = checked(read_station(tmp_path / "io.toml", {"camera.source": "0", "plc.port": "/dev/ttyUSB0"}))
    assert station.gate.mode == "delay"


# --- the document

DOCUMENT = Path(__file__).parents[1] / "docs" / "station.md"


def test_the_document_shows_every_key_with_its_default(tmp_path):
    block = re.search(r"```toml\n(.*?)```", DOCUMENT.read_text(), re.S).group(1)
    (tmp_path / "station.toml").write_text(block)
    assert read_station(tmp_path / "station.toml", {}) == Station()
    shown = re.sub(r"^# ", "", block, flags=re.M)
    values = msgspec.toml.decode(shown)
    for path, struct in tables(Station):
        table = values
        for name in path:
            table = table[name]
        assert set(table) - {"1", "2"} == {field.encode_name for field in msgspec.structs.fields(struct)}, path


def tables(struct, path=()):
    """Every table of a station's file, with the struct that reads it."""
    yield path, struct
    for field in msgspec.structs.fields(struct):
        options = getattr(field.type, "__args__", (field.type,))
        for option in options:
            if isinstance(option, type) and issubclass(option, msgspec.Struct):
                yield from tables(option, (*path, field.encode_name))
