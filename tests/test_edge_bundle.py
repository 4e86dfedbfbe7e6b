"""Contract 4: a damaged bundle is never opened."""

import hashlib
import re
import shutil

import msgspec
import pytest

from stpm.edge import manifest as manifests
from stpm.edge.bundle import MANIFEST, find_bundle, open_bundle
from stpm.edge.errors import BundleError


@pytest.fixture
def copy(bundle, tmp_path):
    return shutil.copytree(bundle.path, tmp_path / "copy")


def test_a_good_copy_opens_with_the_same_hash(bundle, copy):
    assert open_bundle(copy).sha256 == bundle.sha256


@pytest.mark.parametrize("name", ["int8.onnx", "openvino.xml", "openvino.bin", "golden.npz"])
def test_one_flipped_bit_in_any_file_is_noticed_and_named(copy, name):
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(BundleError, match=name.replace(".", r"\.")):
        open_bundle(copy)


def test_every_file_but_the_manifest_is_covered_by_a_hash(copy):
    assert {file.name for file in copy.iterdir()} - {MANIFEST} == set(open_bundle(copy).manifest.files)


def test_missing_and_added_files_are_noticed(copy):
    (copy / "extra").write_text("x")
    with pytest.raises(BundleError, match="extra"):
        open_bundle(copy)
    (copy / "extra").unlink()
    (copy / "openvino.bin").unlink()
    with pytest.raises(BundleError, match=r"openvino\.bin"):
        open_bundle(copy)


def test_another_schema_is_refused_even_when_its_fields_are_unknown(copy):
    (copy / MANIFEST).write_text('{"schema": 1, "novelty": true}')
    with pytest.raises(BundleError, match="schema 1"):
        open_bundle(copy)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"threshold"', '"treshold"', 1),
        lambda text: text.replace('"schema": 4', '"schema": "2"'),
        lambda text: text.replace('"precision": "int8"', '"precision": "int7"'),
        lambda text: "",
        lambda text: re.sub(r'("value": \d\.\d)\d', lambda found: found[1] + "9", text, count=1),
        lambda text: text.replace("0.485", "0.585"),
        lambda text: text.replace('"roi": null', '"roi": [0, 0, 9, 9]'),
    ],
)
def test_a_damaged_manifest_is_refused(copy, damage):
    text = (copy / MANIFEST).read_text()
    assert damage(text) != text
    (copy / MANIFEST).write_text(damage(text))
    with pytest.raises(BundleError, match="damaged"):
        open_bundle(copy)


def test_manifest_survives_the_round_trip(bundle):
    assert manifests.decode(manifests.encode(bundle.manifest), "memory") == bundle.manifest
    assert (bundle.path / MANIFEST).read_bytes() == manifests.encode(bundle.manifest)


def test_manifest_says_what_it_was_made_from(bundle):
    manifest = bundle.manifest
    assert manifest.teacher.source == "builtin"
    assert len(manifest.teacher.sha256) == len(manifest.student.sha256) == 64
    assert manifest.training.normals == 13
    assert manifest.training.held_out == manifest.threshold.normals == 3
    assert manifest.calibration is not None
    assert manifest.calibration.images == 13
    assert manifest.accuracy is not None
    assert manifest.accuracy.images == 8
    assert {"torch", "openvino", "numpy"} <= set(manifest.versions)
    assert msgspec.to_builtins(manifest)["threshold_changes"] == []


def test_find_bundle_takes_the_only_one_and_lists_several(copy):
    root = copy.parent
    assert find_bundle(root) == copy
    shutil.copytree(copy, root / ".copy.partial-1")  # what a killed build leaves
    assert find_bundle(root) == copy
    shutil.copytree(copy, root / "second")
    with pytest.raises(BundleError, match=r"2 bundles.*copy.*second"):
        find_bundle(root)
    with pytest.raises(BundleError, match="found none"):
        find_bundle(root / "nowhere")


def test_no_flipped_bit_of_the_manifest_changes_what_it_says(bundle):
    """Every bit of every byte: refused, or harmless (white space between the fields)."""
    text = (bundle.path / MANIFEST).read_bytes()
    for index in range(0, len(text), 3):
        flipped = bytearray(text)
        flipped[index] ^= 1 << index % 8
        try:
            found = manifests.decode(bytes(flipped), "flipped")
        except BundleError:
            continue
        assert found == bundle.manifest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"graph": "../elsewhere.onnx"}, "elsewhere"),
        ({"threshold": {"value": -1.0}}, "damaged"),
    ],
)
def test_a_sealed_manifest_that_makes_no_sense_is_refused(bundle, change, message):
    raw = msgspec.to_builtins(bundle.manifest)
    for name, value in change.items():
        raw[name] = {**raw[name], **value} if isinstance(value, dict) else value
    # sealed as our own writer would, without the checks that reading makes
    raw["sha256"] = ""
    raw["sha256"] = hashlib.sha256(msgspec.json.encode(raw)).hexdigest()
    with pytest.raises(BundleError, match=message):
        manifests.decode(msgspec.json.encode(raw), "memory")
