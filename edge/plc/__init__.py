"""Links to the PLC: ASCII lines, Modbus RTU as master or slave, or two relays."""

from stpm.edge.plc.base import Link
from stpm.edge.plc.link import open_link

__all__ = ["Link", "open_link"]
