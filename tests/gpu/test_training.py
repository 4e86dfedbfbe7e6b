"""Training on a GPU that torch can use: every method learns there what it learns on the CPU."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="no torch: pip install 'stpm-edge[build]'")

from stpm.build import train as training  # noqa: E402
from stpm.build.device import on  # noqa: E402
from stpm.build.distil import FineTuning, distil  # noqa: E402
from stpm.build.enhance import Enhancement, enhance, task  # noqa: E402
from stpm.build.export import export_graph  # noqa: E402
from stpm.build.fake_quant import FakeQuantNetwork  # noqa: E402
from stpm.build.methods import METHODS  # noqa: E402
from stpm.build.train import RECIPES, train  # noqa: E402
from stpm.calibration.qdq import activations, quantise  # noqa: E402
from stpm.calibration.ranges import OBSERVERS, collect  # noqa: E402
from stpm.edge.preprocess import Preprocess  # noqa: E402
from stpm.tools.parts import draw_part  # noqa: E402

SMALL = Preprocess(height=64, width=64)


@pytest.fixture
def device():
    if not torch.cuda.is_available():
        pytest.skip("torch finds no GPU")
    return "cuda"


@pytest.fixture(scope="module")
def pixels():
    return np.stack([SMALL.resize(draw_part(seed)[0]) for seed in range(10)])


def trained(name, pixels, folder, device):
    method = METHODS[name]()
    teacher, student = method.load_teacher("builtin", ""), method.new_student(0)
    recipe = RECIPES[method.schedule](epochs=4, batch=4)
    folder.mkdir(exist_ok=True)
    with on(device, teacher, student):
        history = train(method, teacher, student, pixels, SMALL, recipe, folder).history
    return method, teacher, student, [epoch.loss for epoch in history]


@pytest.mark.parametrize("name", METHODS)
def test_a_student_learns_there_what_it_learns_on_the_cpu(name, device, pixels, tmp_path):
    *_, wanted = trained(name, pixels, tmp_path / "cpu", "cpu")
    *networks, found = trained(name, pixels, tmp_path / "there", device)
    assert {parameter.device.type for network in networks[1:] for parameter in network.parameters()} == {"cpu"}
    assert found[-1] < 0.9 * found[0]
    assert found[0] == pytest.approx(wanted[0], rel=0.02)
    assert found[-1] == pytest.approx(wanted[-1], rel=0.2), "later epochs multiply the rounding of the first"


def test_a_training_begun_on_the_cpu_goes_on_there(device, pixels, tmp_path, monkeypatch):
    *_, whole = trained("reverse", pixels, tmp_path / "whole", "cpu")
    validate, calls = training._validate, []

    def stopped(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return validate(*arguments)

    monkeypatch.setattr(training, "_validate", stopped)
    with pytest.raises(KeyboardInterrupt):
        trained("reverse", pixels, tmp_path / "parts", "cpu")
    monkeypatch.undo()
    *_, found = trained("reverse", pixels, tmp_path / "parts", device)
    assert found[:2] == whole[:2]
    assert found[2:] == pytest.approx(whole[2:], rel=0.05)


def test_a_teacher_is_enhanced_there(device, pixels):
    def enhanced(device):
        teacher = METHODS["etstpm"]().load_teacher("builtin", "")
        before = weights(teacher)
        with on(device, teacher):
            enhance(teacher, task([pixels]), SMALL, Enhancement(2, 0))
        return weights(teacher) - before

    assert np.corrcoef(enhanced("cpu"), enhanced(device))[0, 1] > 0.9


@pytest.mark.parametrize("name", ["stpm", "reverse"])
def test_a_student_is_fine_tuned_there_for_int8(name, device, pixels, tmp_path):
    method, teacher, student, _ = trained(name, pixels, tmp_path / "float", "cpu")
    graph = export_graph(method.graph(teacher, student.eval(), 64, 64), SMALL)
    histograms = collect(graph, activations(graph), (SMALL.normalise(image) for image in pixels))
    ranges = {tensor: OBSERVERS["mse"](found) for tensor, found in histograms.items()}
    quantised = quantise(graph, ranges)

    def tuned(device, folder):
        folder.mkdir()
        recipe = FineTuning(epochs=2, batch=4)
        result, _ = distil(method, graph, quantised, pixels, SMALL, recipe, folder, device)
        return weights(FakeQuantNetwork(quantise(result, ranges), "/student/")) - weights(
            FakeQuantNetwork(quantised, "/student/")
        )

    assert np.corrcoef(tuned("cpu", tmp_path / "cpu"), tuned(device, tmp_path / "there"))[0, 1] > 0.5


def weights(network):
    return torch.cat([value.detach().flatten() for value in network.parameters()]).numpy()
