"""What a method has to say: which taps are compared, what the student learns, how the maps combine."""

from typing import Protocol

import msgspec
import torch
from torch import nn

from stpm.build.pyramid import Pyramid

Features = list[torch.Tensor]


class Method(Protocol):
    """An immutable value: two that are equal train the same student."""

    @property
    def name(self) -> str: ...

    @property
    def backbone(self) -> str:
        """Of the teacher, by torchvision's name."""

    @property
    def taps(self) -> tuple[str, ...]:
        """The layers whose features are compared."""

    @property
    def teacher_epochs(self) -> int:
        """For so many epochs the teacher first learns to tell the user's parts apart."""

    def new_student(self, seed: int) -> Pyramid:
        """A student with fresh weights, the same for the same seed."""

    def targets(self, features: Features) -> Features:
        """What the student is compared with, one tensor per tap; computed once per image and cached."""

    def loss(self, targets: Features, student: Features) -> torch.Tensor:
        """A scalar to minimise."""

    def validation(self, targets: Features, student: Features, size: int) -> torch.Tensor:
        """One number per image; the checkpoint with the smallest mean over held-out normals is kept."""

    def graph(self, teacher: Pyramid, student: Pyramid, height: int, width: int) -> nn.Module:
        """Both networks and the head, batch norm folded: N×3×H×W → (anomaly map N×1×H×W, score N)."""


Settings = dict[str, str | int | float | list[str]]


def settings_of(method: Method) -> Settings:
    """What there is to choose about it, and how it was."""
    return msgspec.json.decode(msgspec.json.encode(method), type=Settings)


def described(method: Method) -> dict[str, str]:
    """The method and its settings, for the key of a kept step."""
    return {"method": method.name, "settings": msgspec.json.encode(method).decode()}
