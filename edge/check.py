"""stpm-run --check: try everything that the station needs, and move nothing.

The PLC's port is looked at and not opened: opening it would raise RTS and DTR, and they may be wired to the gate.
"""

import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

from stpm.edge.bundle import open_bundle
from stpm.edge.camera.host import CameraHost
from stpm.edge.camera.messages import FrameReady
from stpm.edge.command import say
from stpm.edge.config import Station
from stpm.edge.engine import open_engine
from stpm.edge.errors import CameraError, ConfigError, PlcError, StorageError, StpmError
from stpm.edge.ring import Ring
from stpm.edge.selftest import self_test

FRAME_WAIT_S = 20.0
LEAST_FREE = 1 << 30


def check(station: Station) -> None:
    """One line for each thing, good or not; then the error of the first that is not."""
    sizes: dict[str, tuple[int, int]] = {}  # of the photos, by recipe
    checks: list[tuple[str, Callable[[], str]]] = [
        *((f"recipe {number}", lambda path=path, number=number: _recipe(station, number, path, sizes))
          for number, path in station.recipes.items()),
        ("camera", lambda: _camera(station, sizes)),
        ("plc", lambda: _plc(station)),
        ("journal", lambda: _journal(station)),
        ("control", lambda: _control(station)),
    ]  # fmt: skip
    failed: list[StpmError] = []
    for name, trial in checks:
        try:
            say(f"ok    {name:<12}{trial()}")
        except StpmError as error:
            failed.append(error)
            say(f"FAIL  {name:<12}{error}")
    if failed:
        raise failed[0]


def _recipe(station: Station, number: str, path: str, sizes: dict[str, tuple[int, int]]) -> str:
    bundle = open_bundle(Path(path))
    with open_engine(bundle, station.engine.backend, station.engine.script) as engine:
        deviation = self_test(bundle, engine)
        described = ", ".join(engine.describe().values())
    manifest = bundle.manifest
    sizes[number] = manifest.training.photo_size
    return (
        f"{path}: {manifest.category} {manifest.precision}, threshold {manifest.threshold.value:.3e}, self test "
        f"{deviation:.2%}; {described}"
    )


def _camera(station: Station, sizes: dict[str, tuple[int, int]]) -> str:
    ring = Ring(4)
    camera = CameraHost(station.camera, ring)
    try:
        frame = _first_frame(camera)
        assert camera.opened is not None
        wrong = [
            f"{name}: asked for {asked}, the camera says {found}" for name, (asked, found) in camera.differing.items()
        ]
        if wrong:
            raise CameraError(f"settings that the camera did not take ({'; '.join(wrong)}): correct [camera]")
        height, width = frame.shape[:2]
        for number, size in sizes.items():
            if size != (width, height):
                raise CameraError(
                    f"the camera delivers {width}×{height} pixels and recipe {number} was built from photos of "
                    f"{size[0]}×{size[1]}: set camera.width and camera.height, or build with photos of this camera"
                )
        return f"{camera.opened.description}, {width}×{height}"
    finally:
        camera.end()
        ring.close()


def _first_frame(camera: CameraHost) -> FrameReady:
    deadline = time.monotonic() + FRAME_WAIT_S
    asked = False
    while time.monotonic() < deadline:
        frames, _ = camera.poll(time.monotonic_ns())
        if camera.error:
            raise CameraError(camera.error)
        if frames and frames[0].problem:
            raise CameraError(f"the first frame cannot be judged ({frames[0].problem}): look at the camera")
        if frames:
            return frames[0]
        if camera.ready and not asked:
            asked = camera.take(1)
        time.sleep(0.01)
    raise CameraError(f"no frame came within {FRAME_WAIT_S:g} s: look at the camera and its trigger")


def _plc(station: Station) -> str:
    port = station.plc.port
    if port == "none":
        return "none: nobody is told"
    try:
        mode = os.stat(port).st_mode
    except OSError as error:
        raise PlcError(f"the PLC port {port} is not there ({error.strerror}): check cable and name") from error
    if not stat.S_ISCHR(mode):
        raise PlcError(f"wanted a serial device, found {port}: check plc.port")
    if not os.access(port, os.R_OK | os.W_OK):
        raise PlcError(f"this user may not use {port}: add it to the group dialout")
    return f"{port}, {station.plc.protocol}, {station.plc.baud} baud (not opened)"


def _journal(station: Station) -> str:
    if not station.journal.folder:
        return "none"
    folder = Path(station.journal.folder).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise StorageError(f"cannot write in {there}: check journal.folder and its permissions")
    free = os.statvfs(there).f_bavail * os.statvfs(there).f_frsize
    if free < min(LEAST_FREE, station.journal.max_gb * 1e9):
        raise StorageError(
            f"wanted room for {station.journal.max_gb:g} GB of pictures in {folder}, found {free / 1e9:.1f} GB: free "
            "some, or lower journal.max_gb"
        )
    return f"{folder}, {free / 1e9:.1f} GB free"


def _control(station: Station) -> str:
    path = station.control.socket
    if not path:
        return "none"
    folder = Path(path).absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"cannot make the socket {path}: make the folder {folder}, writable for this user")
    return path
