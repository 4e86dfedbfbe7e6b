"""What Modbus master and slave have in common: pymodbus kept quiet, and the places of the map."""

import logging

from stpm.edge.errors import ConfigError
from stpm.edge.plc.handshake import MS, Handshake
from stpm.edge.plc.registers import CONTROL_COILS, CONTROL_REGISTERS, STATUS_BITS, STATUS_REGISTERS
from stpm.edge.plc.settings import PlcSettings, RegisterMap

# what it has to say comes as events; its own lines would go to stderr
logging.getLogger("pymodbus").addHandler(logging.NullHandler())
logging.getLogger("pymodbus").propagate = False


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
    _fits(
        control_coils=(map.control_coils, CONTROL_COILS),
        control_registers=(map.control_registers, CONTROL_REGISTERS),
        status_bits=(map.status_bits, STATUS_BITS),
        status_registers=(map.status_registers, STATUS_REGISTERS),
    )
    _apart("control_coils", map.control_coils, CONTROL_COILS, "status_bits", map.status_bits, STATUS_BITS)
    _apart(
        "control_registers",
        map.control_registers,
        CONTROL_REGISTERS,
        "status_registers",
        map.status_registers,
        STATUS_REGISTERS,
    )


def check_slave_map(map: RegisterMap) -> None:
    """ConfigError where the mirror of the status lies on what the PLC writes, or something lies nowhere."""
    _fits(
        control_coils=(map.control_coils, CONTROL_COILS),
        control_registers=(map.control_registers, CONTROL_REGISTERS),
        status_bits=(map.status_bits, STATUS_BITS),
        status_registers=(map.status_registers, STATUS_REGISTERS),
        mirror_registers=(map.mirror_registers, STATUS_REGISTERS),
    )
    _apart(
        "control_registers",
        map.control_registers,
        CONTROL_REGISTERS,
        "mirror_registers",
        map.mirror_registers,
        STATUS_REGISTERS,
    )


def _fits(**tables: tuple[int, int]) -> None:
    for name, (first, count) in tables.items():
        if first + count > 1 << 16:
            raise ConfigError(f"{name} ({first} to {first + count - 1}) goes beyond 65535 in [plc.map]: move it")


def _apart(a: str, a_first: int, a_count: int, b: str, b_first: int, b_count: int) -> None:
    if a_first < b_first + b_count and b_first < a_first + a_count:
        raise ConfigError(
            f"{a} ({a_first} to {a_first + a_count - 1}) and {b} ({b_first} to {b_first + b_count - 1}) overlap in "
            "[plc.map]: move one of them"
        )
