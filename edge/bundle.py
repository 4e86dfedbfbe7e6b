"""A bundle: the folder that the office builds and the line runs."""

import hashlib
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from stpm.edge import manifest as manifests
from stpm.edge.errors import BundleError
from stpm.edge.manifest import Manifest
from stpm.edge.preprocess import Image
from stpm.edge.score import Array

MANIFEST = "manifest.json"
SEARCHED = Path("bundles")


@dataclass(frozen=True)
class GoldenFrames:
    frames: Image  # uint8 N×H×W×3 BGR, as a camera gives them
    maps: Array  # float32 N×height×width
    scores: Array  # float32 N


@dataclass(frozen=True)
class Bundle:
    path: Path
    manifest: Manifest
    sha256: str  # of manifest.json, which holds the hashes of all other files

    def golden(self) -> GoldenFrames:
        """Read once: the folder may be replaced while an engine of it is running, and tested again."""
        return self._golden

    @cached_property
    def _golden(self) -> GoldenFrames:
        file = self.path / self.manifest.golden.file
        spec = self.manifest.preprocess
        try:
            with np.load(file, allow_pickle=False) as arrays:
                golden = GoldenFrames(arrays["frames"], arrays["maps"], arrays["scores"])
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise BundleError(f"{file} does not hold golden frames ({error}): build the bundle again") from error
        count = len(golden.frames)
        if not (count and golden.maps.shape == (count, spec.height, spec.width) and (golden.scores > 0).all()):
            raise BundleError(f"{file} does not hold golden frames with positive scores: build the bundle again")
        return golden


def open_bundle(path: Path) -> Bundle:
    """Read the manifest and check the sha256 of every file. Anything missing, added or changed is a BundleError."""
    file = path / MANIFEST
    if not file.is_file():
        raise BundleError(f"wanted a bundle, found no {file}: give the folder that `stpm-build` wrote")
    content = file.read_bytes()
    manifest = manifests.decode(content, str(file))
    present = {str(entry.relative_to(path)) for entry in path.rglob("*") if entry.is_file()} - {MANIFEST}
    # a new manifest on its way, or what a power cut left of it
    present = {name for name in present if not name.startswith(f".{MANIFEST}.partial-")}
    expected = set(manifest.files)
    if present != expected:
        difference = ", ".join(sorted(present ^ expected))
        raise BundleError(f"the files of {path} are not those of its manifest ({difference}): copy the bundle again")
    for name, wanted in sorted(manifest.files.items()):
        found = file_hash(path / name)
        if found != wanted:
            raise BundleError(
                f"{path / name} is damaged (sha256 {found[:12]}… instead of {wanted[:12]}…): copy the bundle again"
            )
    return Bundle(path, manifest, hashlib.sha256(content).hexdigest())


def find_bundle(root: Path = SEARCHED) -> Path:
    """The one bundle in `root`; BundleError when there is none, or several, which are then listed."""
    found = sorted(file.parent for file in root.glob(f"[!.]*/{MANIFEST}"))
    if not found:
        raise BundleError(
            f"wanted a bundle, found none in {root.resolve()}: make one with `stpm-build`, or give --bundle DIR"
        )
    if len(found) > 1:
        names = ", ".join(str(path) for path in found)
        raise BundleError(f"found {len(found)} bundles ({names}): choose one with --bundle DIR")
    return found[0]


def file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
