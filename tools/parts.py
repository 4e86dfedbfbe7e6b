"""Draw photos of a made-up product, a turned steel bushing with a flange, good and defective, in the MVTec layout.

For the demonstration and the tests: no camera, no licence, the same pictures for the same seed.

    python -m stpm.tools.parts --out demo/data --good 60 --test 24
"""

import argparse
from pathlib import Path

import cv2
import numpy as np

from stpm.edge.preprocess import Image
from stpm.edge.storage import storage_errors

SIZE = 320
DEFECTS = ("scratch", "stain", "missing_hole", "dent")


def draw_part(seed: int) -> tuple[Image, np.ndarray]:
    """A good part, uint8 SIZE×SIZE×3 BGR, and the centres of its six holes, 6×2 pixels."""
    random = np.random.default_rng(seed)
    image = _conveyor(random)
    centre = SIZE / 2 + random.uniform(-4, 4, 2)
    turn = random.uniform(-0.06, 0.06)
    y, x = np.mgrid[:SIZE, :SIZE]
    radius = np.hypot(x - centre[0], y - centre[1])
    angle = np.arctan2(y - centre[1], x - centre[0])
    # turned steel shines in two opposite sectors
    steel = 150 + 28 * np.cos(2 * (angle - 0.6)) + 3 * np.sin(radius * 2.1) + random.normal(0, 3, radius.shape)
    flange = (radius < 122) & (radius > 34)
    steel = np.where(radius < 78, steel + 24, steel)
    steel = np.where(np.abs(radius - 78) < 2.5, 70, steel)
    image[flange] = np.clip(steel, 0, 255)[flange, None] * np.array([1.0, 0.98, 0.95])
    for ring in (34, 122):
        cv2.circle(image, _point(centre), ring, (60, 60, 60), 2, cv2.LINE_AA)
    holes = centre + 100 * np.stack(
        [np.cos(turn + np.arange(6) * np.pi / 3), np.sin(turn + np.arange(6) * np.pi / 3)], 1
    )
    for hole in holes:
        cv2.circle(image, _point(hole), 10, (36, 34, 32), -1, cv2.LINE_AA)
        cv2.circle(image, _point(hole), 10, (200, 200, 200), 1, cv2.LINE_AA)
    return image, holes


def add_defect(image: Image, holes: np.ndarray, kind: str, seed: int) -> tuple[Image, Image]:
    """The part with a defect, and its mask, uint8 SIZE×SIZE, 255 on the defect."""
    random = np.random.default_rng((seed, 7))
    defective, mask = image.copy(), np.zeros((SIZE, SIZE), np.uint8)
    angle, reach = random.uniform(0, 2 * np.pi), random.uniform(48, 68)
    centre = SIZE / 2 + reach * np.array([np.cos(angle), np.sin(angle)])
    if kind == "scratch":
        steps = np.cumsum(np.stack([np.full(8, 5.0), random.normal(0, 2.5, 8)], 1), 0) - [20, 0]
        turned = steps @ cv2.getRotationMatrix2D((0, 0), random.uniform(0, 360), 1)[:, :2].T
        line = [(centre + turned).astype(np.int32)]
        cv2.polylines(mask, line, False, 255, 4)
        cv2.polylines(defective, line, False, (70, 72, 75), 3, cv2.LINE_AA)
        cv2.polylines(defective, line, False, (235, 235, 235), 1, cv2.LINE_AA)
    elif kind == "stain":
        cv2.ellipse(
            mask,
            _point(centre),
            (int(random.uniform(10, 18)), int(random.uniform(7, 12))),
            random.uniform(0, 180),
            0,
            360,
            255,
            -1,
        )
        soft = cv2.GaussianBlur(mask, (0, 0), 3)[:, :, None] / 255 * 0.7
        defective = (defective * (1 - soft) + np.array([30, 60, 95]) * soft).astype(np.uint8)
    elif kind == "missing_hole":
        hole = holes[int(random.integers(6))]
        cv2.circle(mask, _point(hole), 12, 255, -1)
        tone = defective[tuple(np.clip(np.array(_point(hole))[::-1] + np.array([0, 15]), 0, SIZE - 1))]
        cv2.circle(defective, _point(hole), 12, tone.tolist(), -1, cv2.LINE_AA)
    elif kind == "dent":
        radius = int(random.uniform(9, 14))
        cv2.circle(mask, _point(centre), radius, 255, -1)
        y, x = np.mgrid[:SIZE, :SIZE]
        slope = (x - centre[0] + y - centre[1]) / radius
        bowl = np.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / (0.5 * radius**2))
        defective = np.clip(defective - 75 * (slope * bowl)[:, :, None], 0, 255).astype(np.uint8)
    else:
        raise ValueError(f"wanted a defect out of {DEFECTS}, found {kind!r}")
    return defective, mask


def write_dataset(root: Path, category: str, good: int, test: int, seed: int = 0) -> None:
    """`good` training images, then `test` good and `test` defective ones with masks, under root/category."""
    folder = root / category
    for index in range(good):
        _write(folder / "train" / "good" / f"{index:03d}.png", draw_part(seed + index)[0])
    for index in range(test):
        _write(folder / "test" / "good" / f"{index:03d}.png", draw_part(seed + 10_000 + index)[0])
        kind = DEFECTS[index % len(DEFECTS)]
        part, holes = draw_part(seed + 20_000 + index)
        defective, mask = add_defect(part, holes, kind, seed + index)
        _write(folder / "test" / kind / f"{index:03d}.png", defective)
        _write(folder / "ground_truth" / kind / f"{index:03d}_mask.png", mask)


def _conveyor(random: np.random.Generator) -> Image:
    belt = 92 + cv2.GaussianBlur(random.normal(0, 6, (SIZE, SIZE)), (0, 0), 1.2)
    return np.clip(np.repeat(belt[:, :, None], 3, 2) * [0.95, 1.0, 0.92], 0, 255).astype(np.uint8)


def _point(position: np.ndarray) -> tuple[int, int]:
    return round(float(position[0])), round(float(position[1]))


def _write(path: Path, image: Image) -> None:
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(cv2.imencode(".png", image)[1].tobytes())


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--category", default="bushing")
    options.add_argument("--good", type=int, default=60)
    options.add_argument("--test", type=int, default=24)
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    write_dataset(chosen.out, chosen.category, chosen.good, chosen.test, chosen.seed)


if __name__ == "__main__":
    main()
