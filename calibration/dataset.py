"""A folder of photos: the MVTec AD layout, or just images of good parts."""

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from stpm.edge.errors import InputError, RegionError
from stpm.edge.images import list_images, read_image
from stpm.edge.preprocess import Image, Preprocess

MINIMUM_NORMALS = 10
MAXIMUM_UNREADABLE = 0.05


@dataclass(frozen=True)
class LabelledImage:
    path: Path
    kind: str  # "good", or the name of the defect
    mask: Path | None  # where the defect is; None for good parts and where no mask was drawn

    @property
    def defective(self) -> bool:
        return self.kind != "good"


@dataclass(frozen=True)
class Dataset:
    """`normals` are for training; `labelled` (may be empty) only ever for evaluation."""

    category: str
    normals: list[Path]
    labelled: list[LabelledImage]


@dataclass(frozen=True)
class Images:
    """Decoded images, resized for the network: uint8 N×height×width×3 BGR, in the order of `paths`."""

    paths: list[Path]
    pixels: Image
    unreadable: list[Path]


def find_dataset(root: Path, category: str) -> Dataset:
    """`root/category/train/good` with `test/*` and `ground_truth/*`, or a plain folder `root/category` or `root`."""
    if not root.is_dir():
        raise InputError(f"wanted a folder of images for --data, found no folder {root}: check the path")
    folder = root / category
    if (folder / "train" / "good").is_dir():
        return Dataset(category, list_images(folder / "train" / "good"), find_labelled(folder))
    for plain in (folder, root):
        if plain.is_dir() and list_images(plain):
            return Dataset(category, list_images(plain), [])
    raise InputError(
        f"wanted images of good parts in {folder / 'train' / 'good'} (MVTec layout), {folder} or {root}, found none: "
        "put them in one of these folders"
    )


def find_labelled(folder: Path) -> list[LabelledImage]:
    """`folder/test/KIND/*` with masks `folder/ground_truth/KIND/*_mask.png`; KIND "good" means no defect."""
    test = folder / "test"
    if not test.is_dir():
        return []
    return [
        LabelledImage(path, kind.name, None if kind.name == "good" else _mask_of(folder, path))
        for kind in sorted(test.iterdir())
        if kind.is_dir()
        for path in list_images(kind)
    ]


def _mask_of(folder: Path, path: Path) -> Path | None:
    masks = folder / "ground_truth" / path.parent.name
    candidates = [masks / f"{path.stem}_mask.png", masks / f"{path.stem}.png"]
    return next((mask for mask in candidates if mask.is_file()), None)


def load_images(paths: list[Path], preprocess: Preprocess, title: str) -> Images:
    """Decode and resize. Unreadable files are named in the result; more than 5 % of them is an InputError."""
    kept: list[Path] = []
    pixels: list[Image] = []
    unreadable: list[Path] = []
    for path in tqdm(paths, desc=title, unit="image", disable=None, leave=False):
        try:
            pixels.append(preprocess.resize(read_image(path)))
            kept.append(path)
        except RegionError as error:
            raise RegionError(f"{path}: {error}") from error
        except InputError as error:
            unreadable.append(path)
            tqdm.write(f"skipped: {error}")
    if len(unreadable) > MAXIMUM_UNREADABLE * len(paths):
        raise InputError(
            f"{len(unreadable)} of {len(paths)} images cannot be decoded, more than {MAXIMUM_UNREADABLE:.0%}: "
            f"repair or remove them (the first is {unreadable[0]})"
        )
    shape = (0, preprocess.height, preprocess.width, 3)
    return Images(kept, np.stack(pixels) if pixels else np.zeros(shape, np.uint8), unreadable)


def load_normals(dataset: Dataset, preprocess: Preprocess) -> Images:
    """The normal images of a data set. Fewer than 10 readable ones is an InputError."""
    images = load_images(dataset.normals, preprocess, "reading good parts")
    if len(images.paths) < MINIMUM_NORMALS:
        where = dataset.normals[0].parent if dataset.normals else f"the training folder of {dataset.category}"
        raise InputError(
            f"wanted at least {MINIMUM_NORMALS} images of good parts, found {len(images.paths)} in {where}: add more"
        )
    return images


def load_mask(item: LabelledImage, preprocess: Preprocess) -> np.ndarray | None:
    """bool height×width, True on the defect; all False for a good part, None for a defect without a mask.

    The mask takes the path of the image: ROI, then area resize. A pixel counts as defect when at least half of it
    is covered; a defect too small for that keeps every pixel it touches.
    """
    if not item.defective:
        return np.zeros((preprocess.height, preprocess.width), bool)
    if item.mask is None:
        return None
    image, mask = read_image(item.path), read_image(item.mask)
    if mask.shape[:2] != image.shape[:2]:
        raise InputError(
            f"wanted a mask of {image.shape[1]}×{image.shape[0]} pixels like its image {item.path}, found "
            f"{mask.shape[1]}×{mask.shape[0]} in {item.mask}: export the mask at the image's size"
        )
    covered = preprocess.resize(
        np.where(cv2.inRange(mask, (128,) * 3, (255,) * 3)[:, :, None] > 0, 255, 0).astype(np.uint8)
    )[:, :, 0]
    return covered >= 128 if (covered >= 128).any() else covered > 0
