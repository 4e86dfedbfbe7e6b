"""What a method has to say: which taps are compared, what the student learns, how the maps combine."""

from typing import Protocol

import msgspec
import torch
from torch import nn

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
    def fused(self) -> bool:
        """Whether edge/kernels can make its score: the product of one map for each tap of teacher and student."""

    @property
    def schedule(self) -> str:
        """How it is trained where the caller does not say: a name in `train.RECIPES`."""

    @property
    def teacher_epochs(self) -> int:
        """For so many epochs the teacher first learns to tell the user's parts apart."""

    @property
    def equalised(self) -> bool:
        """Whether the teacher's channels are first divided by how much they vary on the user's parts."""

    def load_teacher(self, source: str, second: str) -> nn.Module:
        """Frozen and in eval mode: float32 N×3×H×W → its features. Sources as in `weights.load_teacher`; `second` is
        empty where the caller says nothing of a second one."""

    def new_student(self, seed: int) -> nn.Module:
        """A student with fresh weights, the same for the same seed."""

    def targets(self, features: Features) -> Features:
        """What training needs of the teacher's features; computed once per image and cached."""

    def answer(self, student: nn.Module, x: torch.Tensor, targets: Features) -> Features:
        """What the student makes of the images, to be compared with the targets."""

    def loss(self, targets: Features, student: Features) -> torch.Tensor:
        """A scalar to minimise."""

    def validation(self, targets: Features, student: Features, size: tuple[int, int]) -> torch.Tensor:
        """One number per image, from maps of this height and width; the checkpoint with the smallest mean over
        held-out normals is kept."""

    def graph(self, teacher: nn.Module, student: nn.Module, height: int, width: int) -> nn.Module:
        """Both networks and the head, batch norm folded: N×3×H×W → (anomaly map N×1×H×W, score N)."""


def fits_teacher(method: Method) -> bool:
    """Whether its teacher is changed by the user's photos, so that a student belongs to both."""
    return method.teacher_epochs > 0 or method.equalised


Settings = dict[str, str | int | float | list[str]]


def settings_of(method: Method) -> Settings:
    """What there is to choose about it, and how it was."""
    return msgspec.json.decode(msgspec.json.encode(method), type=Settings)


def described(method: Method) -> dict[str, str]:
    """The method and its settings, for the key of a kept step."""
    return {"method": method.name, "settings": msgspec.json.encode(method).decode()}
