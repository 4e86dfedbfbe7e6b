"""Distil a student from a teacher on normal images: the same loop for every method.

The teacher's features do not change, so they are computed once, for each of the few ways in which an image may be
turned, and kept as float16 in memory or on disk where there is room. Every epoch leaves a checkpoint from which the
same run goes on.
"""

import io
import math
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from stpm.build.cache import feature_cache
from stpm.build.methods.base import Features, Method
from stpm.build.pyramid import channels_last
from stpm.edge.command import warn
from stpm.edge.errors import TrainingError
from stpm.edge.preprocess import Image, Preprocess
from stpm.edge.storage import write_file

RISING = 0.1  # share of a one-cycle run


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The settings of one training run; the defaults are those of Wang et al."""

    schedule: str = "constant"
    epochs: int = 100
    batch: int = 32
    learning_rate: float = 0.4
    momentum: float = 0.9
    weight_decay: float = 1e-4
    held_out: float = 0.2  # share of the normals kept for validation and for the threshold
    share: float = 1.0  # of the others that is trained on, to see how many photos are enough
    seed: int = 0
    patience: int = 0  # stop after so many epochs without a better validation score; 0: never
    bfloat16: bool = False  # convolutions of the student in bfloat16, weights and loss in float32
    turned: bool = False  # each image, each time, in one of the ways of `turn`: for parts that lie at any angle

    @property
    def remedy(self) -> str:
        """What to do when the loss is not finite."""
        return "train with a lower --learning-rate"

    def optimiser(self, network: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(network.parameters(), self.learning_rate, self.momentum, weight_decay=self.weight_decay)

    def rate(self, progress: float) -> float:
        """The learning rate when this share of all steps is done, 0 to 1."""
        return self.learning_rate


class OneCycle(Recipe, frozen=True, forbid_unknown_fields=True):
    """AdamW, whose rate rises to `learning_rate` in the first tenth of the run and falls to nothing until its end."""

    schedule: str = "one-cycle"
    epochs: int = 60
    batch: int = 8
    learning_rate: float = 2e-3

    def optimiser(self, network: nn.Module) -> torch.optim.Optimizer:
        betas = (self.momentum, 0.999)
        return torch.optim.AdamW(network.parameters(), self.learning_rate, betas, weight_decay=self.weight_decay)

    def rate(self, progress: float) -> float:
        if progress < RISING:
            begin, end, share = 0.04, 1.0, progress / RISING
        else:
            begin, end, share = 1.0, 0.0, (progress - RISING) / (1 - RISING)
        return self.learning_rate * (end + (begin - end) * (1 + math.cos(math.pi * share)) / 2)


RECIPES: dict[str, type[Recipe]] = {"constant": Recipe, "one-cycle": OneCycle}


class Epoch(msgspec.Struct, frozen=True):
    loss: float
    validation: float


class Trained(msgspec.Struct, frozen=True):
    student: nn.Module
    history: list[Epoch]
    best_epoch: int  # counted from 1


def split(count: int, recipe: Recipe) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the images to train on and of those held out, by seed; the latter are the same for every share."""
    order = np.random.default_rng(recipe.seed).permutation(count)
    held_out = max(1, round(count * recipe.held_out))
    trained_on = max(1, round((count - held_out) * recipe.share))
    return np.sort(order[held_out : held_out + trained_on]), np.sort(order[:held_out])


def turn(image: Image, way: int) -> Image:
    """Way 0 is as it was, 1 upside down; 2 and 3 are these mirrored; 4 to 7 are all of them turned by a quarter, for
    square images only."""
    image = image[::-1, ::-1] if way & 1 else image
    image = image[:, ::-1] if way & 2 else image
    return np.ascontiguousarray(image.swapaxes(0, 1) if way & 4 else image)


class TrainingSet:
    """Preprocessed batches and the method's targets for a set of uint8 images, the targets cached if there is room,
    in the memory of the CPU or in `folder`.

    Each image is there in every way of `turn`, if it is to be turned: image i of N in way w has the index w·N + i.
    What it gives is where the teacher is.
    """

    def __init__(
        self,
        pixels: Image,
        preprocess: Preprocess,
        method: Method,
        teacher: nn.Module,
        folder: Path,
        title: str,
        turned: bool = False,
    ) -> None:
        self.pixels, self.preprocess, self.method, self.teacher = pixels, preprocess, method, teacher
        self.device = next(teacher.parameters()).device
        self.ways = (8 if preprocess.height == preprocess.width else 4) if turned else 1
        one, count = self._compute(np.arange(1)), self.ways * len(pixels)
        self.cache = feature_cache([(count, *feature.shape[1:]) for feature in one], folder)
        if self.cache is None:
            size = count * sum(2 * feature.numel() for feature in one)
            warn(
                f"no room for {size / 1e9:.1f} GB, half of what is free in memory or in {folder}: the teacher looks "
                f"at the {title} again in every epoch, which takes longer"
            )
            return
        for index in tqdm(range(count), desc=f"teacher, {title}", unit="image", disable=None, leave=False):
            for cached, feature in zip(self.cache, self._compute(np.array([index])), strict=True):
                cached[index] = feature[0]

    def __len__(self) -> int:
        """Images, in whatever way."""
        return len(self.pixels)

    def input(self, indices: np.ndarray) -> torch.Tensor:
        turned = [turn(self.pixels[index % len(self)], index // len(self)) for index in indices]
        batch = np.concatenate([self.preprocess.normalise(image) for image in turned])
        return torch.from_numpy(batch).to(self.device, memory_format=torch.channels_last)

    def targets(self, indices: np.ndarray) -> Features:
        if self.cache is None:
            return self._compute(indices)
        return [cached[indices].to(self.device, torch.float32) for cached in self.cache]

    def _compute(self, indices: np.ndarray) -> Features:
        # not inference_mode: a student may begin with what the teacher says, and learn through it
        with torch.no_grad():
            return [target.clone() for target in self.method.targets(self.teacher(self.input(indices)))]


def train(
    method: Method,
    teacher: nn.Module,
    student: nn.Module,
    pixels: Image,
    preprocess: Preprocess,
    recipe: Recipe,
    folder: Path,
) -> Trained:
    """Train `student`, in place, on uint8 N×H×W×3 normals until its features are those of `teacher`; both give one
    N×C×h×w per tap and are on the same device. `folder` keeps the checkpoint; a stopped run in it is continued.

    The student ends with the weights of the epoch with the lowest validation score. A loss or a score that is not
    finite: TrainingError.
    """
    teacher = channels_last(teacher)
    training, held_out = split(len(pixels), recipe)
    material = preprocess, method, teacher, folder
    train_set = TrainingSet(pixels[training], *material, "training images", recipe.turned)
    validation_set = TrainingSet(pixels[held_out], *material, "held-out images")
    student = channels_last(student)
    optimiser = recipe.optimiser(student)
    checkpoint = folder / "checkpoint.pth"
    best: dict[str, Any] = {"validation": math.inf, "epoch": 0, "student": {}}
    history: list[Epoch] = []
    if checkpoint.is_file():
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        student.load_state_dict(saved["student"])
        optimiser.load_state_dict(saved["optimiser"])
        best, history = saved["best"], [Epoch(*epoch) for epoch in saved["history"]]
        tqdm.write(f"training goes on after epoch {len(history)}")

    started, first = time.monotonic(), len(history)
    progress = tqdm(
        range(first, recipe.epochs),
        initial=first,
        total=recipe.epochs,
        desc="training",
        unit="epoch",
        disable=None,
    )
    for number in progress:
        if recipe.patience and number - best["epoch"] >= recipe.patience:
            tqdm.write(f"stopped after epoch {number}: none of the last {recipe.patience} was better on the held-out")
            break
        loss = _train_epoch(method, student, optimiser, train_set, recipe, number)
        validation = _validate(method, student, validation_set, recipe)
        if not math.isfinite(validation):
            raise TrainingError(
                f"the score of the held-out images is {validation} after epoch {number + 1} at learning rate "
                f"{recipe.learning_rate}: {recipe.remedy}"
            )
        history.append(Epoch(loss, validation))
        if validation < best["validation"]:
            state = {name: value.clone() for name, value in student.state_dict().items()}
            best = {"validation": validation, "epoch": number + 1, "student": state}
        # a log file gets the first epoch and ten more lines, no bar
        if progress.disable and (number == first or (number + 1) % max(1, recipe.epochs // 10) == 0):
            left = _time_left(started, number + 1 - first, recipe.epochs - number - 1)
            print(
                f"epoch {number + 1}/{recipe.epochs}: loss {loss:.4f}, held-out {validation:.3e}, {left}", flush=True
            )
        progress.set_postfix_str(f"loss {loss:.4f}, held-out {validation:.3e}, best epoch {best['epoch']}")
        _save(
            checkpoint,
            {
                "student": student.state_dict(),
                "optimiser": optimiser.state_dict(),
                "best": best,
                "history": [(epoch.loss, epoch.validation) for epoch in history],
            },
        )
    student.load_state_dict(best["student"])
    return Trained(student.eval().requires_grad_(False), history, best["epoch"])


def _time_left(started: float, done: int, left: int) -> str:
    seconds = (time.monotonic() - started) / done * left
    end = datetime.now() + timedelta(seconds=seconds)
    return f"about {seconds / 60:.0f} min left, until {end:%H:%M}" if left else "done"


def _train_epoch(
    method: Method,
    student: nn.Module,
    optimiser: torch.optim.Optimizer,
    images: TrainingSet,
    recipe: Recipe,
    number: int,
) -> float:
    student.train()
    # the order depends on seed and epoch alone, so a continued run takes the same steps
    random = np.random.default_rng((recipe.seed, number))
    order = random.permutation(len(images))
    if images.ways > 1:
        order += len(images) * random.integers(images.ways, size=len(order))
    total = 0.0
    for start in range(0, len(order), recipe.batch):
        indices = order[start : start + recipe.batch]
        targets = images.targets(indices)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=recipe.bfloat16):
            features = method.answer(student, images.input(indices), targets)
        loss = method.loss(targets, [feature.float() for feature in features])
        rate = recipe.rate((number + start / len(order)) / recipe.epochs)
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss.item()} in step {start // recipe.batch + 1} of epoch {number + 1} at learning "
                f"rate {rate:.4g}: {recipe.remedy}"
            )
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        total += loss.item() * len(indices)
    return total / len(order)


@torch.inference_mode()
def _validate(method: Method, student: nn.Module, images: TrainingSet, recipe: Recipe) -> float:
    student.eval()
    values, size = [], (images.preprocess.height, images.preprocess.width)
    for start in range(0, len(images), recipe.batch):
        indices = np.arange(start, min(start + recipe.batch, len(images)))
        targets = images.targets(indices)
        answer = method.answer(student, images.input(indices), targets)
        values.append(method.validation(targets, answer, size))
    return float(torch.cat(values).mean())


def _save(path: Path, state: dict[str, Any]) -> None:
    # through memory, because torch reports a full disk as an internal error
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_file(path, buffer.getvalue())
