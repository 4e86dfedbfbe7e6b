"""GenICam cameras, against the camera that Aravis emulates: a process of its own that speaks GigE Vision over UDP."""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import time
from itertools import pairwise

import cv2
import numpy as np
import pytest

from stpm.edge.camera import CameraSettings, aravis, open_source
from stpm.edge.camera.messages import CameraFailed, CameraOpened, FrameReady, FromCamera, TakePicture
from stpm.edge.channel import ChannelClosedError
from stpm.edge.errors import CameraError
from stpm.edge.ring import Ring
from stpm.edge.worker import Worker

SERIAL = f"T{os.getpid()}"
NAME = f"Aravis-Fake-{SERIAL}"
ADDRESS = ("127.0.0.1", 3956)
DISCOVERY = bytes((0x42, 0x11, 0, 2, 0, 0, 0, 1))
SMALL = {"width": 64, "height": 48, "fps": 50}


def _has_library():
    try:
        ctypes.CDLL(aravis.LIBRARIES[-1])
    except OSError:
        return False
    return True


emulated = pytest.mark.skipif(
    not (shutil.which("arv-fake-gv-camera-0.8") and _has_library()),
    reason="the emulated camera takes `apt-get install aravis-tools`",
)


class Emulator:
    process = None

    def start(self, *options):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.bind(ADDRESS)
            except OSError:
                # they would share the port, and each get some of the packets
                pytest.skip("another emulated camera runs on this machine")
        self.process = subprocess.Popen(["arv-fake-gv-camera-0.8", "-i", "127.0.0.1", "-s", SERIAL, *options])
        deadline = time.monotonic() + 10
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.settimeout(0.05)
            while time.monotonic() < deadline:
                probe.sendto(DISCOVERY, ADDRESS)
                try:
                    if SERIAL.encode() in probe.recv(1000):
                        return
                except (TimeoutError, ConnectionRefusedError):
                    continue
        self.kill()
        raise AssertionError("the emulated camera does not answer")

    def kill(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def emulator():
    emulator = Emulator()
    emulator.start()
    yield emulator
    emulator.kill()


@pytest.fixture
def camera():
    """Opens the emulated camera, and closes it in the end."""
    opened = []

    def opener(**settings):
        opened.append(open_source(CameraSettings(source=f"genicam:{NAME}", **settings)))
        return opened[-1]

    yield opener
    for source in opened:
        source.close()


def read(source, count):
    """So many frames, with copies of their images."""
    found, deadline = [], time.monotonic() + 20
    while len(found) < count:
        assert time.monotonic() < deadline, f"{len(found)} of {count} frames"
        frame = source.read(timeout_s=0.5)
        if frame is not None:
            found.append((frame, None if frame.image is None else frame.image.copy()))
    return found


def picture(source):
    """The first frame that came whole: on a busy machine a large one may not, as long as Aravis' socket is small."""
    return next(image for _, image in read(source, 5) if image is not None)


def register(address):
    """What stands in a register of the camera, read past Aravis."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        asker.settimeout(5)
        asker.sendto(bytes((0x42, 1, 0, 0x80, 0, 4, 0, 1)) + address.to_bytes(4, "big"), ADDRESS)
        return int.from_bytes(asker.recv(1000)[8:12], "big")


# --- running


@emulated
def test_frames_come_by_themselves_differ_and_are_stamped(emulator, camera):
    source = camera(**SMALL)
    assert source.live
    assert not source.triggered
    assert SERIAL in source.description
    found = read(source, 30)
    assert not any(frame.problem or frame.missed for frame, _ in found)
    assert {image.shape for _, image in found} == {(48, 64, 3)}
    for (_, one), (_, other) in pairwise(found):
        assert (one[:, 1:] == other[:, :-1]).all()  # the emulated picture moves by one pixel a frame
        assert (one != other).any()
    times = [frame.captured_ns for frame, _ in found]
    assert times == sorted(times)
    assert 0.45 < (times[-1] - times[0]) / 1e9 < 0.9
    assert all(frame.began_ns <= frame.captured_ns <= time.monotonic_ns() for frame, _ in found)


@emulated
def test_an_image_stays_until_the_next_but_one(emulator, camera):
    source = camera(**SMALL)
    first = source.read(1).image
    copy = first.copy()
    second = source.read(1).image
    assert (first == copy).all()
    assert (second != first).any()


@emulated
def test_frame_numbers_that_wrap_are_no_gap(emulator, camera):
    """The emulated camera counts from 65000, with 16 bits."""
    found = read(camera(**(SMALL | {"fps": 300})), 600)
    assert sum(frame.missed for frame, _ in found) < 50  # none, unless the machine was very busy


@pytest.mark.parametrize(
    ("last", "now", "missed"),
    [
        (7, 8, 0),
        (7, 11, 3),
        (65535, 1, 0),
        (65533, 2, 3),
        (65535, 0, 0),  # not allowed, and done
        (0, 1, 0),
        (5, 5, 0),
        (40_000, 3, 0),  # it counts anew
        (65535, 65536, 0),  # of 64 bits
        (70_000, 70_009, 8),
        (70_000, 1, 0),
    ],
)
def test_gaps_in_the_numbers_are_counted(last, now, missed):
    assert aravis.missed_between(last, now) == missed


@emulated
def test_lost_packets_are_damaged_frames_or_missed_ones(camera):
    emulator = Emulator()
    emulator.start("-r", "20")  # of a thousand packets
    try:
        source = camera(width=320, height=240, fps=50)
        found = read(source, 60)
        source.close()
    finally:
        emulator.kill()
    damaged = [frame for frame, _ in found if frame.problem]
    assert 10 < len(damaged) < 60
    assert all(frame.image is None for frame in damaged)
    assert {frame.problem for frame in damaged} <= {
        "the frame came damaged: missing packets",
        "the frame came damaged: timeout",
    }
    good = [image for frame, image in found if not frame.problem]
    assert all((image[1:, :-1] == image[:-1, 1:]).all() for image in good)  # the ramp has no hole


@emulated
def test_a_software_trigger_gives_exactly_one_frame(emulator, camera):
    source = camera(width=64, height=48, trigger="software")
    assert source.triggered
    assert source.read(0.3) is None
    for _ in range(5):
        triggered_ns = time.monotonic_ns()
        source.trigger()
        frame = source.read(1)
        assert frame.image is not None
        assert triggered_ns < frame.captured_ns < triggered_ns + 0.5e9
        assert frame.missed == 0
        assert source.read(0.1) is None


@emulated
def test_a_frame_that_was_there_before_the_trigger_is_not_its_answer(emulator, camera):
    source = camera(width=64, height=48, trigger="software")
    source.trigger()
    time.sleep(0.3)  # its frame has come, and nobody has read it
    triggered_ns = time.monotonic_ns()
    source.trigger()
    assert source.read(1).captured_ns > triggered_ns
    assert source.read(0.1) is None


# --- settings


@emulated
def test_settings_are_applied_and_read_back(emulator, camera):
    library = aravis._Library()
    earlier = library("arv_camera_new", NAME.encode())
    library("arv_camera_set_gain_auto", earlier, 2)  # continuous
    library("g_object_unref", earlier)
    assert register(0x114) == 2
    source = camera(width=320, height=200, fps=30, exposure=4000, gain=3, fourcc="BayerGR8")
    settings = source.settings()
    assert sorted(settings) == ["exposure", "fourcc", "fps", "gain", "height", "width"]
    assert all(asked == found for asked, found in settings.values()), settings
    assert picture(source).shape == (200, 320, 3)
    addresses = {"width": 0x100, "height": 0x104, "period": 0x138, "exposure": 0x120, "gain": 0x110, "auto": 0x114}
    assert {name: register(address) for name, address in addresses.items()} == {
        "width": 320,
        "height": 200,
        "period": 33333,  # µs
        "exposure": 4000,  # µs
        "gain": 3,
        "auto": 1,  # off
    }
    assert register(0x128) == next(number for number, (name, _, _) in aravis.FORMATS.items() if name == "BayerGR8")


@emulated
def test_what_is_not_asked_for_stays_and_one_side_of_the_size_may_be_set(emulator, camera):
    camera(width=320, height=200, fps=50).close()
    source = camera(height=100)
    assert source.settings() == {"height": ("100", "100")}
    assert picture(source).shape == (100, 320, 3)


@emulated
def test_the_trigger_of_an_earlier_user_is_switched_off(emulator, camera):
    camera(trigger="software").close()
    assert register(0x300) == 1
    assert len(read(camera(width=64, height=48), 5)) == 5


@emulated
def test_a_camera_that_a_wire_triggers_is_not_made_to_run_by_itself(emulator, camera):
    source = camera(trigger="software")
    source._call("arv_camera_set_trigger", source._camera, b"Line0")
    source.close()
    with pytest.raises(CameraError, match=r"triggered by a wire \(Line0\)"):
        camera(width=64, height=48)
    assert register(0x300) == 1
    camera(trigger="software").close()
    assert len(read(camera(width=64, height=48), 5)) == 5


@emulated
def test_a_setting_that_did_not_stick_is_seen(emulator, camera):
    source = camera(trigger="software", fps=30)
    assert source.settings() == {"fps": ("30", "a frame for each trigger")}
    source.close()
    source = camera(**SMALL, gain=2.4)  # the emulated gain is a whole number
    assert source.settings()["gain"] == ("2.4", "2")


@emulated
def test_a_pixel_format_that_we_cannot_read_is_exchanged_for_one_of_8_bits(emulator, camera):
    with pytest.raises(CameraError, match="Mono16"):
        camera(**SMALL, fourcc="Mono16")
    source = camera(**SMALL)  # the camera has kept Mono16
    assert picture(source).shape == (48, 64, 3)
    assert aravis.FORMATS[register(0x128)][0] == "Mono8"


@emulated
def test_a_pixel_format_that_does_not_exist_is_refused_in_one_sentence(emulator, camera):
    with pytest.raises(CameraError, match=r"^the camera Aravis Fake .* does not start .*Colourful"):
        camera(fourcc="Colourful")


@emulated
@pytest.mark.parametrize("name", ["RGB8", "BayerGR8", "BayerGB8"])  # its RG8 and BG8 are each other's
def test_colours_are_as_the_camera_has_them(name, emulator, camera):
    image = picture(camera(width=320, height=240, fps=50, exposure=3000, gain=3, fourcc=name))
    blue, _, red = image.reshape(-1, 3).mean(axis=0)
    assert red > 2 * blue


@pytest.mark.parametrize("name", ["RG", "GR", "GB", "BG"])
def test_a_bayer_pattern_is_named_by_its_first_two_pixels(name):
    colour = {"B": 200, "G": 120, "R": 40}
    below = {"RG": "GB", "GR": "BG", "GB": "RG", "BG": "GR"}[name]
    cell = [[colour[letter] for letter in row] for row in (name, below)]
    mosaic = np.tile(np.array(cell, np.uint8), (8, 8))[:, :, None]
    (code,) = (code for label, _, code in aravis.FORMATS.values() if label == f"Bayer{name}8")
    image = aravis.to_bgr(mosaic, code, np.empty((0, 0, 3), np.uint8))
    assert (image == (200, 120, 40)).all()


def test_conversions_reuse_their_memory_and_follow_the_size():
    grey = np.arange(48, dtype=np.uint8).reshape(6, 8, 1)
    into = np.empty((6, 8, 3), np.uint8)
    image = aravis.to_bgr(grey, cv2.COLOR_GRAY2BGR, into)
    assert image is into
    assert (image == grey).all()
    assert aravis.to_bgr(grey[:4], cv2.COLOR_GRAY2BGR, into).shape == (4, 8, 3)
    bgr = np.arange(48 * 3, dtype=np.uint8).reshape(6, 8, 3)
    assert (aravis.to_bgr(bgr, None, into) == bgr).all()


# --- opening and going


def test_a_missing_library_is_one_sentence_with_its_package(monkeypatch):
    monkeypatch.setattr(aravis, "LIBRARIES", ("libnowhere.so.0",))
    with pytest.raises(CameraError, match="apt-get install libaravis-0"):
        open_source(CameraSettings(source="genicam:"))


@emulated
def test_a_camera_that_is_not_there_names_those_that_are(emulator):
    with pytest.raises(CameraError, match=f"GenICam camera Nobody-1, found .*{NAME}"):
        open_source(CameraSettings(source="genicam:Nobody-1"))


@emulated
def test_without_a_name_the_first_camera_is_taken(emulator):
    source = open_source(CameraSettings(source="genicam:", **SMALL))
    assert source.read(1) is not None
    source.close()


@emulated
def test_a_closed_camera_can_be_opened_again_at_once_and_closed_twice(emulator, camera):
    source = camera(**SMALL)
    assert register(aravis.HEARTBEAT_REGISTER) == 2000
    source.close()
    source.close()
    started = time.monotonic()
    assert read(camera(**SMALL), 1)
    assert time.monotonic() - started < 1


@emulated
def test_a_camera_of_another_program_is_not_taken_from_it(emulator, camera):
    first = camera(**SMALL)
    with pytest.raises(CameraError, match="in use by another program"):
        camera(**SMALL)
    assert len(read(first, 5)) == 5


# --- in its process


class Process:
    def __init__(self, ring, **settings):
        settings = CameraSettings(source=f"genicam:{NAME}", **settings)
        self.worker = Worker("stpm.edge.camera.process", settings, FromCamera, ring)

    def until(self, kind, within_s):
        deadline, found = time.monotonic() + within_s, []
        while time.monotonic() < deadline:
            try:
                found += self.worker.channel.receive(0.05)
            except ChannelClosedError:
                break
            for message in found:
                if isinstance(message, kind):
                    return message
        raise AssertionError(f"no {kind.__name__} within {within_s} s, only {found[-3:]}")

    def collect(self, count, within_s):
        """So many messages."""
        deadline, found = time.monotonic() + within_s, []
        while len(found) < count:
            assert time.monotonic() < deadline, f"{len(found)} of {count} messages within {within_s} s"
            found += self.worker.channel.receive(0.05)
        return found


@pytest.fixture
def process():
    ring, started = Ring(8), []

    def starter(**settings):
        started.append(Process(ring, **settings))
        return started[-1], ring

    yield starter
    for each in started:
        each.worker.end(0)
    ring.close()


@emulated
def test_the_camera_process_delivers_what_the_camera_sends(emulator, process):
    camera, ring = process(**SMALL)
    assert camera.until(CameraOpened, 15).settings["width"] == ("64", "64")
    frame = camera.until(FrameReady, 5)
    assert (frame.number, frame.problem, frame.shape) == (1, "", (48, 64, 3))
    image = ring.image(frame.slot, frame.shape)
    assert (image[1:, :-1] == image[:-1, 1:]).all()


@emulated
def test_the_camera_process_answers_each_trigger_once(emulator, process):
    camera, ring = process(width=64, height=48, trigger="software")
    camera.until(CameraOpened, 15)
    for trigger in (5, 6, 7):
        asked_ns = time.monotonic_ns()
        camera.worker.channel.send(TakePicture(trigger, asked_ns))
        frame = camera.until(FrameReady, 3)
        assert (frame.trigger, frame.problem) == (trigger, "")
        assert frame.captured_ns > asked_ns
        ring.release(frame.slot)
    assert camera.worker.channel.receive(0.2) == []


@emulated
def test_the_camera_process_catches_up_with_triggers_at_once(emulator, process):
    camera, _ = process(width=64, height=48, trigger="software")
    camera.until(CameraOpened, 15)
    os.kill(camera.worker.process.pid, signal.SIGSTOP)  # the computer is busy, and triggers pile up
    for trigger in range(1, 31):
        camera.worker.channel.send(TakePicture(trigger, time.monotonic_ns()))
    os.kill(camera.worker.process.pid, signal.SIGCONT)
    found = camera.collect(30, 3)
    assert [frame.trigger for frame in found] == list(range(1, 31))
    assert [frame.slot is None for frame in found] == [True] * 29 + [False]


@emulated
@pytest.mark.parametrize("trigger", ["free", "software"])
def test_a_camera_that_goes_is_noticed_and_opens_again_when_it_is_back(trigger, emulator, process):
    """In processes of their own: of a camera that is gone Aravis keeps a thread until the process ends, and its
    heartbeats would hold the next emulated camera for the dead."""
    camera, _ = process(**SMALL, trigger=trigger)
    camera.until(CameraOpened, 15)
    if trigger == "free":
        camera.until(FrameReady, 5)
    emulator.kill()
    if trigger == "software":
        camera.worker.channel.send(TakePicture(1, time.monotonic_ns()))
    gone = camera.until(CameraFailed, 4).sentence
    assert ("no frame for" if trigger == "free" else "does not take a trigger") in gone
    camera.worker.process.wait(2)  # and closing takes no time
    emulator.start()
    again, _ = process(**SMALL)
    again.until(FrameReady, 15)


@emulated
def test_a_killed_camera_process_does_not_keep_the_camera(emulator, process):
    camera, _ = process(**SMALL)
    camera.until(FrameReady, 15)
    camera.worker.process.send_signal(signal.SIGKILL)
    camera.worker.process.wait()
    killed = time.monotonic()
    again, _ = process(**SMALL)
    again.until(FrameReady, 8)
    # 2.7 s on an idle machine: the heartbeat of the killed one must run out first
    assert time.monotonic() - killed < 8
