"""Where training runs, and that the networks come back from there."""

import pytest
import torch

from stpm.build.cli import train_main
from stpm.build.device import device_of, on
from stpm.edge.errors import TrainingError


@pytest.mark.parametrize(
    ("wish", "there", "found"),
    [
        ("auto", False, "cpu"),
        ("auto", True, "cuda"),
        ("cpu", True, "cpu"),
        ("cpu", False, "cpu"),
        ("cuda", True, "cuda"),
    ],
)
def test_a_gpu_is_taken_where_there_is_one_and_the_cpu_is_not_refused(monkeypatch, wish, there, found):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert device_of(wish) == found


def test_cuda_without_a_gpu_is_refused_before_anything_is_read(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert train_main(f"--category x --data {tmp_path} --device cuda".split()) == 2
    assert "wanted an NVIDIA GPU for --device cuda" in capsys.readouterr().err


class Elsewhere(torch.nn.Linear):
    """Says where it was sent."""

    def to(self, device):
        self.sent = [*getattr(self, "sent", []), device]
        return self


def test_networks_come_back_also_when_the_memory_of_the_gpu_was_too_small():
    network = Elsewhere(1, 1)
    with on("cuda", network):
        assert network.sent == ["cuda"]
    assert network.sent == ["cuda", "cpu"]
    with pytest.raises(TrainingError, match="smaller --batch"), on("cuda", network):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
    assert network.sent == ["cuda", "cpu"] * 2
