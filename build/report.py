"""One HTML page about a build, self-contained: what was compared, where it is worst, and with what it was made."""

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import jinja2
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stpm.build.curve import draw_curve
from stpm.build.pipeline import StudentFile
from stpm.calibration.dataset import Images
from stpm.calibration.evaluation import shown
from stpm.calibration.gate import FIGURES, Measured, drops, name_of
from stpm.calibration.metrics import FPR_LIMIT, pro, roc
from stpm.edge.manifest import Manifest
from stpm.edge.picture import defect_picture
from stpm.edge.preprocess import Image
from stpm.edge.score import Array

TEMPLATE = Path(__file__).with_name("report.html")
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "stpm-edge",
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
}
COLOURS = {"FP32": "#4477aa", "INT8": "#cc6677", "FP16": "#cc6677"}
CURVE_POINTS = 400
HIGHEST_NORMALS = 3


@dataclass(frozen=True)
class Facts:
    """`chosen` is the engine in the bundle; of an fp32 bundle it is `fp32` itself. `sensitivity` is of int8 only."""

    manifest: Manifest
    held_out: Images
    labelled: bool  # whether the images with defects are labelled photos, not drawn scratches
    fp32: Measured
    chosen: Measured
    sensitivity: dict[str, float]
    trained: StudentFile | None

    @property
    def engines(self) -> dict[str, Measured]:
        name = self.manifest.precision.upper()
        return {"FP32": self.fp32} if name == "FP32" else {"FP32": self.fp32, name: self.chosen}


@dataclass(frozen=True)
class Example:
    title: str
    note: str
    pictures: list[tuple[str, str]]  # caption, data URL


def write_report(path: Path, facts: Facts) -> None:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    manifest = facts.manifest
    page = template.render(
        manifest=manifest,
        gate_rows=_gate_rows(manifest),
        images="labelled images" if facts.labelled else "normals, half of them with a drawn scratch",
        threshold=_threshold_rows(manifest),
        histograms=_figure(9, 2.2 * len(facts.engines), len(facts.engines), 1, lambda axes: _histograms(axes, facts)),
        curves=_figure(9, 3, 1, 3, lambda axes: _curves(axes, facts)),
        layers=_layers_figure(facts.sensitivity) if facts.sensitivity else None,
        training=_training(facts.trained) if facts.trained else None,
        examples=_examples(facts),
        settings=_settings(manifest),
        versions=sorted(manifest.versions.items()),
    )
    path.write_text(page, encoding="utf-8")


def _gate_rows(manifest: Manifest) -> list[tuple[str, list[str], str]]:
    """FP32 and every attempt: name, figures, verdict."""
    gate = manifest.gate
    if gate is None:
        return []
    rows = [
        (
            "FP32",
            [*(shown(getattr(gate.fp32, name)) for name in FIGURES), "", "", f"{gate.fp32_false_rejects:.1%}", ""],
            "",
        )
    ]
    for attempt in gate.attempts:
        lost = dict(drops(attempt.accuracy, gate.fp32))
        figures = [
            f"{shown(getattr(attempt.accuracy, name))}{'' if drop is None else f' ({0 - drop:+.4f})'}"
            for name, drop in lost.items()
        ]
        figures += [f"{attempt.map_correlation:.4f}", f"{attempt.score_ratio:.2f}×"]
        figures += [f"{attempt.false_rejects:.1%}", f"{attempt.false_rejects_at_fp32:.1%}"]
        rows.append((f"INT8 {name_of(attempt.setting)}", figures, "pass" if attempt.passed else "fail"))
    return rows


def _threshold_rows(manifest: Manifest) -> list[tuple[str, str]]:
    threshold = manifest.threshold
    rows = [("threshold", f"{threshold.value:.4e}"), ("rule", threshold.rule)]
    if threshold.false_reject_rate is not None:
        rows.append(("false-reject rate", f"{threshold.false_reject_rate:.2%}"))
    if threshold.interval is not None:
        low, high = threshold.interval
        rows.append(("95 % interval of that rate", f"{low:.2%} to {high:.2%}"))
    return [*rows, ("held-out normals it rests on", str(threshold.normals))]


def _figure(width: float, height: float, rows: int, columns: int, draw: Callable[[list[Axes]], None]) -> str:
    """A drawing of rows × columns axes as SVG text."""
    with matplotlib.rc_context(STYLE):
        figure = Figure((width, height), layout="constrained")
        draw(list(figure.subplots(rows, columns, squeeze=False).ravel()))
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def _histograms(axes: list[Axes], facts: Facts) -> None:
    every = np.concatenate([np.concatenate([m.scores, m.evaluation.scores]) for m in facts.engines.values()])
    bins = np.geomspace(max(every.min(), 1e-12), every.max() * 1.01, 50)
    for axis, (name, measured) in zip(axes, facts.engines.items(), strict=True):
        of_labelled, defective = measured.evaluation.scores, measured.evaluation.images.defective
        groups = [("held-out normals", measured.scores, "#228833")]
        if facts.labelled:
            groups += [("good", of_labelled[~defective], "#88ccaa"), ("defects", of_labelled[defective], "#cc6677")]
        else:
            groups.append(("with a drawn scratch", of_labelled[defective], "#cc6677"))
        for label, scores, colour in groups:
            axis.hist(scores, bins=list(bins), label=f"{label} ({len(scores)})", color=colour, alpha=0.6)
        axis.axvline(measured.threshold.value, color="black", linewidth=1, label="threshold")
        axis.set_xscale("log")
        axis.set_ylabel(f"{name}: images")
        axis.legend(fontsize=7)
    axes[-1].set_xlabel("score")


def _curves(axes: list[Axes], facts: Facts) -> None:
    for name, measured in facts.engines.items():
        evaluation = measured.evaluation
        images = evaluation.images
        maps, masks = evaluation.maps[images.masked], images.masks[images.masked]
        curves = (roc(evaluation.scores, images.defective), roc(maps, masks), pro(maps, masks))
        for axis, curve, figure in zip(axes, curves, FIGURES, strict=True):
            if curve is not None:
                x = np.linspace(0, FPR_LIMIT if figure == "aupro" else 1, CURVE_POINTS)
                label = f"{name} {shown(getattr(measured.accuracy, figure))}"
                axis.plot(x, np.interp(x, *curve), label=label, color=COLOURS[name], linewidth=1.3)
                axis.legend(fontsize=8, loc="lower right")
    for axis, title, rate in zip(
        axes, ("image ROC", "pixel ROC", "PRO"), ("true positives",) * 2 + ("overlap",), strict=True
    ):
        axis.set(title=title, xlabel="false-positive rate", ylabel=rate)


def _layers_figure(sensitivity: dict[str, float]) -> str:
    height = 1.2 + 0.08 * len(sensitivity)
    return _figure(9, height, 1, 2, lambda axes: _layers(axes, sensitivity))


def _layers(axes: list[Axes], sensitivity: dict[str, float]) -> None:
    limit = 1.05 * max(sensitivity.values())
    for axis, network in zip(axes, ("teacher", "student"), strict=True):
        layers = {name: error for name, error in sorted(sensitivity.items()) if name.startswith(f"/{network}/")}
        axis.barh([_short(name) for name in layers], list(layers.values()), color="#4477aa")
        axis.set(title=network, xlim=(0, limit), xlabel="change of the anomaly map")
        axis.invert_yaxis()
        axis.tick_params(axis="y", labelsize=7)


def _training(trained: StudentFile) -> str:
    return _figure(9, 3, 1, 1, lambda axes: draw_curve(axes[0], trained.history, trained.best_epoch))


def _short(layer: str) -> str:
    """ "/teacher/layer2/layer2.0/conv1/Conv" as "layer2.0 conv1": without what only contains the next."""
    parts = layer.split("/")[2:-1]
    return " ".join(part for part, after in zip(parts, [*parts[1:], ""], strict=True) if not after.startswith(part))


def _examples(facts: Facts) -> list[Example]:
    """The defect with the lowest score, the good part with the highest, and the highest held-out normals."""
    chosen = facts.chosen.evaluation
    defective = chosen.images.defective
    examples = []
    for title, members, pick in (
        ("the defect with the lowest score", np.flatnonzero(defective), np.argmin),
        ("the good part with the highest score", np.flatnonzero(~defective), np.argmax),
    ):
        if len(members):
            index = int(members[pick(chosen.scores[members])])
            item = chosen.images.items[index]
            pictures = [
                _picture(name, chosen.images.pixels[index], m.evaluation.maps[index], m.evaluation.scores[index], m)
                for name, m in facts.engines.items()
            ]
            examples.append(Example(title, f"{item.kind}/{item.path.name}", pictures))
    for index in np.argsort(-facts.chosen.scores)[:HIGHEST_NORMALS]:
        pictures = [
            _picture(name, facts.held_out.pixels[index], m.maps[index], m.scores[index], m)
            for name, m in facts.engines.items()
        ]
        examples.append(Example("held-out normal with a high score", facts.held_out.paths[index].name, pictures))
    return examples


def _picture(name: str, pixels: Image, anomaly: Array, score: float, measured: Measured) -> tuple[str, str]:
    threshold = measured.threshold.value
    verdict = "FAIL" if score > threshold else "PASS"
    picture = defect_picture(pixels, anomaly, threshold, f"{name}  {verdict}  score {score:.2e}")
    data = base64.b64encode(cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 88])[1].tobytes()).decode()
    return f"{name}: {verdict}, score {score:.3e}, threshold {threshold:.3e}", f"data:image/jpeg;base64,{data}"


def _settings(manifest: Manifest) -> list[tuple[str, str]]:
    training, calibration = manifest.training, manifest.calibration
    width, height = training.photo_size
    rows = [
        ("teacher", f"{manifest.teacher.source}, sha256 {manifest.teacher.sha256[:16]}…"),
        ("student", f"{manifest.student.source}, sha256 {manifest.student.sha256[:16]}…"),
        ("photos", f"{training.normals} to train on, {training.held_out} held out, {width}×{height} pixels"),
        ("training", ", ".join(f"{name} {value}" for name, value in training.settings.items())),
        ("best epoch", str(training.best_epoch or "student given")),
    ]
    if calibration is not None:
        rows.append(("int8", f"{name_of(calibration.setting)}, calibrated on {calibration.images} images"))
        rows += [("layers in FP16", layer) for layer in calibration.setting.fp16_layers]
        if calibration.fine_tuning is not None:
            tuned = ", ".join(f"{name} {value}" for name, value in calibration.fine_tuning.items())
            rows.append(("fine-tuning", tuned))
    return rows
