"""Make the built-in teacher: a ResNet-18 (to layer3) trained on pictures that drawn.py draws. No photo is used.

The task: two views of a picture, turned, moved, lit, coloured, blurred and grained a little differently, show the same
places; what each tap has at a place in one view must tell it from all other places of all pictures in the other view.
So the features keep what a place looks like and drop what a camera adds to it, and no two kinds of place get the same:
what a teacher of good parts is for. (The loss is InfoNCE of van den Oord et al. 2018, for places as in the dense
contrastive learning of Wang et al. 2021.)

    python -m stpm.tools.make_teacher --device cpu --out build/builtin_teacher.npz

The result depends on the options, the torch version and what it is computed on; the file in the repository was made
with the defaults and `--device cpu`.
"""

import sys
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from stpm.build.device import DEVICES, device_of, keep_freed_memory, on
from stpm.build.pyramid import TAPS, Pyramid, channels_last, channels_of, weights_hash
from stpm.build.weights import write_weights
from stpm.edge.cli import count
from stpm.edge.command import parser, run_command
from stpm.edge.errors import TrainingError
from stpm.edge.preprocess import Preprocess
from stpm.edge.storage import storage_errors
from stpm.tools.drawn import Dice, draw

DRAWN, SEEN = 160, 96  # pixels on each side of a picture, and of a view of it
DRAWN_AT_ONCE = 128
PLACES = 16  # compared in each picture
TEMPERATURE = 0.1

EXAMPLES = """\
  python -m stpm.tools.make_teacher --device cpu --out build/builtin_teacher.npz
  python -m stpm.tools.make_teacher --pictures 60000 --steps 6000 --batch 256 --out large.npz"""

Tensor = torch.Tensor


@dataclass(frozen=True)
class View:
    pixels: Tensor  # float32 N×3×SEEN×SEEN, normalised
    places: Tensor  # N×PLACES×2: where the common places are in it, from -1 to 1


def drawn(count: int, seed: int, device: torch.device) -> Tensor:
    """uint8 count×3×DRAWN×DRAWN."""
    pool = torch.empty(count, 3, DRAWN, DRAWN, dtype=torch.uint8, device=device)
    for start in tqdm(range(0, count, DRAWN_AT_ONCE), desc="drawing", mininterval=5):
        size = min(DRAWN_AT_ONCE, count - start)
        pool[start : start + size] = draw(seed * 1_000_003 + start, size, DRAWN, device)
    return pool


def two_views(pictures: Tensor, dice: Dice) -> tuple[View, View]:
    """uint8 N×3×DRAWN×DRAWN → the same part of each seen twice."""
    x = pictures.float() / 255
    turn, shift = dice.uniform(0, 2 * torch.pi), dice.uniform(-0.35, 0.35, 2)
    mirror = torch.where(dice.happens(0.5), -1.0, 1.0)
    scale = SEEN / DRAWN * 2 ** dice.uniform(-1, 0.25)
    places = dice.uniform(-0.6, 0.6, PLACES, 2)
    common = places @ _matrix(turn, scale, mirror).mT + shift[:, None]

    def view() -> View:
        matrix = _matrix(turn + dice.uniform(-0.17, 0.17), scale * torch.exp(dice.uniform(-0.15, 0.15)), mirror)
        moved = shift + scale[:, None] * dice.uniform(-0.25, 0.25, 2)
        grid = F.affine_grid(torch.cat([matrix, moved[:, :, None]], 2), [len(x), 3, SEEN, SEEN], align_corners=False)
        seen = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
        return View(photographed(seen, dice), (common - moved[:, None]) @ torch.linalg.inv(matrix).mT)

    return view(), view()


def _matrix(turn: Tensor, scale: Tensor, mirror: Tensor) -> Tensor:
    cos, sin = turn.cos() * scale, turn.sin() * scale
    return torch.stack([torch.stack([cos * mirror, -sin], 1), torch.stack([sin * mirror, cos], 1)], 1)


def photographed(x: Tensor, dice: Dice) -> Tensor:
    """float32 N×3×H×W from 0 to 1 → as a network sees it: sharpened or blurred, lit, coloured and grained."""
    soft = F.avg_pool2d(F.avg_pool2d(F.pad(x, (2, 2, 2, 2), "reflect"), 3, 1), 3, 1)
    x = x + (soft - x) * dice.uniform(-0.4, 1, 1, 1, 1)
    x = x.clip(1e-3, 1) ** (2 ** dice.uniform(-0.7, 0.7, 1, 1, 1))
    ramp = torch.linspace(-1, 1, x.shape[-1], device=x.device)
    light = 1 + dice.uniform(-0.3, 0.3, 1, 1, 1) * ramp + dice.uniform(-0.3, 0.3, 1, 1, 1) * ramp[:, None]
    x = x * light * dice.uniform(0.6, 1.3, 1, 1, 1) * dice.uniform(0.7, 1.3, 3, 1, 1) + dice.uniform(
        -0.1, 0.1, 1, 1, 1
    )
    # colour must not give a picture away, or nothing but colour is learnt
    other = x.gather(1, dice.uniform(0, 1, 3).argsort(1)[:, :, None, None].expand_as(x))
    x = torch.where(dice.happens(0.3, 1, 1, 1), other, x)
    x = torch.where(dice.happens(0.4, 1, 1, 1), x.mean(1, keepdim=True).expand_as(x), x)
    x = (x + dice.uniform(0, 0.03, 1, 1, 1) * dice.normal(*x.shape[1:])).clip(0, 1)
    spec = Preprocess(SEEN, SEEN)
    mean, std = (torch.tensor(each, device=x.device)[:, None, None] for each in (spec.mean, spec.std))
    return (x - mean) / std


class Descriptors(nn.Module):
    """The pyramid, and for each tap a small network that turns what it has at a place into a unit vector."""

    def __init__(self) -> None:
        super().__init__()
        self.pyramid = Pyramid()
        channels_last(self.pyramid)  # in place
        widths = channels_of("resnet18")
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(widths[tap], 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 128))
            for tap in TAPS
        )

    def forward(self, x: Tensor, places: Tensor) -> list[Tensor]:
        """Places N×P×2 → for each tap (N·P)×128."""
        found = []
        for feature, head in zip(self.pyramid(x), self.heads, strict=True):
            there = F.grid_sample(feature.float(), places[:, None], align_corners=False)[:, :, 0]
            found.append(F.normalize(head(there.transpose(1, 2).flatten(0, 1)).float()))
        return found


def train(pool: Tensor, steps: int, batch: int, seed: int) -> tuple[Pyramid, list[float]]:
    """The trained pyramid, and for each tap the share of places that were found among those of a whole batch."""
    torch.manual_seed(seed)
    device = pool.device
    dice = Dice(seed, batch, device)
    model = Descriptors().to(device)
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=0.02)
    # of 10 steps, a tenth of which rise, it divides by zero
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, max(steps, 11), pct_start=0.1)
    same = torch.arange(batch * PLACES, device=device)
    found = torch.zeros(len(TAPS), device=device)
    progress = tqdm(range(steps), desc="training", unit="step", mininterval=5)
    for step in progress:
        first, second = two_views(pool[torch.randint(len(pool), (batch,), device=device, generator=dice.stream)], dice)
        pixels = torch.cat([first.pixels, second.pixels]).to(memory_format=torch.channels_last)
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            descriptors = model(pixels, torch.cat([first.places, second.places]))
        losses, right = [], []
        for both in descriptors:
            a, b = both.chunk(2)
            alike = a @ b.T / TEMPERATURE
            losses.append((F.cross_entropy(alike, same) + F.cross_entropy(alike.T, same)) / 2)
            right.append((alike.argmax(1) == same).float().mean())
        loss = torch.stack(losses).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        found = found + (torch.stack(right) - found) / min(step + 1, 100)
        if step % 50 == 0:
            if not loss.isfinite():
                raise TrainingError(
                    f"the loss is {loss.item()} in step {step + 1} at learning rate {schedule.get_last_lr()[0]:.4g}: "
                    "take another --seed or a larger --batch"
                )
            progress.set_postfix_str(f"loss {loss.item():.3f}, found {' '.join(f'{float(f):.1%}' for f in found)}")
    return model.pyramid.eval().cpu(), found.tolist()


def main(arguments: list[str] | None = None) -> int:
    options = parser("make_teacher", "Make the built-in teacher from drawn pictures.", EXAMPLES)
    add = options.add_argument
    add("--pictures", type=count, default=6000, help="how many are drawn (default: 6000)")
    add("--steps", type=count, default=1300, help="of training (default: 1300)")
    add("--batch", type=count, default=64, help="pictures in a step (default: 64)")
    add("--seed", type=int, default=0, help="default: 0")
    add("--device", choices=DEVICES, default="auto", help="to train on (default: a GPU if torch finds one)")
    add("--out", type=Path, required=True, metavar="FILE", help="the weights, .npz")
    chosen = options.parse_args(arguments)
    return run_command("make_teacher", lambda: _make(chosen), "nothing was written")


def _make(chosen: Namespace) -> None:
    with storage_errors(chosen.out):  # now, and not after the training
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
    device = torch.device(device_of(chosen.device))
    if device.type == "cpu":
        keep_freed_memory()
    start = time.monotonic()
    with on(device.type):
        pool = drawn(chosen.pictures, chosen.seed, device)
        ready = time.monotonic()
        pyramid, found = train(pool, chosen.steps, chosen.batch, chosen.seed)
    if not all(value.isfinite().all() for value in pyramid.state_dict().values()):
        raise TrainingError("a weight of the teacher is not finite: take another --seed or a larger --batch")
    write_weights(chosen.out, pyramid.state_dict(), np.float16)
    print(
        f"{chosen.out}: drawn in {ready - start:.0f} s, trained on {device.type} in {time.monotonic() - ready:.0f} s, "
        f"places found among {chosen.batch * PLACES} by layer {', '.join(f'{f:.1%}' for f in found)}, sha256 of the "
        f"tensors {weights_hash(pyramid.state_dict())[:16]}"
    )


if __name__ == "__main__":
    sys.exit(main())
