"""What is wrong with the line at the moment, and the state that follows from it. Pure.

A *fault* means that no part can be passed safely: the state is FAULT until it is gone. A *warning* leaves the verdicts
valid: the state is DEGRADED. A latched condition stays until somebody clears it, though its cause is gone.
"""

from dataclasses import dataclass, replace
from typing import Literal

PASSING = ("READY", "RUNNING", "DEGRADED")
Phase = Literal["BOOT", "SELF_TEST", "READY", "RUNNING", "STOPPED"]


@dataclass(frozen=True)
class Condition:
    sentence: str
    fault: bool
    latched: bool
    code: int  # exit code of that kind of error, for the PLC


class Health:
    def __init__(self) -> None:
        self.phase: Phase = "BOOT"
        self.simulated = False  # no part is inspected: the verdicts are scripted
        self.conditions: dict[str, Condition] = {}

    def fault(self, name: str, sentence: str, code: int = 1, latched: bool = False) -> bool:
        """True when that is news."""
        return self._set(name, Condition(sentence, True, latched, code))

    def warn(self, name: str, sentence: str, code: int = 1, latched: bool = False) -> bool:
        return self._set(name, Condition(sentence, False, latched, code))

    def settle(self, name: str) -> bool:
        """The cause is gone; True when that is news."""
        condition = self.conditions.get(name)
        if condition is None or condition.latched:
            return False
        del self.conditions[name]
        return True

    def clear(self) -> list[str]:
        """Somebody has looked: the latched conditions go. Their names."""
        cleared = [name for name, condition in self.conditions.items() if condition.latched]
        for name in cleared:
            del self.conditions[name]
        return cleared

    @property
    def faulty(self) -> bool:
        return any(condition.fault for condition in self.conditions.values())

    @property
    def state(self) -> str:
        if self.phase in ("BOOT", "SELF_TEST", "STOPPED"):
            return self.phase
        if self.faulty:
            return "FAULT"
        return "DEGRADED" if self.conditions else self.phase

    @property
    def reason(self) -> str:
        """Of FAULT or DEGRADED: the names of what is wrong, faults first. SIMULATED where all would be well."""
        simulated = ["SIMULATED"] if self.simulated and self.state in PASSING else []
        if self.state not in ("FAULT", "DEGRADED"):
            return " ".join(simulated)
        names = sorted(self.conditions, key=lambda name: (not self.conditions[name].fault, name))
        return " ".join([*simulated, *names])

    @property
    def code(self) -> int:
        faults = [condition.code for condition in self.conditions.values() if condition.fault]
        return faults[0] if faults else 0

    def _set(self, name: str, condition: Condition) -> bool:
        before = self.conditions.get(name)
        latched = condition.latched or (before is not None and before.latched)
        self.conditions[name] = replace(condition, latched=latched)
        return before is None
