"""Teachers and students from every kind of file, and the files that are none."""

from http.client import IncompleteRead
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import pytest
import safetensors.torch
import torch

from stpm.build import weights
from stpm.build.pyramid import Pyramid, weights_hash
from stpm.build.weights import BUILTIN_TEACHER, load_into, load_teacher, read_weights, write_weights
from stpm.edge.errors import InputError

TAPS = ("layer1", "layer2", "layer3")


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return Pyramid().state_dict()


def test_the_same_weights_from_three_kinds_of_file(state, tmp_path):
    write_weights(tmp_path / "a.npz", state)
    torch.save(state, tmp_path / "a.pth")
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    hashes = {
        weights_hash(load_teacher(str(tmp_path / f"a.{suffix}"), TAPS).state_dict())
        for suffix in ("npz", "pth", "safetensors")
    }
    assert hashes == {weights_hash(state)}


def test_a_whole_resnet18_is_taken_up_to_the_last_tap(tmp_path):
    from stpm.build.torchvision_cpu import models

    whole = models.resnet18(weights=None)
    torch.save(whole.state_dict(), tmp_path / "resnet18.pth")
    found = load_teacher(str(tmp_path / "resnet18.pth"), TAPS)
    torch.testing.assert_close(found.layer3[1].conv2.weight, whole.layer3[1].conv2.weight)
    assert not hasattr(found, "layer4")
    assert not found.training


def test_the_hash_depends_on_every_value(state):
    changed = dict(state)
    changed["layer2.0.conv1.weight"] = state["layer2.0.conv1.weight"].clone()
    changed["layer2.0.conv1.weight"].view(-1)[7] += 1e-3
    assert weights_hash(changed) != weights_hash(state)


def test_the_builtin_teacher_is_small_and_complete():
    assert BUILTIN_TEACHER.stat().st_size < 6 << 20
    teacher = load_teacher("builtin", TAPS)
    features = teacher(torch.randn(1, 3, 64, 64))
    assert all(feature.isfinite().all() and feature.std() > 0 for feature in features)


@pytest.mark.parametrize("error", [URLError("no route to host"), TimeoutError("timed out"), IncompleteRead(b"", 5)])
def test_imagenet_out_of_reach_names_the_other_two(monkeypatch, error):
    def unreachable(weights=None):
        raise error

    monkeypatch.setattr(weights.models, "resnet18", unreachable)
    with pytest.raises(InputError, match=r"could not be downloaded .*builtin.*PATH"):
        load_teacher("imagenet", TAPS)


@pytest.mark.parametrize("content", [b"", b"<html>please log in</html>", bytes(range(256)) * 20])
def test_a_damaged_download_of_imagenet_is_named_as_the_file_to_delete(monkeypatch, tmp_path, content):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    file = tmp_path / "checkpoints" / "resnet18-f37072fd.pth"
    file.parent.mkdir()
    file.write_bytes(content)
    with pytest.raises(InputError, match=rf"damaged .*delete {file}.*builtin.*PATH"):
        load_teacher("imagenet", TAPS)


def test_a_download_of_imagenet_that_is_something_else_is_refused(monkeypatch, tmp_path):
    """A page to log in, in the place of the file; torch compares the hash."""
    page = tmp_path / "page.html"
    page.write_text("<html>please log in</html>")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", lambda request: urlopen(page.as_uri()))
    with pytest.raises(InputError, match=r"damaged \(invalid hash.*builtin.*PATH"):
        load_teacher("imagenet", TAPS)
    assert not (tmp_path / "checkpoints" / "resnet18-f37072fd.pth").exists()


def test_missing_tensor_is_named(state):
    incomplete = {name: value for name, value in state.items() if name != "layer1.0.conv1.weight"}
    with pytest.raises(InputError, match=r"layer1\.0\.conv1\.weight.*missing"):
        load_into(Pyramid(), incomplete, "x.npz")


def test_wrong_shape_is_named_with_both(state):
    wrong = {**state, "conv1.weight": torch.zeros(64, 1, 7, 7)}
    with pytest.raises(InputError, match=r"\(64, 3, 7, 7\).*\(64, 1, 7, 7\)"):
        load_into(Pyramid(), wrong, "x.npz")


def test_values_that_are_not_finite_are_refused(state):
    wrong = {**state, "bn1.weight": torch.full((64,), float("nan"))}
    with pytest.raises(InputError, match=r"bn1\.weight"):
        load_into(Pyramid(), wrong, "x.npz")


@pytest.mark.parametrize("name", ["a.npz", "a.pth", "a.safetensors", "a.txt"])
@pytest.mark.parametrize("content", [b"", b"not weights at all", bytes(range(256)) * 20])
def test_files_that_hold_no_weights(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        read_weights(tmp_path / name)


def test_a_pickle_with_code_in_it_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "touched"), "w"))

    torch.save({"conv1.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(InputError):
        read_weights(tmp_path / "evil.pth")
    assert not (tmp_path / "touched").exists()


def test_missing_file_is_named():
    with pytest.raises(InputError, match=r"no file nowhere\.npz"):
        read_weights(__import__("pathlib").Path("nowhere.npz"))


def test_half_precision_is_read_as_float(state, tmp_path):
    write_weights(tmp_path / "half.npz", state, np.float16)
    teacher = load_teacher(str(tmp_path / "half.npz"), TAPS)
    assert {value.dtype for value in teacher.parameters()} == {torch.float32}
