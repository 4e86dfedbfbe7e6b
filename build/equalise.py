"""A teacher whose channels all vary equally much on good parts.

In an ImageNet network some channels are thirty times as strong as others. A student that is judged by a cosine learns
the strong ones, and a defect that shows in a weak one is hardly seen. Dividing every channel by its standard deviation
costs nothing at run time: ReLU and max pooling commute with a positive factor for each channel, so the factors go into
the weights (as in the cross-layer equalisation of Nagel et al. 2019, who do it for the sake of INT8).
"""

import numpy as np
import torch
from torch import nn

from stpm.build.pyramid import NARROW_BACKBONES, Pyramid
from stpm.edge.errors import ConfigError
from stpm.edge.preprocess import Image, Preprocess

BATCH = 8
# of the median spread of a tap: a channel that hardly ever speaks is not made the loudest
QUIETEST = 0.05


def spreads(teacher: nn.Module, pixels: Image, preprocess: Preprocess) -> list[torch.Tensor]:
    """For every tap one float32 per channel: its standard deviation over all places of the uint8 N×H×W×3 images, at
    least `QUIETEST` times the median of its tap."""
    sums: list[tuple[torch.Tensor, torch.Tensor]] = []
    places: list[int] = []
    for start in range(0, len(pixels), BATCH):
        batch = np.concatenate([preprocess.normalise(image) for image in pixels[start : start + BATCH]])
        with torch.inference_mode():
            features = [feature.double() for feature in teacher(torch.from_numpy(batch))]
        found = [(feature.sum((0, 2, 3)), feature.square().sum((0, 2, 3))) for feature in features]
        sums = [(a + x, b + y) for (a, b), (x, y) in zip(sums, found, strict=True)] if sums else found
        places = [len(pixels) * feature[0, 0].numel() for feature in features]
    result = []
    for (total, squares), count in zip(sums, places, strict=True):
        spread = (squares / count - (total / count).square()).clamp(min=0).sqrt()
        # the median of a tap most of whose channels are silent is 0: nothing to measure by, and 1 is the least then
        result.append(spread.clamp(min=QUIETEST * float(spread.median()) or 1.0).float().clone())
    return result


@torch.no_grad()
def equalise(teacher: Pyramid, spreads: list[torch.Tensor]) -> None:
    """Change the weights, in place, so that every channel of every tap is what it was divided by its spread.

    The taps must be all layers that it has, and its blocks those of ResNet-18 and -34: what a layer adds up is then
    divided in the batch norms that make it, and multiplied again in the convolutions that read it.
    """
    if teacher.taps != teacher.layers or teacher.backbone not in NARROW_BACKBONES:
        raise ConfigError(
            f"wanted a resnet18 or resnet34 with all its layers as taps, found a {teacher.backbone} with "
            f"{', '.join(teacher.taps)}"
        )
    _divide(teacher.bn1, spreads[0])
    before = spreads[0]
    for name, spread in zip(teacher.layers, spreads, strict=True):
        for block in getattr(teacher, name):
            _multiply(block.conv1, before)
            _divide(block.bn2, spread)
            if block.downsample is not None:
                _multiply(block.downsample[0], before)
                _divide(block.downsample[1], spread)
            before = spread


def _divide(norm: nn.BatchNorm2d, spread: torch.Tensor) -> None:
    norm.weight.div_(spread)
    norm.bias.div_(spread)


def _multiply(conv: nn.Conv2d, spread: torch.Tensor) -> None:
    """The channels that it reads."""
    conv.weight.mul_(spread.view(1, -1, 1, 1))
