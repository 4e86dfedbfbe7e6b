"""STPM: Student-Teacher Feature Pyramid Matching (Wang et al., BMVC 2021)."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from stpm.build.head import ProductHead
from stpm.build.methods.base import Features
from stpm.build.pyramid import TAPS, Pyramid, fold_batch_norm
from stpm.build.weights import load_teacher
from stpm.edge.errors import ConfigError


@dataclass(frozen=True)
class Stpm:
    """The defaults are the published ones; the paper varies taps and backbone too."""

    backbone: str = "resnet18"
    taps: tuple[str, ...] = TAPS
    name: ClassVar[str] = "stpm"
    schedule: ClassVar[str] = "constant"
    teacher_epochs: ClassVar[int] = 0
    equalised: ClassVar[bool] = False
    fused: ClassVar[bool] = True

    def load_teacher(self, source: str, second: str) -> Pyramid:
        if second:
            raise ConfigError(f"--method {self.name} has one teacher: leave --second-teacher out")
        return load_teacher(source, self.taps, self.backbone)

    def new_student(self, seed: int) -> Pyramid:
        torch.manual_seed(seed)
        return Pyramid(self.taps, self.backbone)

    def targets(self, features: Features) -> Features:
        return [F.normalize(feature, dim=1) for feature in features]

    def answer(self, student: nn.Module, x: torch.Tensor, targets: Features) -> Features:
        return student(x)  # type: ignore[no-any-return]

    def loss(self, targets: Features, student: Features) -> torch.Tensor:
        """Σ over taps of the mean over pixels and images of ‖t̂ − ŝ‖² (sum over channels).

        This is the form of the authors' code. Halving it, or summing over the batch, changes the step that the
        published learning rate of 0.4 makes, and with it the result.
        """
        pairs = zip(targets, student, strict=True)
        return torch.stack([(t - F.normalize(s, dim=1)).square().sum(1).mean() for t, s in pairs]).sum()

    def validation(self, targets: Features, student: Features, size: tuple[int, int]) -> torch.Tensor:
        """The mean of the anomaly map, as the authors' code selects its checkpoint."""
        product, _ = ProductHead(*size)(targets, student)
        return product.mean((1, 2, 3))

    def graph(self, teacher: nn.Module, student: nn.Module, height: int, width: int) -> nn.Module:
        return TwoPyramids(teacher, student, ProductHead(height, width)).eval()


class TwoPyramids(nn.Module):
    def __init__(self, teacher: nn.Module, student: nn.Module, head: ProductHead) -> None:
        super().__init__()
        self.teacher, self.student, self.head = copy.deepcopy(teacher).eval(), copy.deepcopy(student).eval(), head
        fold_batch_norm(self.teacher)
        fold_batch_norm(self.student)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.head(self.teacher(x), self.student(x))  # type: ignore[no-any-return]
