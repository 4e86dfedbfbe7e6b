"""Accuracy of an engine on labelled images: the same engine, preprocessing and score as on the line."""

from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from stpm.calibration.dataset import Labelled
from stpm.calibration.metrics import aupro, auroc
from stpm.edge.engine import Engine
from stpm.edge.errors import EngineError
from stpm.edge.manifest import Accuracy
from stpm.edge.preprocess import Image, Preprocess
from stpm.edge.score import Array


@dataclass(frozen=True)
class Evaluation:
    """Anomaly maps float32 N×H×W and scores float32 N of labelled images, in their order."""

    images: Labelled
    maps: Array
    scores: Array

    def accuracy(self) -> Accuracy:
        defective = self.images.defective
        maps, masks = self.maps[self.images.masked], self.images.masks[self.images.masked]
        return Accuracy(len(defective), auroc(self.scores, defective), auroc(maps, masks), aupro(maps, masks))


def evaluate(engine: Engine, images: Labelled, preprocess: Preprocess) -> Evaluation:
    return Evaluation(images, *infer_all(engine, images.pixels, preprocess, "evaluating"))


def infer_all(engine: Engine, pixels: Image, preprocess: Preprocess, title: str) -> tuple[Array, Array]:
    """Maps float32 N×H×W and scores float32 N of resized images uint8 N×H×W×3.

    A score that is not finite is an EngineError.
    """
    maps = np.empty(pixels.shape[:3], np.float32)
    scores = np.empty(len(pixels), np.float32)
    for index in tqdm(range(len(pixels)), desc=title, unit="image", disable=None, leave=False):
        inference = engine.infer(preprocess.normalise(pixels[index]))
        maps[index], scores[index] = inference.maps[0], inference.scores[0]
    if not np.isfinite(scores).all():
        raise EngineError(
            f"the engine gives {np.count_nonzero(~np.isfinite(scores))} scores that are not finite: build again with "
            "--engine fp32 to see whether the precision is the cause"
        )
    return maps, scores


def shown(figure: float | None) -> str:
    """A figure as people read it."""
    return "not defined" if figure is None else f"{figure:.4f}"
