"""From teacher and student to a bundle: quantise, compile, measure, choose, pack."""

import platform
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import cv2
import msgspec
import numpy as np
import onnx

from stpm.build.compile import Compiler
from stpm.build.distil import FineTuning
from stpm.build.golden import TOLERANCE, golden_frames
from stpm.build.graphs import Graphs, spread
from stpm.build.methods.base import settings_of
from stpm.build.pipeline import Job, Material
from stpm.build.pyramid import weights_hash
from stpm.build.report import Facts, write_report
from stpm.build.settings import settings
from stpm.build.train import Recipe, split
from stpm.calibration.dataset import Images, Labelled, load_labelled
from stpm.calibration.evaluation import infer_all
from stpm.calibration.gate import Measured, compare, measure, name_of, table
from stpm.calibration.scratches import with_faint_scratches
from stpm.calibration.thresholds import outliers, warning
from stpm.edge.bundle import MANIFEST, file_hash
from stpm.edge.command import warn
from stpm.edge.engine import Engine
from stpm.edge.engine.openvino import OpenVinoEngine
from stpm.edge.errors import AccuracyError, DeviceError, EngineError, InputError, TrainingError
from stpm.edge.manifest import (
    SCHEMA,
    Calibration,
    Gate,
    Golden,
    Limits,
    Manifest,
    Precision,
    Setting,
    Training,
    Weights,
    encode,
)
from stpm.edge.preprocess import Image
from stpm.edge.score import Array
from stpm.edge.storage import new_folder

# Normals on which the sensitivity of the layers is measured.
SENSITIVITY_IMAGES = 8
# File names in a warning; there may be hundreds.
SHOWN = 5


class Wish(msgspec.Struct, frozen=True):
    """What the bundle shall be like. `threshold` is a rule of calibration/thresholds.py, or a number."""

    precision: Precision = "int8"
    setting: Setting = Setting("qad", "mse")
    fine_tuning_epochs: int = FineTuning().epochs
    calibration_images: int = 128
    limits: Limits = Limits()
    threshold: str | float = "tail"
    false_reject_rate: float = 0.01


def check_out(out: Path) -> None:
    """Only a bundle may be replaced by a bundle; anything else in the way is an InputError."""
    if out.exists() and not (out / MANIFEST).is_file():
        raise InputError(f"{out} exists and is not a bundle: give another --out DIR")


def build_bundle(job: Job, material: Material, wish: Wish, out: Path, compiler: Compiler) -> Manifest:
    """Write the bundle `out` at once, or nothing. The figures in its manifest come from the engine in it.

    An int8 engine that loses more than `wish.limits` in every setting is an AccuracyError with the table.
    """
    check_out(out)
    with new_folder(out) as folder:
        return Assembly(job, material, wish, folder, compiler).build(out)


@dataclass(frozen=True)
class Assembly:
    """One bundle on its way into `folder`. The engine measured last is the one that lies in the folder."""

    job: Job
    material: Material
    wish: Wish
    folder: Path
    compiler: Compiler

    def build(self, out: Path) -> Manifest:
        fp32 = self._measured(self.graphs.fp32)
        self._warn_of_outliers(fp32)
        chosen, calibration, gate, layers = fp32, None, None, {}
        if self.wish.precision == "int8":
            chosen, calibration, gate = self._choose_int8(fp32)
            layers = self.sensitivity
        elif self.wish.precision == "fp16":
            chosen = self._measured(self.graphs.fp16())
        too_few = warning(chosen.threshold, self.wish.false_reject_rate)
        if too_few is not None:
            warn(too_few)
        print(f"bundle: packing {out}", flush=True)
        with self._engine() as engine:
            golden = golden_frames(self.held_out, chosen.scores, self.job.preprocess, engine)
        np.savez_compressed(self.folder / "golden.npz", frames=golden.frames, maps=golden.maps, scores=golden.scores)
        manifest = self._manifest(chosen, calibration, gate)
        write_report(
            self.folder / "report.html",
            Facts(manifest, self.held_out, self.has_labels, fp32, chosen, layers, self.material.trained),
        )
        files = {file.name: file_hash(file) for file in sorted(self.folder.iterdir())}
        manifest = msgspec.structs.replace(manifest, files=files)
        (self.folder / MANIFEST).write_bytes(encode(manifest))
        return manifest

    @cached_property
    def graphs(self) -> Graphs:
        material, recipe = self.material, self.job.recipe
        fine_tuning = FineTuning(
            epochs=self.wish.fine_tuning_epochs,
            batch=recipe.batch,
            held_out=recipe.held_out,
            share=recipe.share,
            seed=recipe.seed,
        )
        return Graphs(
            self.job.method,
            material.teacher,
            material.student,
            self.job.preprocess,
            material.normals.pixels,
            self.wish.calibration_images,
            fine_tuning,
            self.job.steps,
            self.job.device,
        )

    @cached_property
    def held_out(self) -> Images:
        _, indices = split(len(self.material.normals.paths), self.job.recipe)
        return self.material.normals.subset(indices)

    @property
    def has_labels(self) -> bool:
        """Whether good and defective parts are labelled: without either no figure is defined."""
        return len({item.defective for item in self.material.dataset.labelled}) == 2

    @cached_property
    def labelled(self) -> Labelled:
        """The labelled images; where there are none, held-out normals with and without a drawn scratch."""
        if self.has_labels:
            return load_labelled(self.material.dataset.labelled, self.job.preprocess)
        return with_faint_scratches(self.held_out, self.job.recipe.seed)

    @cached_property
    def sensitivity(self) -> dict[str, float]:
        pixels = self.held_out.pixels[spread(np.arange(len(self.held_out.pixels)), SENSITIVITY_IMAGES)]
        return self.graphs.sensitivity(self.wish.setting.observer, pixels, self._maps)

    def _maps(self, graph: onnx.ModelProto, pixels: Image) -> Array:
        with TemporaryDirectory(dir=self.folder) as folder:
            file = Path(folder) / "graph.onnx"
            onnx.save(graph, file)
            # thirty graphs for an order of layers: always on the CPU, where compiling takes no time
            with OpenVinoEngine.of_file(file, self.job.preprocess) as engine:
                return infer_all(engine, pixels, self.job.preprocess, "maps")[0]

    def _choose_int8(self, fp32: Measured) -> tuple[Measured, Calibration, Gate]:
        """The first setting that passes the gate."""
        images: Literal["labelled", "drawn"] = "labelled" if self.has_labels else "drawn"
        gate = Gate(self.wish.limits, images, fp32.accuracy, fp32.false_rejects, [])
        for setting in settings(self.wish.setting, lambda: list(self.sensitivity)):
            print(f"int8: {name_of(setting)}", flush=True)
            try:
                measured = self._measured(self.graphs.int8(setting))
            except DeviceError:
                raise  # another setting would not fit either
            except (EngineError, InputError, TrainingError) as error:
                # a worse setting may give scores that are not finite or all the same; another one need not
                warn(f"int8 {name_of(setting)} cannot be used ({error})")
                continue
            gate.attempts.append(compare(setting, measured, fp32, self.wish.limits))
            if gate.attempts[-1].passed:
                print(table(gate), flush=True)
                return measured, self.graphs.calibration(setting), gate
            print("int8: it loses more than --max-drop allows, trying the next setting", flush=True)
        raise AccuracyError(
            "no int8 engine is as accurate as FP32 within --max-drop, so no bundle was written: build with --engine "
            f"fp16, allow more with --max-drop, or train longer\n{table(gate)}"
        )

    def _measured(self, graph: onnx.ModelProto) -> Measured:
        print(f"engine: compiling for {self.compiler.name}, measuring", flush=True)
        self.compiler.compile(graph, self.folder / self._graph_name, self.job.preprocess)
        with self._engine() as engine:
            return measure(
                engine,
                self.held_out.pixels,
                self.labelled,
                self.job.preprocess,
                self.wish.threshold,
                self.wish.false_reject_rate,
            )

    def _engine(self) -> Engine:
        return self.compiler.open(self.folder, self.job.preprocess)

    @property
    def _graph_name(self) -> str:
        return f"{self.wish.precision}.onnx"

    def _warn_of_outliers(self, fp32: Measured) -> None:
        """Defects among the good parts: the ranges and the student learn them, and the threshold follows them."""
        training, _ = split(len(self.material.normals.paths), self.job.recipe)
        trained_on = self.material.normals.subset(training)
        with self._engine() as engine:
            _, scores = infer_all(engine, trained_on.pixels, self.job.preprocess, "training images")
        for use, images, of in (("training", trained_on, scores), ("held-out", self.held_out, fp32.scores)):
            found = [str(images.paths[index]) for index in outliers(of)]
            if found:
                more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
                warn(
                    f"{len(found)} of {len(of)} {use} images score far above the others ({', '.join(found[:SHOWN])}"
                    f"{more}): look at them, and remove those that show a defect"
                )

    def _manifest(self, chosen: Measured, calibration: Calibration | None, gate: Gate | None) -> Manifest:
        job, material = self.job, self.material
        training, held_out = split(len(material.normals.paths), job.recipe)
        trained = material.trained
        return Manifest(
            schema=SCHEMA,
            category=job.category,
            method=job.method.name,
            method_settings=settings_of(job.method),
            precision=self.wish.precision,
            preprocess=job.preprocess,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            graph=self._graph_name,
            engines={self.compiler.name: self.compiler.files},
            golden=Golden("golden.npz", TOLERANCE[self.wish.precision]),
            teacher=Weights(_named(job.teacher), weights_hash(material.teacher.state_dict())),
            student=Weights("trained" if trained else "given", weights_hash(material.student.state_dict())),
            training=Training(
                len(training),
                len(held_out),
                material.normals.photo_size,
                [path.name for path in material.normals.unreadable],
                [digest[:16] for digest in material.photos_sha256],
                _settings(job.recipe, trained is not None),
                trained.best_epoch if trained else None,
            ),
            calibration=calibration,
            threshold=chosen.threshold,
            threshold_changes=[],
            accuracy=chosen.accuracy if self.has_labels else None,
            gate=gate,
            versions=_versions(),
            files={},
        )


def _settings(recipe: Recipe, trained: bool) -> dict[str, str | int | float | bool]:
    """The recipe; of a student that was given only the split of the normals is known."""
    known = msgspec.structs.asdict(recipe)
    return known if trained else {name: known[name] for name in ("seed", "held_out", "share")}


def _named(teacher: str) -> str:
    return teacher if teacher in ("imagenet", "builtin") else Path(teacher).name


def _versions() -> dict[str, str]:
    names = ("stpm-edge", "torch", "torchvision", "onnx", "onnxruntime", "openvino", "numpy")
    return {"python": platform.python_version(), "opencv": cv2.__version__, **{name: version(name) for name in names}}
