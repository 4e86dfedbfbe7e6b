"""Reverse distillation (Deng & Li, CVPR 2022), at the cost of STPM.

The student does not see the image. It gets the teacher's features, squeezed into a summary of a thirty-second of the
image's size, and has to make the same features again from it. On good parts it learns to; what it has never seen, a
defect, does not pass through the summary.

The paper's student is as large as its teacher. This one has half as many convolutions, and enlarges by 1×1
convolutions whose channels become pixels, not by transposed ones, which engines have rarely in INT8: with the teacher
it costs less than the two pyramids of STPM. The map is STPM's product (eq. 4 of Wang et al.), where the paper adds.
Ours too are the loss, which looks at the places that are still made badly, and that the teacher's channels are brought
to one scale first (`build/equalise.py`).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from stpm.build.head import ProductHead
from stpm.build.methods.base import Features
from stpm.build.methods.stpm import Stpm, TwoPyramids
from stpm.build.pyramid import NARROW_BACKBONES, TAPS, channels_of
from stpm.build.torchvision_cpu import models
from stpm.edge.errors import ConfigError

HARD = 0.1  # share of the places


@dataclass(frozen=True)
class Reverse(Stpm):
    name: ClassVar[str] = "reverse"
    schedule: ClassVar[str] = "one-cycle"
    equalised: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.taps != TAPS:
            raise ConfigError(f"--method reverse compares {', '.join(TAPS)}, found --taps {','.join(self.taps)}")
        if self.backbone not in NARROW_BACKBONES:
            raise ConfigError(
                f"wanted --backbone {' or '.join(NARROW_BACKBONES)} for --method reverse, found {self.backbone}"
            )

    def new_student(self, seed: int) -> "Reconstruction":  # type: ignore[override]
        torch.manual_seed(seed)
        return Reconstruction(channels_of(self.backbone))

    def targets(self, features: Features) -> Features:
        """As they are: the student begins with them."""
        return features

    def answer(self, student: nn.Module, x: torch.Tensor, targets: Features) -> Features:
        return student(targets)  # type: ignore[no-any-return]

    def loss(self, targets: Features, student: Features) -> torch.Tensor:
        """Σ over taps of [1 − cos(t, s) of all features of an image at once] + [the mean of 1 − cos(t, s) of every
        place over the tenth of the places where it is largest], the mean over images.

        In the first, places where the features are long, edges and texture, weigh more than an empty background; in
        the second only what is still made badly weighs at all.
        """
        terms = []
        for t, s in zip(targets, student, strict=True):
            everywhere = F.cosine_similarity(t.flatten(1), s.flatten(1))
            places = F.cosine_similarity(t, s).flatten(1)
            hardest = places.topk(max(1, round(HARD * places.shape[1])), dim=1, largest=False).values
            terms.append((1 - everywhere).mean() + (1 - hardest).mean())
        return torch.stack(terms).sum()

    def graph(self, teacher: nn.Module, student: nn.Module, height: int, width: int) -> nn.Module:
        return TeacherThenStudent(teacher, student, ProductHead(height, width)).eval()


class Reconstruction(nn.Module):
    """layer1 to layer3 of the teacher, N×C×h×w at strides 4, 8 and 16 → the same three, made from their summary at
    stride 32."""

    def __init__(self, channels: dict[str, int]) -> None:
        super().__init__()
        w1, w2, w3, w4 = channels.values()
        self.enter1 = nn.Sequential(halved(w1, w2), halved(w2, w3))
        self.enter2 = halved(w2, w3)
        self.summary = halved(3 * w3, w4)
        self.layer3, self.layer2, self.layer1 = doubled(w4, w3, blocks=2), doubled(w3, w2), doubled(w2, w1)

    def forward(self, teacher: Features) -> Features:
        layer1, layer2, layer3 = teacher
        summary = self.summary(torch.cat([self.enter1(layer1), self.enter2(layer2), layer3], 1))
        third = self.layer3(summary)
        second = self.layer2(third)
        return [self.layer1(second), second, third]


def halved(width: int, to: int) -> nn.Module:
    """To half the height and width."""
    return nn.Sequential(nn.Conv2d(width, to, 3, 2, 1, bias=False), nn.BatchNorm2d(to), nn.ReLU())


def doubled(width: int, to: int, blocks: int = 1) -> nn.Module:
    """To twice the height and width, then residual blocks."""
    larger = (nn.Conv2d(width, 4 * to, 1, bias=False), nn.BatchNorm2d(4 * to), nn.ReLU(), nn.PixelShuffle(2))
    return nn.Sequential(*larger, *(models.resnet.BasicBlock(to, to) for _ in range(blocks)))


class TeacherThenStudent(TwoPyramids):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.teacher(x)
        return self.head(features, self.student(features))  # type: ignore[no-any-return]
