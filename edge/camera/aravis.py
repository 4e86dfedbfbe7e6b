"""GenICam cameras (GigE Vision, USB3 Vision) through the library Aravis, bound with ctypes.

What is odd about them: a GigE camera belongs to one program at a time, and that of a program that was killed stays
taken until its heartbeat has been missing for a while. A camera remembers format, region and trigger of whoever had it
before. It numbers its frames, so one that got lost is noticed; one of which packets got lost comes all the same, with
that as its status. Aravis stamps a frame with the wall clock when it begins to come, and somebody may set that clock
before we read the stamp.
"""

import ctypes
import re
import time
from collections import deque
from contextlib import suppress
from ctypes import POINTER, byref, c_char_p, c_double, c_int, c_int64, c_size_t, c_uint, c_uint32, c_uint64, c_void_p
from typing import Any

import cv2
import numpy as np

from stpm.edge.camera.base import Captured
from stpm.edge.camera.messages import CameraSettings
from stpm.edge.errors import CameraError
from stpm.edge.preprocess import Image

LIBRARIES = ("libglib-2.0.so.0", "libgobject-2.0.so.0", "libaravis-0.8.so.0")
BUFFERS = 8  # frames that may wait while the process is held up
TAKE_S = 5.0  # how long a camera that another program has is waited for
SILENT_S = 2.0  # a free-running camera that gives nothing for so long is gone
LONGEST_GAP = 5000  # frames
LONGEST_AGE_NS = 1_000_000_000  # of a frame that is read; the stamp of what claims to be older is wrong
CLOCK_STEP_NS = 1_000_000  # a wall clock that goes so far from the monotonic one between two looks has been set
CLOSE_ENOUGH = 0.01  # cameras round exposure, gain and rate to their own steps

# GigE Vision's register for the milliseconds after which a program without heartbeat loses the camera. Aravis beats
# once a second, and once more half a second later when there is no answer.
HEARTBEAT_REGISTER, HEARTBEAT_MS = 0x0938, 2000

CONTINUOUS, AUTO_OFF = 0, 0
NO_PACKET_SOCKET = 1  # it takes root's rights
# Aravis' own choice is one frame, which is lost when its thread has to wait; the kernel cuts it to net.core.rmem_max
SOCKET_BUFFER_FIXED, SOCKET_BUFFER_BYTES = 0, 32 << 20
PAYLOADS_WITH_IMAGE = (1, 5)  # image, image with chunks
STATUS = {
    -1: "unknown",
    1: "cleared",
    2: "timeout",
    3: "missing packets",
    4: "wrong packet id",
    5: "size mismatch",
    6: "still filling",
    7: "aborted",
}

# GenICam's number → its name, bytes per pixel, and what makes BGR of it. GenICam names a Bayer pattern by its first
# two pixels. OpenCV's short names (BayerBG, ...) go by the second row from its second pixel on, so that RG8 is BayerBG
# there; its long names give all four pixels and cannot be mistaken.
FORMATS: dict[int, tuple[str, int, int | None]] = {
    0x01080009: ("BayerRG8", 1, cv2.COLOR_BayerRGGB2BGR),
    0x01080008: ("BayerGR8", 1, cv2.COLOR_BayerGRBG2BGR),
    0x0108000A: ("BayerGB8", 1, cv2.COLOR_BayerGBRG2BGR),
    0x0108000B: ("BayerBG8", 1, cv2.COLOR_BayerBGGR2BGR),
    0x02180014: ("RGB8", 3, cv2.COLOR_RGB2BGR),
    0x02180015: ("BGR8", 3, None),
    0x01080001: ("Mono8", 1, cv2.COLOR_GRAY2BGR),
}


class _GError(ctypes.Structure):
    _fields_ = (("domain", c_uint32), ("code", c_int), ("message", c_char_p))


_FAILS = POINTER(POINTER(_GError))  # the last argument of what can fail
_IN = c_void_p  # a camera, device, stream or buffer
_ints = POINTER(c_int)
# name: what comes back, arguments
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "g_error_free": (None, POINTER(_GError)),
    "g_free": (None, c_void_p),
    "g_object_unref": (None, _IN),
    "g_object_set": (None, _IN, c_char_p, c_int, c_char_p, c_int, c_void_p),
    "arv_update_device_list": (None,),
    "arv_get_n_devices": (c_uint,),
    "arv_get_device_id": (c_char_p, c_uint),
    "arv_camera_new": (c_void_p, c_char_p, _FAILS),
    "arv_camera_get_device": (c_void_p, _IN),
    "arv_camera_get_vendor_name": (c_char_p, _IN, _FAILS),
    "arv_camera_get_model_name": (c_char_p, _IN, _FAILS),
    "arv_camera_get_device_id": (c_char_p, _IN, _FAILS),
    "arv_camera_is_gv_device": (c_int, _IN),
    "arv_camera_is_feature_available": (c_int, _IN, c_char_p, _FAILS),
    "arv_camera_gv_set_stream_options": (None, _IN, c_int),
    "arv_gv_device_is_controller": (c_int, _IN),
    "arv_gv_device_take_control": (c_int, _IN, _FAILS),
    "arv_device_write_register": (c_int, _IN, c_uint64, c_uint32, _FAILS),
    "arv_camera_set_acquisition_mode": (None, _IN, c_int, _FAILS),
    "arv_camera_dup_available_pixel_formats": (c_void_p, _IN, POINTER(c_uint), _FAILS),
    "arv_camera_get_pixel_format": (c_uint32, _IN, _FAILS),
    "arv_camera_get_pixel_format_as_string": (c_char_p, _IN, _FAILS),
    "arv_camera_set_pixel_format": (None, _IN, c_uint32, _FAILS),
    "arv_camera_set_pixel_format_from_string": (None, _IN, c_char_p, _FAILS),
    "arv_camera_get_region": (None, _IN, _ints, _ints, _ints, _ints, _FAILS),
    "arv_camera_set_region": (None, _IN, c_int, c_int, c_int, c_int, _FAILS),
    "arv_camera_get_frame_rate": (c_double, _IN, _FAILS),
    "arv_camera_set_frame_rate": (None, _IN, c_double, _FAILS),
    "arv_camera_is_exposure_auto_available": (c_int, _IN, _FAILS),
    "arv_camera_set_exposure_time_auto": (None, _IN, c_int, _FAILS),
    "arv_camera_get_exposure_time": (c_double, _IN, _FAILS),
    "arv_camera_set_exposure_time": (None, _IN, c_double, _FAILS),
    "arv_camera_is_gain_auto_available": (c_int, _IN, _FAILS),
    "arv_camera_set_gain_auto": (None, _IN, c_int, _FAILS),
    "arv_camera_get_gain": (c_double, _IN, _FAILS),
    "arv_camera_set_gain": (None, _IN, c_double, _FAILS),
    "arv_camera_get_string": (c_char_p, _IN, c_char_p, _FAILS),
    "arv_camera_clear_triggers": (None, _IN, _FAILS),
    "arv_camera_set_trigger": (None, _IN, c_char_p, _FAILS),
    "arv_camera_software_trigger": (None, _IN, _FAILS),
    "arv_camera_get_payload": (c_uint, _IN, _FAILS),
    "arv_camera_create_stream": (c_void_p, _IN, c_void_p, c_void_p, _FAILS),
    "arv_camera_start_acquisition": (None, _IN, _FAILS),
    "arv_camera_stop_acquisition": (None, _IN, _FAILS),
    "arv_stream_push_buffer": (None, _IN, _IN),
    "arv_stream_timeout_pop_buffer": (c_void_p, _IN, c_uint64),
    "arv_buffer_new": (c_void_p, c_size_t, c_void_p),
    "arv_buffer_get_status": (c_int, _IN),
    "arv_buffer_get_payload_type": (c_int, _IN),
    "arv_buffer_get_frame_id": (c_uint64, _IN),
    "arv_buffer_get_system_timestamp": (c_uint64, _IN),
    "arv_buffer_get_image_pixel_format": (c_uint32, _IN),
    "arv_buffer_get_image_width": (c_int, _IN),
    "arv_buffer_get_image_height": (c_int, _IN),
    "arv_buffer_get_image_padding": (None, _IN, _ints, _ints),
    "arv_buffer_get_data": (c_void_p, _IN, POINTER(c_size_t)),
}


class _RefusedError(Exception):
    """What the library, or the camera through it, says went wrong."""


class _Library:
    """Called with the name of a function and its arguments; the GError at the end becomes an exception."""

    def __init__(self) -> None:
        try:
            libraries = [ctypes.CDLL(name) for name in LIBRARIES]
        except OSError as error:
            raise CameraError(
                f"wanted the library Aravis for GenICam cameras, found none ({error}): "
                "`apt-get install libaravis-0.8-0`"
            ) from error
        self._functions = {}
        for name, (result, *arguments) in _FUNCTIONS.items():
            found = [getattr(library, name) for library in libraries if hasattr(library, name)]
            if not found:
                raise CameraError(f"wanted Aravis 0.8.23 or newer, found one without {name}: update libaravis-0.8-0")
            found[0].restype, found[0].argtypes = result, arguments
            self._functions[name] = found[0]

    def __call__(self, name: str, *arguments: Any) -> Any:
        if _FUNCTIONS[name][-1] is not _FAILS:
            return self._functions[name](*arguments)
        error = POINTER(_GError)()
        result = self._functions[name](*arguments, byref(error))
        if not error:
            return result
        message = error.contents.message.decode("utf-8", "replace")
        self._functions["g_error_free"](error)
        raise _RefusedError(message)


class AravisSource:
    """`name`: an id as `arv-tool-0.8` lists them, the IP address of a GigE camera, or empty for the first one found.

    Of the settings, `exposure` is in microseconds and `fourcc` a pixel format of GenICam (Mono8, BayerRG8, ...).
    """

    live, finished = True, False

    def __init__(self, name: str, settings: CameraSettings) -> None:
        self._call = _Library()
        self.triggered = settings.trigger == "software"
        self._name = name
        self._settings: dict[str, tuple[str, str]] = {}
        self._last_id: int | None = None
        self._wall_ns = 0  # how far the wall clock is ahead of the monotonic one
        self._set_ns = 0  # when it was seen to have been set
        self._silent_ns = round(max(SILENT_S, 3 / settings.fps if settings.fps else 0) * 1e9)
        # in turn, because one is looked at until the next but one is there
        self._images = deque([np.empty((0, 0, 3), np.uint8)] * 2)
        self._stream: int | None = None
        self._gone = False
        deadline = time.monotonic() + TAKE_S
        self._camera: int | None = self._find()
        try:
            self._own(deadline)
            self._set_up(settings)
            self._start()
        except _RefusedError as error:
            self.close()
            raise CameraError(
                f"the camera {self._name} does not start ({error}): compare [camera] with what `arv-tool-0.8 values` "
                "(of aravis-tools-cli) says"
            ) from error
        except CameraError:
            self.close()
            raise

    def settings(self) -> dict[str, tuple[str, str]]:
        return self._settings

    def trigger(self) -> None:
        self._check()
        while (early := self._pop(0)) is not None:  # exposed before this trigger
            self._missed(early)
            self._push(early)
        try:
            self._call("arv_camera_software_trigger", self._camera)
        except _RefusedError as error:
            raise self._lost(f"does not take a trigger ({error}): check cable and power") from error

    def read(self, timeout_s: float) -> Captured | None:
        began_ns = self._look_at_clocks()
        buffer = self._pop(timeout_s)
        if buffer is None:
            self._check()
            return None
        try:
            return self._captured(buffer, began_ns)
        finally:
            self._push(buffer)

    def close(self) -> None:
        camera, stream = self._camera, self._stream
        self._camera = self._stream = None
        if self._gone:
            return  # every word to it would take seconds; what Aravis still holds goes with the process
        if stream is not None:
            with suppress(_RefusedError):  # it may have gone just now
                self._call("arv_camera_stop_acquisition", camera)
            self._call("g_object_unref", stream)
        if camera is not None:
            self._call("g_object_unref", camera)

    # --- opening

    def _find(self) -> int:
        try:
            camera: int = self._call("arv_camera_new", self._name.encode() or None)
        except _RefusedError as error:
            self._call("arv_update_device_list")
            count = self._call("arv_get_n_devices")
            found = [self._call("arv_get_device_id", number).decode("utf-8", "replace") for number in range(count)]
            raise CameraError(
                f"wanted the GenICam camera {self._name or 'that is found first'}, found "
                f"{', '.join(found) or 'none at all'} ({error}): check cable, power and network address"
            ) from error
        return camera

    def _own(self, deadline: float) -> None:
        """Become the one program that may set and start the camera, and say who it is."""
        self._device = self._call("arv_camera_get_device", self._camera)
        self._gige = bool(self._call("arv_camera_is_gv_device", self._camera))
        words = (
            self._call(f"arv_camera_get_{what}", self._camera) for what in ("vendor_name", "model_name", "device_id")
        )
        self._name = " ".join(word.decode("utf-8", "replace") for word in words if word)
        self.description = f"{self._name} through Aravis"
        if not self._gige:
            return
        while not self._call("arv_gv_device_is_controller", self._device):
            if time.monotonic() > deadline:
                raise self._lost("is in use by another program: end that one")
            time.sleep(0.1)
            with suppress(_RefusedError):  # tried again
                self._call("arv_gv_device_take_control", self._device)
        self._call("arv_device_write_register", self._device, HEARTBEAT_REGISTER, HEARTBEAT_MS)

    def _set_up(self, settings: CameraSettings) -> None:
        """In this order: the format decides which sizes there are, the size which rates."""
        call, camera = self._call, self._camera
        with suppress(_RefusedError):  # some refuse to stop when they do not run
            call("arv_camera_stop_acquisition", camera)  # a program that was killed has left it running
        call("arv_camera_set_acquisition_mode", camera, CONTINUOUS)
        if call("arv_camera_is_feature_available", camera, b"TriggerMode"):
            if not self.triggered:
                self._refuse_wire()
            call("arv_camera_clear_triggers", camera)
        self._choose_format(settings.fourcc)
        self._set_size(settings.width, settings.height)
        if settings.fps is not None and not self.triggered:
            self._set_number("fps", "frame_rate", settings.fps)
        if settings.exposure is not None:
            if call("arv_camera_is_exposure_auto_available", camera):
                call("arv_camera_set_exposure_time_auto", camera, AUTO_OFF)
            self._set_number("exposure", "exposure_time", settings.exposure)
        if settings.gain is not None:
            if call("arv_camera_is_gain_auto_available", camera):
                call("arv_camera_set_gain_auto", camera, AUTO_OFF)
            self._set_number("gain", "gain", settings.gain)
        if self.triggered:
            # last, because a rate that is set switches triggers off
            call("arv_camera_set_trigger", camera, b"Software")
            if settings.fps is not None:
                self._settings["fps"] = (f"{settings.fps:g}", "a frame for each trigger")

    def _choose_format(self, wanted: str | None) -> None:
        """That which was asked for; or that which the camera has if we can read it, or the nearest one of 8 bits."""
        call, camera = self._call, self._camera
        if wanted is not None:
            call("arv_camera_set_pixel_format_from_string", camera, wanted.encode())
        if call("arv_camera_get_pixel_format", camera) not in FORMATS:
            present = call("arv_camera_get_pixel_format_as_string", camera).decode("utf-8", "replace")
            count = c_uint()
            array = call("arv_camera_dup_available_pixel_formats", camera, byref(count))
            offered = list((c_int64 * count.value).from_address(array)) if array else []
            call("g_free", array)
            usable = [number for number in FORMATS if number in offered]
            if wanted is not None or not usable:
                names = ", ".join(name for name, _, _ in FORMATS.values())
                raise CameraError(
                    f"wanted one of the pixel formats {names}, found {present} on the camera {self._name}: "
                    "set camera.fourcc to one of them that it has"
                )
            family = re.split(r"\d", present)[0]  # BayerRG of BayerRG12p
            call("arv_camera_set_pixel_format", camera, min(usable, key=lambda n: FORMATS[n][0][:-1] != family))
        if wanted is not None:
            found = call("arv_camera_get_pixel_format_as_string", camera).decode("utf-8", "replace")
            self._settings["fourcc"] = (wanted, found)

    def _set_size(self, width: int | None, height: int | None) -> None:
        if width is None and height is None:
            return
        # what is not above zero is left as it is
        self._call("arv_camera_set_region", self._camera, 0, 0, width or 0, height or 0)
        region = [c_int() for _ in range(4)]
        self._call("arv_camera_get_region", self._camera, *map(byref, region))
        for name, wanted, found in (("width", width, region[2]), ("height", height, region[3])):
            if wanted is not None:
                self._settings[name] = (str(wanted), str(found.value))

    def _set_number(self, name: str, feature: str, wanted: float) -> None:
        self._call(f"arv_camera_set_{feature}", self._camera, wanted)
        found = self._call(f"arv_camera_get_{feature}", self._camera)
        near = abs(found - wanted) <= CLOSE_ENOUGH * abs(wanted)
        self._settings[name] = (f"{wanted:g}", f"{wanted if near else found:g}")

    def _start(self) -> None:
        call, camera = self._call, self._camera
        if self._gige:
            call("arv_camera_gv_set_stream_options", camera, NO_PACKET_SOCKET)
        payload = call("arv_camera_get_payload", camera)
        self._stream = call("arv_camera_create_stream", camera, None, None)
        if self._gige:
            pairs = (b"socket-buffer", SOCKET_BUFFER_FIXED, b"socket-buffer-size", SOCKET_BUFFER_BYTES)
            call("g_object_set", self._stream, *pairs, None)
        for _ in range(BUFFERS):
            self._push(call("arv_buffer_new", payload, None))
        call("arv_camera_start_acquisition", camera)
        # Not before the first packet does Aravis give its socket the memory, so the first frame is sacrificed; that it
        # comes shows that the camera, and its trigger, work.
        if self.triggered:
            call("arv_camera_software_trigger", camera)
        first = self._pop(self._silent_ns / 1e9)
        if first is None:
            raise self._lost(f"has delivered no first frame within {self._silent_ns / 1e9:g} s: check cable and power")
        self._missed(first)
        self._push(first)
        self._heard_ns = self._look_at_clocks()

    def _refuse_wire(self) -> None:
        """One that a wire triggers would run by itself from here on, and every picture would be taken for a part."""
        with suppress(_RefusedError):  # has no such feature
            mode, source = (
                self._call("arv_camera_get_string", self._camera, name) for name in (b"TriggerMode", b"TriggerSource")
            )
            if mode == b"On" and source and source.startswith(b"Line"):
                raise CameraError(
                    f"the camera {self._name} is set to be triggered by a wire ({source.decode()}), which is not "
                    'supported: set camera.trigger = "software", or its TriggerMode to Off to let it run by itself'
                )

    # --- running

    def _check(self) -> None:
        """CameraError when the camera is gone. Of a lost heartbeat Aravis knows after some seconds."""
        if self._gige and not self._call("arv_gv_device_is_controller", self._device):
            raise self._lost("does not answer any more: check cable and power")
        silent_ns = time.monotonic_ns() - self._heard_ns
        if not self.triggered and silent_ns > self._silent_ns:
            raise self._lost(f"has delivered no frame for {silent_ns / 1e9:.1f} s: check cable and power")

    def _lost(self, what: str) -> CameraError:
        self._gone = True
        return CameraError(f"the camera {self._name} {what}")

    def _pop(self, timeout_s: float) -> int | None:
        buffer: int | None = self._call("arv_stream_timeout_pop_buffer", self._stream, round(timeout_s * 1e6))
        return buffer

    def _push(self, buffer: int) -> None:
        """Let the camera fill it, for the first time or again."""
        self._call("arv_stream_push_buffer", self._stream, buffer)

    def _missed(self, buffer: int) -> int:
        """How many frames got lost before this one; to be asked for each that comes."""
        last, self._last_id = self._last_id, self._call("arv_buffer_get_frame_id", buffer)
        return 0 if last is None else missed_between(last, self._last_id)

    def _look_at_clocks(self) -> int:
        """Now, by the monotonic clock; and whether somebody has set the other one."""
        now_ns = time.monotonic_ns()
        before_ns, self._wall_ns = self._wall_ns, time.time_ns() - now_ns
        if abs(self._wall_ns - before_ns) >= CLOCK_STEP_NS:
            self._set_ns = now_ns
        return now_ns

    def _captured(self, buffer: int, began_ns: int) -> Captured:
        self._heard_ns = self._look_at_clocks()
        age_ns = self._heard_ns + self._wall_ns - self._call("arv_buffer_get_system_timestamp", buffer)
        captured_ns = captured_at(age_ns, self._heard_ns, self._set_ns)
        missed = self._missed(buffer)
        status = self._call("arv_buffer_get_status", buffer)
        problem = self._take(buffer) if status == 0 else f"the frame came damaged: {STATUS.get(status, status)}"
        image = None if problem else self._images[0]
        # one that lay there already was exposed before we waited
        return Captured(min(began_ns, captured_ns), captured_ns, "", image, problem, missed)

    def _take(self, buffer: int) -> str:
        """Copy the pixels as BGR into `self._images[0]`; the problem when they are none that we can read."""
        call = self._call
        payload = call("arv_buffer_get_payload_type", buffer)
        if payload not in PAYLOADS_WITH_IMAGE:
            return f"the camera sends no image but payload type {payload}: set it to plain images"
        number = call("arv_buffer_get_image_pixel_format", buffer)
        if number not in FORMATS:
            return f"the camera has changed to pixel format {number:#010x}: set it back"
        _, channels, code = FORMATS[number]
        width, height = call("arv_buffer_get_image_width", buffer), call("arv_buffer_get_image_height", buffer)
        padding, size = c_int(), c_size_t()
        call("arv_buffer_get_image_padding", buffer, byref(padding), byref(c_int()))
        address = call("arv_buffer_get_data", buffer, byref(size))
        row = width * channels + padding.value
        if size.value < row * height:
            return f"the frame came damaged: {size.value} bytes for {width}×{height} pixels"
        data = np.ctypeslib.as_array((ctypes.c_uint8 * (row * height)).from_address(address)).reshape(height, row)
        self._images.rotate()
        self._images[0] = to_bgr(data[:, : width * channels].reshape(height, width, channels), code, self._images[0])
        return ""


def to_bgr(pixels: Image, code: int | None, into: Image) -> Image:
    """uint8 H×W×channels as uint8 H×W×3 BGR by that conversion of OpenCV; in the memory of `into` if that fits."""
    shape = (*pixels.shape[:2], 3)
    if into.shape != shape:
        into = np.empty(shape, np.uint8)
    if code is None:
        into[:] = pixels
    else:
        cv2.cvtColor(pixels, code, dst=into)
    return into


def captured_at(age_ns: int, heard_ns: int, set_ns: int) -> int:
    """When a frame came that we have heard of just now and whose stamp says that it is so old, all on the monotonic
    clock. A stamp from the future or from long ago is wrong, and any may be while the wall clock has been set a moment
    ago, at `set_ns`: then it is taken to have come when we heard of it."""
    believed = heard_ns - set_ns > LONGEST_AGE_NS and 0 <= age_ns < LONGEST_AGE_NS
    return heard_ns - age_ns if believed else heard_ns


def missed_between(last: int, now: int) -> int:
    """How many frames were numbered between two. Ids of 16 bits (GigE Vision 1) go from 65535 to 1."""
    step = now - last
    if step < 0 and last <= 0xFFFF:
        step += 0xFFFF
    # more do not get lost before the camera counts as gone: it counts anew
    return step - 1 if 0 < step <= LONGEST_GAP else 0
