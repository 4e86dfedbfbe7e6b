"""[plc] of a station."""

from typing import Annotated, Literal

import msgspec

from stpm.edge.limits import AtLeastOne, NotNegative, Positive

# the last words of a link take a few of them
Timeout = Annotated[float, msgspec.Meta(gt=0, le=500)]
Protocol = Literal["ascii", "modbus-master", "modbus-slave", "pins"]


class Pins(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[plc.pins]: what the two outputs of the serial connector do. Closed port or dead process: both are off."""

    gate: Literal["rts", "dtr", "none"] = "rts"
    ready: Literal["rts", "dtr", "none"] = "dtr"  # on while the state allows parts to pass
    trigger: Literal["cts", "dsr", "cd", "ri", "none"] = "none"  # input: a rising edge is a trigger


class RegisterMap(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[plc.map]: where the map of docs/plc.md begins in each table; addresses from 0, as in the request."""

    # modbus-slave answers at these; modbus-master reads `control_*` from the PLC and writes `status_*` into it, where
    # both are coils, or holding registers: they must not overlap
    control_coils: int = 0
    control_registers: int = 0
    status_bits: int = 100  # slave: discrete inputs; master: coils of the PLC
    status_registers: int = 100  # slave: input registers; master: holding registers of the PLC
    mirror_registers: int = 1000  # slave: the status registers again, as holding registers


class RemoteIo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[plc.io]: modbus-master without a PLC: coils of a remote I/O block instead of the map. None: not used."""

    gate_coil: int | None = None
    ready_coil: int | None = None
    heartbeat_coil: int | None = None
    trigger_input: int | None = None  # discrete input, rising edge


class PlcSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    port: str = ""  # serial device, pseudo-terminal, or "none"
    protocol: Protocol = "ascii"
    baud: AtLeastOne = 115200
    parity: Literal["N", "E", "O"] = "N"
    stop_bits: Literal[1, 2] = 1
    device_id: Annotated[int, msgspec.Meta(ge=1, le=247)] = 1  # Modbus: ours as slave, the PLC's as master
    timeout_ms: Timeout = 200.0  # of every read and write, at most 500
    poll_ms: Positive = 20.0  # modbus-master: how often the PLC is read
    heartbeat_s: Positive = 0.5  # longest silence of ours
    peer_timeout_s: NotNegative = 0.0  # longest silence of the PLC before FAULT; 0: the PLC need not beat
    acknowledge: bool = False  # ascii: every PART must be answered by ACK (Modbus: the handshake does it)
    acknowledge_ms: Positive = 500.0  # longest wait for ACK, or for RESULT_ACK
    expire_ms: Positive = 1000.0  # a result older than this is not sent any more: it is undelivered
    queue: AtLeastOne = 8  # results that wait for the PLC
    local_echo: bool = False  # Modbus: the RS-485 adapter hears what we send ourselves
    enable: bool = False  # inspect only while the PLC says so (ENABLE)
    pins: Pins = Pins()
    map: RegisterMap = RegisterMap()
    io: RemoteIo | None = None
