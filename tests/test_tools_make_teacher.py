"""The built-in teacher's school: the pictures, the two views of one, and that a network learns from them."""

import numpy as np
import pytest
import torch

from stpm.build.pyramid import TAPS
from stpm.build.weights import load_teacher
from stpm.tools import make_teacher
from stpm.tools.drawn import Dice, draw

CPU = torch.device("cpu")


def test_pictures_are_of_the_seed_alone_and_each_is_another():
    first = draw(1, 6, 64, CPU)
    assert first.dtype == torch.uint8
    assert first.shape == (6, 3, 64, 64)
    assert torch.equal(first, draw(1, 6, 64, CPU))
    both = torch.cat([first, draw(2, 6, 64, CPU)]).float()
    assert (both[:, None] - both[None]).abs().mean((2, 3, 4)).add(1e3 * torch.eye(12)).min() > 5
    assert both.std((1, 2, 3)).min() > 1, "a picture shows something"


@pytest.mark.parametrize("mirrored", [0.0, 1.0])
def test_both_views_show_the_same_thing_at_their_places(monkeypatch, mirrored):
    """Pictures whose value is where they are: red goes from left to right, green from top to bottom."""
    monkeypatch.setattr(make_teacher, "photographed", lambda x, dice: x)
    monkeypatch.setattr(Dice, "happens", lambda self, p, *shape: torch.full((self.count, *shape), bool(mirrored)))
    ramp = torch.arange(make_teacher.DRAWN, dtype=torch.float32)
    red, green = ramp.expand(make_teacher.DRAWN, -1), ramp[:, None].expand(-1, make_teacher.DRAWN)
    pictures = torch.stack([red, green, 0 * red]).byte().expand(40, -1, -1, -1)
    first, second = make_teacher.two_views(pictures, Dice(0, 40, CPU))
    seen = [
        torch.nn.functional.grid_sample(view.pixels, view.places[:, None], align_corners=False)[:, :2, 0] * 255
        for view in (first, second)
    ]
    # not beyond the picture, where it is reflected
    inner = ((seen[0] > 12) & (seen[0] < make_teacher.DRAWN - 12)).all(1)
    assert inner.float().mean() > 0.5
    assert (seen[0] - seen[1]).abs().amax(1)[inner].max() < 0.5
    assert not torch.equal(first.places, second.places)


def test_a_camera_adds_light_colour_and_grain():
    plain = torch.full((64, 3, 32, 32), 0.5)
    seen = make_teacher.photographed(plain, Dice(0, 64, CPU))
    assert torch.isfinite(seen).all()
    assert seen.mean((1, 2, 3)).std() > 0.1
    assert seen.std((2, 3)).min() > 0


def test_a_network_learns_to_find_the_places_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_teacher, "DRAWN", 64)
    monkeypatch.setattr(make_teacher, "SEEN", 48)
    pool = make_teacher.drawn(32, 0, CPU)
    _, unlearnt = make_teacher.train(pool, 1, 8, 0)
    _, learnt = make_teacher.train(pool, 80, 8, 0)
    assert sum(learnt) > 2 * sum(unlearnt)

    words = f"--pictures 16 --steps 2 --batch 4 --out {tmp_path / 'teacher.npz'}"
    assert make_teacher.main(words.split()) == 0
    assert "places found among 64" in capsys.readouterr().out
    teacher = load_teacher(str(tmp_path / "teacher.npz"), TAPS)
    assert np.isfinite([float(feature.mean()) for feature in teacher(torch.zeros(1, 3, 64, 64))]).all()
    assert (tmp_path / "teacher.npz").stat().st_size < 6e6


@pytest.mark.parametrize(("steps", "said"), [(60, "the loss is nan in step 51 at learning rate"), (1, "a weight")])
def test_a_training_that_goes_wrong_writes_nothing(tmp_path, monkeypatch, capsys, steps, said):
    monkeypatch.setattr(make_teacher, "DRAWN", 64)
    monkeypatch.setattr(make_teacher, "SEEN", 48)
    step = torch.optim.AdamW.step

    def broken(optimiser):
        step(optimiser)
        with torch.no_grad():
            optimiser.param_groups[0]["params"][0].fill_(float("nan"))

    monkeypatch.setattr(torch.optim.AdamW, "step", broken)
    words = f"--pictures 4 --steps {steps} --batch 2 --out {tmp_path / 'teacher.npz'}"
    assert make_teacher.main(words.split()) == 9
    assert said in capsys.readouterr().err
    assert not (tmp_path / "teacher.npz").exists()


def test_a_gpu_that_is_not_there_is_said_before_anything_is_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert make_teacher.main(["--device", "cuda", "--out", str(tmp_path / "teacher.npz")]) == 2
    assert "GPU" in capsys.readouterr().err
