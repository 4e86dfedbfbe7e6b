"""RSTPM: a second student that reconstructs, with attention (Yamada & Hotta 2021).

Two pairs look at the image. The first is STPM. In the second the student does not see the image: it is a decoder that
must reconstruct the features of the second teacher from the deepest features of the first, so that what such features
say nothing of (a defect) cannot be copied. Attention, computed from the second teacher's features, tells the decoder
which places matter.

What is known of the paper are its abstract, the figures of its successor (arXiv 2210.07548) and other people's code.
Where these differ or are silent: attention is x + x·A at every level, and at layer1, where the decoder ends, it comes
before the last stage.

    published   second teacher ResNet-50, decoder of its widths, from layer4 of the first: 100 M parameters
    lite        the same teachers, the decoder as narrow as a ResNet-18, with a 1×1 convolution to each width
    shared      ours: the first teacher is the second one too, and the decoder begins from layer3, made half as large
"""

import copy
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn
from torch.nn import functional as F

from stpm.build.head import level_map
from stpm.build.methods.base import Features
from stpm.build.pyramid import TAPS, Pyramid, channels_of, fold_batch_norm
from stpm.build.torchvision_cpu import models
from stpm.build.weights import load_teacher
from stpm.edge.errors import ConfigError

Variant = Literal["published", "lite", "shared"]
VARIANTS: tuple[Variant, ...] = ("shared", "lite", "published")
SECOND = "resnet50"
NARROW = (64, 128, 256)  # of layer1 to layer3


@dataclass(frozen=True)
class Rstpm:
    """`attention`: the levels that have it, by the layer of the second teacher that it comes from."""

    backbone: str = "resnet18"
    taps: tuple[str, ...] = TAPS
    variant: Variant = "shared"
    attention: tuple[str, ...] = ("layer2", "layer3")
    name: ClassVar[str] = "rstpm"
    schedule: ClassVar[str] = "constant"
    teacher_epochs: ClassVar[int] = 0
    equalised: ClassVar[bool] = False
    fused: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.taps != TAPS:
            raise ConfigError(f"--method rstpm compares {', '.join(TAPS)}, found --taps {','.join(self.taps)}")
        if not set(self.attention) <= set(TAPS):
            raise ConfigError(f"wanted some of {', '.join(TAPS)} for --attention, found {','.join(self.attention)}")

    @property
    def shared(self) -> bool:
        return self.variant == "shared"

    def load_teacher(self, source: str, second: str) -> "Teachers":
        if self.shared:
            if second:
                raise ConfigError("--variant shared has one teacher: leave --second-teacher out")
            return Teachers(load_teacher(source, TAPS, self.backbone), None).eval()
        first = load_teacher(source, (*TAPS, "layer4"), self.backbone)
        return Teachers(first, load_teacher(second or "imagenet", TAPS, SECOND)).eval()

    def new_student(self, seed: int) -> "Students":
        torch.manual_seed(seed)
        first = Pyramid(TAPS, self.backbone)
        deep = channels_of(self.backbone)["layer3" if self.shared else "layer4"]
        second = channels_of(self.backbone if self.shared else SECOND)
        targets = (second["layer1"], second["layer2"], second["layer3"])
        widths = NARROW if self.variant == "lite" else targets
        return Students(first, Decoder(deep, widths, targets, self.attention, halve=self.shared))

    def targets(self, features: Features) -> Features:
        """As they are: the decoder begins with some of them."""
        return features

    def answer(self, student: nn.Module, x: torch.Tensor, targets: Features) -> Features:
        return student(x, targets)  # type: ignore[no-any-return]

    def loss(self, targets: Features, student: Features) -> torch.Tensor:
        """Both pairs have the loss of STPM; they share no weights, so its sum trains each by its own."""
        pairs = zip(compared(targets), student, strict=True)
        distances = [F.normalize(t, dim=1) - F.normalize(s, dim=1) for t, s in pairs]
        return torch.stack([distance.square().sum(1).mean() for distance in distances]).sum()

    def validation(self, targets: Features, student: Features, size: tuple[int, int]) -> torch.Tensor:
        """The mean of the anomaly map, as with STPM."""
        combined, _ = SumProductHead(*size)(compared(targets), student)
        return combined.mean((1, 2, 3))

    def graph(self, teacher: nn.Module, student: nn.Module, height: int, width: int) -> nn.Module:
        return TwoPairs(teacher, student, SumProductHead(height, width)).eval()


def compared(features: Features) -> Features:
    """What the six features of the students are compared with, of those that `Teachers` gives."""
    return features[:6] if len(features) == 7 else [*features, *features]


class Teachers(nn.Module):
    """float32 N×3×H×W → layer1 to layer3 of the first teacher; with a second one also its three, and the first's
    layer4."""

    def __init__(self, first: Pyramid, second: Pyramid | None) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: torch.Tensor) -> Features:
        features: Features = self.first(x)
        return features if self.second is None else [*features[:3], *self.second(x), features[3]]


class Students(nn.Module):
    """float32 N×3×H×W and what `Teachers` gives → layer1 to layer3 of the first student and of the second."""

    def __init__(self, first: Pyramid, second: "Decoder") -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: torch.Tensor, teachers: Features) -> Features:
        return [*self.first(x), *self.second(teachers[-1], compared(teachers)[3:])]


class Decoder(nn.Module):
    """The deepest features N×C×h×w, and those of the second teacher that attention looks at → layer1 to layer3 of the
    second teacher. `halve`: the deepest are those of layer3 and are made half as large first."""

    def __init__(
        self,
        deep: int,
        widths: tuple[int, int, int],
        targets: tuple[int, int, int],
        attention: tuple[str, ...],
        halve: bool,
    ) -> None:
        super().__init__()
        w1, w2, w3 = widths
        stride = 2 if halve else 1
        enter = nn.Sequential(nn.Conv2d(deep, w3, 3, stride, 1, bias=False), nn.BatchNorm2d(w3), nn.ReLU())
        self.enter = nn.Sequential(enter, block(w3))
        self.up3 = nn.Sequential(*double(w3, w3), nn.ReLU())
        self.stage3 = nn.Sequential(block(w3), block(w3))
        self.up2 = nn.Sequential(*double(w3, w2), nn.ReLU())
        self.stage2 = nn.Sequential(block(w2, projected=True), block(w2))
        self.up1 = nn.Sequential(*double(w2, w1))
        self.stage1 = nn.Sequential(block(w1, projected=True), block(w1))
        self.attention = nn.ModuleDict({layer: Attention(targets[TAPS.index(layer)]) for layer in attention})
        self.heads = nn.ModuleList(
            nn.Identity() if width == target else nn.Conv2d(width, target, 1)
            for width, target in zip(widths, targets, strict=True)
        )

    def forward(self, deep: torch.Tensor, teacher: Features) -> Features:
        layer3 = self.stage3(self.up3(self.enter(deep)))
        layer2 = self.stage2(self.up2(self._attend("layer3", layer3, teacher[2])))
        layer1 = self.up1(self._attend("layer2", layer2, teacher[1]))
        layer1 = self.stage1(self._attend("layer1", layer1, teacher[0]))
        return [head(layer) for head, layer in zip(self.heads, (layer1, layer2, layer3), strict=True)]

    def _attend(self, layer: str, x: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return x + x * self.attention[layer](teacher) if layer in self.attention else x


class Attention(nn.Sequential):
    """N×C×h×w → N×1×h×w, from 0 to 1."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, 1, 1),
            nn.Sigmoid(),
        )


def block(width: int, projected: bool = False) -> nn.Module:
    """A residual block of two 3×3 convolutions; `projected`: with a 1×1 convolution in its shortcut."""
    shortcut = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width)) if projected else None
    return models.resnet.BasicBlock(width, width, downsample=shortcut)


def double(width: int, to: int) -> tuple[nn.Module, nn.Module]:
    """To twice the height and width."""
    return nn.ConvTranspose2d(width, to, 3, 2, 1, output_padding=1, bias=False), nn.BatchNorm2d(to)


class SumProductHead(nn.Module):
    """The maps of both pairs, upsampled to height×width and added by level, and the sums multiplied:
    (Ω₁+Ω₆)(Ω₂+Ω₅)(Ω₃+Ω₄). The score is the maximum."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.size = (height, width)

    def forward(self, teacher: Features, student: Features) -> tuple[torch.Tensor, torch.Tensor]:
        product: torch.Tensor | None = None
        for level in range(3):
            first, second = (level_map(teacher[each], student[each]) for each in (level, level + 3))
            # bilinear interpolation is linear: of the sum it is the sum
            larger = F.interpolate(first + second, size=self.size, mode="bilinear", align_corners=False)
            product = larger if product is None else product * larger
        assert product is not None
        return product, product.amax((1, 2, 3))


class TwoPairs(nn.Module):
    def __init__(self, teacher: nn.Module, student: nn.Module, head: SumProductHead) -> None:
        super().__init__()
        self.teacher, self.student, self.head = copy.deepcopy(teacher).eval(), copy.deepcopy(student).eval(), head
        fold_batch_norm(self.teacher)
        fold_batch_norm(self.student)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.teacher(x)
        return self.head(compared(features), self.student(x, features))  # type: ignore[no-any-return]
