"""One Modbus request and its answer, we are the master.

Odd about the outside world: an answer may be lost to noise, so only LIMIT exchanges in a row without one mean that the
PLC is gone. Odd about pymodbus: it waits by sleeping and by the wall clock, and by itself opens a device again that
was unplugged.
"""

import contextlib
import select
import time
from typing import Any

from pymodbus import ModbusException
from pymodbus.client import ModbusSerialClient
from pymodbus.pdu import ExceptionResponse, ModbusPDU

from stpm.edge.plc.modbus import silence_s
from stpm.edge.plc.serial_port import SERIAL_ERRORS, is_gone, no_answer, open_serial
from stpm.edge.plc.settings import PlcSettings

LIMIT = 3  # exchanges in a row without an answer
EXCEPTIONS = {1: "illegal function", 2: "illegal address", 3: "illegal value", 4: "device failure", 6: "busy"}


class RefusedError(Exception):
    """An exception answer, or none: this time, or every time."""


class Exchange:
    """One request, one answer. Counts those that stay without."""

    def __init__(self, settings: PlcSettings) -> None:
        self._settings = settings
        self._client: _Client | None = None
        self._unanswered = 0
        self.patient = False  # however many stay without: for the last words

    @property
    def is_open(self) -> bool:
        return self._client is not None

    def open(self) -> None:
        settings = self._settings
        port = open_serial(settings)
        self._client = _Client(
            settings.port,
            timeout=settings.timeout_ms / 1000,
            baudrate=settings.baud,
            retries=0,
            handle_local_echo=settings.local_echo,
        )
        self._client.socket = port
        self._client.silence_s = silence_s(settings)
        # a PLC that was lost counts as there when it answers the first time
        self._unanswered = LIMIT - 1

    def close(self) -> None:
        client, self._client = self._client, None
        if client is not None and client.socket is not None:
            with contextlib.suppress(*SERIAL_ERRORS):
                client.socket.close()

    def __call__(self, request: ModbusPDU) -> ModbusPDU:
        """The answer. RefusedError when it is an exception, or does not come; PlcError when too many did not come or
        the device is gone."""
        client, port = self._client, self._settings.port
        assert client is not None
        if client.socket is None:  # pymodbus would open the device again, its own way
            raise is_gone(port, OSError("the device was unplugged"))
        what = f"{type(request).__name__.removesuffix('Request')} at {request.address}"
        request.dev_id = self._settings.device_id
        try:
            answer = client.execute(False, request)
        except ModbusException as error:
            if client.socket is None:
                raise is_gone(port, error.__context__ or error) from error
            self._unanswered += 1
            if self._unanswered >= LIMIT and not self.patient:
                raise no_answer(port, what) from error
            raise RefusedError(f"the PLC does not answer {what}") from error
        except SERIAL_ERRORS as error:
            raise is_gone(port, error) from error
        self._unanswered = 0
        if isinstance(answer, ExceptionResponse):
            code = answer.exception_code
            raise RefusedError(f"the PLC refuses {what}: exception {code} ({EXCEPTIONS.get(code, 'unknown')})")
        if answer.function_code != request.function_code:
            raise RefusedError(f"the PLC answers {what} with function {answer.function_code}")
        return answer


class _Client(ModbusSerialClient):
    """pymodbus waits for an answer by sleeping, and by the wall clock, which may be set meanwhile. This one waits
    until bytes are there, by the monotonic clock; and it leaves the wire silent before the next request."""

    silence_s = 0.0
    _deadline = _heard = 0.0

    def send(self, request: bytes, addr: tuple[Any, ...] | None = None) -> int:
        time.sleep(max(0.0, self._heard + self.silence_s - time.monotonic()))
        self._deadline = time.monotonic() + self.comm_params.timeout_connect
        return super().send(request, addr)

    def recv(self, size: int | None) -> bytes:
        port = self.socket
        assert port is not None
        if not select.select([port], [], [], max(0.0, self._deadline - time.monotonic()))[0]:
            return b""
        data: bytes = port.read(max(1, port.in_waiting))
        self._heard = time.monotonic()
        return data
