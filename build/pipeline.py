"""From a folder of good parts to a teacher, a trained student and the images: what every bundle is made from."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
from torch import nn

from stpm.build.curve import History
from stpm.build.device import on
from stpm.build.enhance import Enhancement, enhance, task
from stpm.build.equalise import equalise, spreads
from stpm.build.methods.base import Method, described, fits_teacher
from stpm.build.pyramid import Pyramid, weights_hash
from stpm.build.steps import STEP_VERSION, Inputs, Steps
from stpm.build.train import Recipe, split, train
from stpm.build.weights import load_into, read_weights, write_weights
from stpm.calibration.dataset import Dataset, Images, find_dataset, images_hash, load_normals, other_categories
from stpm.edge.bundle import file_hash
from stpm.edge.command import warn
from stpm.edge.errors import ConfigError, InputError
from stpm.edge.preprocess import Image, Preprocess


class StudentFile(msgspec.Struct, frozen=True):
    """Facts about a training run that are kept beside its student."""

    best_epoch: int
    history: History


@dataclass(frozen=True)
class Job:
    """What to learn from what."""

    data: Path
    category: str
    teacher: str
    method: Method
    recipe: Recipe
    preprocess: Preprocess
    steps: Steps
    second_teacher: str = ""
    device: str = "cpu"  # to train on; what is made differs by rounding only


@dataclass(frozen=True)
class Material:
    """Teacher, student and the normals they were made from. `normals` is in the order that `split` refers to."""

    dataset: Dataset
    normals: Images
    photos_sha256: list[str]
    teacher: nn.Module
    student: nn.Module
    trained: StudentFile | None  # None when the student was given


def prepare(job: Job, student_file: Path | None = None) -> Material:
    """Read the images and the teacher, then train a student, or read it from `student_file`."""
    method = job.method
    if student_file is not None and fits_teacher(method):
        raise ConfigError(
            f"a student of {method.name} belongs to its teacher as it was fitted to the photos, which is not in "
            f"{student_file}: leave --student out, what was done before is re-used"
        )
    teacher = method.load_teacher(job.teacher, job.second_teacher)
    dataset = find_dataset(job.data, job.category)
    normals = load_normals(dataset, job.preprocess)
    photos_sha256 = [file_hash(path) for path in normals.paths]
    print(
        f"{job.category}: {len(normals.paths)} good parts, {len(normals.unreadable)} unreadable, "
        f"{len(dataset.labelled)} labelled test images",
        flush=True,
    )
    if method.teacher_epochs:
        _enhance(job, teacher, normals, photos_sha256)
    if method.equalised:
        _equalise(job, teacher, normals, photos_sha256)
    student = method.new_student(job.recipe.seed)
    trained = None
    if student_file is not None:
        load_into(student, read_weights(student_file), str(student_file))
        warn(
            "--student: the threshold rests on the normals that this --seed holds out; it is too low if the student "
            "was trained on them"
        )
    else:
        folder = _train_step(job, teacher, normals, photos_sha256)
        load_into(student, read_weights(folder / "student.npz"), "the finished training")
        trained = msgspec.json.decode((folder / "training.json").read_bytes(), type=StudentFile)
    return Material(dataset, normals, photos_sha256, teacher, student.eval().requires_grad_(False), trained)


def _enhance(job: Job, teacher: nn.Module, normals: Images, photos_sha256: list[str]) -> None:
    """Let the teacher, in place, learn to tell this category from the others beside it."""
    others = other_categories(job.data, job.category)
    hashes = {other.category: [file_hash(path) for path in other.normals] for other in others}
    recipe = Enhancement(job.method.teacher_epochs, job.recipe.seed)

    def produce(folder: Path) -> None:
        training, _ = split(len(normals.paths), job.recipe)
        # the region of interest is of this product's camera
        whole = msgspec.structs.replace(job.preprocess, roi=None)
        images = [normals.pixels[training], *(_normals_beside(other, whole) for other in others)]
        with on(job.device, teacher):
            right = enhance(teacher, task(images), job.preprocess, recipe)
        what = f"{job.category} from {', '.join(hashes)}" if hashes else "images with a pasted patch from others"
        print(f"teacher: tells {what}, {', '.join(f'{share:.1%}' for share in right)} right by epoch", flush=True)
        write_weights(folder / "teacher.npz", teacher.state_dict())

    inputs = _images_trained_on(job, photos_sha256)
    inputs |= {f"images of {name}": images_hash(photos, job.preprocess) for name, photos in hashes.items()}
    _teacher_step(job, teacher, inputs | msgspec.structs.asdict(recipe), produce)


def _equalise(job: Job, teacher: nn.Module, normals: Images, photos_sha256: list[str]) -> None:
    """Divide the channels of the teacher, in place, by how much each varies on the parts that are trained on."""

    def produce(folder: Path) -> None:
        assert isinstance(teacher, Pyramid)
        training, _ = split(len(normals.paths), job.recipe)
        found = spreads(teacher, normals.pixels[training], job.preprocess)
        equalise(teacher, found)
        strongest = ", ".join(f"{float(spread.max() / spread.min()):.0f}" for spread in found)
        print(f"teacher: the strongest channel varied {strongest} times as much as the weakest, by layer", flush=True)
        write_weights(folder / "teacher.npz", teacher.state_dict())

    _teacher_step(job, teacher, _images_trained_on(job, photos_sha256) | {"fit": "equalise"}, produce)


def _images_trained_on(job: Job, photos_sha256: list[str]) -> Inputs:
    return {
        "images": images_hash(photos_sha256, job.preprocess),
        "seed": job.recipe.seed,
        "held_out": job.recipe.held_out,
        "share": job.recipe.share,
    }


def _teacher_step(job: Job, teacher: nn.Module, inputs: Inputs, produce: Callable[[Path], None]) -> None:
    """Load into the teacher what `produce` makes of it, or made before."""
    inputs = {"version": STEP_VERSION, "teacher": weights_hash(teacher.state_dict()), **inputs}
    load_into(teacher, read_weights(job.steps.run("teacher", inputs, produce) / "teacher.npz"), "the fitted teacher")


def _normals_beside(other: Dataset, preprocess: Preprocess) -> Image:
    try:
        return load_normals(other, preprocess).pixels
    except InputError as error:
        raise InputError(f"{error}; the teacher was to tell them apart: or keep {other.category} elsewhere") from error


def _train_step(job: Job, teacher: nn.Module, normals: Images, photos_sha256: list[str]) -> Path:
    def produce(folder: Path) -> None:
        student = job.method.new_student(job.recipe.seed)
        with on(job.device, teacher, student):
            trained = train(job.method, teacher, student, normals.pixels, job.preprocess, job.recipe, folder)
        write_weights(folder / "student.npz", student.state_dict())
        facts = StudentFile(trained.best_epoch, [(epoch.loss, epoch.validation) for epoch in trained.history])
        (folder / "training.json").write_bytes(msgspec.json.encode(facts))
        (folder / "checkpoint.pth").unlink(missing_ok=True)

    inputs: Inputs = {
        "version": STEP_VERSION,
        **described(job.method),
        "teacher": weights_hash(teacher.state_dict()),
        "images": images_hash(photos_sha256, job.preprocess),
        **msgspec.structs.asdict(job.recipe),
    }
    return job.steps.run("train", inputs, produce)
