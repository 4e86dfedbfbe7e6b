"""[plc] of a station."""

from typing import Annotated, Literal

import msgspec

from stpm.edge.limits import AtLeastOne, NotNegative, Positive

# the last words of a link take a few of them
Timeout = Annotated[float, msgspec.Meta(gt=0, le=500)]
Address = Annotated[int, msgspec.Meta(ge=0, le=65535)]
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
    control_coils: Address = 0
    control_registers: Address = 0
    status_bits: Address = 100  # slave: discrete inputs; master: coils of the PLC
    status_registers: Address = 100  # slave: input registers; master: holding registers of the PLC
    mirror_registers: Address = 1000  # slave: the status registers again, as holding registers


class RemoteIo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[plc.io]: modbus-master without a PLC: coils of a remote I/O block instead of the map. None: not used."""

    gate_coil: Address | None = None
    ready_coil: Address | None = None
    heartbeat_coil: Address | None = None
    trigger_input: Address | None = None  # discrete input, rising edge


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

    @property
    def talks(self) -> bool:
        """Whether somebody is there to be told and to tell. Pins and remote I/O are outputs, and perhaps an input."""
        return self.port != "none" and self.protocol != "pins" and self.io is None

    @property
    def has_trigger(self) -> bool:
        return self.talks or self._has(self.pins.trigger, self.io.trigger_input if self.io else None)

    @property
    def has_gate(self) -> bool:
        return self.talks or self._has(self.pins.gate, self.io.gate_coil if self.io else None)

    def _has(self, pin: str, address: int | None) -> bool:
        if self.port == "none":
            return False
        return pin != "none" if self.protocol == "pins" else address is not None
