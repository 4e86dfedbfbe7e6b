"""stpm-tune: a new threshold on the edge box, with a record of who changed what."""

import json
import shutil

import cv2
import numpy as np
import pytest

from stpm.calibration.thresholds import quantile
from stpm.edge.bundle import MANIFEST, open_bundle
from stpm.edge.engine import open_engine
from stpm.edge.images import list_images, read_image
from stpm.tools import tune
from stpm.tools.parts import draw_part


@pytest.fixture
def copy(bundle, tmp_path):
    return shutil.copytree(bundle.path, tmp_path / "bundle")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Good parts that were not in the training."""
    folder = tmp_path_factory.mktemp("photos")
    for seed in range(24):
        cv2.imwrite(str(folder / f"{seed:03d}.png"), draw_part(10_000 + seed)[0])
    return folder


def run(copy, photos, more):
    return tune.main(["--bundle", str(copy), "--images", str(photos), *more.split()])


def test_the_threshold_follows_the_new_photos_and_the_change_is_recorded(copy, photos, capsys):
    before = open_bundle(copy)
    assert run(copy, photos, "--threshold quantile --false-reject-rate 0.1 --by anna --reason lamp") == 0
    after = open_bundle(copy)  # checks the seal and every hash
    with open_engine(after) as engine:
        spec = after.manifest.preprocess
        scores = [float(engine.infer(spec(read_image(path))).scores[0]) for path in list_images(photos)]
    assert after.manifest.threshold == quantile(np.array(scores, np.float32).astype(np.float64), 0.1)
    (change,) = after.manifest.threshold_changes
    assert (change.by, change.reason) == ("anna", "lamp")
    assert (change.before, change.after) == (before.manifest.threshold, after.manifest.threshold)
    assert len(change.images_sha256) == 64
    assert change.at.endswith("+00:00")
    assert after.manifest.files == before.manifest.files
    printed = capsys.readouterr().out
    assert f"{before.manifest.threshold.value:.3e}" in printed
    assert f"{after.manifest.threshold.value:.3e}" in printed
    assert "next start" in printed


def test_changes_add_up(copy, photos):
    assert run(copy, photos, "") == 0
    assert tune.main(["--bundle", str(copy), "--threshold", "0.5"]) == 0
    manifest = open_bundle(copy).manifest
    first, second = manifest.threshold_changes
    assert first.after == second.before
    assert manifest.threshold.value == second.after.value == 0.5
    assert (second.after.rule, second.after.normals, second.images_sha256) == ("manual", 0, None)


def test_a_dry_run_shows_and_changes_nothing(copy, photos, capsys):
    before = (copy / MANIFEST).read_bytes()
    assert run(copy, photos, "--dry-run") == 0
    assert (copy / MANIFEST).read_bytes() == before
    assert "nothing was changed" in capsys.readouterr().out


def test_stpm_run_judges_with_the_new_threshold_and_says_so(copy, parts, capsys):
    from stpm.edge.cli import main

    assert tune.main(["--bundle", str(copy), "--threshold", "1e-9", "--reason", "trial", "--by", "bo"]) == 0
    assert main(["--bundle", str(copy), "--camera", str(parts / "bushing" / "test"), "--plc", "none"]) == 0
    printed = capsys.readouterr().out
    assert "FAIL 8" in printed
    assert "by bo" in printed
    assert "trial" in printed


def refused(copy, photos, more, code, capsys):
    before = (copy / MANIFEST).read_bytes()
    assert run(copy, photos, more) == code
    assert (copy / MANIFEST).read_bytes() == before
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def test_the_photos_of_the_training_are_refused(copy, parts, capsys):
    assert "trained on" in refused(copy, parts / "bushing" / "train" / "good", "", 3, capsys)


def test_photos_of_another_size_are_refused(copy, photos, tmp_path, capsys):
    other = tmp_path / "small"
    other.mkdir()
    for path in list_images(photos):
        cv2.imwrite(str(other / path.name), cv2.resize(read_image(path), (64, 48)))
    error = refused(copy, other, "", 3, capsys)
    assert "found 64×48" in error
    assert "wanted photos of 320×320" in error or "wanted photos of" in error


def test_too_few_photos_and_no_folder(copy, photos, tmp_path, capsys):
    few = tmp_path / "few"
    few.mkdir()
    assert "at least 10" in refused(copy, few, "", 3, capsys)
    for path in list_images(photos)[:9]:
        shutil.copy(path, few)
    assert "found 9" in refused(copy, few, "", 3, capsys)
    assert "no folder" in refused(copy, tmp_path / "nowhere", "", 3, capsys)


def test_a_defect_among_the_good_parts_is_named(copy, photos, tmp_path, capsys, monkeypatch):
    mixed = shutil.copytree(photos, tmp_path / "mixed")
    scores = np.full(24, 1e-3, np.float32) * np.linspace(0.9, 1.1, 24, dtype=np.float32)
    scores[7] = 0.4
    monkeypatch.setattr(tune, "infer_all", lambda *arguments: (None, scores))
    assert run(copy, mixed, "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "007.png scores 4.000e-01" in printed
    assert printed.count("far above the others") == 1


def test_scripted_scores_are_no_scores(copy, photos, capsys):
    assert "fake" in refused(copy, photos, "--backend fake", 3, capsys)


def test_a_box_whose_engine_disagrees_cannot_tune(copy, photos, capsys):
    from stpm.edge import manifest as manifests

    manifest = open_bundle(copy).manifest
    import msgspec

    golden = np.load(copy / "golden.npz")
    np.savez_compressed(
        copy / "golden.npz", frames=golden["frames"], maps=golden["maps"] * 2, scores=golden["scores"] * 2
    )
    from stpm.edge.bundle import file_hash

    files = manifest.files | {"golden.npz": file_hash(copy / "golden.npz")}
    (copy / MANIFEST).write_bytes(manifests.encode(msgspec.structs.replace(manifest, files=files)))
    assert "self test" in refused(copy, photos, "", 5, capsys)


def test_a_bundle_that_changes_meanwhile_is_not_overwritten(copy, photos, capsys, monkeypatch):
    real = tune.fit

    def slow(*arguments):
        assert tune.main(["--bundle", str(copy), "--threshold", "0.25", "--by", "other"]) == 0
        return real(*arguments)

    calls = iter([slow, real])
    monkeypatch.setattr(tune, "fit", lambda *arguments: next(calls)(*arguments))
    assert run(copy, photos, "") == 4
    assert "meanwhile" in capsys.readouterr().err
    assert [change.by for change in open_bundle(copy).manifest.threshold_changes] == ["other"]


def test_without_images_a_rule_is_a_wrong_command_line(copy, capsys):
    with pytest.raises(SystemExit) as stopped:
        tune.main(["--bundle", str(copy)])
    assert stopped.value.code == 2
    assert "--images" in capsys.readouterr().err


def test_a_box_without_write_permission(copy, photos, capsys, monkeypatch):
    def denied(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("stpm.edge.storage.os.replace", denied)
    assert "cannot write" in refused(copy, photos, "", 8, capsys)
    assert not [path for path in copy.iterdir() if "partial" in path.name]


def test_the_record_reads_well_in_the_file(copy):
    assert tune.main(["--bundle", str(copy), "--threshold", "0.5", "--reason", "für die Nachtschicht"]) == 0
    record = json.loads((copy / MANIFEST).read_text())["threshold_changes"][0]
    assert record["reason"] == "für die Nachtschicht"
    assert list(record) == ["at", "by", "before", "after", "images_sha256", "reason"]
