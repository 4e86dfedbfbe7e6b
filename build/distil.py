"""Quantisation-aware distillation: the student learns to round like the teacher.

The teacher is quantised first and frozen. The student, with fake quantisation, is fine-tuned on normals against the
quantised teacher by the method's own loss, so that on good parts both networks carry the same rounding and the
difference between them, which is the anomaly score, loses it.
"""

from pathlib import Path

import onnx
import torch
from torch import nn

from stpm.build.device import on
from stpm.build.fake_quant import FakeQuantNetwork
from stpm.build.methods.base import Method
from stpm.build.train import Recipe, train
from stpm.edge.preprocess import Image, Preprocess


class FineTuning(Recipe, frozen=True, forbid_unknown_fields=True):
    """Adam with small steps: batch norm is folded into the weights, and with SGD the rate that such weights bear
    differs between teachers by a factor of ten."""

    epochs: int = 10
    learning_rate: float = 3e-5
    weight_decay: float = 0.0

    @property
    def remedy(self) -> str:
        return "build with --quantize ptq"

    def optimiser(self, network: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(network.parameters(), self.learning_rate, (self.momentum, 0.999))


def distil(
    method: Method,
    graph: onnx.ModelProto,
    quantised: onnx.ModelProto,
    pixels: Image,
    preprocess: Preprocess,
    recipe: FineTuning,
    folder: Path,
    device: str,
) -> tuple[onnx.ModelProto, int]:
    """The float `graph` with a student fine-tuned for the ranges in `quantised`, to be quantised again with the same;
    and the best epoch.

    pixels: uint8 N×H×W×3 normals, split as in training. `folder` keeps the checkpoint of a stopped run.
    """
    teacher = FakeQuantNetwork(quantised, "/teacher/").requires_grad_(False)
    student = FakeQuantNetwork(quantised, "/student/")
    with on(device, teacher, student):
        trained = train(method, teacher, student, pixels, preprocess, recipe, folder)
    return student.into(graph), trained.best_epoch
