"""What the numbers of triggers tell."""

import pytest

from stpm.edge.triggers import LONGEST_GAP, Taken, Triggers

NOISE = "noise"


def after(*numbers):
    triggers = Triggers()
    for number in numbers:
        triggers.take(number)
    return triggers


@pytest.mark.parametrize(
    ("before", "number", "missing"),
    [
        ([], 1, range(0)),
        ([], 700, range(0)),  # it was running before us
        ([7], 8, range(0)),
        ([7], 10, range(8, 10)),
        ([7], 8 + LONGEST_GAP - 1, range(8, 107)),
    ],
)
def test_numbers_left_out_are_parts_that_nobody_saw(before, number, missing):
    taken = after(*before).take(number)
    assert (taken.missing, bool(taken.doubt), taken.note) == (missing, bool(missing), "")


def test_a_plc_that_counts_anew_is_noted_and_one_that_leaps_ahead_is_doubted():
    anew = "the PLC counts its triggers from 1, after 7"
    assert after(7).take(1) == Taken(note=anew)
    ahead = f"the PLC counts its triggers from {8 + LONGEST_GAP}, after 7"
    assert after(7).take(8 + LONGEST_GAP) == Taken(doubt=ahead, note=ahead)


def test_a_part_comes_once():
    triggers = after(7)
    assert triggers.came_before(7)
    assert not triggers.came_before(6)
    assert not triggers.came_before(None)
    triggers.ignore(8)
    assert not triggers.came_before(8)  # it has become no part
    assert triggers.take(8) == Taken()


@pytest.mark.parametrize(("number", "doubted"), [(8, False), (9, True), (1, True), (7, True), (None, True)])
def test_what_did_not_arrive_is_a_doubt_unless_the_next_number_tells(number, doubted):
    triggers = after(7)
    assert triggers.lost(NOISE, expected=True) == ""
    taken = triggers.take(number)
    assert bool(taken.doubt) == doubted
    assert taken.doubt.startswith(NOISE) == (doubted and number != 9)  # of 9 the gap tells more
    assert triggers.take(8 if number is None else number + 1).doubt == ""  # once


@pytest.mark.parametrize(("number", "doubted"), [(1, False), (2, True), (None, True)])
def test_before_the_first_trigger_too(number, doubted):
    triggers = Triggers()
    triggers.lost(NOISE, expected=True)
    assert bool(triggers.take(number).doubt) == doubted


def test_what_was_no_trigger_for_sure_is_no_doubt():
    triggers = after(7)
    triggers.lost(NOISE, expected=False)
    assert triggers.take(None) == Taken()


def test_without_numbers_all_that_did_not_arrive_is_a_doubt_at_once():
    triggers = after(None)
    assert triggers.unnumbered
    assert triggers.lost(NOISE, expected=False).startswith(NOISE)
    assert triggers.take(1) == Taken()
    assert not triggers.unnumbered


def test_triggers_that_are_ignored_are_counted_and_show_gaps_too():
    triggers = after(7)
    assert triggers.ignore(8) == ""
    assert triggers.ignore(11) == "triggers 9 to 10 never came"
    assert triggers.take(12) == Taken()
    assert Triggers().ignore(5) == ""
    triggers.lost(NOISE, expected=True)
    triggers.ignore(13)
    assert triggers.take(1).doubt.startswith(NOISE)
    assert "without a number" in triggers.ignore(None)
