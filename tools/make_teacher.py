"""Make the built-in teacher: a ResNet-18 (to layer3) trained on images that this file draws. No photo is used.

The task is to tell apart CLASSES recipes of texture and shape: each class is one random setting of one of the
generators below, each image one random instance of it. Every time it is seen it is turned, scaled, lit, blurred,
coloured and grained anew. What the network must learn for that (edges, corners, curvature, grain, arrangement) is
what the student's teacher is for.

    python -m stpm.tools.make_teacher --out build/builtin_teacher.npz

First all images are drawn, by every CPU core, into one file (62 KB each; --pool says where), then the network is
trained, on a GPU if there is one. The images depend on the seed alone, the weights also on the torch version and on
what they are computed on; the file in the repository was made with the defaults.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
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

CLASSES = 1008
DRAWN = 144  # pixels on each side of a drawn image
SEEN = 112  # and of the turned piece of it that the network sees
CHUNK = 500  # images that a worker draws at once

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


def inlaid(setting: np.random.Generator, instance: np.random.Generator) -> Image:
    """Two of the others, one inside a shape: a part before its background."""
    inner, outer = (SIMPLE[int(index)] for index in setting.choice(len(SIMPLE), 2, replace=False))
    corners, radius = int(setting.integers(3, 9)), setting.uniform(20, 50)
    images = [make(setting, instance) for make in (inner, outer)]
    mask = np.zeros((DRAWN, DRAWN), np.uint8)
    centre = instance.uniform(DRAWN / 3, 2 * DRAWN / 3, 2)
    cv2.fillPoly(mask, [_polygon(centre, radius, corners, instance.uniform(0, 6.28))], 1)
    return np.where(mask[:, :, None] > 0, images[0], images[1])


SIMPLE: tuple[Generator, ...] = (waves, cloud, dead_leaves, cells, fractal, solids, strokes)
GENERATORS = (*SIMPLE, inlaid)


def draw(label: int, number: int) -> Image:
    """One image of a class: uint8 DRAWN×DRAWN×3. `number` decides the instance, the label alone decides the class."""
    setting, instance = np.random.default_rng(label), np.random.default_rng((label, number, 1))
    return GENERATORS[label % len(GENERATORS)](setting, instance)


def labels_of(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, CLASSES, count)


def draw_all(count: int, seed: int, file: Path, workers: int) -> Image:
    """All images, N×DRAWN×DRAWN×3, in a file that is mapped into memory."""
    shape = (count, DRAWN, DRAWN, 3)
    images = np.memmap(file, np.uint8, "w+", shape=shape)
    with ProcessPoolExecutor(workers) as pool:
        parts = [pool.submit(_draw_part, file, shape, seed, start) for start in range(0, count, CHUNK)]
        for part in tqdm(as_completed(parts), total=len(parts), desc="drawing", unit="part", mininterval=5):
            part.result()
    return images


def _draw_part(file: Path, shape: tuple[int, ...], seed: int, start: int) -> None:
    cv2.setNumThreads(1)
    images, labels = np.memmap(file, np.uint8, "r+", shape=shape), labels_of(shape[0], seed)
    for number in range(start, min(start + CHUNK, shape[0])):
        images[number] = draw(int(labels[number]), number)


def photographed(images: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """uint8 N×DRAWN×DRAWN×3 → float32 N×3×SEEN×SEEN as a network sees it: turned, scaled, lit, blurred, coloured and
    grained, each image in its own way."""
    count, device = len(images), images.device

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand(count, *shape, generator=random, device=device) * (high - low) + low

    def some(probability: float) -> torch.Tensor:
        return uniform(0, 1, 1, 1, 1) < probability

    x = images.permute(0, 3, 1, 2).float()
    angle, scale = uniform(-0.45, 0.45), uniform(0.55, 0.95)
    cos, sin, shift = angle.cos() * scale, angle.sin() * scale, uniform(-1, 1, 2) * (1 - scale[:, None])
    affine = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = F.affine_grid(affine, [count, 3, SEEN, SEEN], align_corners=False)
    x = F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    x = torch.where(some(0.4), _blurred(x, uniform(0.4, 1.5)), x)
    ramp = torch.linspace(-1, 1, SEEN, device=device)
    light = 1 + uniform(-0.3, 0.3, 1, 1, 1) * ramp + uniform(-0.3, 0.3, 1, 1, 1) * ramp[:, None]
    x = x * light * uniform(0.7, 1.25, 1, 1, 1) + uniform(-25, 25, 1, 1, 1)
    x = x + uniform(0, 8, 1, 1, 1) * torch.randn(x.shape, generator=random, device=device)
    # colour must not give the class away, or nothing but colour is learnt
    x = x.gather(1, uniform(0, 1, 3).argsort(1)[:, :, None, None].expand_as(x))
    x = torch.where(some(0.5), 255 - x, x)
    x = torch.where(some(0.4), x.mean(1, keepdim=True).expand_as(x), x).clip(0, 255) / 255
    spec = Preprocess(SEEN, SEEN)
    mean, std = (torch.tensor(each, device=device)[:, None, None] for each in (spec.mean, spec.std))
    return (x - mean) / std


def _blurred(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """By a Gaussian of its own for each image."""
    count, _, height, width = x.shape
    reach = torch.arange(-4, 5, device=x.device)
    taps = torch.exp(-((reach / sigma[:, None]) ** 2) / 2)
    taps = (taps / taps.sum(1, keepdim=True)).repeat_interleave(3, 0)
    x = F.pad(x.reshape(1, -1, height, width), (4, 4, 4, 4), mode="reflect")
    x = F.conv2d(x, taps[:, None, :, None], groups=3 * count)
    x = F.conv2d(x, taps[:, None, None, :], groups=3 * count)
    return x.reshape(count, 3, height, width)


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


def train(
    images: Image, labels: np.ndarray, epochs: int, batch: int, seed: int, device: torch.device
) -> tuple[Pyramid, float]:
    """The trained pyramid, and the share of the last images that it told rightly before it learnt from them."""
    torch.manual_seed(seed)
    random = torch.Generator(device).manual_seed(seed)
    model = Classifier().to(device)
    optimiser = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=1e-4, nesterov=True)
    steps = len(images) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.4, epochs * steps)
    progress = tqdm(total=epochs * steps, desc="training", unit="step", mininterval=5)
    right = torch.zeros((), device=device)
    for epoch in range(epochs):
        order = np.random.default_rng((seed, epoch)).permutation(len(images))
        for step in range(steps):
            indices = np.sort(order[step * batch : (step + 1) * batch])
            x = photographed(torch.from_numpy(images[indices]).to(device), random)
            y = torch.from_numpy(labels[indices]).to(device)
            with torch.autocast(device.type, torch.bfloat16):
                answer = model(x.to(memory_format=torch.channels_last))
            loss = F.cross_entropy(answer.float(), y)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            right = 0.99 * right + 0.01 * (answer.argmax(1) == y).float().mean()
            progress.update()
            if step % 100 == 99:
                progress.set_postfix_str(f"loss {loss.item():.3f}, right {float(right):.1%}")
    progress.close()
    return model.pyramid.cpu(), float(right)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--images", type=int, default=300_000)
    options.add_argument("--epochs", type=int, default=6)
    options.add_argument("--batch", type=int, default=256)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--workers", type=int, default=os.cpu_count())
    options.add_argument("--pool", type=Path, help="folder for the drawn images (default: a temporary one)")
    options.add_argument("--out", type=Path, required=True)
    chosen = options.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start = time.monotonic()
    with tempfile.TemporaryDirectory(dir=chosen.pool) as folder:
        images = draw_all(chosen.images, chosen.seed, Path(folder) / "drawn", chosen.workers)
        drawn = time.monotonic()
        labels = labels_of(chosen.images, chosen.seed)
        pyramid, right = train(images, labels, chosen.epochs, chosen.batch, chosen.seed, device)
    write_weights(chosen.out, pyramid.state_dict(), np.float16)
    print(
        f"{chosen.out}: drawn in {drawn - start:.0f} s, trained on {device.type} in {time.monotonic() - drawn:.0f} s, "
        f"{right:.1%} right in the end, sha256 of the tensors {weights_hash(pyramid.state_dict())[:16]}"
    )


if __name__ == "__main__":
    main()
