"""The anomaly score of edge/score.py as torch operations, for training's validation and for the exported graph."""

import torch
from torch import nn
from torch.nn import functional as F

from stpm.edge.score import EPS


def level_map(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """N×C×h×w twice → N×1×h×w: one minus the cosine over channels."""
    tt = (teacher * teacher).sum(1, keepdim=True)
    ss = (student * student).sum(1, keepdim=True)
    ts = (teacher * student).sum(1, keepdim=True)
    # abs, not relu: rounding may give -1e-8, and OpenVINO's relu would turn a NaN into a perfect 0
    return torch.abs(1 - (ts + EPS) / (torch.sqrt(tt + EPS) * torch.sqrt(ss + EPS)))


class ProductHead(nn.Module):
    """Level maps, upsampled to height×width and multiplied; the score is the maximum (Wang et al., eq. 4)."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.size = (height, width)

    def forward(self, teacher: list[torch.Tensor], student: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        product: torch.Tensor | None = None
        for t, s in zip(teacher, student, strict=True):
            level = F.interpolate(level_map(t, s), size=self.size, mode="bilinear", align_corners=False)
            product = level if product is None else product * level
        assert product is not None
        return product, product.amax((1, 2, 3))
