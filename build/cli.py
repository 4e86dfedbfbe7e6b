"""stpm-build and stpm-train."""

import argparse
import inspect
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from stpm.build.assemble import Wish, build_bundle, check_out
from stpm.build.compile import BACKENDS, Compiler, OpenVinoCompiler, TensorRtCompiler
from stpm.build.curve import learning_curve
from stpm.build.device import DEVICES, device_of, emulates_bfloat16, keep_freed_memory
from stpm.build.gpu.cli import add_plan_options, plan_options
from stpm.build.methods import METHODS
from stpm.build.methods.base import Method, fits_teacher
from stpm.build.methods.etstpm import EtStpm
from stpm.build.methods.rstpm import VARIANTS, Rstpm
from stpm.build.pipeline import Job, prepare
from stpm.build.pyramid import BACKBONES, LAYERS, TAPS
from stpm.build.steps import Steps, default_work
from stpm.build.train import RECIPES, OneCycle, Recipe
from stpm.build.weights import write_weights
from stpm.calibration.dataset import categories
from stpm.calibration.evaluation import shown
from stpm.calibration.ranges import OBSERVERS
from stpm.calibration.thresholds import described, threshold_rule
from stpm.edge.cli import count, positive, share
from stpm.edge.command import parser, run_command, warn
from stpm.edge.errors import ConfigError, InputError, StpmError
from stpm.edge.manifest import Limits, Manifest, Setting
from stpm.edge.preprocess import Preprocess
from stpm.edge.storage import storage_errors, write_file

# of one method or another, by the names of its fields
OWN_OPTIONS = ("teacher_epochs", "variant", "attention")
# of training, by the names of the fields of its recipe
RECIPE_OPTIONS = ("epochs", "batch", "learning_rate", "seed", "patience", "bfloat16", "turned", "share")

# of the deepest features that a method compares or makes a summary of
STRIDE = 32

ALL = "all"

AGAIN = "run the same command again, it goes on where it stopped"

BUILD_EXAMPLES = """\
  stpm-build --engine int8 --category screw --data photos --teacher builtin
  stpm-build --engine fp16 --category screw --data mvtec --teacher resnet18.pth --epochs 200 --seed 1
  stpm-build --engine int8 --category screw --data photos --teacher builtin --student screw.npz
  stpm-build --engine int8 --category all --data mvtec --teacher resnet18.pth --out bundles"""

TRAIN_EXAMPLES = """\
  stpm-train --category screw --data photos --teacher builtin --out screw.npz"""


def build_main(arguments: list[str] | None = None) -> int:
    options = parser("stpm-build", "From images of good parts to a bundle that stpm-run judges with.", BUILD_EXAMPLES)
    add = options.add_argument
    add("--engine", required=True, choices=("fp32", "fp16", "int8"), help="precision of the engine")
    _add_training(options)
    add("--student", type=Path, metavar="PATH", help="use this trained student (.npz, .pth, .safetensors)")
    add("--backend", choices=BACKENDS, default="openvino", help="what to compile for (default: openvino)")
    wish = Wish()
    add(
        "--quantize",
        choices=("ptq", "qad"),
        default=wish.setting.quantize,
        help="int8 by post-training quantisation alone, or with the student fine-tuned against the quantised teacher "
        f"(default: {wish.setting.quantize})",
    )
    add(
        "--observer",
        choices=tuple(OBSERVERS),
        default=wish.setting.observer,
        help=f"how int8 finds activation ranges (default: {wish.setting.observer})",
    )
    add(
        "--qad-epochs",
        type=count,
        default=wish.fine_tuning_epochs,
        metavar="N",
        help=f"epochs of that fine-tuning (default: {wish.fine_tuning_epochs})",
    )
    add(
        "--calibration-images",
        type=count,
        default=wish.calibration_images,
        metavar="N",
        help=f"training images that int8 is calibrated on (default: {wish.calibration_images})",
    )
    add(
        "--max-drop",
        type=_limits,
        default=wish.limits,
        metavar="IMAGE,PIXEL,PRO",
        help="how much image AUROC, pixel AUROC and AUPRO an int8 engine may lose against FP32 before other settings "
        "are tried and in the end none is written (default: 0.005,0.003,0.01)",
    )
    add(
        "--threshold",
        type=threshold_rule,
        default=wish.threshold,
        metavar="tail|quantile|SCORE",
        help="from the held-out normals by a fit of the tail of their scores, by their order alone, or by hand "
        "(default: tail)",
    )
    add(
        "--false-reject-rate",
        type=share,
        default=wish.false_reject_rate,
        metavar="R",
        help="share of good parts that the threshold may reject (default: 0.01)",
    )
    add("--out", type=Path, metavar="DIR", help="the bundle (default: bundles/CATEGORY-ENGINE)")
    add_plan_options(options)
    chosen = options.parse_args(arguments)

    def build(chosen: argparse.Namespace) -> None:
        job = _job(chosen)
        if chosen.backend == "tensorrt" and not job.method.fused:
            raise ConfigError(f"--method {chosen.method} has no TensorRT kernels: build it with --backend openvino")
        compiler = _compiler(chosen)
        compiler.check()
        out = chosen.out or Path("bundles") / f"{chosen.category}-{chosen.engine}"
        check_out(out)
        wish = Wish(
            chosen.engine,
            Setting(chosen.quantize, chosen.observer),
            chosen.qad_epochs,
            chosen.calibration_images,
            chosen.max_drop,
            chosen.threshold,
            chosen.false_reject_rate,
        )
        print(_report(build_bundle(job, prepare(job, chosen.student), wish, out, compiler), out))

    def command() -> None:
        _each_category(chosen, build, lambda name: f"{name}-{chosen.engine}", Path("bundles"))

    return run_command("stpm-build", command, AGAIN)


def train_main(arguments: list[str] | None = None) -> int:
    options = parser(
        "stpm-train", "Train a student on images of good parts: the first step of stpm-build, alone.", TRAIN_EXAMPLES
    )
    _add_training(options)
    options.add_argument("--out", type=Path, metavar="FILE", help="the student (default: CATEGORY.npz)")
    chosen = options.parse_args(arguments)

    def train(chosen: argparse.Namespace) -> None:
        out = chosen.out or Path(f"{chosen.category}.npz")
        if out.suffix != ".npz" or out.is_dir():
            raise InputError(f"wanted the name of an .npz file for --out, found {out}: the student is written as .npz")
        job = _job(chosen)
        material = prepare(job)
        with storage_errors(out):
            out.parent.mkdir(parents=True, exist_ok=True)
        write_weights(out, material.student.state_dict())
        trained = material.trained
        assert trained is not None
        write_file(out.with_suffix(".png"), learning_curve(trained.history, trained.best_epoch))
        print(f"student of epoch {trained.best_epoch}: {out}, its learning curve: {out.with_suffix('.png')}")
        if fits_teacher(job.method):
            print("its teacher was fitted to these photos: stpm-build with the same options takes both up from --work")

    def command() -> None:
        _each_category(chosen, train, lambda name: f"{name}.npz", Path())

    return run_command("stpm-train", command, AGAIN)


def _each_category(
    chosen: argparse.Namespace,
    work: Callable[[argparse.Namespace], None],
    name_of: Callable[[str], str],
    default: Path,
) -> None:
    """Do the work for the category, or for all in --data one after another, into the folder --out; one that fails does
    not keep the others from being done."""
    if chosen.category != ALL or (chosen.data / ALL).is_dir():
        work(chosen)
        return
    if getattr(chosen, "student", None) or isinstance(getattr(chosen, "threshold", None), float):
        raise ConfigError("--category all with one --student or one --threshold for all: build each by its name")
    names = categories(chosen.data) if chosen.data.is_dir() else []
    if not names:
        raise InputError(f"wanted folders CATEGORY/train/good in {chosen.data}, found none: name the --category")
    failed: dict[str, StpmError] = {}
    for number, name in enumerate(names, 1):
        print(f"--- {name}, {number} of {len(names)}", flush=True)
        out = (chosen.out or default) / name_of(name)
        try:
            work(argparse.Namespace(**vars(chosen) | {"category": name, "out": out}))
        except StpmError as error:
            failed[name] = error
            print(f"{name}: {error}", file=sys.stderr, flush=True)
    if failed:
        which = ", ".join(failed)
        raise type(next(iter(failed.values())))(
            f"{len(failed)} of {len(names)} categories were not done, see above: {which}"
        )


def _compiler(chosen: argparse.Namespace) -> Compiler:
    return TensorRtCompiler(plan_options(chosen), chosen.work) if chosen.backend == "tensorrt" else OpenVinoCompiler()


def _add_training(options: argparse.ArgumentParser) -> None:
    recipe = Recipe()
    add = options.add_argument
    add(
        "--category",
        required=True,
        metavar="NAME|all",
        help="the product; the folder NAME inside --data, or all that are there, one after another",
    )
    add(
        "--data",
        type=Path,
        default=Path("data"),
        metavar="ROOT",
        help="ROOT/NAME/train/good (MVTec layout), or a plain folder of images of good parts (default: data)",
    )
    add(
        "--teacher",
        default="imagenet",
        metavar="imagenet|builtin|PATH",
        help="weights of the backbone: torchvision's download, the ResNet-18 in this package, or a file (default: "
        "imagenet)",
    )
    add(
        "--method",
        choices=tuple(METHODS),
        default="stpm",
        help="stpm; rstpm: with a second student that reconstructs; etstpm: with a teacher that first learns to tell "
        "the parts of --data apart; reverse: with a student that reconstructs instead of one that looks (default: "
        "stpm)",
    )
    add(
        "--variant",
        choices=VARIANTS,
        help="of rstpm: one teacher for both students, or ResNet-50 as the second one with a narrow decoder or the "
        f"published one of 100 million parameters (default: {Rstpm().variant})",
    )
    add(
        "--second-teacher",
        default="",
        metavar="imagenet|PATH",
        help="of rstpm lite and published: weights of the ResNet-50 (default: imagenet)",
    )
    add(
        "--attention",
        type=_layers_or_none,
        metavar="LAYER,...|none",
        help=f"of rstpm: at which layers its decoder has attention (default: {','.join(Rstpm().attention)})",
    )
    add(
        "--teacher-epochs",
        type=_from_zero,
        metavar="N",
        help=f"of etstpm: how long that goes on (default: {EtStpm().teacher_epochs})",
    )
    add("--backbone", choices=BACKBONES, default="resnet18", help="of teacher and student (default: resnet18)")
    add(
        "--taps",
        type=_taps,
        default=TAPS,
        metavar="LAYER,...",
        help=f"which layers are compared, out of {', '.join(LAYERS)} (default: {','.join(TAPS)})",
    )
    add(
        "--schedule",
        choices=tuple(RECIPES),
        help="constant: SGD at one rate, as published; one-cycle: AdamW, whose rate rises and falls (default: "
        "one-cycle for reverse, constant for the others)",
    )
    add("--epochs", type=count, help=_defaults("epochs"))
    add("--batch", type=count, help=_defaults("batch"))
    add("--learning-rate", type=positive, help=_defaults("learning_rate"))
    add(
        "--patience",
        type=count,
        default=recipe.patience,
        metavar="N",
        help="constant schedule only: stop when N epochs have not made it better on the held-out (default: train to "
        "the end)",
    )
    add(
        "--turned",
        action="store_true",
        help="train on the images turned and mirrored: for parts that lie at any angle",
    )
    add("--bfloat16", action="store_true", help="train in bfloat16: faster where the CPU or GPU has it")
    add(
        "--share",
        type=_share_or_all,
        default=recipe.share,
        metavar="R",
        help="train on this share of the training images only, to see how many are enough (default: 1)",
    )
    add("--seed", type=_from_zero, default=recipe.seed, help=f"default: {recipe.seed}")
    add("--roi", type=_region, metavar="X,Y,W,H", help="look only at this part of the frame, in pixels")
    add(
        "--size",
        type=size,
        default=(256, 256),
        metavar="N|WxH",
        help=f"what a frame is made smaller to for the networks, multiples of {STRIDE}: more pixels show smaller "
        "defects and take more time (default: 256)",
    )
    add(
        "--work",
        type=Path,
        default=default_work(),
        metavar="DIR",
        help="where finished steps are kept for re-use (default: ~/.cache/stpm-edge)",
    )
    add("--device", choices=DEVICES, default="auto", help="to train on (default: a GPU if torch finds one)")
    add("--threads", type=count, metavar="N", help="CPU threads for training (default: all)")


def _job(chosen: argparse.Namespace) -> Job:
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    method = _method(chosen)
    given = {name: getattr(chosen, name) for name in RECIPE_OPTIONS if getattr(chosen, name) is not None}
    recipe = RECIPES[chosen.schedule or method.schedule](**given)
    if recipe.patience and isinstance(recipe, OneCycle):
        raise ConfigError(
            "--patience with the one-cycle schedule, whose last epochs are its best: leave it out and choose --epochs"
        )
    device = device_of(chosen.device)
    if device == "cpu":
        keep_freed_memory()
    if recipe.bfloat16 and emulates_bfloat16(device):
        warn("this CPU has no bfloat16 arithmetic and is many times slower with it: leave --bfloat16 out")
    width, height = chosen.size
    return Job(
        chosen.data,
        chosen.category,
        chosen.teacher,
        method,
        recipe,
        Preprocess(height, width, chosen.roi),
        Steps(chosen.work),
        chosen.second_teacher,
        device,
    )


def _defaults(name: str) -> str:
    values = {schedule: getattr(make(), name) for schedule, make in RECIPES.items()}
    if len(set(values.values())) == 1:
        return f"default: {values['constant']}"
    return "default: " + ", ".join(f"{value} ({schedule})" for schedule, value in values.items())


def _method(chosen: argparse.Namespace) -> Method:
    make = METHODS[chosen.method]
    own = {name: getattr(chosen, name) for name in OWN_OPTIONS if getattr(chosen, name) is not None}
    for name in own.keys() - inspect.signature(make).parameters.keys():
        raise ConfigError(f"--method {chosen.method} has no --{name.replace('_', '-')}: leave it out")
    return make(chosen.backbone, chosen.taps, **own)


def _region(text: str) -> tuple[int, int, int, int]:
    try:
        x, y, width, height = (int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"wanted four whole numbers X,Y,W,H, found {text}") from error
    return x, y, width, height


def size(text: str) -> tuple[int, int]:
    """Width and height that the networks can take, from `N` or `WxH`."""
    try:
        width, height = (int(part) for part in (text.split("x") if "x" in text else (text, text)))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"wanted one whole number or two as WIDTHxHEIGHT, found {text}") from error
    if min(width, height) < 2 * STRIDE or width % STRIDE or height % STRIDE:
        raise argparse.ArgumentTypeError(f"wanted multiples of {STRIDE} from {2 * STRIDE}, found {text}")
    return width, height


def _taps(text: str) -> tuple[str, ...]:
    names = tuple(name for name in LAYERS if name in text.split(","))
    if not names or len(names) != len(text.split(",")):
        raise argparse.ArgumentTypeError(f"wanted some of {', '.join(LAYERS)} with commas between, found {text}")
    return names


def _share_or_all(text: str) -> float:
    return 1.0 if float(text) == 1 else share(text)


def _layers_or_none(text: str) -> tuple[str, ...]:
    return () if text == "none" else _taps(text)


def _from_zero(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"wanted a whole number from 0, found {text}")
    return value


def _limits(text: str) -> Limits:
    try:
        image, pixel, aupro = (float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"wanted three numbers IMAGE,PIXEL,PRO, found {text}") from error
    if not all(0 <= limit <= 1 for limit in (image, pixel, aupro)):
        raise argparse.ArgumentTypeError(f"wanted three numbers between 0 and 1, found {text}")
    return Limits(image, pixel, aupro)


def _report(manifest: Manifest, out: Path) -> str:
    threshold, accuracy = manifest.threshold, manifest.accuracy
    rows = [
        ("bundle", str(out)),
        ("precision", manifest.precision),
        ("trained on", f"{manifest.training.normals} good parts, {manifest.training.held_out} held out"),
        ("best epoch", str(manifest.training.best_epoch or "- (student given)")),
        ("threshold", described(threshold)),
    ]
    if accuracy is not None:
        rows += [
            (name, shown(value))
            for name, value in (
                ("image AUROC", accuracy.image_auroc),
                ("pixel AUROC", accuracy.pixel_auroc),
                ("AUPRO@30%", accuracy.aupro),
            )
        ]
    rows.append(("report", str(out / "report.html")))
    return "\n".join(f"  {name:<12} {value}" for name, value in rows)


if __name__ == "__main__":
    sys.exit(build_main())
