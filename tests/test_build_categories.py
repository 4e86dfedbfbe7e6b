"""`--category all`: one after another, and one that fails does not keep the others from being done."""

import shutil

import pytest

from stpm.build.cli import build_main, train_main
from stpm.edge.bundle import open_bundle
from stpm.tools.parts import write_dataset


@pytest.fixture
def photos(tmp_path):
    for number, name in enumerate(("bushing", "ring")):
        write_dataset(tmp_path / "photos", name, 12, 2, seed=100 * number)
    (tmp_path / "photos" / "notes").mkdir()
    return tmp_path / "photos"


def words(photos, tmp_path):
    found = ["--category", "all", "--data", str(photos), "--teacher", "builtin", "--epochs", "1", "--batch", "8"]
    return [*found, "--size", "64", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]


def test_every_category_gets_its_student(photos, tmp_path, capsys):
    assert train_main(words(photos, tmp_path)) == 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "bushing.npz",
        "bushing.png",
        "ring.npz",
        "ring.png",
    ]
    assert (tmp_path / "out" / "bushing.npz").read_bytes() != (tmp_path / "out" / "ring.npz").read_bytes()
    out = capsys.readouterr().out
    assert out.index("--- bushing, 1 of 2") < out.index("--- ring, 2 of 2")


def test_every_category_gets_its_bundle(photos, tmp_path):
    assert build_main([*words(photos, tmp_path), "--engine", "fp32"]) == 0
    for name in ("bushing", "ring"):
        assert open_bundle(tmp_path / "out" / f"{name}-fp32").manifest.category == name


def test_one_that_fails_is_named_at_the_end_and_the_others_are_done(photos, tmp_path, capsys):
    for path in sorted((photos / "bushing" / "train" / "good").iterdir())[3:]:
        path.unlink()
    assert train_main(words(photos, tmp_path)) == 3
    assert (tmp_path / "out" / "ring.npz").is_file()
    assert not (tmp_path / "out" / "bushing.npz").exists()
    said = capsys.readouterr().err.splitlines()
    assert "bushing: wanted at least 10 images of good parts" in said[0]
    assert said[-1] == "stpm-train: 1 of 2 categories were not done, see above: bushing"


def test_without_any_the_command_says_what_it_looks_for(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    assert train_main(words(tmp_path / "photos", tmp_path)) == 3
    assert "wanted folders CATEGORY/train/good" in capsys.readouterr().err


@pytest.mark.parametrize("more", [["--student", "bushing.npz"], ["--threshold", "0.1"]])
def test_what_belongs_to_one_category_is_refused_for_all(photos, tmp_path, capsys, more):
    assert build_main([*words(photos, tmp_path), "--engine", "fp32", *more]) == 2
    assert "build each by its name" in capsys.readouterr().err


def test_a_folder_of_that_name_is_a_category(photos, tmp_path, capsys):
    shutil.move(photos / "ring", photos / "all")
    assert train_main([*words(photos, tmp_path)[:-1], str(tmp_path / "all.npz"), "--share", "1"]) == 0
    assert "--- " not in capsys.readouterr().out
    assert (tmp_path / "all.npz").is_file()
