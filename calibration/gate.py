"""The accuracy gate: an int8 engine beside the FP32 engine, both compiled, on the same images."""

from dataclasses import dataclass

import numpy as np

from stpm.calibration.dataset import Labelled
from stpm.calibration.evaluation import Evaluation, evaluate, infer_all, shown
from stpm.calibration.thresholds import fit
from stpm.edge.engine import Engine
from stpm.edge.manifest import Accuracy, Attempt, Gate, Limits, Setting, Threshold
from stpm.edge.preprocess import Image, Preprocess
from stpm.edge.score import Array

FIGURES = {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC", "aupro": "AUPRO@30%"}


@dataclass(frozen=True)
class Measured:
    """What an engine answers: maps float32 N×H×W and scores float32 N of the held-out normals, the threshold that
    follows from them, its false rejects, and the labelled images."""

    maps: Array
    scores: Array
    threshold: Threshold
    false_rejects: float
    evaluation: Evaluation
    accuracy: Accuracy


def measure(
    engine: Engine,
    held_out: Image,
    labelled: Labelled,
    preprocess: Preprocess,
    rule: str | float,
    false_reject_rate: float,
) -> Measured:
    maps, scores = infer_all(engine, held_out, preprocess, "held-out normals")
    evaluation = evaluate(engine, labelled, preprocess)
    return Measured(
        maps,
        scores,
        fit(scores, rule, false_reject_rate),
        cross_fitted(scores, rule, false_reject_rate),
        evaluation,
        evaluation.accuracy(),
    )


def cross_fitted(scores: Array, rule: str | float, false_reject_rate: float) -> float:
    """The share of normals above a threshold that rests on the other half of them: no score judges itself."""
    one, other = scores[::2], scores[1::2]
    above = sum(
        np.count_nonzero(judged > fit(fitted, rule, false_reject_rate).value)
        for fitted, judged in ((one, other), (other, one))
        if len(fitted)
    )
    return float(above / len(scores))


def compare(setting: Setting, int8: Measured, fp32: Measured, limits: Limits) -> Attempt:
    """Passes when at least one figure can be compared and none drops by more than its limit."""
    pairs = zip(int8.maps, fp32.maps, strict=True)
    lost = {name: drop for name, drop in drops(int8.accuracy, fp32.accuracy) if drop is not None}
    return Attempt(
        setting,
        int8.accuracy,
        float(np.mean([_correlation(a, b) for a, b in pairs])),
        _correlation(int8.scores, fp32.scores),
        float(np.median(int8.scores / np.maximum(fp32.scores, 1e-30))),
        int8.false_rejects,
        float(np.mean(int8.scores > fp32.threshold.value)),
        bool(lost) and all(drop <= getattr(limits, name) for name, drop in lost.items()),
    )


def drops(int8: Accuracy, fp32: Accuracy) -> list[tuple[str, float | None]]:
    """How much int8 loses of every figure; None where the figure is not defined. Below zero: it gains."""
    pairs = [(name, getattr(fp32, name), getattr(int8, name)) for name in FIGURES]
    return [(name, None if before is None or after is None else before - after) for name, before, after in pairs]


def _correlation(a: Array, b: Array) -> float:
    """Pearson's; of constants it is not defined, and 0 here: nothing says that they agree."""
    a, b = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    a, b = a - a.mean(), b - b.mean()
    lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / lengths if lengths > 0 else 0.0


def name_of(setting: Setting) -> str:
    """As people read it: "qad mse, 2 FP16" with two layers in FP16."""
    layers = f", {len(setting.fp16_layers)} FP16" if setting.fp16_layers else ""
    return f"{setting.quantize} {setting.observer}{layers}"


def table(gate: Gate) -> str:
    """FP32, every attempt and the limits; at most 100 columns."""
    where = "labelled images" if gate.images == "labelled" else "normals, half of them with a drawn scratch"
    lines = [
        f"accuracy gate, on {gate.fp32.images} {where}",
        f"  {'':<28}{'image AUROC':>12}{'pixel AUROC':>12}{'AUPRO@30%':>11}{'maps agree':>11}{'score':>8}{'FRR':>7}",
        f"  {'FP32':<28}{_figures(gate.fp32)}{'':>11}{'':>8}{gate.fp32_false_rejects:>7.1%}",
    ]
    lines += [
        f"  {'INT8 ' + name_of(attempt.setting):<28}{_figures(attempt.accuracy)}{attempt.map_correlation:>11.4f}"
        f"{attempt.score_ratio:>7.2f}×{attempt.false_rejects:>7.1%}  {'pass' if attempt.passed else 'FAIL'}"
        for attempt in gate.attempts
    ]
    limits = gate.limits
    lines.append(
        f"  {'largest drop allowed':<28}{limits.image_auroc:>12.4f}{limits.pixel_auroc:>12.4f}{limits.aupro:>11.4f}"
    )
    return "\n".join(lines)


def _figures(accuracy: Accuracy) -> str:
    widths = (12, 12, 11)
    return "".join(f"{shown(getattr(accuracy, name)):>{width}}" for name, width in zip(FIGURES, widths, strict=True))
