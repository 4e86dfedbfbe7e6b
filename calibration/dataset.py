"""A folder of photos: the MVTec AD layout, or just images of good parts."""

import hashlib
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import msgspec
import numpy as np
from tqdm import tqdm

from stpm.edge.command import printable, warn
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
class Labelled:
    """Decoded labelled images, in the order of `items`: pixels uint8 N×height×width×3 BGR, masks bool N×height×width.

    `masked` says of which images the mask is known; the others have an empty one.
    """

    items: list[LabelledImage]
    pixels: Image
    masks: np.ndarray
    masked: np.ndarray

    @property
    def defective(self) -> np.ndarray:
        return np.array([item.defective for item in self.items], bool)


@dataclass(frozen=True)
class Images:
    """Decoded images, resized for the network: uint8 N×height×width×3 BGR, in the order of `paths`."""

    paths: list[Path]
    pixels: Image
    unreadable: list[Path]
    photo_size: tuple[int, int]  # width and height of the photos before resizing

    def subset(self, indices: np.ndarray) -> "Images":
        return replace(self, paths=[self.paths[index] for index in indices], pixels=self.pixels[indices])


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


def categories(root: Path) -> list[str]:
    """The names of those in MVTec layout in a folder."""
    return [folder.name for folder in sorted(root.iterdir()) if (folder / "train" / "good").is_dir()]


def other_categories(root: Path, category: str) -> list[Dataset]:
    """The categories in MVTec layout beside this one that have enough good parts to train on."""
    names = [name for name in categories(root) if name != category]
    found = [Dataset(name, list_images(root / name / "train" / "good"), []) for name in names]
    return [each for each in found if len(each.normals) >= MINIMUM_NORMALS]


def find_labelled(folder: Path) -> list[LabelledImage]:
    """`folder/test/KIND/*` with masks `folder/ground_truth/KIND/*_mask.png`; KIND "good" means no defect."""
    test = folder / "test"
    if not test.is_dir():
        return []
    return [
        LabelledImage(path, printable(kind.name), None if kind.name == "good" else _mask_of(folder, path))
        for kind in sorted(test.iterdir())
        if kind.is_dir()
        for path in list_images(kind)
    ]


def _mask_of(folder: Path, path: Path) -> Path | None:
    masks = folder / "ground_truth" / path.parent.name
    candidates = [masks / f"{path.stem}_mask.png", masks / f"{path.stem}.png"]
    return next((mask for mask in candidates if mask.is_file()), None)


def load_images(paths: list[Path], preprocess: Preprocess, title: str) -> Images:
    """Decode and resize. Unreadable files are named in the result; more than 5 % of them is an InputError.

    Photos of another size than most are used, with a warning that names the first.
    """
    kept: list[Path] = []
    sizes: list[tuple[int, int]] = []
    pixels: list[Image] = []
    unreadable: list[Path] = []
    for path in tqdm(paths, desc=title, unit="image", disable=None, leave=False):
        try:
            image = read_image(path)
            pixels.append(preprocess.resize(image))
            kept.append(path)
            sizes.append((image.shape[1], image.shape[0]))
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
    if not kept:
        return Images([], np.zeros((0, preprocess.height, preprocess.width, 3), np.uint8), unreadable, (0, 0))
    usual, _ = Counter(sizes).most_common(1)[0]
    odd = [path for path, size in zip(kept, sizes, strict=True) if size != usual]
    if odd:
        tqdm.write(
            f"WARNING: {len(odd)} of {len(kept)} photos are not {usual[0]}×{usual[1]} pixels like the others (the "
            f"first is {odd[0]}): take them all with the same camera and settings"
        )
    return Images(kept, np.stack(pixels), unreadable, usual)


def images_hash(photos_sha256: list[str], preprocess: Preprocess) -> str:
    """sha256 over the preprocessing and the hashes of the files, in this order."""
    return hashlib.sha256(msgspec.json.encode(preprocess) + "".join(photos_sha256).encode()).hexdigest()


def load_normals(dataset: Dataset, preprocess: Preprocess) -> Images:
    """The normal images of a data set. Fewer than 10 readable ones is an InputError."""
    images = load_images(dataset.normals, preprocess, "reading good parts")
    if len(images.paths) < MINIMUM_NORMALS:
        where = dataset.normals[0].parent if dataset.normals else f"the training folder of {dataset.category}"
        raise InputError(
            f"wanted at least {MINIMUM_NORMALS} images of good parts, found {len(images.paths)} in {where}: add more"
        )
    return images


def load_labelled(labelled: list[LabelledImage], preprocess: Preprocess) -> Labelled:
    """Images and masks; an image that cannot be decoded is left out, as in `load_images`. Where only some defects
    have a mask, that is said."""
    images = load_images([item.path for item in labelled], preprocess, "reading test images")
    kept = set(images.paths)
    items = [item for item in labelled if item.path in kept]
    masks = [load_mask(item, preprocess) for item in items]
    without = [item for item, mask in zip(items, masks, strict=True) if mask is None]
    defective = sum(item.defective for item in items)
    if 0 < len(without) < defective:
        warn(
            f"{len(without)} of {defective} images of defects have no mask (the first is {without[0].path}): pixel "
            "AUROC and AUPRO are without these"
        )
    empty = np.zeros((preprocess.height, preprocess.width), bool)
    return Labelled(
        items,
        images.pixels,
        np.stack([empty if mask is None else mask for mask in masks]),
        np.array([mask is not None for mask in masks], bool),
    )


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
