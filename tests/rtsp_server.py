"""A real RTSP server, by the system's Python with GStreamer: `python3 rtsp_server.py PORT` serves moving pictures as
rtsp://127.0.0.1:PORT/video, and says so on its output when it does."""

import sys

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer  # noqa: E402

Gst.init(None)
server = GstRtspServer.RTSPServer()
server.set_service(sys.argv[1])
factory = GstRtspServer.RTSPMediaFactory()
factory.set_launch(
    "( videotestsrc is-live=true pattern=ball ! video/x-raw,format=I420,width=320,height=240,framerate=25/1 "
    "! jpegenc ! rtpjpegpay name=pay0 )"
)
factory.set_shared(True)
server.get_mount_points().add_factory("/video", factory)
server.attach(None)
print("ready", flush=True)
GLib.MainLoop().run()
