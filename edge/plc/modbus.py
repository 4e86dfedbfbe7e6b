"""What Modbus master and slave have in common: pymodbus kept quiet, and the places of the map."""

import logging

from stpm.edge.errors import ConfigError
from stpm.edge.plc.handshake import MS, Handshake
from stpm.edge.plc.registers import CONTROL_COILS, CONTROL_REGISTERS, STATUS_BITS, STATUS_REGISTERS
from stpm.edge.plc.settings import PlcSettings, RegisterMap

# what it has to say comes as events; its own lines would go to stderr
logging.getLogger("pymodbus").addHandler(logging.NullHandler())
logging.getLogger("pymodbus").propagate = False

SIZES = {
    "control_coils": CONTROL_COILS,
    "control_registers": CONTROL_REGISTERS,
    "status_bits": STATUS_BITS,
    "status_registers": STATUS_REGISTERS,
    "mirror_registers": STATUS_REGISTERS,
}


def silence_s(settings: PlcSettings) -> float:
    """The silence that ends a frame: 3.5 characters, 1.75 ms above 19200 baud. pymodbus does not keep it by itself."""
    bits = 1 + 8 + (settings.parity != "N") + settings.stop_bits
    return 3.5 * bits / settings.baud if settings.baud <= 19200 else 0.00175


def new_handshake(settings: PlcSettings, now_ns: int) -> Handshake:
    beat_ns = round(settings.heartbeat_s * 1e9)
    acknowledge_ns, expire_ns = round(settings.acknowledge_ms * MS), round(settings.expire_ms * MS)
    return Handshake(settings.queue, acknowledge_ns, expire_ns, beat_ns, now_ns)


def check_master_map(map: RegisterMap) -> None:
    """ConfigError where what we write into the PLC would overwrite what the PLC tells us, or lies nowhere."""
    used = ("control_coils", "control_registers", "status_bits", "status_registers")
    _check(map, used, ("control_coils", "status_bits"), ("control_registers", "status_registers"))


def check_slave_map(map: RegisterMap) -> None:
    """ConfigError where the mirror of the status lies on what the PLC writes, or something lies nowhere."""
    _check(map, tuple(SIZES), ("control_registers", "mirror_registers"))


def _check(map: RegisterMap, used: tuple[str, ...], *apart: tuple[str, str]) -> None:
    places = {name: range(getattr(map, name), getattr(map, name) + SIZES[name]) for name in used}
    for name, place in places.items():
        if place.stop > 1 << 16:
            raise ConfigError(f"{_named(name, place)} goes beyond 65535 in [plc.map]: move it")
    for a, b in apart:
        if places[a].start < places[b].stop and places[b].start < places[a].stop:
            raise ConfigError(
                f"{_named(a, places[a])} and {_named(b, places[b])} overlap in [plc.map]: move one of them"
            )


def _named(name: str, place: range) -> str:
    return f"{name} ({place.start} to {place.stop - 1})"
