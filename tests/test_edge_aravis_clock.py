"""When a frame of a GenICam camera came, whatever somebody does to the wall clock, by which Aravis stamps it."""

import itertools

import pytest

from stpm.edge.camera import aravis
from stpm.edge.camera.aravis import CLOCK_STEP_NS, LONGEST_AGE_NS, AravisSource, captured_at

MS = 1_000_000
EPOCH = 1_700_000_000_000_000_000


@pytest.mark.parametrize(
    ("age_ms", "set_ago_ms", "came_ms_ago"),
    [
        (0, 5000, 0),
        (20, 5000, 20),
        (999, 5000, 999),
        (1000, 5000, 0),  # no frame waits so long
        (-1, 5000, 0),  # in the future
        (EPOCH // MS, 5000, 0),  # no stamp at all
        (20, 1001, 20),
        (20, 1000, 0),  # before or after somebody has set the clock?
        (520, 0, 0),
    ],
)
def test_a_frame_has_come_when_its_stamp_says_or_when_it_is_heard_of(age_ms, set_ago_ms, came_ms_ago):
    heard = 10**12
    assert captured_at(age_ms * MS, heard, heard - set_ago_ms * MS) == heard - came_ms_ago * MS
    assert LONGEST_AGE_NS == 1000 * MS


class Clocks:
    """Both, and the frames that Aravis has stamped: `buffers` of them wait, each with its stamp."""

    def __init__(self):
        self.monotonic, self.ahead, self.buffers = 5_000_000 * MS, EPOCH, []
        self.ids = itertools.count()

    def monotonic_ns(self):
        return self.monotonic

    def time_ns(self):
        return self.monotonic + self.ahead

    def frame_comes(self):
        self.buffers.append(self.time_ns())
        return self.monotonic

    def call(self, name, *arguments):
        """What the library answers, for a frame that is damaged: that is stamped too."""
        match name:
            case "arv_stream_timeout_pop_buffer":
                return self.buffers[0] if self.buffers else None
            case "arv_buffer_get_system_timestamp":
                return self.buffers[0]
            case "arv_stream_push_buffer":
                self.buffers.pop(0)
            case "arv_buffer_get_frame_id":
                return next(self.ids)
            case "arv_buffer_get_status":
                return 3
        return None


@pytest.fixture
def clocks(monkeypatch):
    clocks = Clocks()
    monkeypatch.setattr(aravis, "time", clocks)
    return clocks


@pytest.fixture
def source(clocks):
    """Of which only the reading is real; it has been running for a while."""
    source = object.__new__(AravisSource)
    state = {"_call": clocks.call, "_stream": 1, "_gige": False, "triggered": True, "_last_id": None}
    source.__dict__.update(state, _images=[None], _wall_ns=clocks.ahead, _set_ns=0, _heard_ns=0)
    assert source.read(0.1) is None
    return source


def test_a_frame_that_has_waited_came_when_it_came(clocks, source):
    came = clocks.frame_comes()
    clocks.monotonic += 70 * MS
    assert source.read(0.1).captured_ns == came


@pytest.mark.parametrize("step_ms", [-3_600_000, -500, -30, 2, 30, 500, 980, 3_600_000])
def test_setting_the_clock_puts_no_frame_into_the_past_or_the_future(clocks, source, step_ms):
    came = [clocks.frame_comes(), clocks.frame_comes()]
    clocks.monotonic += 20 * MS
    clocks.ahead += step_ms * MS
    for before in came:  # both were stamped by the clock as it was
        assert before <= source.read(0.1).captured_ns <= clocks.monotonic
    clocks.monotonic += 15 * MS  # as was this one, which was coming just then
    clocks.buffers.append(clocks.time_ns() - 25 * MS - step_ms * MS)
    assert clocks.monotonic - 25 * MS <= source.read(0.1).captured_ns <= clocks.monotonic
    clocks.monotonic += 1001 * MS
    source.read(0.1)
    came = clocks.frame_comes()
    clocks.monotonic += 10 * MS
    assert source.read(0.1).captured_ns == came  # and all is well again


def test_a_clock_that_is_corrected_slowly_is_believed(clocks, source):
    for _ in range(100):
        came = clocks.frame_comes()
        clocks.monotonic += 10 * MS
        clocks.ahead += CLOCK_STEP_NS // 10
        assert came - CLOCK_STEP_NS <= source.read(0.1).captured_ns <= came
        clocks.monotonic += 90 * MS


def test_the_clock_is_looked_at_between_frames_too(clocks, source):
    """Set while nothing came, it has nothing to do with the frame that comes a second later."""
    clocks.ahead += 500 * MS
    assert source.read(0.1) is None
    clocks.monotonic += 1001 * MS
    came = clocks.frame_comes()
    clocks.monotonic += 30 * MS
    assert source.read(0.1).captured_ns == came
