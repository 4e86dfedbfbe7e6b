"""From a folder of good parts to a bundle: train, export, quantise, compile, measure, pack."""

import hashlib
import platform
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import cv2
import msgspec
import numpy as np
import onnx
from tqdm import tqdm

from stpm.build.compile import compile_openvino
from stpm.build.export import check_parity, export_graph
from stpm.build.methods import METHODS
from stpm.build.pyramid import Pyramid, weights_hash
from stpm.build.steps import Inputs, Steps
from stpm.build.train import Recipe, split, train
from stpm.build.weights import load_into, load_teacher, read_weights, write_weights
from stpm.calibration.dataset import Dataset, Images, find_dataset, load_normals
from stpm.calibration.evaluation import evaluate, infer_all
from stpm.calibration.fp16 import to_fp16
from stpm.calibration.qdq import activations, quantise
from stpm.calibration.ranges import OBSERVERS, collect
from stpm.calibration.thresholds import conformal, normals_needed
from stpm.edge.bundle import MANIFEST, GoldenFrames, file_hash
from stpm.edge.engine.openvino import OpenVinoEngine
from stpm.edge.errors import InputError
from stpm.edge.images import read_image
from stpm.edge.manifest import (
    SCHEMA,
    Accuracy,
    Calibration,
    Golden,
    Manifest,
    Precision,
    Threshold,
    Training,
    Weights,
    encode,
)
from stpm.edge.preprocess import Image, Preprocess
from stpm.edge.storage import new_folder

# How far another machine's engine may be from ours: rounding differs with the CPU's instruction set.
TOLERANCE: dict[str, float] = {"fp32": 0.01, "fp16": 0.01, "int8": 0.10}


SCRATCH_PLACES = [(across, down) for across in (0.25, 0.5, 0.75) for down in (0.25, 0.5, 0.75)]

# Raised when a step is changed so that its old results must not be used again.
STEP_VERSION = 1


class StudentFile(msgspec.Struct, frozen=True):
    """Facts about a training run that are kept beside its student."""

    best_epoch: int
    history: list[tuple[float, float]]


@dataclass(frozen=True)
class Job:
    """What the user asked for."""

    data: Path
    category: str
    teacher: str
    method: str
    recipe: Recipe
    preprocess: Preprocess
    steps: Steps


@dataclass(frozen=True)
class Material:
    """Teacher, student and the normals they were made from. `normals` is in the order that `split` refers to."""

    dataset: Dataset
    normals: Images
    images_sha256: str
    teacher: Pyramid
    student: Pyramid
    best_epoch: int | None


def prepare(job: Job, student_file: Path | None = None) -> Material:
    """Read the images and the teacher, then train a student, or read it from `student_file`."""
    method = METHODS[job.method]
    teacher = load_teacher(job.teacher, method.taps)
    dataset = find_dataset(job.data, job.category)
    normals = load_normals(dataset, job.preprocess)
    digest = hashlib.sha256(msgspec.json.encode(job.preprocess))
    for path in normals.paths:
        digest.update(file_hash(path).encode())
    images_sha256 = digest.hexdigest()
    print(
        f"{job.category}: {len(normals.paths)} good parts, {len(normals.unreadable)} unreadable, "
        f"{len(dataset.labelled)} labelled test images",
        flush=True,
    )
    student = method.new_student(job.recipe.seed)
    best_epoch = None
    if student_file is not None:
        load_into(student, read_weights(student_file), str(student_file))
        print(
            "WARNING: --student: the threshold rests on the normals that this --seed holds out; it is too low if the "
            "student was trained on them",
            flush=True,
        )
    else:
        folder = _train_step(job, teacher, normals, images_sha256)
        load_into(student, read_weights(folder / "student.npz"), "the finished training")
        best_epoch = msgspec.json.decode((folder / "training.json").read_bytes(), type=StudentFile).best_epoch
    return Material(dataset, normals, images_sha256, teacher, student.eval().requires_grad_(False), best_epoch)


def _train_step(job: Job, teacher: Pyramid, normals: Images, images_sha256: str) -> Path:
    def produce(folder: Path) -> None:
        trained = train(METHODS[job.method], teacher, normals.pixels, job.preprocess, job.recipe, folder)
        write_weights(folder / "student.npz", trained.student.state_dict())
        facts = StudentFile(trained.best_epoch, [(epoch.loss, epoch.validation) for epoch in trained.history])
        (folder / "training.json").write_bytes(msgspec.json.encode(facts))
        (folder / "checkpoint.pth").unlink(missing_ok=True)

    inputs: Inputs = {
        "version": STEP_VERSION,
        "method": job.method,
        "teacher": weights_hash(teacher.state_dict()),
        "images": images_sha256,
        **msgspec.structs.asdict(job.recipe),
    }
    return job.steps.run("train", inputs, produce)


def check_out(out: Path) -> None:
    """Only a bundle may be replaced by a bundle; anything else in the way is an InputError."""
    if out.exists() and not (out / MANIFEST).is_file():
        raise InputError(f"{out} exists and is not a bundle: give another --out DIR")


def build_bundle(
    job: Job,
    material: Material,
    precision: Precision,
    observer: str,
    calibration_images: int,
    false_reject_rate: float,
    out: Path,
) -> Manifest:
    """Write the bundle `out` at once, or nothing. The figures in its manifest come from the engine in it."""
    check_out(out)
    training, held_out = split(len(material.normals.paths), job.recipe)
    graph, calibration = _graph_step(job, material, precision, observer, training[:calibration_images])
    print(f"engine: compiling for OpenVINO, evaluating, packing {out}", flush=True)
    with new_folder(out) as folder:
        graph_name = f"{precision}.onnx"
        onnx.save(graph, folder / graph_name)
        engine_files = compile_openvino(folder / graph_name, folder)
        preprocess = job.preprocess
        with OpenVinoEngine.of_file(folder / engine_files.main, preprocess.height, preprocess.width) as engine:
            _, scores = infer_all(engine, material.normals.pixels[held_out], preprocess, "held-out normals")
            threshold = _threshold(scores, false_reject_rate)
            golden = _golden_frames(material, held_out[np.argsort(scores)], preprocess, engine)
            accuracy = _accuracy(engine, material.dataset, preprocess)
        np.savez_compressed(folder / "golden.npz", frames=golden.frames, maps=golden.maps, scores=golden.scores)
        manifest = Manifest(
            schema=SCHEMA,
            category=job.category,
            method=job.method,
            taps=list(METHODS[job.method].taps),
            precision=precision,
            preprocess=preprocess,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            graph=graph_name,
            engines={"openvino": engine_files},
            golden=Golden("golden.npz", TOLERANCE[precision]),
            teacher=Weights(_named(job.teacher), weights_hash(material.teacher.state_dict())),
            student=Weights(
                "trained" if material.best_epoch else "given", weights_hash(material.student.state_dict())
            ),
            training=Training(
                len(training),
                len(held_out),
                [path.name for path in material.normals.unreadable],
                material.images_sha256,
                _settings(job.recipe, trained=material.best_epoch is not None),
                material.best_epoch,
            ),
            calibration=calibration,
            threshold=threshold,
            threshold_changes=[],
            accuracy=accuracy,
            versions=_versions(),
            files={file.name: file_hash(file) for file in sorted(folder.iterdir())},
        )
        (folder / MANIFEST).write_bytes(encode(manifest))
    return manifest


def _graph_step(
    job: Job, material: Material, precision: Precision, observer: str, calibration: np.ndarray
) -> tuple[onnx.ModelProto, Calibration | None]:
    pixels = material.normals.pixels[calibration]

    def produce(folder: Path) -> None:
        print(f"graph: exporting both networks, {precision}", flush=True)
        method, spec = METHODS[job.method], job.preprocess
        model = method.graph(material.teacher, material.student, spec.height, spec.width)
        graph = export_graph(model, spec)
        check_parity(model, graph, spec.normalise(pixels[0]))
        if precision == "fp16":
            graph = to_fp16(graph)
        if precision == "int8":
            batches = (
                spec.normalise(image)
                for image in tqdm(pixels, desc="calibrating", unit="image", disable=None, leave=False)
            )
            histograms = collect(graph, activations(graph), batches)
            ranges = {name: OBSERVERS[observer](histogram) for name, histogram in histograms.items()}
            (folder / "ranges.json").write_bytes(msgspec.json.format(msgspec.json.encode(ranges)))
            graph = quantise(graph, ranges)
        onnx.save(graph, folder / "graph.onnx")

    inputs: Inputs = {
        "version": STEP_VERSION,
        "method": job.method,
        "precision": precision,
        "preprocess": msgspec.json.encode(job.preprocess).decode(),
        "teacher": weights_hash(material.teacher.state_dict()),
        "student": weights_hash(material.student.state_dict()),
    }
    if precision == "int8":
        inputs |= {"observer": observer, "pixels": hashlib.sha256(pixels.tobytes()).hexdigest()}
    folder = job.steps.run("graph", inputs, produce)
    graph = onnx.load(folder / "graph.onnx")
    if precision != "int8":
        return graph, None
    return graph, Calibration(observer, len(pixels), file_hash(folder / "ranges.json"))


def _threshold(scores: np.ndarray, false_reject_rate: float) -> Threshold:
    threshold = conformal(scores, false_reject_rate)
    if threshold.false_reject_rate is not None and threshold.false_reject_rate > false_reject_rate:
        print(
            f"WARNING: {len(scores)} held-out normals can promise a false-reject rate of "
            f"{threshold.false_reject_rate:.1%}, not of {false_reject_rate:.1%}; that takes "
            f"{normals_needed(false_reject_rate)}. The threshold is their highest score.",
            flush=True,
        )
    return threshold


def _golden_frames(
    material: Material, by_score: np.ndarray, preprocess: Preprocess, engine: OpenVinoEngine
) -> GoldenFrames:
    """The held-out normals with the lowest and the middle score, and the middle one with a scratch drawn on it.

    Of several places for the scratch the one with the highest score is taken, so that the self test exercises an
    engine where it has to answer large.
    """
    paths = [material.normals.paths[by_score[0]], material.normals.paths[by_score[len(by_score) // 2]]]
    frames = [read_image(path) for path in paths]
    if frames[0].shape != frames[1].shape:
        frames[0] = frames[1]
    scratched = [_scratched(frames[1], preprocess, place) for place in SCRATCH_PLACES]
    frames.append(max(scratched, key=lambda frame: float(engine.infer(preprocess(frame)).scores[0])))
    answers = [engine.infer(preprocess(frame)) for frame in frames]
    maps, scores = (np.concatenate([getattr(answer, name) for answer in answers]) for name in ("maps", "scores"))
    return GoldenFrames(np.stack(frames), maps, scores)


def _scratched(frame: Image, preprocess: Preprocess, place: tuple[float, float]) -> Image:
    """A light line with a dark core, a fifth of the picture long, through a place given as a share of the picture."""
    x, y, width, height = preprocess.roi or (0, 0, frame.shape[1], frame.shape[0])
    start, end = (
        (round(x + width * (place[0] + step)), round(y + height * (place[1] + step))) for step in (-0.1, 0.1)
    )
    scratched = frame.copy()
    cv2.line(scratched, start, end, (255, 255, 255), max(4, width // 40))
    cv2.line(scratched, start, end, (0, 0, 0), max(2, width // 80))
    return scratched


def _accuracy(engine: OpenVinoEngine, dataset: Dataset, preprocess: Preprocess) -> Accuracy | None:
    return evaluate(engine, dataset.labelled, preprocess).accuracy() if dataset.labelled else None


def _settings(recipe: Recipe, trained: bool) -> dict[str, int | float]:
    """The recipe; of a student that was given only the split of the normals is known."""
    settings = msgspec.structs.asdict(recipe)
    return settings if trained else {name: settings[name] for name in ("seed", "held_out")}


def _named(teacher: str) -> str:
    return teacher if teacher in ("imagenet", "builtin") else Path(teacher).name


def _versions() -> dict[str, str]:
    names = ("stpm-edge", "torch", "torchvision", "onnx", "onnxruntime", "openvino", "numpy")
    return {"python": platform.python_version(), "opencv": cv2.__version__, **{name: version(name) for name in names}}
