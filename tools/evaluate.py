"""stpm-eval: the accuracy of a bundle on labelled images, measured through the engine in it."""

import argparse
import shutil
import sys
from pathlib import Path

import cv2
import msgspec
import numpy as np

from stpm.calibration.dataset import find_labelled, load_labelled
from stpm.calibration.evaluation import Evaluation, evaluate, shown
from stpm.calibration.metrics import auroc
from stpm.edge.bundle import Bundle, find_bundle, open_bundle
from stpm.edge.command import parser, run_command
from stpm.edge.engine import BACKENDS, open_engine
from stpm.edge.errors import InputError
from stpm.edge.manifest import Accuracy
from stpm.edge.picture import defect_picture, sheet
from stpm.edge.preprocess import Image
from stpm.edge.storage import storage_errors, write_file, write_json

EXAMPLES = """\
  stpm-eval --bundle bundles/screw-int8 --data mvtec
  stpm-eval --data mvtec --out report"""


class Kind(msgspec.Struct, frozen=True):
    """One kind of defect, or "good"."""

    images: int
    rejected: int
    auroc: float | None  # against the good parts
    median_score: float


class Report(msgspec.Struct, frozen=True):
    bundle: str
    bundle_sha256: str
    category: str
    precision: str
    engine: dict[str, str]
    threshold: float
    accuracy: Accuracy
    kinds: dict[str, Kind]
    scores: dict[str, float]


def main(arguments: list[str] | None = None) -> int:
    options = parser("stpm-eval", "Measure a bundle on labelled images, through the engine in it.", EXAMPLES)
    add = options.add_argument
    add("--bundle", type=Path, metavar="DIR", help="default: the only bundle in ./bundles")
    add(
        "--data",
        type=Path,
        default=Path("data"),
        metavar="ROOT",
        help="ROOT/CATEGORY/test/KIND with masks in ground_truth/KIND, or the category's own folder (default: data)",
    )
    add("--backend", choices=("auto", *BACKENDS), default="auto")
    add("--out", type=Path, metavar="DIR", help="write report.json, overview.png and pictures of wrong verdicts")
    chosen = options.parse_args(arguments)
    return run_command("stpm-eval", lambda: _run(chosen), "nothing was written")


def _run(options: argparse.Namespace) -> None:
    bundle = open_bundle(options.bundle or find_bundle())
    category = bundle.manifest.category
    labelled = find_labelled(options.data / category) or find_labelled(options.data)
    if not labelled:
        raise InputError(
            f"wanted labelled images in {options.data / category / 'test'}/KIND, found none: check --data (a folder "
            "of good parts alone cannot be evaluated)"
        )
    with open_engine(bundle, options.backend) as engine:
        preprocess = bundle.manifest.preprocess
        evaluation = evaluate(engine, load_labelled(labelled, preprocess), preprocess)
        report = make_report(bundle, evaluation, engine.describe())
    print(table(report))
    if options.out:
        _write(options.out, report, evaluation)
        print(f"\nwritten: {options.out / 'report.json'}, {options.out / 'overview.png'}")


def make_report(bundle: Bundle, evaluation: Evaluation, engine: dict[str, str]) -> Report:
    threshold, scores = bundle.manifest.threshold.value, evaluation.scores
    kinds = np.array([item.kind for item in evaluation.images.items])
    rows = {}
    for kind in sorted(set(kinds), key=lambda name: (name != "good", name)):
        of_kind = kinds == kind
        versus_good = of_kind | (kinds == "good")
        rows[str(kind)] = Kind(
            int(of_kind.sum()),
            int((scores[of_kind] > threshold).sum()),
            None if kind == "good" else auroc(scores[versus_good], of_kind[versus_good]),
            float(np.median(scores[of_kind])),
        )
    manifest = bundle.manifest
    by_name = {
        f"{item.kind}/{item.path.name}": float(score)
        for item, score in zip(evaluation.images.items, scores, strict=True)
    }
    return Report(
        str(bundle.path),
        bundle.sha256,
        manifest.category,
        manifest.precision,
        engine,
        threshold,
        evaluation.accuracy(),
        rows,
        by_name,
    )


def table(report: Report) -> str:
    """At most 100 columns."""

    lines = [
        f"{report.category}, {report.precision}, {report.engine['backend']} on {report.engine['device']}",
        f"{'kind':<24}{'images':>8}{'rejected':>10}{'AUROC':>13}{'median score':>15}",
    ]
    lines += [
        f"{name:<24}{kind.images:>8}{kind.rejected:>10}{'' if name == 'good' else shown(kind.auroc):>13}"
        f"{kind.median_score:>15.3e}"
        for name, kind in report.kinds.items()
    ]
    accuracy = report.accuracy
    lines += [
        "",
        f"image AUROC {shown(accuracy.image_auroc)}   pixel AUROC {shown(accuracy.pixel_auroc)}   "
        f"AUPRO@30% {shown(accuracy.aupro)}   threshold {report.threshold:.3e}",
    ]
    return "\n".join(lines)


def _write(out: Path, report: Report, evaluation: Evaluation) -> None:
    wrong = out / "wrong"
    with storage_errors(out):
        if (out / "report.json").is_file():  # an earlier report of ours
            shutil.rmtree(wrong, ignore_errors=True)
        wrong.mkdir(parents=True, exist_ok=True)
    write_json(out / "report.json", report)
    _write_picture(out / "overview.png", overview(report, evaluation))
    for index, item in enumerate(evaluation.images.items):
        if item.defective != (evaluation.scores[index] > report.threshold):
            _write_picture(wrong / f"{item.kind}_{item.path.stem}.png", _picture(report, evaluation, index))


def overview(report: Report, evaluation: Evaluation) -> Image:
    """For every kind the image with the lowest, the middle and the highest score, one row a kind."""
    kinds = np.array([item.kind for item in evaluation.images.items])
    pictures = []
    for kind in report.kinds:
        ranked = np.flatnonzero(kinds == kind)[np.argsort(evaluation.scores[kinds == kind])]
        for index in (ranked[0], ranked[len(ranked) // 2], ranked[-1]):
            pictures.append(_picture(report, evaluation, int(index)))
    return sheet(pictures, 3)


def _picture(report: Report, evaluation: Evaluation, index: int) -> Image:
    item, score = evaluation.images.items[index], evaluation.scores[index]
    verdict = "FAIL" if score > report.threshold else "PASS"
    caption = f"{item.kind}/{item.path.name}  {verdict}  score {score:.2e}  threshold {report.threshold:.2e}"
    return defect_picture(evaluation.images.pixels[index], evaluation.maps[index], report.threshold, caption)


def _write_picture(path: Path, picture: Image) -> None:
    write_file(path, cv2.imencode(".png", picture)[1].tobytes())


if __name__ == "__main__":
    sys.exit(main())
