"""stpm-tune: a new threshold on the edge box, with a record of who changed what."""

import json
import os
import shutil

import cv2
import msgspec
import numpy as np
import pytest

from stpm.calibration.thresholds import quantile
from stpm.edge.bundle import MANIFEST, file_hash, open_bundle
from stpm.edge.cli import main as run_main
from stpm.edge.engine import open_engine
from stpm.edge.images import list_images, read_image
from stpm.edge.manifest import encode
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


@pytest.mark.parametrize(
    ("share", "said"), [(1.01, "even the scratched part"), (0.5, None), (0.001, "even the good part")]
)
def test_a_threshold_that_tells_nothing_apart_is_named(copy, capsys, share, said):
    scratched = float(open_bundle(copy).golden().scores.max())
    assert tune.main(["--bundle", str(copy), "--threshold", str(share * scratched), "--dry-run"]) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if "of the self test" in line]
    assert [said in line for line in warnings] == ([True] if said else [])


def test_a_dry_run_shows_and_changes_nothing(copy, photos, capsys):
    before = (copy / MANIFEST).read_bytes()
    assert run(copy, photos, "--dry-run") == 0
    assert (copy / MANIFEST).read_bytes() == before
    assert "nothing was changed" in capsys.readouterr().out


def test_stpm_run_judges_with_the_new_threshold_and_says_so(copy, parts, capsys):
    assert tune.main(["--bundle", str(copy), "--threshold", "1e-9", "--reason", "trial", "--by", "bo"]) == 0
    assert run_main(["--bundle", str(copy), "--camera", str(parts / "bushing" / "test"), "--plc", "none"]) == 0
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


def test_one_photo_of_the_training_is_enough_to_refuse(copy, parts, photos, tmp_path, capsys):
    mixed = shutil.copytree(photos, tmp_path / "mixed")
    shutil.copy(parts / "bushing" / "train" / "good" / "003.png", mixed / "new-name.png")
    error = refused(copy, mixed, "", 3, capsys)
    assert "found 1 of 25 that this bundle was trained on" in error
    assert "new-name.png" in error


def test_photos_of_another_size_are_refused(copy, photos, tmp_path, capsys):
    other = tmp_path / "small"
    other.mkdir()
    for path in list_images(photos):
        cv2.imwrite(str(other / path.name), cv2.resize(read_image(path), (64, 48)))
    error = refused(copy, other, "", 3, capsys)
    assert "found 64×48" in error
    height, width = read_image(list_images(photos)[0]).shape[:2]
    assert f"wanted photos of {width}×{height}" in error


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
    manifest = open_bundle(copy).manifest
    golden = np.load(copy / "golden.npz")
    np.savez_compressed(
        copy / "golden.npz", frames=golden["frames"], maps=golden["maps"] * 2, scores=golden["scores"] * 2
    )
    files = manifest.files | {"golden.npz": file_hash(copy / "golden.npz")}
    (copy / MANIFEST).write_bytes(encode(msgspec.structs.replace(manifest, files=files)))
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


def test_a_user_without_a_name_is_a_number(copy, monkeypatch):
    def nameless():
        raise KeyError("getpwuid(): uid not found: 1234")

    monkeypatch.setattr(tune.getpass, "getuser", nameless)
    assert tune.main(["--bundle", str(copy), "--threshold", "0.5"]) == 0
    assert open_bundle(copy).manifest.threshold_changes[0].by == f"user {os.getuid()}"


def test_what_a_power_cut_left_does_not_stop_the_line_and_goes(copy):
    left = copy / f".{MANIFEST}.partial-99999999"
    left.write_text("half a mani")
    open_bundle(copy)
    assert tune.main(["--bundle", str(copy), "--threshold", "0.5"]) == 0
    assert not left.exists()
