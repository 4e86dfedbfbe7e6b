"""The line: judges frames with a bundle and tells the PLC.

Needs numpy, OpenCV, pyserial and one engine; never torch.
"""

__version__ = "0.1.0"
