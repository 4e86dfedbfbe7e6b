"""ET-STPM: STPM with an enhanced teacher (Zolfaghari & Sajedi, CSICC 2022)."""

from dataclasses import dataclass
from typing import ClassVar

from stpm.build.methods.stpm import Stpm


@dataclass(frozen=True)
class EtStpm(Stpm):
    """The paper says "few" epochs; 0 is STPM itself."""

    teacher_epochs: int = 2  # type: ignore[misc]
    name: ClassVar[str] = "etstpm"
