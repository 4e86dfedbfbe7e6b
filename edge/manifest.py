"""What a bundle says of itself: manifest.json, schema 4. Read strictly: an unknown or missing field is an error."""

import hashlib
from typing import Annotated, Literal

import msgspec

from stpm.edge.errors import BundleError
from stpm.edge.preprocess import Preprocess

SCHEMA = 4

Precision = Literal["fp32", "fp16", "int8"]
Quantize = Literal["ptq", "qad"]


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a TensorRT plan was compiled with and for; it runs nowhere else."""

    kernels: str  # the file with the compiled kernels of edge/kernels
    tensorrt: str
    sm: str  # compute capability, as "8.7"
    driver: str  # the CUDA version that the driver supported, as "12.6"
    tactic_sources: list[str]
    batches: list[int]  # numbers of images, one optimisation profile for each
    scales: dict[str, float]  # of the outputs that are int8: a stored value times this is the feature
    hardware_compatible: bool  # runs on later GPUs too, from Ampere on
    version_compatible: bool  # runs with later TensorRT versions too
    dla_core: int | None  # of a Jetson; None: the GPU alone
    settings: dict[str, bool | int | str]  # the other settings of the compiler, for the record


class EngineFiles(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The compiled files of one backend and the device they were compiled for: "CPU", or the name of a GPU."""

    main: str
    device: str
    plan: Plan | None = None  # of TensorRT

    @property
    def names(self) -> set[str]:
        return {self.main} | ({self.plan.kernels} if self.plan else set())


class Weights(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    source: str
    sha256: str  # over the tensors, not the file, before folding and fine-tuning: see build/pyramid.py


class Training(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    normals: int
    held_out: int
    photo_size: tuple[int, int]  # width and height of the photos in pixels
    unreadable: list[str]
    photos: list[str]  # the first 16 digits of the sha256 of every photo, trained on or held out
    settings: dict[str, str | int | float | bool]
    best_epoch: int | None  # None when the student was given


class Setting(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One way to make the int8 graph: post-training quantisation, or quantisation-aware distillation as well."""

    quantize: Quantize
    observer: str
    fp16_layers: list[str] = []  # convolutions that stay FP16


class Calibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    setting: Setting
    images: int
    images_sha256: str  # over their preprocessed pixels
    ranges_sha256: str
    fine_tuning: dict[str, str | int | float | bool] | None  # of the student, with quantize "qad"; and its best epoch


class Threshold(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part whose score is above `value` fails."""

    value: Annotated[float, msgspec.Meta(gt=0)]
    rule: str
    false_reject_rate: float | None  # what the rule expects on parts like the normals
    normals: int  # that it rests on
    interval: tuple[float, float] | None  # of the false-reject rate, with 95 % confidence; None: by hand


class ThresholdChange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    at: str  # UTC, ISO 8601
    by: str
    before: Threshold
    after: Threshold
    images_sha256: str | None  # over the photos it was found with; None: by hand
    reason: str


class Accuracy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Measured through a compiled engine. None: not defined on the images that were given."""

    images: int
    image_auroc: float | None
    pixel_auroc: float | None
    aupro: float | None  # per-region overlap, integrated to a false-positive rate of 30 % and divided by it


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How much of each figure the int8 engine may lose."""

    image_auroc: float = 0.005
    pixel_auroc: float = 0.003
    aupro: float = 0.01


class Attempt(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One int8 engine beside the FP32 engine, both compiled, on the same images."""

    setting: Setting
    accuracy: Accuracy
    map_correlation: float  # of the two anomaly maps of a held-out normal, mean
    score_correlation: float  # over all held-out normals
    score_ratio: float  # int8 score / FP32 score of a held-out normal, median
    false_rejects: float  # share of the held-out normals above a threshold from the other half of them
    false_rejects_at_fp32: float  # share of them above the threshold of the FP32 engine
    passed: bool


class Gate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the int8 engine in this bundle had to pass. The last attempt is the one in the bundle."""

    limits: Limits
    images: Literal["labelled", "drawn"]  # drawn: scratches on held-out normals, where no defects are labelled
    fp32: Accuracy
    fp32_false_rejects: float
    attempts: list[Attempt]


class Golden(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file with the golden frames; an engine may differ from their scores by this share, and the same share of
    the map's maximum at any pixel."""

    file: str
    tolerance: float


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    schema: int
    category: str
    method: str
    method_settings: dict[str, str | int | float | list[str]]  # backbone, taps, and what else the method knows
    precision: Precision
    preprocess: Preprocess
    created: str
    graph: str
    engines: dict[str, EngineFiles]
    golden: Golden
    teacher: Weights
    student: Weights
    training: Training
    calibration: Calibration | None
    threshold: Threshold
    threshold_changes: list[ThresholdChange]
    accuracy: Accuracy | None  # on the labelled images
    gate: Gate | None  # of an int8 engine
    versions: dict[str, str]
    files: dict[str, str]  # name → sha256 of every other file in the folder
    sha256: str = ""  # of this manifest, encoded with this field empty


class _SchemaOnly(msgspec.Struct):
    schema: int


def encode(manifest: Manifest) -> bytes:
    """The text of manifest.json, sealed with its own hash."""
    sealed = msgspec.structs.replace(manifest, sha256=_seal(manifest))
    return msgspec.json.format(msgspec.json.encode(sealed), indent=2) + b"\n"


def _seal(manifest: Manifest) -> str:
    return hashlib.sha256(msgspec.json.encode(msgspec.structs.replace(manifest, sha256=""))).hexdigest()


def decode(content: bytes, source: str) -> Manifest:
    """The manifest in `content`; BundleError when it is not one of this schema. `source` names it in messages."""
    try:
        schema = msgspec.json.decode(content, type=_SchemaOnly).schema
        if schema != SCHEMA:
            raise BundleError(
                f"{source} has schema {schema} and this version reads schema {SCHEMA}: "
                "build the bundle again with `stpm-build`, or install the version that made it"
            )
        manifest = msgspec.json.decode(content, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BundleError(f"{source} is damaged ({error}): copy the bundle again or build it again") from error
    if manifest.sha256 != _seal(manifest):
        raise BundleError(f"{source} is damaged (its sha256 does not fit): copy the bundle again or build it again")
    named = {manifest.graph, manifest.golden.file}.union(*(engine.names for engine in manifest.engines.values()))
    if not named <= set(manifest.files):
        raise BundleError(f"{source} names files that it has no sha256 of ({', '.join(named - set(manifest.files))})")
    return manifest
