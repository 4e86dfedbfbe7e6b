"""Frame sources. `open_camera` chooses by the look of the source."""

from pathlib import Path

from stpm.edge.camera.base import Camera, Frame
from stpm.edge.errors import CameraError

__all__ = ["Camera", "Frame", "open_camera"]


def open_camera(source: str, fps: float | None = None, loop: bool = False) -> Camera:
    """An index ("0"), /dev/videoN, a URL (rtsp://, http://), a video file, or a folder of images.

    `fps` is the pace of a folder (as fast as they are judged when None) or of a video file (the file's own when
    None), and is asked of a live camera; `loop` starts a folder or file again at its end. CameraError when the
    source does not open.
    """
    from stpm.edge.camera.live import LiveCamera
    from stpm.edge.camera.recorded import FolderCamera, VideoFile

    path = Path(source)
    if path.is_dir():
        return FolderCamera(path, fps, loop)
    if path.is_file():
        return VideoFile(path, fps, loop)
    if (source.isascii() and source.isdigit()) or source.startswith("/dev/") or "://" in source:
        return LiveCamera(source, fps)
    raise CameraError(
        f"wanted a camera index, /dev/videoN, a URL, a video file or a folder of images, found nothing at {source}: "
        "check --camera"
    )
