"""Make the built-in teacher: a ResNet-18 (to layer3) trained on images that this file draws. No photo is used.

The task is to tell apart CLASSES recipes of texture and shape: each class is one random setting of one of the
generators below, each image one random instance of it, turned, scaled, lit and blurred at random. What the network
must learn for that (edges, corners, curvature, grain, colour, arrangement) is what the student's teacher is for.

    python -m stpm.tools.make_teacher --steps 2500 --out build/builtin_teacher.npz

The result depends on seed, steps, torch version and CPU; the file in the repository was made with the defaults.
"""

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from stpm.build.pyramid import Pyramid, channels_last, weights_hash
from stpm.build.weights import write_weights
from stpm.edge.preprocess import Image, Preprocess

CLASSES = 240
SIZE = 96
DRAWN = 144  # drawn larger, so that a turned crop of SIZE stays inside

Generator = Callable[[np.random.Generator, np.random.Generator], Image]


def waves(setting: np.random.Generator, instance: np.random.Generator) -> Image:
    """A sum of plane waves, thresholded or smooth: stripes, grids, moiré."""
    y, x = np.mgrid[:DRAWN, :DRAWN].astype(np.float32)
    field = np.zeros((DRAWN, DRAWN), np.float32)
    for _ in range(setting.integers(1, 4)):
        angle, period = setting.uniform(0, np.pi), setting.uniform(4, 30)
        field += np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / period + instance.uniform(0, 6.28))
    if setting.random() < 0.5:
        field = np.sign(field)
    return _coloured(field, setting)


def cloud(setting: np.random.Generator, instance: np.random.Generator) -> Image:
    """Noise with a power-law spectrum, stretched along one direction: cast, brushed and grained surfaces."""
    exponent, stretch, angle = setting.uniform(0.5, 2.2), setting.uniform(1, 6), setting.uniform(0, np.pi)
    fy, fx = np.meshgrid(np.fft.fftfreq(DRAWN), np.fft.fftfreq(DRAWN), indexing="ij")
    u, v = fx * np.cos(angle) + fy * np.sin(angle), -fx * np.sin(angle) + fy * np.cos(angle)
    spectrum = 1 / (np.hypot(u * stretch, v) + 1 / DRAWN) ** exponent
    noise = instance.normal(size=(DRAWN, DRAWN)) + 1j * instance.normal(size=(DRAWN, DRAWN))
    field = np.fft.ifft2(noise * spectrum).real
    return _coloured(field, setting)


def dead_leaves(setting: np.random.Generator, instance: np.random.Generator) -> Image:
    """Shapes falling over one another until nothing shows through: occlusion edges at all scales."""
    corners, power = int(setting.integers(2, 8)), setting.uniform(1.5, 3.5)
    palette = setting.integers(0, 256, (6, 3))
    image = np.full((DRAWN, DRAWN, 3), palette[0], np.uint8)
    for _ in range(int(setting.integers(60, 200))):
        radius = min(60.0, 3 * instance.random() ** (-1 / power))
        centre = instance.uniform(-10, DRAWN + 10, 2)
        colour = palette[instance.integers(len(palette))].tolist()
        if corners == 2:
            cv2.circle(image, centre.astype(int).tolist(), int(radius), colour, -1, cv2.LINE_AA)
        else:
            cv2.fillPoly(image, [_polygon(centre, radius, corners, instance.uniform(0, 6.28))], colour, cv2.LINE_AA)
    return image


def cells(setting: np.random.Generator, instance: np.random.Generator) -> Image:
    """Distance to scattered points: cells, grains, cracks, dots, regular or not."""
    spacing, jitter = setting.uniform(10, 36), setting.uniform(0, 0.5)
    grid = np.stack(np.meshgrid(np.arange(0, DRAWN, spacing), np.arange(0, DRAWN, spacing)), -1).reshape(-1, 2)
    points = np.ones((DRAWN, DRAWN), np.uint8)
    for x, y in (grid + instance.uniform(-jitter, jitter, grid.shape) * spacing).astype(int):
        points[np.clip(y, 0, DRAWN - 1), np.clip(x, 0, DRAWN - 1)] = 0
    distance, label = cv2.distanceTransformWithLabels(points, cv2.DIST_L2, 5)
    style = setting.integers(3)
    if style == 0:
        return _coloured(distance, setting)
    if style == 1:
        return _coloured(np.sin(label * 12.9898) + 0 * distance, setting)
    return _coloured((distance < spacing * setting.uniform(0.15, 0.4)).astype(np.float32), setting)


def fractal(setting: np.random.Generator, instance: np.random.Generator) -> Image:
    """An iterated function system: two to five random contractions, thousands of points."""
    maps = setting.uniform(-1, 1, (setting.integers(2, 6), 2, 3))
    maps[:, :, :2] *= 0.85 / np.maximum(np.linalg.norm(maps[:, :, :2], 2, axis=(1, 2)), 0.85)[:, None, None]
    maps = maps + instance.normal(0, 0.02, maps.shape)
    points = instance.uniform(-1, 1, (400, 2))
    trail = []
    for _ in range(60):
        chosen = maps[instance.integers(len(maps), size=len(points))]
        points = np.einsum("nij,nj->ni", chosen[:, :, :2], points) + chosen[:, :, 2]
        trail.append(points)
    cloud_ = np.concatenate(trail[15:])
    low, high = np.percentile(cloud_, [1, 99], axis=0)
    pixels = ((cloud_ - low) / np.maximum(high - low, 1e-6) * (DRAWN - 1)).astype(int).clip(0, DRAWN - 1)
    density = np.zeros((DRAWN, DRAWN), np.float32)
    np.add.at(density, (pixels[:, 1], pixels[:, 0]), 1)
    return _coloured(np.log1p(cv2.GaussianBlur(density, (0, 0), setting.uniform(0.5, 1.2))), setting)


def solids(setting: np.random.Generator, instance: np.random.Generator) -> Image:
    """Lit bodies on a plain ground: turned profiles with shading, threads, highlights and holes, like metal parts."""
    ground, body = setting.integers(0, 256, 3), setting.integers(40, 230, 3)
    profile = 0.2 + 0.8 * np.abs(np.interp(np.linspace(0, 1, DRAWN), np.linspace(0, 1, 7), setting.uniform(-1, 1, 7)))
    profile = profile * setting.uniform(14, 34) + setting.uniform(0, 3) * np.sin(
        np.arange(DRAWN) * 2 * np.pi / setting.uniform(5, 16)
    )
    offset = np.arange(DRAWN)[:, None] - DRAWN / 2 + instance.uniform(-8, 8)
    across = offset / np.maximum(profile, 1)[None]
    inside = np.abs(across) < 1
    shade = np.sqrt(np.clip(1 - across**2, 0, 1)) * instance.uniform(0.7, 1.1) + 0.6 * np.exp(
        -((across - instance.uniform(-0.6, 0.6)) ** 2) / setting.uniform(0.01, 0.1)
    )
    image = np.where(inside[:, :, None], body * shade[:, :, None], ground).clip(0, 255).astype(np.uint8)
    for _ in range(setting.integers(0, 4)):
        centre = (int(instance.uniform(20, DRAWN - 20)), int(instance.uniform(50, DRAWN - 50)))
        cv2.ellipse(
            image,
            centre,
            (int(setting.uniform(3, 12)), int(setting.uniform(3, 12))),
            0,
            0,
            360,
            (ground // 2).tolist(),
            -1,
            cv2.LINE_AA,
        )
    return image


def strokes(setting: np.random.Generator, instance: np.random.Generator) -> Image:
    """Lines, arcs and outlines on a ground: scratches, wires, print."""
    ground, palette = setting.integers(0, 256, 3), setting.integers(0, 256, (3, 3))
    image = np.full((DRAWN, DRAWN, 3), ground, np.uint8)
    kind, length, spread = setting.integers(4), setting.uniform(8, 60), setting.uniform(0.05, 1.6)
    direction, width = setting.uniform(0, np.pi), int(setting.integers(1, 5))
    for _ in range(int(setting.integers(10, 90))):
        start, angle = instance.uniform(0, DRAWN, 2), direction + instance.normal(0, spread)
        colour = palette[instance.integers(3)].tolist()
        end = start + length * np.array([np.cos(angle), np.sin(angle)])
        if kind == 0:
            cv2.line(image, start.astype(int).tolist(), end.astype(int).tolist(), colour, width, cv2.LINE_AA)
        elif kind == 1:
            cv2.ellipse(
                image,
                start.astype(int).tolist(),
                (int(length / 2), int(length / 4)),
                np.degrees(angle),
                0,
                200,
                colour,
                width,
                cv2.LINE_AA,
            )
        elif kind == 2:
            outline = _polygon(start, length / 3, int(setting.integers(3, 7)), angle)
            cv2.polylines(image, [outline], True, colour, width, cv2.LINE_AA)
        else:
            letter = chr(65 + int(instance.integers(26)))
            cv2.putText(
                image,
                letter,
                start.astype(int).tolist(),
                cv2.FONT_HERSHEY_SIMPLEX,
                length / 30,
                colour,
                width,
                cv2.LINE_AA,
            )
    return image


GENERATORS: tuple[Generator, ...] = (waves, cloud, dead_leaves, cells, fractal, solids, strokes)


def draw(label: int, seed: int) -> Image:
    """One image of a class: uint8 SIZE×SIZE×3. `seed` decides the instance, the label alone decides the class."""
    setting, instance = np.random.default_rng(label), np.random.default_rng((label, seed, 1))
    image = GENERATORS[label % len(GENERATORS)](setting, instance)
    return _photographed(image, instance)


def _photographed(image: Image, instance: np.random.Generator) -> Image:
    turn = cv2.getRotationMatrix2D((DRAWN / 2, DRAWN / 2), instance.uniform(-25, 25), instance.uniform(0.85, 1.3))
    turned = cv2.warpAffine(image, turn, (DRAWN, DRAWN), borderMode=cv2.BORDER_REFLECT)
    top, left = instance.integers(0, DRAWN - SIZE, 2)
    crop = turned[top : top + SIZE, left : left + SIZE].astype(np.float32)
    y, x = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j]
    light = 1 + instance.uniform(-0.3, 0.3) * x + instance.uniform(-0.3, 0.3) * y
    crop = crop * light[:, :, None] * instance.uniform(0.7, 1.25) + instance.uniform(-25, 25)
    if instance.random() < 0.4:
        crop = cv2.GaussianBlur(crop, (0, 0), instance.uniform(0.4, 1.5))
    crop += instance.normal(0, instance.uniform(0, 8), crop.shape)
    # colour must not give the class away, or nothing but colour is learnt
    crop = crop[:, :, instance.permutation(3)]
    if instance.random() < 0.5:
        crop = 255 - crop
    if instance.random() < 0.4:
        crop = np.repeat(crop.mean(2, keepdims=True), 3, axis=2)
    return crop.clip(0, 255).astype(np.uint8)


def _coloured(field: np.ndarray, setting: np.random.Generator) -> Image:
    low, high = np.percentile(field, [2, 98])
    level = ((field - low) / max(high - low, 1e-6)).clip(0, 1)[:, :, None]
    dark, bright = setting.integers(0, 256, 3), setting.integers(0, 256, 3)
    return (dark * (1 - level) + bright * level).astype(np.uint8)


def _polygon(centre: np.ndarray, radius: float, corners: int, turn: float) -> np.ndarray:
    angles = turn + np.arange(corners) * 2 * np.pi / corners
    return (centre + radius * np.stack([np.cos(angles), np.sin(angles)], 1)).astype(np.int32)


class Classifier(nn.Module):
    """The pyramid, and a linear layer on what each tap has seen anywhere in the image."""

    def __init__(self) -> None:
        super().__init__()
        self.pyramid = channels_last(Pyramid())
        self.answer = nn.Linear(64 + 128 + 256, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.answer(torch.cat([feature.mean((2, 3)) for feature in self.pyramid(x)], 1))


def _batch(labels: np.ndarray, first: int) -> np.ndarray:
    cv2.setNumThreads(1)
    spec = Preprocess(SIZE, SIZE)
    return np.concatenate([spec.normalise(draw(int(label), first + index)) for index, label in enumerate(labels)])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--steps", type=int, default=2500)
    options.add_argument("--batch", type=int, default=64)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", type=Path, required=True)
    chosen = options.parse_args()
    torch.manual_seed(chosen.seed)
    labels = np.random.default_rng(chosen.seed).integers(0, CLASSES, (chosen.steps, chosen.batch))
    model = Classifier()
    optimiser = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.2, chosen.steps)
    progress = tqdm(range(chosen.steps), unit="step", mininterval=5)
    right, start = 0.0, time.monotonic()
    with ProcessPoolExecutor(1) as pool:
        ahead = [pool.submit(_batch, labels[step], step * chosen.batch) for step in range(4)]
        for step in progress:
            x = torch.from_numpy(ahead.pop(0).result()).to(memory_format=torch.channels_last)
            if step + 4 < chosen.steps:
                ahead.append(pool.submit(_batch, labels[step + 4], (step + 4) * chosen.batch))
            y = torch.from_numpy(labels[step])
            with torch.autocast("cpu", torch.bfloat16):
                answer = model(x)
            loss = F.cross_entropy(answer.float(), y)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            # every image is new, so this is accuracy on unseen images
            right = 0.98 * right + 0.02 * float((answer.argmax(1) == y).float().mean())
            progress.set_postfix_str(f"loss {loss.item():.3f}, right {right:.1%}")
            if step % 500 == 499:
                write_weights(chosen.out, model.pyramid.state_dict(), np.float16)
    write_weights(chosen.out, model.pyramid.state_dict(), np.float16)
    print(
        f"{chosen.out}: {right:.1%} right on unseen images after {time.monotonic() - start:.0f} s, sha256 of the "
        f"tensors {weights_hash(model.pyramid.state_dict())[:16]}"
    )


if __name__ == "__main__":
    main()
