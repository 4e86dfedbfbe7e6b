"""The file of a station: TOML, one table for each thing on the line. An unknown key is an error naming the nearest.

[station]  name
[camera]   source, trigger, exposure, ...     edge/camera/messages.py
[parts]    deadline, queue, alarm             PartSettings
[gate]     who rejects, when, how long        GateSettings
[plc]      port and protocol                  edge/plc/settings.py
[recipes]  number = bundle folder
[journal]  folder, pictures, retention        edge/journal/messages.py
[control]  socket for stpm-ctl
"""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from stpm.edge.camera.messages import CameraSettings
from stpm.edge.errors import ConfigError
from stpm.edge.journal.messages import JournalSettings
from stpm.edge.limits import AtLeastOne, Count, NotNegative, Positive
from stpm.edge.plc.modbus import check_master_map, check_slave_map
from stpm.edge.plc.settings import PlcSettings


class StationSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str = "station"


class PartSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[parts]"""

    deadline_ms: Positive = 500.0  # from trigger, or from capture in free run, to verdict; later is UNKNOWN
    queue: Annotated[int, msgspec.Meta(ge=1, le=24)] = 8  # frames that may wait for the engine; the ring has 32
    alarm_after: Count = 10  # consecutive rejects; 0: no alarm
    limit: AtLeastOne | None = None  # stop after so many


class GateSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[gate]"""

    mode: Literal["plc", "delay", "encoder"] = "plc"  # who finds the moment: the PLC; the clock; the encoder
    polarity: Literal["reject", "accept"] = "accept"  # what the pulse does to the part
    delay_ms: NotNegative = 0.0  # from capture, mode delay
    counts: Count = 0  # from capture, mode encoder
    pulse_ms: Positive = 50.0
    encoder_timeout_ms: Positive = 200.0  # an encoder that is not heard for so long is lost

    @property
    def safe(self) -> bool:
        """The level of the output that rejects whatever comes."""
        return self.mode != "plc" and self.polarity == "reject"


class ControlSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    socket: str = ""  # path; none without one


class EngineChoice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[engine]"""

    backend: Literal["auto", "tensorrt", "openvino", "fake"] = "auto"
    script: str = ""  # of the fake engine
    hang_ms: Positive = 2000.0  # an inspection that takes longer hangs: its process is killed and started again


class Station(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    station: StationSettings = StationSettings()
    camera: CameraSettings = CameraSettings()
    engine: EngineChoice = EngineChoice()
    parts: PartSettings = PartSettings()
    gate: GateSettings = GateSettings()
    plc: PlcSettings = PlcSettings()
    recipes: dict[str, str] = {}
    recipe: Count | None = None  # the one to begin with; the lowest number when None
    journal: JournalSettings = JournalSettings()
    control: ControlSettings = ControlSettings()


def read_station(path: Path | None, overrides: Mapping[str, object]) -> Station:
    """The station in `path` (all defaults when None) with `overrides` ("camera.source" → value) on top."""
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = msgspec.toml.decode(path.read_bytes())
        except OSError as error:
            raise ConfigError(f"cannot read the station file {path}: {error.strerror}") from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not TOML ({error}): correct it there") from error
    for name, value in overrides.items():
        *tables, key = name.split(".")
        table = values
        for each in tables:
            table = table.setdefault(each, {})
            if not isinstance(table, dict):
                raise ConfigError(f"{path}: `{each}` is {table!r} there, and should be a table: write [{each}]")
        table[key] = value
    camera = values.get("camera")
    if isinstance(camera, dict) and type(camera.get("source")) is int:  # the index of a camera
        camera["source"] = str(camera["source"])
    where = str(path) if path else "the command line"
    try:
        return msgspec.convert(values, Station)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {_explained(str(error))}") from error


def checked(station: Station) -> Station:
    """The station; ConfigError where settings are missing or contradict each other."""
    camera, gate, plc = station.camera, station.gate, station.plc
    recipes = station.recipes or {"1": ""}  # the only bundle in ./bundles
    contradictions = {
        "camera.source is missing: give --camera SOURCE": not camera.source,
        "plc.port is missing: give --plc PORT, or `none`": not plc.port,
        "recipes have numbers from 1 to 65535, without zeros in front: correct [recipes]": not all(
            re.fullmatch("[1-9][0-9]{0,4}", key) and int(key) < 1 << 16 for key in station.recipes
        ),
        f"recipe {station.recipe} is not in [recipes]: known are {', '.join(recipes)}": (
            station.recipe is not None and str(station.recipe) not in recipes
        ),
        'camera.trigger = "software" needs a PLC that triggers: set plc.port, and plc.pins.trigger for pins or '
        "plc.io.trigger_input for remote I/O": (camera.trigger == "software" and not plc.has_trigger),
        'gate.mode = "delay" needs gate.delay_ms, from the camera to the gate': (
            gate.mode == "delay" and not gate.delay_ms
        ),
        'gate.mode = "encoder" needs gate.counts, from the camera to the gate': (
            gate.mode == "encoder" and not gate.counts
        ),
        'gate.mode = "encoder" needs a PLC that sends counts: ascii, or Modbus without [plc.io]': (
            gate.mode == "encoder" and not plc.talks
        ),
        'plc.protocol = "pins" and [plc.io] need gate.mode "delay": outputs can tell a PLC no part\'s verdict': (
            plc.port != "none" and gate.mode == "plc" and not plc.talks
        ),
        'gate.mode = "delay" needs an output: set plc.pins.gate for pins, or plc.io.gate_coil for remote I/O': (
            plc.port != "none" and gate.mode == "delay" and not plc.has_gate
        ),
        "plc.enable needs a PLC that says so: ascii, or Modbus without [plc.io]": plc.enable and not plc.talks,
        "plc.peer_timeout_s needs a PLC that beats: ascii, or Modbus without [plc.io]": (
            plc.peer_timeout_s > 0 and not plc.talks
        ),
        f'[plc.io] is for plc.protocol = "modbus-master", found {plc.protocol}: set it, or leave [plc.io] out': (
            plc.io is not None and plc.protocol != "modbus-master"
        ),
        f"[plc.pins] gate and ready are both {plc.pins.gate}: give each its own, or none": (
            plc.protocol == "pins" and plc.pins.gate == plc.pins.ready != "none"
        ),
        'a gate needs every part: set camera.policy = "every" or camera.trigger = "software"': (
            gate.mode != "plc" and camera.policy == "latest" and camera.trigger == "free" and bool(camera.source)
        ),
    }
    for sentence, wrong in contradictions.items():
        if wrong:
            raise ConfigError(sentence)
    if plc.protocol == "modbus-master" and plc.io is None:
        check_master_map(plc.map)
    elif plc.protocol == "modbus-slave":
        check_slave_map(plc.map)
    return station


def _explained(error: str) -> str:
    """msgspec's sentence; for an unknown key with the nearest known one."""
    unknown = re.match(r"Object contains unknown field `([^`]*)`(?: - at `\$\.?(.*)`)?$", error)
    if not unknown:
        return error.replace(" - at `$.", ", in `")
    key, place = unknown.group(1), unknown.group(2) or ""
    known = _keys(Station, [part for part in place.split(".") if part])
    near = difflib.get_close_matches(key, known, 1, 0.5)
    hint = f"did you mean `{near[0]}`?" if near else f"known are {', '.join(sorted(known))}"
    return f"unknown key `{key}`{f' in [{place}]' if place else ''}: {hint}"


def _keys(struct: Any, place: list[str]) -> list[str]:
    for name in place:
        field = next(field for field in msgspec.structs.fields(struct) if field.encode_name == name)
        options = getattr(field.type, "__args__", (field.type,))
        struct = next(option for option in options if isinstance(option, type) and issubclass(option, msgspec.Struct))
    return [field.encode_name for field in msgspec.structs.fields(struct)]
