"""The graphs of a job: both networks in float, then FP16, or INT8 in one of several settings. Each is a kept step."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgspec
import numpy as np
import onnx
from torch import nn
from tqdm import tqdm

from stpm.build.distil import FineTuning, distil
from stpm.build.export import check_parity, export_graph
from stpm.build.methods.base import Method, described
from stpm.build.pyramid import weights_hash
from stpm.build.steps import STEP_VERSION, Inputs, Steps
from stpm.build.train import split
from stpm.calibration.fp16 import to_fp16
from stpm.calibration.qdq import activations, fused_with, quantise
from stpm.calibration.ranges import OBSERVERS, collect
from stpm.calibration.sensitivity import sensitivity
from stpm.edge.bundle import file_hash
from stpm.edge.manifest import Calibration, Setting
from stpm.edge.preprocess import Image, Preprocess
from stpm.edge.score import Array


@dataclass(frozen=True)
class Graphs:
    """`pixels` are all normals, uint8 N×H×W×3, in the order that `split` refers to."""

    method: Method
    teacher: nn.Module
    student: nn.Module
    preprocess: Preprocess
    pixels: Image
    calibration_images: int
    fine_tuning: FineTuning
    steps: Steps
    device: str  # to fine-tune on

    @cached_property
    def fp32(self) -> onnx.ModelProto:
        def produce(folder: Path) -> None:
            print("graph: exporting both networks", flush=True)
            spec = self.preprocess
            model = self.method.graph(self.teacher, self.student, spec.height, spec.width)
            graph = export_graph(model, spec)
            check_parity(model, graph, spec.normalise(self.pixels[0]))
            onnx.save(graph, folder / "graph.onnx")

        return onnx.load(self.steps.run("graph", self._inputs({}), produce) / "graph.onnx")

    def fp16(self) -> onnx.ModelProto:
        return to_fp16(self.fp32)

    def int8(self, setting: Setting) -> onnx.ModelProto:
        graph = onnx.load(self._distilled(setting) / "graph.onnx") if setting.quantize == "qad" else self.fp32
        return self._quantised(graph, setting)

    def calibration(self, setting: Setting) -> Calibration:
        fine_tuning = None
        if setting.quantize == "qad":
            best_epoch = msgspec.json.decode((self._distilled(setting) / "training.json").read_bytes(), type=int)
            fine_tuning = msgspec.structs.asdict(self.fine_tuning) | {"best_epoch": best_epoch}
        pixels = self._calibration_pixels
        return Calibration(setting, len(pixels), _hash(pixels), file_hash(self._ranges_file), fine_tuning)

    def _quantised(self, graph: onnx.ModelProto, setting: Setting) -> onnx.ModelProto:
        quantised = quantise(graph, self.ranges(setting.observer), in_float=setting.fp16_layers)
        return to_fp16(quantised, fused_with(graph, setting.fp16_layers)) if setting.fp16_layers else quantised

    def ranges(self, observer: str) -> dict[str, float]:
        """The largest magnitude that int8 shall represent, for every quantised activation."""
        return msgspec.json.decode(self._ranges_file.read_bytes(), type=dict[str, dict[str, float]])[observer]

    @cached_property
    def _ranges_file(self) -> Path:
        def produce(folder: Path) -> None:
            batches = (
                self.preprocess.normalise(image)
                for image in tqdm(
                    self._calibration_pixels, desc="calibrating", unit="image", disable=None, leave=False
                )
            )
            histograms = collect(self.fp32, activations(self.fp32), batches)
            ranges = {
                name: {tensor: observe(histogram) for tensor, histogram in histograms.items()}
                for name, observe in OBSERVERS.items()
            }
            (folder / "ranges.json").write_bytes(msgspec.json.format(msgspec.json.encode(ranges)))

        return self.steps.run("ranges", self._inputs(self._calibrated_on()), produce) / "ranges.json"

    def sensitivity(
        self, observer: str, pixels: Image, maps_of: Callable[[onnx.ModelProto, Image], Array]
    ) -> dict[str, float]:
        """How far each layer's rounding moves the maps of these images, most sensitive first; before distillation."""

        def produce(folder: Path) -> None:
            found = sensitivity(self.fp32, self.ranges(observer), lambda graph: maps_of(graph, pixels))
            (folder / "sensitivity.json").write_bytes(msgspec.json.encode(found))

        inputs = self._calibrated_on() | {"observer": observer, "pixels": _hash(pixels)}
        folder = self.steps.run("sensitivity", self._inputs(inputs), produce)
        return msgspec.json.decode((folder / "sensitivity.json").read_bytes(), type=dict[str, float])

    def _distilled(self, setting: Setting) -> Path:
        """A folder with the float graph of the fine-tuned student, graph.onnx, and its best epoch, training.json."""

        def produce(folder: Path) -> None:
            print("distilling: the student learns to round like the quantised teacher", flush=True)
            quantised = quantise(self.fp32, self.ranges(setting.observer), in_float=setting.fp16_layers)
            graph, best_epoch = distil(
                self.method, self.fp32, quantised, self.pixels, self.preprocess, self.fine_tuning, folder, self.device
            )
            onnx.save(graph, folder / "graph.onnx")
            (folder / "training.json").write_bytes(msgspec.json.encode(best_epoch))
            (folder / "checkpoint.pth").unlink(missing_ok=True)

        inputs = self._calibrated_on() | {"observer": setting.observer, "fp16_layers": setting.fp16_layers}
        inputs |= {"pixels": _hash(self.pixels), **msgspec.structs.asdict(self.fine_tuning)}
        return self.steps.run("distilled", self._inputs(inputs), produce)

    @cached_property
    def _calibration_pixels(self) -> Image:
        """Spread over the training images: files next to each other are often of one lot."""
        training, _ = split(len(self.pixels), self.fine_tuning)
        return self.pixels[spread(training, self.calibration_images)]

    def _calibrated_on(self) -> Inputs:
        return {"calibration": _hash(self._calibration_pixels)}

    def _inputs(self, more: Inputs) -> Inputs:
        return {
            "version": STEP_VERSION,
            **described(self.method),
            "preprocess": msgspec.json.encode(self.preprocess).decode(),
            "teacher": weights_hash(self.teacher.state_dict()),
            "student": weights_hash(self.student.state_dict()),
            **more,
        }


def spread(indices: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of the indices, at equal distances."""
    return indices[np.unique(np.linspace(0, len(indices) - 1, min(count, len(indices))).astype(int))]


def _hash(pixels: np.ndarray) -> str:
    return hashlib.sha256(pixels.tobytes()).hexdigest()
