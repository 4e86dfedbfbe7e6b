"""Accuracy of an engine on labelled images: the same engine, preprocessing and score as on the line."""

from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from stpm.calibration.dataset import LabelledImage, load_images, load_mask
from stpm.calibration.metrics import aupro, auroc
from stpm.edge.engine import Engine
from stpm.edge.errors import EngineError
from stpm.edge.manifest import Accuracy
from stpm.edge.preprocess import Image, Preprocess
from stpm.edge.score import Array


@dataclass(frozen=True)
class Evaluation:
    """Everything per image, in the order of `items`: pixels uint8 N×H×W×3, maps float32 N×H×W, scores float32 N.

    `masks` is bool N×H×W; `masked` says for which images it is known.
    """

    items: list[LabelledImage]
    pixels: Image
    maps: Array
    scores: Array
    masks: np.ndarray
    masked: np.ndarray

    def accuracy(self) -> Accuracy:
        defective = np.array([item.defective for item in self.items], bool)
        maps, masks = self.maps[self.masked], self.masks[self.masked]
        return Accuracy(len(self.items), auroc(self.scores, defective), auroc(maps, masks), aupro(maps, masks))


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


def evaluate(engine: Engine, labelled: list[LabelledImage], preprocess: Preprocess) -> Evaluation:
    images = load_images([item.path for item in labelled], preprocess, "reading test images")
    kept = set(images.paths)
    items = [item for item in labelled if item.path in kept]
    maps, scores = infer_all(engine, images.pixels, preprocess, "evaluating")
    masks = np.zeros(maps.shape, bool)
    masked = np.zeros(len(items), bool)
    for index, item in enumerate(items):
        mask = load_mask(item, preprocess)
        if mask is not None:
            masks[index], masked[index] = mask, True
    return Evaluation(items, images.pixels, maps, scores, masks, masked)


def shown(figure: float | None) -> str:
    """A figure as people read it."""
    return "not defined" if figure is None else f"{figure:.4f}"
