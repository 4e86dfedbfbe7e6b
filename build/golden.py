"""Golden frames: inputs with the answers that any machine's engine must give before it may judge."""

import numpy as np

from stpm.calibration.dataset import Images
from stpm.calibration.scratches import scratched
from stpm.edge.bundle import GoldenFrames
from stpm.edge.engine import Engine
from stpm.edge.images import read_image
from stpm.edge.preprocess import Preprocess
from stpm.edge.score import Array

# How far another machine's engine may be from ours: rounding differs with the CPU's instruction set.
TOLERANCE: dict[str, float] = {"fp32": 0.01, "fp16": 0.01, "int8": 0.10}

SCRATCH_PLACES = [(across, down) for across in (0.25, 0.5, 0.75) for down in (0.25, 0.5, 0.75)]


def golden_frames(normals: Images, scores: Array, preprocess: Preprocess, engine: Engine) -> GoldenFrames:
    """The normals with the lowest and the middle score, and the middle one with a scratch drawn on it.

    Of several places for the scratch the one with the highest score is taken, so that the self test exercises an
    engine where it has to answer large.
    """
    by_score = np.argsort(scores)
    frames = [read_image(normals.paths[index]) for index in (by_score[0], by_score[len(by_score) // 2])]
    if frames[0].shape != frames[1].shape:
        frames[0] = frames[1]
    drawn = [scratched(frames[1], preprocess, place) for place in SCRATCH_PLACES]
    frames.append(max(drawn, key=lambda frame: engine.inspect(frame, np.inf).score))
    answers = [engine.inspect(frame, np.inf, with_map=True) for frame in frames]
    scores_found = np.array([answer.score for answer in answers], np.float32)
    maps = np.stack([answer.map for answer in answers if answer.map is not None])
    return GoldenFrames(np.stack(frames), maps, scores_found)
