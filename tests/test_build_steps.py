"""Finished steps are re-used, stopped ones go on, and nothing half-done has a finished name."""

import fcntl

import pytest

from stpm.build.steps import Steps
from stpm.edge.errors import StorageError


def writer(text, log):
    def produce(folder):
        log.append(text)
        (folder / "result").write_text(text)

    return produce


def test_same_inputs_are_done_once_and_others_again(tmp_path):
    steps, log = Steps(tmp_path), []
    first = steps.run("train", {"seed": 0}, writer("a", log))
    assert steps.run("train", {"seed": 0}, writer("b", log)) == first
    assert (first / "result").read_text() == "a"
    other = steps.run("train", {"seed": 1}, writer("c", log))
    assert other != first
    assert steps.run("graph", {"seed": 0}, writer("d", log)) != first
    assert log == ["a", "c", "d"]


def test_a_stopped_step_finds_its_folder_again(tmp_path):
    def stopped(folder):
        (folder / "checkpoint").write_text("epoch 7")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Steps(tmp_path).run("train", {}, stopped)
    assert not [path for path in tmp_path.iterdir() if path.is_dir() and path.suffix != ".partial"]

    def resumed(folder):
        assert (folder / "checkpoint").read_text() == "epoch 7"

    assert Steps(tmp_path).run("train", {}, resumed).is_dir()


def test_two_builds_do_not_share_a_step(tmp_path):
    def produce(folder):
        with pytest.raises(StorageError, match="another build"):
            Steps(tmp_path).run("train", {}, lambda folder: None)

    assert Steps(tmp_path).run("train", {}, produce).is_dir()
    lock = next(tmp_path.glob("*.lock"))
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        Steps(tmp_path / "file" / "steps").run("train", {}, lambda folder: None)
