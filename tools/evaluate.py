"""stpm-eval: the accuracy of a bundle on labelled images, measured through the engine in it."""

import argparse
import shutil
import sys
from pathlib import Path

import cv2
import msgspec
import numpy as np

from stpm.calibration.bootstrap import PixelHistograms, image_intervals, pixel_intervals
from stpm.calibration.dataset import LabelledImage, find_labelled, load_labelled
from stpm.calibration.evaluation import Evaluation, evaluate, shown
from stpm.calibration.gate import FIGURES
from stpm.calibration.metrics import Bools, Floats, auroc, f1_max
from stpm.edge.bundle import Bundle, find_bundle, open_bundle
from stpm.edge.command import parser, printable, run_command
from stpm.edge.engine import BACKENDS, open_engine
from stpm.edge.errors import InputError
from stpm.edge.picture import defect_picture, sheet
from stpm.edge.preprocess import Image
from stpm.edge.storage import storage_errors, write_file, write_json

EXAMPLES = """\
  stpm-eval --bundle bundles/screw-int8 --data mvtec
  stpm-eval --data mvtec --out report"""

TITLES = {**FIGURES, "f1": "image F1-max"}


class Figure(msgspec.Struct, frozen=True):
    """None: not defined on these images."""

    value: float | None
    interval: tuple[float, float] | None  # 95 %, by bootstrap over the images


class Kind(msgspec.Struct, frozen=True):
    """One kind of defect, or "good"."""

    images: int
    rejected: int
    median_score: float
    figures: dict[str, Figure]  # as of the whole, against the good parts; none of "good"


class Report(msgspec.Struct, frozen=True):
    bundle: str
    bundle_sha256: str
    category: str
    precision: str
    engine: dict[str, str]
    threshold: float
    figures: dict[str, Figure]  # of `Accuracy`, and f1: the largest that a threshold reaches
    f1_threshold: float | None  # which one; it was found on these images, so it is no threshold for a line
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
    manifest = bundle.manifest
    images, scores = evaluation.images, evaluation.scores
    pixels = PixelHistograms(evaluation.maps[images.masked], images.masks[images.masked])
    intervals = {**image_intervals(scores, images.defective), **pixel_intervals(pixels)}
    accuracy, best = evaluation.accuracy(), f1_max(scores, images.defective)
    values = {name: getattr(accuracy, name) for name in FIGURES} | {"f1": best[0] if best else None}
    return Report(
        str(bundle.path),
        bundle.sha256,
        manifest.category,
        manifest.precision,
        engine,
        manifest.threshold.value,
        {name: Figure(value, intervals[name]) for name, value in values.items()},
        best[1] if best else None,
        _kinds(evaluation, pixels, manifest.threshold.value),
        {_name(item): float(score) for item, score in zip(images.items, scores, strict=True)},
    )


def _kinds(evaluation: Evaluation, pixels: PixelHistograms, threshold: float) -> dict[str, Kind]:
    images, scores = evaluation.images, evaluation.scores
    kinds = np.array([item.kind for item in images.items])
    rows = {}
    for kind in sorted(set(kinds), key=lambda name: (name != "good", name)):
        of_kind = kinds == kind
        rows[str(kind)] = Kind(
            int(of_kind.sum()),
            int((scores[of_kind] > threshold).sum()),
            float(np.median(scores[of_kind])),
            {} if kind == "good" else _figures_of(of_kind, of_kind | (kinds == "good"), evaluation, pixels),
        )
    return rows


def _figures_of(of_kind: Bools, among: Bools, evaluation: Evaluation, pixels: PixelHistograms) -> dict[str, Figure]:
    """Of some images alone; those of pixels from histograms, within 1e-3."""
    scores, positive, masked = evaluation.scores[among], of_kind[among], among[evaluation.images.masked]
    best, weights = f1_max(scores, positive), masked[None].astype(float)
    values = {
        "image_auroc": auroc(scores, positive),
        "pixel_auroc": _defined(pixels.auroc(weights)),
        "aupro": _defined(pixels.aupro(weights)),
        "f1": best[0] if best else None,
    }
    intervals = {**image_intervals(scores, positive), **pixel_intervals(pixels, masked)}
    return {name: Figure(value, intervals[name]) for name, value in values.items()}


def _defined(values: Floats) -> float | None:
    return float(values[0]) if np.isfinite(values[0]) else None


def table(report: Report) -> str:
    """At most 100 columns."""
    lines = [
        f"{report.category}, {report.precision}, {report.engine['backend']} on {report.engine['device']}",
        f"{'kind':<22}{'images':>8}{'rejected':>10}{'AUROC':>8}{'95 %':>16}{'F1-max':>8}{'pixel':>8}{'AUPRO':>8}"
        f"{'median':>10}",
    ]
    for name, kind in report.kinds.items():
        lines.append(
            f"{name:<22}{kind.images:>8}{kind.rejected:>10}{_columns(kind.figures)}{kind.median_score:>10.2e}"
        )
    lines.append("")
    for name, figure in report.figures.items():
        interval = "" if figure.interval is None else "   95 % {:.4f} to {:.4f}".format(*figure.interval)
        at = f"   at {report.f1_threshold:.3e}" if name == "f1" and report.f1_threshold is not None else ""
        lines.append(f"{TITLES[name]:<14}{shown(figure.value):>11}{interval}{at}")
    lines.append(f"{'threshold':<14}{report.threshold:>11.3e}")
    return "\n".join(lines)


def _columns(figures: dict[str, Figure]) -> str:
    texts = {name: "-" if figure.value is None else f"{figure.value:.3f}" for name, figure in figures.items()}
    interval = figures["image_auroc"].interval if figures else None
    between = "{:.3f} to {:.3f}".format(*interval) if interval else ""
    columns = (("image_auroc", 8), (None, 16), ("f1", 8), ("pixel_auroc", 8), ("aupro", 8))
    return "".join(f"{texts.get(name, '') if name else between:>{width}}" for name, width in columns)


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
    caption = f"{_name(item)}  {verdict}  score {score:.2e}  threshold {report.threshold:.2e}"
    return defect_picture(evaluation.images.pixels[index], evaluation.maps[index], report.threshold, caption)


def _name(item: LabelledImage) -> str:
    return f"{item.kind}/{printable(item.path.name)}"


def _write_picture(path: Path, picture: Image) -> None:
    write_file(path, cv2.imencode(".png", picture)[1].tobytes())


if __name__ == "__main__":
    sys.exit(main())
