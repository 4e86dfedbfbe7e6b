"""An enhanced teacher: before a student is taught, the teacher learns to tell the user's own parts apart.

Zolfaghari & Sajedi (2022) go on training the ImageNet network on the good parts of all categories, with these as the
classes, for few epochs. Where there is but one category nothing is there to be told apart; then the task is whether a
patch of the image was pasted elsewhere in it (CutPaste, Li et al. 2021), which is ours and not the paper's.

Only good training parts are ever seen, and of the category in question not those that are held out.
"""

from typing import Protocol

import msgspec
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from stpm.build.pyramid import channels_last
from stpm.edge.errors import TrainingError
from stpm.edge.preprocess import Image, Preprocess

# of a pasted patch: its area as a share of the image, and its width over its height
AREA, ASPECT = (0.02, 0.15), (0.3, 3.3)


class Enhancement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The paper gives no rate; this one leaves what the network has learned before."""

    epochs: int
    seed: int
    batch: int = 32
    learning_rate: float = 1e-3
    momentum: float = 0.9


class Task(Protocol):
    classes: int

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray, random: np.random.Generator) -> tuple[list[Image], np.ndarray]:
        """These images, as the network shall see them, and the class of each."""


class WhichCategory:
    """`categories`: uint8 N×H×W×3 each."""

    def __init__(self, categories: list[Image]) -> None:
        self.classes = len(categories)
        self._images = [image for images in categories for image in images]
        self._labels = np.repeat(np.arange(self.classes), [len(images) for images in categories])

    def __len__(self) -> int:
        return len(self._images)

    def batch(self, indices: np.ndarray, random: np.random.Generator) -> tuple[list[Image], np.ndarray]:
        return [self._images[index] for index in indices], self._labels[indices]


class WhetherPasted:
    """`images`: uint8 N×H×W×3, half of which get a patch of themselves each time."""

    classes = 2

    def __init__(self, images: Image) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def batch(self, indices: np.ndarray, random: np.random.Generator) -> tuple[list[Image], np.ndarray]:
        labels = random.integers(2, size=len(indices))
        pairs = zip(indices, labels, strict=True)
        return [pasted(self._images[i], random) if label else self._images[i] for i, label in pairs], labels


def task(categories: list[Image]) -> Task:
    return WhichCategory(categories) if len(categories) > 1 else WhetherPasted(categories[0])


def pasted(image: Image, random: np.random.Generator) -> Image:
    """A copy of an H×W×3 image with one of its patches at another place too."""
    height, width = image.shape[:2]
    area = random.uniform(*AREA) * height * width
    aspect = np.exp(random.uniform(*np.log(ASPECT)))
    h = int(np.clip(np.sqrt(area / aspect), 1, height - 1))
    w = int(np.clip(np.sqrt(area * aspect), 1, width - 1))
    (y, to_y), (x, to_x) = random.integers(height - h + 1, size=2), random.integers(width - w + 1, size=2)
    result = image.copy()
    result[to_y : to_y + h, to_x : to_x + w] = image[y : y + h, x : x + w]
    return result


class Classifier(nn.Module):
    """float32 N×3×H×W → N×classes: a linear layer over the mean of the last features."""

    def __init__(self, pyramid: nn.Module, classes: int, channels: int) -> None:
        super().__init__()
        self.pyramid, self.linear = pyramid, nn.Linear(channels, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.linear(self.pyramid(x)[-1].mean((2, 3)))
        return logits


def enhance(teacher: nn.Module, images: Task, preprocess: Preprocess, recipe: Enhancement) -> list[float]:
    """Train `teacher`, in place, to tell the classes apart; the share it told rightly, by epoch.

    Its batch norms keep their statistics: with few images of one kind in a batch they would lose what makes the
    features comparable. Deterministic by seed. A loss or weight that is not finite: TrainingError.
    """
    torch.manual_seed(recipe.seed)
    device = next(teacher.parameters()).device
    with torch.inference_mode():
        channels = teacher(torch.zeros(1, 3, preprocess.height, preprocess.width, device=device))[-1].shape[1]
    classifier = channels_last(Classifier(teacher, images.classes, channels)).to(device).requires_grad_(True).eval()
    optimiser = torch.optim.SGD(classifier.parameters(), recipe.learning_rate, recipe.momentum)
    right = []
    progress = tqdm(range(recipe.epochs), desc="teacher", unit="epoch", disable=None, leave=False)
    for number in progress:
        random = np.random.default_rng((recipe.seed, number))
        order, hits = random.permutation(len(images)), 0
        for start in range(0, len(order), recipe.batch):
            batch, labels = images.batch(order[start : start + recipe.batch], random)
            pixels = torch.from_numpy(np.concatenate([preprocess.normalise(image) for image in batch]))
            logits = classifier(pixels.to(device, memory_format=torch.channels_last))
            loss = F.cross_entropy(logits, torch.from_numpy(labels).to(device))
            if not torch.isfinite(loss):
                step = start // recipe.batch + 1
                raise _diverged(
                    f"the loss of the teacher is {loss.item()} in step {step} of epoch {number + 1}", recipe
                )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            hits += int((logits.argmax(1).cpu().numpy() == labels).sum())
        if not all(parameter.isfinite().all() for parameter in classifier.parameters()):
            raise _diverged(f"a weight of the teacher is not finite after epoch {number + 1}", recipe)
        right.append(hits / len(order))
        progress.set_postfix_str(f"{right[-1]:.1%} right")
    teacher.requires_grad_(False)
    return right


def _diverged(what: str, recipe: Enhancement) -> TrainingError:
    return TrainingError(
        f"{what} at learning rate {recipe.learning_rate}: build with fewer --teacher-epochs, or another --teacher"
    )
