"""The graphs of a job: both networks in float, then FP16, or INT8 in one of several settings. Each is a kept step."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgspec
import numpy as np
import onnx
from tqdm import tqdm

from stpm.build.distil import FineTuning, distil
from stpm.build.export import check_parity, export_graph
from stpm.build.methods import METHODS
from stpm.build.pyramid import Pyramid, weights_hash
from stpm.build.steps import STEP_VERSION, Inputs, Steps
from stpm.build.train import split
from stpm.calibration.fp16 import to_fp16
from stpm.calibration.qdq import activations, quantise
from stpm.calibration.ranges import OBSERVERS, collect
from stpm.edge.bundle import file_hash
from stpm.edge.manifest import Calibration, Setting
from stpm.edge.preprocess import Image, Preprocess


@dataclass(frozen=True)
class Graphs:
    """`pixels` are all normals, uint8 N×H×W×3, in the order that `split` refers to."""

    method: str
    teacher: Pyramid
    student: Pyramid
    preprocess: Preprocess
    pixels: Image
    calibration_images: int
    fine_tuning: FineTuning
    steps: Steps

    @cached_property
    def fp32(self) -> onnx.ModelProto:
        def produce(folder: Path) -> None:
            print("graph: exporting both networks", flush=True)
            method, spec = METHODS[self.method], self.preprocess
            model = method.graph(self.teacher, self.student, spec.height, spec.width)
            graph = export_graph(model, spec)
            check_parity(model, graph, spec.normalise(self.pixels[0]))
            onnx.save(graph, folder / "graph.onnx")

        return self._graph("graph", {}, produce)

    def fp16(self) -> onnx.ModelProto:
        return to_fp16(self.fp32)

    def int8(self, setting: Setting) -> onnx.ModelProto:
        ranges = self.ranges(setting.observer)
        graph = self._distilled(setting.observer) if setting.quantize == "qad" else self.fp32
        quantised = quantise(graph, ranges, in_float=setting.fp16_layers)
        return to_fp16(quantised, setting.fp16_layers) if setting.fp16_layers else quantised

    def calibration(self, setting: Setting) -> Calibration:
        return Calibration(
            setting,
            len(self._calibration_pixels()),
            file_hash(self._ranges_file),
            msgspec.structs.asdict(self.fine_tuning) if setting.quantize == "qad" else None,
        )

    def ranges(self, observer: str) -> dict[str, float]:
        """The largest magnitude that int8 shall represent, for every quantised activation."""
        return msgspec.json.decode(self._ranges_file.read_bytes(), type=dict[str, dict[str, float]])[observer]

    @cached_property
    def _ranges_file(self) -> Path:
        def produce(folder: Path) -> None:
            pixels = self._calibration_pixels()
            batches = (
                self.preprocess.normalise(image)
                for image in tqdm(pixels, desc="calibrating", unit="image", disable=None, leave=False)
            )
            histograms = collect(self.fp32, activations(self.fp32), batches)
            ranges = {
                name: {tensor: observe(histogram) for tensor, histogram in histograms.items()}
                for name, observe in OBSERVERS.items()
            }
            (folder / "ranges.json").write_bytes(msgspec.json.format(msgspec.json.encode(ranges)))

        return self.steps.run("ranges", self._inputs(self._calibrated_on()), produce) / "ranges.json"

    def _distilled(self, observer: str) -> onnx.ModelProto:
        def produce(folder: Path) -> None:
            print("distilling: the student learns to round like the quantised teacher", flush=True)
            method, quantised = METHODS[self.method], quantise(self.fp32, self.ranges(observer))
            tuned = distil(method, self.fp32, quantised, self.pixels, self.preprocess, self.fine_tuning, folder)
            onnx.save(tuned, folder / "graph.onnx")
            (folder / "checkpoint.pth").unlink(missing_ok=True)

        inputs = self._calibrated_on() | {"observer": observer, "pixels": _hash(self.pixels)}
        return self._graph("distilled", inputs | msgspec.structs.asdict(self.fine_tuning), produce)

    def _calibration_pixels(self) -> Image:
        training, _ = split(len(self.pixels), self.fine_tuning)
        return self.pixels[training[: self.calibration_images]]

    def _calibrated_on(self) -> Inputs:
        return {"calibration": _hash(self._calibration_pixels())}

    def _inputs(self, more: Inputs) -> Inputs:
        return {
            "version": STEP_VERSION,
            "method": self.method,
            "preprocess": msgspec.json.encode(self.preprocess).decode(),
            "teacher": weights_hash(self.teacher.state_dict()),
            "student": weights_hash(self.student.state_dict()),
            **more,
        }

    def _graph(self, name: str, more: Inputs, produce: Callable[[Path], None]) -> onnx.ModelProto:
        return onnx.load(self.steps.run(name, self._inputs(more), produce) / "graph.onnx")


def _hash(pixels: np.ndarray) -> str:
    return hashlib.sha256(pixels.tobytes()).hexdigest()
