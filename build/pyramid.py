"""A feature pyramid: a residual network up to its last tap. Teacher and student are two of these."""

import hashlib

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from stpm.build.torchvision_cpu import models

LAYERS = ("layer1", "layer2", "layer3", "layer4")
BACKBONES = ("resnet18", "resnet34", "resnet50", "wide_resnet50_2")
TAPS = ("layer1", "layer2", "layer3")
NARROW_BACKBONES = ("resnet18", "resnet34")  # made of basic blocks, their layers 64 to 512 channels wide


class Pyramid(nn.Module):
    """float32 N×3×H×W → one N×C×h×w per tap, at stride 4 (layer1), 8, 16 and 32; parameter names are torchvision's."""

    def __init__(self, taps: tuple[str, ...] = TAPS, backbone: str = "resnet18") -> None:
        super().__init__()
        network = models.get_model(backbone, weights=None)
        self.taps, self.backbone = taps, backbone
        self.conv1, self.bn1 = network.conv1, network.bn1
        self.relu, self.maxpool = network.relu, network.maxpool
        self.layers = LAYERS[: 1 + max(LAYERS.index(tap) for tap in taps)]
        for name in self.layers:
            self.add_module(name, getattr(network, name))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        features = []
        for name in self.layers:
            x = getattr(self, name)(x)
            if name in self.taps:
                features.append(x)
        return features


def channels_of(backbone: str) -> dict[str, int]:
    """How many channels each layer of it has."""
    wide = 4 if backbone in ("resnet50", "wide_resnet50_2") else 1
    return {layer: wide * 64 << index for index, layer in enumerate(LAYERS)}


def channels_last(network: nn.Module) -> nn.Module:
    """The same network with its weights laid out for CPU convolutions: twice as fast as the default layout."""
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def fold_batch_norm(network: nn.Module) -> None:
    """Put every batch norm into the convolution before it, in place; the network must be in eval mode."""
    for module in network.modules():
        names = [name for name, _ in module.named_children()]
        for conv, norm in (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"), ("0", "1")):
            if conv in names and norm in names and isinstance(getattr(module, norm), nn.BatchNorm2d):
                before = getattr(module, conv)
                folded = fuse_conv_bn_eval(before, getattr(module, norm), isinstance(before, nn.ConvTranspose2d))
                setattr(module, conv, folded)
                setattr(module, norm, nn.Identity())


def weights_hash(state: dict[str, torch.Tensor]) -> str:
    """sha256 over names, shapes and float32 values: the same weights from another file have the same hash."""
    digest = hashlib.sha256()
    for name in sorted(state):
        if name.endswith("num_batches_tracked"):
            continue
        values = state[name].detach().to(torch.float32).contiguous().numpy()
        digest.update(f"{name}{values.shape}".encode() + values.tobytes())
    return digest.hexdigest()
