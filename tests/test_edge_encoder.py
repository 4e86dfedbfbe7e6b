"""The encoder: where the belt was, is and will be, and which counts are not believed."""

import pytest

from stpm.edge.encoder import Encoder
from stpm.edge.gate import MS

WAY = 1000


def test_the_encoder_interpolates_extrapolates_and_wraps():
    encoder = Encoder(200 * MS, WAY)
    assert encoder.lost(0)
    assert encoder.count_at(0) is None
    start = (1 << 32) - 150
    for step in range(5):
        encoder.add(step * 100 * MS, (start + 100 * step) % (1 << 32))
    assert encoder.count_at(150 * MS) == start + 150
    assert encoder.count_at(450 * MS) == start + 450
    assert encoder.time_of(start + 600) == 600 * MS
    assert not encoder.lost(600 * MS)
    assert encoder.lost(601 * MS)


def test_two_counts_of_one_moment_are_one():
    encoder = Encoder(200 * MS, WAY)
    for ns, count in ((0, 0), (MS, 10), (MS, 11), (2 * MS, 20)):
        encoder.add(ns, count)
        encoder.count_at(2 * ns)  # whatever comes next
    assert encoder.count_at(MS) == 11
    assert encoder.time_of(30) == 3 * MS


def test_an_encoder_that_stands_says_never_and_one_that_runs_back_a_little_does_not_jump():
    encoder = Encoder(200 * MS, WAY)
    for ms, count in ((0, 100), (10, 110), (20, 105), (30, 105), (40, 105), (50, 105)):
        encoder.add(ms * MS, count)
    assert encoder.count_at(50 * MS) == 105
    assert encoder.time_of(120) is None


def fed(counts, every_ms=10):
    """An encoder that has read these, and what it said of each."""
    encoder = Encoder(200 * MS, WAY)
    return encoder, [encoder.add(step * every_ms * MS, count % (1 << 32)) for step, count in enumerate(counts)]


@pytest.mark.parametrize(
    "counts",
    [
        range(0, 100_000, 90),
        [0, 4, 8, 28, 48, 128, 208, 500, 800, 1200],
        range((1 << 32) - 500, (1 << 32) + 500, 50),
        [*range(0, 500, 50), *([450] * 20), *range(450, 2000, 50)],
        [*range(0, 2000, 50), *([1950] * 20), *range(1950, 3000, 50)],
        # swings at a standstill
        [0, 50, 100, 103, 100, 97, 101, 100, 150],
        # so fast that the whole way lies between two reads
        [0, 900, 2200, 3600, 8000, 10000],
    ],
)
def test_a_belt_that_runs_wraps_stands_swings_or_runs_fast_is_believed(counts):
    assert not any(fed(counts)[1])


@pytest.mark.parametrize(
    ("last", "sentence"),
    # the belt runs by 10 from read to read: the way is 1000, and a jump within it is one too
    [(0, "ran back"), (1900, "ran back"), (2450, "jumped"), (3500, "jumped"), (1 << 31, "jumped|ran back")],
)
def test_a_counter_that_is_set_back_or_jumps_is_told_once_and_counts_from_there(last, sentence):
    encoder, said = fed([*range(0, 2000, 10), last, last + 10, last + 20])
    assert [bool(each) for each in said] == [False] * 200 + [True, False, False]
    assert any(word in said[200] for word in sentence.split("|"))
    assert encoder.count_at(202 * 10 * MS) == last + 20
    assert encoder.time_of(last + 30) == 203 * 10 * MS


def test_running_back_by_little_steps_is_noticed_before_it_matters():
    said = fed([*range(500), *range(500, 300, -1)])[1]
    first = next(step for step, each in enumerate(said) if each)
    assert 500 < first <= 500 + 0.02 * WAY + 2


def test_when_the_belt_last_moved():
    encoder = fed([0, 0, 10, 20, 20, 20])[0]
    assert encoder.moved_ns == 30 * MS
    assert fed([7])[0].moved_ns == 0  # it may have


def test_on_a_short_way_an_encoder_may_still_swing():
    encoder = Encoder(200 * MS, 10)
    assert not any(encoder.add(ms * MS, count) for ms, count in enumerate((5, 8, 4, 8, 5)))
    assert encoder.add(10 * MS, 3)


@pytest.mark.parametrize("first", [1, 2, 5])
def test_a_belt_that_begins_with_a_wobble_is_believed_at_full_speed(first):
    assert not any(fed([0, 0, first, *range(first + 40, 5000, 40)], 20)[1])


def test_after_a_jump_the_belt_shows_its_speed_anew():
    said = fed([*range(0, 3000, 10), 5000, *range(5040, 9000, 40)])[1]
    assert [step for step, each in enumerate(said) if each] == [300]


def test_a_first_count_that_was_held_up_makes_no_belt_fast_for_ever():
    encoder = Encoder(200 * MS, WAY)
    said = [encoder.add(max(ms, 19) * MS, ms) for ms in range(0, 5500, 20)]
    assert not any(said)
    assert encoder.add(5500 * MS, 9500)


def test_after_a_jump_an_earlier_speed_excuses_no_further_one():
    slow = range(10_001, 10_002 + WAY)
    said = fed([*range(0, 3000, 100), 10_000, *slow, slow[-1] + 500])[1]
    assert [step for step, each in enumerate(said) if each] == [30, len(said) - 1]


def test_what_is_passed_was_passed_between_the_two_counts_around_it():
    """The belt has stood, and has just started."""
    encoder = fed([95, 95, 95, 95, 135], 20)[0]
    assert encoder.time_of(100) == (60 + 20 * 5 / 40) * MS
    assert encoder.time_of(90) == 0
    assert encoder.time_of(145) > 80 * MS
    assert fed([90, 95, 95, 95, 135], 20)[0].time_of(95) == 20 * MS  # when it came there, not when it went on


def test_counts_that_were_held_up_and_come_together_are_no_jump():
    """The belt runs all the time, at 1 a millisecond; for 150 ms nobody reads, and then all of it at one moment."""
    encoder = Encoder(200 * MS, 100)
    said = [encoder.add(ms * MS, ms) for ms in range(0, 1000, 10)]
    said += [encoder.add(1150 * MS, ms) for ms in range(1000, 1150, 10)]
    said += [encoder.add((1150 + 1 + ms) * MS, 1150 + ms) for ms in range(0, 500, 10)]
    assert not any(said)
