"""stpm-tune: a new threshold for a bundle, on the edge box, from photos of good parts that its camera has taken."""

import argparse
import fcntl
import getpass
import os
import sys
from datetime import datetime, timezone
from pathlib import Path

import msgspec
import numpy as np

from stpm.calibration.dataset import MINIMUM_NORMALS, Images, images_hash, load_images
from stpm.calibration.evaluation import infer_all
from stpm.calibration.thresholds import described, fit, outliers, threshold_rule, warning
from stpm.edge.bundle import MANIFEST, Bundle, file_hash, find_bundle, open_bundle
from stpm.edge.cli import share
from stpm.edge.command import parser, run_command, say, warn
from stpm.edge.engine import BACKENDS, open_engine
from stpm.edge.errors import BundleError, InputError
from stpm.edge.images import list_images
from stpm.edge.manifest import Manifest, Threshold, ThresholdChange, encode
from stpm.edge.score import Array
from stpm.edge.selftest import self_test
from stpm.edge.storage import write_file

EXAMPLES = """\
  stpm-tune --bundle bundles/screw-int8 --images good-parts --reason "new lamp"
  stpm-tune --images good-parts --false-reject-rate 0.002 --dry-run
  stpm-tune --threshold 9.5e-4 --reason "asked for by quality"
"""


def main(arguments: list[str] | None = None) -> int:
    options = parser(
        "stpm-tune", "Find the threshold of a bundle again from photos of good parts, and record the change.", EXAMPLES
    )
    add = options.add_argument
    add("--bundle", type=Path, metavar="DIR", help="default: the only bundle in ./bundles")
    add("--images", type=Path, metavar="DIR", help="photos of good parts that the student was not trained on")
    add(
        "--threshold",
        type=threshold_rule,
        default="tail",
        metavar="tail|quantile|SCORE",
        help="by a fit of the tail of the scores, by their order alone, or by hand (default: tail)",
    )
    add(
        "--false-reject-rate",
        type=share,
        default=0.01,
        metavar="R",
        help="share of good parts that the threshold may reject (default: 0.01)",
    )
    add("--reason", default="", metavar="TEXT", help="kept in the record of the change")
    add("--by", default=None, metavar="NAME", help="who changes it (default: the user's name on this machine)")
    add("--backend", choices=("auto", *BACKENDS), default="auto")
    add("--dry-run", action="store_true", help="show the new threshold and change nothing")
    chosen = options.parse_args(arguments)
    if chosen.images is None and not isinstance(chosen.threshold, float):
        options.error("wanted --images DIR with photos of good parts, or --threshold SCORE to set it by hand")
    return run_command("stpm-tune", lambda: _run(chosen), "the threshold was not changed")


def _run(options: argparse.Namespace) -> None:
    bundle = open_bundle(options.bundle or find_bundle())
    by = options.by or _user()
    before, scores, digest = bundle.manifest.threshold, np.zeros(0, np.float32), None
    if options.images is not None:
        images = _load(options.images, bundle.manifest)
        digest = images_hash(_new_photos(images, bundle.manifest), bundle.manifest.preprocess)
        scores = _scores(bundle, options.backend, images)
        _warn_of_outliers(images, scores)
    after = fit(scores, options.threshold, options.false_reject_rate)
    _show(bundle, before, after, scores)
    too_few = warning(after, options.false_reject_rate)
    if too_few is not None:
        warn(too_few)
    _warn_of_golden(bundle, after.value)
    if options.dry_run:
        say("nothing was changed (--dry-run)")
        return
    change = ThresholdChange(
        datetime.now(timezone.utc).isoformat(timespec="seconds"),
        by,
        before,
        after,
        digest,
        options.reason,
    )
    _write(bundle, change)
    say(f"recorded in {bundle.path / MANIFEST}; stpm-run judges with it from its next start or `stpm-ctl reload`")


def _warn_of_golden(bundle: Bundle, threshold: float) -> None:
    """The frames of the self test are a good part and the same with a scratch, as they scored when it was built."""
    good, scratched = float(bundle.golden().scores.min()), float(bundle.golden().scores.max())
    if threshold >= scratched:
        warn(f"at {threshold:.3e} even the scratched part of the self test passes, which scores {scratched:.3e}")
    elif threshold < good:
        warn(f"at {threshold:.3e} even the good part of the self test is rejected, which scores {good:.3e}")


def _load(folder: Path, manifest: Manifest) -> Images:
    paths = list_images(folder)
    images = load_images(paths, manifest.preprocess, "reading good parts")
    if len(images.paths) < MINIMUM_NORMALS:
        raise InputError(
            f"wanted at least {MINIMUM_NORMALS} photos of good parts, found {len(images.paths)} in {folder}: add more"
        )
    if images.photo_size != manifest.training.photo_size:
        (width, height), (wanted_width, wanted_height) = images.photo_size, manifest.training.photo_size
        raise InputError(
            f"wanted photos of {wanted_width}×{wanted_height} pixels like those that the bundle was trained on, found "
            f"{width}×{height} in {folder}: set the camera to that size, or build the bundle again with such photos"
        )
    return images


def _new_photos(images: Images, manifest: Manifest) -> list[str]:
    """Their sha256; an InputError when the student was trained on some of them."""
    hashes = [file_hash(path) for path in images.paths]
    known = set(manifest.training.photos)
    old = [path for path, digest in zip(images.paths, hashes, strict=True) if digest[:16] in known]
    if old:
        raise InputError(
            f"wanted photos of good parts that were taken after the training, found {len(old)} of {len(hashes)} that "
            f"this bundle was trained on (the first is {old[0]}): they score lower than new ones, so remove them"
        )
    return hashes


def _scores(bundle: Bundle, backend: str, images: Images) -> Array:
    with open_engine(bundle, backend) as engine:
        if engine.describe()["backend"] == "fake":
            raise InputError("wanted an engine that inspects parts, found --backend fake: its scores are scripted")
        self_test(bundle, engine)
        return infer_all(engine, images.pixels, bundle.manifest.preprocess, "scoring")[1]


def _warn_of_outliers(images: Images, scores: Array) -> None:
    middle = np.median(scores)
    for index in outliers(scores):
        warn(
            f"{images.paths[index]} scores {scores[index]:.3e}, far above the others (median {middle:.3e}): look at "
            "it, and remove it if it shows a defect"
        )


def _show(bundle: Bundle, before: Threshold, after: Threshold, scores: Array) -> None:
    say(f"{bundle.path}: {bundle.manifest.category} {bundle.manifest.precision}")
    if len(scores):
        low, middle, high = np.quantile(scores, (0, 0.5, 1))
        say(f"  photos  {len(scores)}, scores {low:.3e} to {high:.3e}, median {middle:.3e}")
    for name, threshold in (("before", before), ("after", after)):
        above = f"; {np.count_nonzero(scores > threshold.value)} of these photos above it" if len(scores) else ""
        say(f"  {name:<7} {described(threshold)}{above}")


def _write(bundle: Bundle, change: ThresholdChange) -> None:
    """Replace the manifest at once. The engine does not change, so neither do the hashes of its files."""
    manifest = msgspec.structs.replace(
        bundle.manifest,
        threshold=change.after,
        threshold_changes=[*bundle.manifest.threshold_changes, change],
    )
    folder = os.open(bundle.path, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # two changes at once: the second shall see the first
        if open_bundle(bundle.path).sha256 != bundle.sha256:
            raise BundleError(f"{bundle.path} was changed by someone else meanwhile: run the command again")
        write_file(bundle.path / MANIFEST, encode(manifest))
    finally:
        os.close(folder)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container often runs under a number without a name
        return f"user {os.getuid()}"


if __name__ == "__main__":
    sys.exit(main())
