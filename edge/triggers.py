"""What the numbers of triggers tell: whether one was lost, and whether the PLC's parts are still ours."""

from dataclasses import dataclass

LONGEST_GAP = 100  # so many parts that were missed get a verdict each; a PLC whose numbers jump further counts anew


@dataclass(frozen=True)
class Taken:
    """A trigger that became a part. `missing`: numbers before it that never came, each a part that nobody has seen.
    `doubt`: why the PLC's parts and ours may not be the same any more. `note`: for the journal."""

    missing: range = range(0)
    doubt: str = ""
    note: str = ""


class Triggers:
    def __init__(self) -> None:
        self.unnumbered = False  # they come without a number
        self._last = self._taken = 0  # number of the last one, and of the last that became a part
        self._lost = ""  # what did not arrive before the next one, and may have been one

    def came_before(self, number: int | None) -> bool:
        """Whether the part of this trigger is there already."""
        return number is not None and number == self._taken

    def take(self, number: int | None) -> Taken:
        """A trigger becomes a part."""
        last, lost = self._last, self._lost
        self.unnumbered, self._lost = number is None, ""
        unsaid = f"{lost}; it may have been a trigger, and no number says that it was not" if lost else ""
        if number is None:
            return Taken(doubt=unsaid)
        self._last = self._taken = number
        if last and last + 1 < number <= last + LONGEST_GAP:
            return Taken(range(last + 1, number), _never_came(last, number))
        jumps = last and number not in (last, last + 1)  # the last may not have been taken
        note = f"the PLC counts its triggers from {number}, after {last}" if jumps else ""
        follows = last < number if last else number == 1  # one between them would show
        return Taken(doubt=note if follows else unsaid, note=note)

    def ignore(self, number: int | None) -> str:
        """A trigger while inspection is not enabled. The doubt: one before it may have been lost while it was."""
        last = self._last
        if number is None:
            return "a trigger without a number came while inspection was not enabled"
        self._last = number
        return _never_came(last, number) if last and number > last + 1 else ""

    def lost(self, what: str, expected: bool) -> str:
        """The PLC has said something that did not arrive. The doubt; where there are numbers, the next one tells."""
        if self.unnumbered:
            return f"{what}; it may have been a trigger, and no number will say that it was not"
        if expected:
            self._lost = what
        return ""


def _never_came(last: int, number: int) -> str:
    return f"triggers {last + 1} to {number - 1} never came"
