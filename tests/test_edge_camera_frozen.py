"""What the camera process decides by itself: when a picture is frozen, and that a silent camera is asked how it is."""

import numpy as np
import pytest

from stpm.edge.camera import CameraSettings
from stpm.edge.camera.messages import ToCamera
from stpm.edge.camera.process import FROZEN_S, SAMPLE_ROWS, Capture, Frozen
from stpm.edge.channel import Channel, pair
from stpm.edge.errors import CameraError
from stpm.edge.ring import Ring

FRAME_NS = 20_000_000


def noise(seed, shape=(48, 64, 3)):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def watch(frozen, images):
    return [frozen.look(image, number * FRAME_NS) for number, image in enumerate(images)]


def kinds(frozen, images):
    return [problem.split(":")[0] for problem in watch(frozen, images)]


def test_a_picture_that_comes_again_has_a_problem_the_third_one_is_called_frozen_and_a_new_one_is_neither():
    images = [noise(1), noise(2), noise(2), noise(2), noise(2), noise(3), noise(3), noise(4)]
    again, frozen = "the same picture again", "the camera is frozen"
    assert kinds(Frozen(3, 0), images) == ["", "", again, frozen, frozen, "", again, ""]
    assert kinds(Frozen(2, 0), images) == ["", "", frozen, frozen, frozen, "", frozen, ""]
    assert "picture number 3 that is the same" in watch(Frozen(3, 0), images)[3]


def test_pictures_that_differ_only_where_the_first_look_does_not_go_are_not_alike():
    one, other = noise(1), noise(1)
    other[SAMPLE_ROWS - 1, -1, -1] ^= 1
    assert watch(Frozen(2, 0), [one, other] * 10) == [""] * 20
    assert [bool(problem) for problem in watch(Frozen(3, 0), [one, other, other])] == [False, False, True]


def test_pictures_of_another_size_or_type_are_not_alike():
    images = [noise(1), noise(1)[:32], noise(1), noise(1).astype(np.uint16) * 2]
    assert watch(Frozen(2, 0), images * 2) == [""] * 8


def test_a_frame_without_a_picture_neither_thaws_nor_counts():
    problems = watch(Frozen(3, 0), [noise(1), None, noise(1), None, None, noise(1)])
    assert [bool(problem) for problem in problems] == [False, False, True, False, False, True]
    assert "number 3" in problems[5]


def test_a_camera_that_stays_frozen_is_given_up_after_two_seconds():
    frozen, frames = Frozen(3, 0), round(FROZEN_S * 1e9 / FRAME_NS)
    problems = watch(frozen, [noise(1)] * (frames + 1))
    assert all(problems[1:])
    with pytest.raises(CameraError, match="frozen"):
        frozen.look(noise(1), (frames + 1) * FRAME_NS)


def test_time_before_the_first_like_picture_does_not_count():
    frozen = Frozen(3, 0)
    frozen.look(noise(1), 0)
    for late in (10, 11, 12):
        problem = frozen.look(noise(2), late * 1_000_000_000)
    assert problem  # 2 s, and not 12


def test_the_first_picture_is_compared_with_that_of_the_process_before():
    before = Frozen(3, 0)
    watch(before, [noise(1), noise(2)])
    late = 1000 * FRAME_NS  # of a camera that stays frozen, the time begins anew
    still = Frozen(3, before.last_picture)
    assert [bool(still.look(noise(2), late + number)) for number in range(4)] == [True] * 4
    assert kinds(Frozen(3, before.last_picture), [noise(1), noise(2)]) == ["", ""]
    assert kinds(Frozen(3, before.last_picture), [noise(2), noise(3)]) == ["the same picture again", ""]


def test_nothing_is_frozen_where_it_is_switched_off():
    off = Frozen(0, 0)
    assert watch(off, [noise(1)] * 500) == [""] * 500
    assert off.last_picture == 0


class Unplugged:
    """A camera that gives frames on demand, and that nobody asks."""

    description, live, triggered = "a camera", True, True

    def __init__(self):
        self.rounds = self.looked = 0

    @property
    def finished(self):
        self.rounds += 1
        assert self.rounds < 20, "nobody asks it"
        return False

    def read(self, timeout_s):
        assert timeout_s == 0
        self.looked += 1
        if self.looked > 3:
            raise CameraError("the camera does not answer any more")


def test_a_camera_that_is_lost_between_two_triggers_is_noticed():
    ours, theirs = pair()
    ring, source = Ring(1), Unplugged()
    channel = Channel(theirs, ToCamera)
    with pytest.raises(CameraError, match="does not answer"):
        Capture(CameraSettings(trigger="software"), source, channel, ring).run()
    assert source.looked == 4
    ring.close()
    channel.close()
    ours.close()
