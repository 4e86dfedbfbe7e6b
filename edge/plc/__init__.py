"""Links to the PLC."""

from stpm.edge.plc.link import Link, NoLink, SerialLink, open_plc

__all__ = ["Link", "NoLink", "SerialLink", "open_plc"]
