"""Frame sources. `open_source` chooses by the look of the source and imports only what that needs."""

from pathlib import Path

from stpm.edge.camera.base import Captured, Source
from stpm.edge.camera.messages import CameraSettings
from stpm.edge.errors import CameraError

__all__ = ["CameraSettings", "Captured", "Source", "open_source"]


def open_source(settings: CameraSettings) -> Source:
    """An index ("0"), /dev/videoN, a URL (rtsp://, http://), genicam:NAME, a video file, a folder of images, or
    pattern:... CameraError when it does not open."""
    source = settings.source
    kind, colon, rest = source.partition(":")
    if colon and kind == "pattern":
        from stpm.edge.camera.pattern import PatternSource

        return PatternSource(rest, settings)
    if colon and kind == "genicam":
        from stpm.edge.camera.aravis import AravisSource

        return AravisSource(rest, settings)
    if Path(source).is_dir() or Path(source).is_file():
        from stpm.edge.camera.recorded import FolderSource, VideoFile

        if Path(source).is_dir():
            return FolderSource(Path(source), settings.fps, settings.loop)
        return VideoFile(Path(source), settings.fps, settings.loop)
    if (source.isascii() and source.isdigit()) or source.startswith("/dev/") or "://" in source:
        from stpm.edge.camera.opencv import OpenCvSource

        return OpenCvSource(settings)
    raise CameraError(
        f"wanted a camera index, /dev/videoN, a URL, genicam:NAME, a video file or a folder of images, found nothing "
        f"at {source}: check --camera"
    )
