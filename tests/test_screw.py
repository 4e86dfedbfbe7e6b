"""The same contracts on real photos and real weights, where they are at hand: a folder `shared` beside the checkout,
or the one named by STPM_SHARED, with data/screw (MVTec AD) and weights/*.npz (ResNet-18, ImageNet)."""

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from stpm.build.export import check_parity, export_graph
from stpm.build.methods import METHODS
from stpm.build.weights import load_teacher
from stpm.calibration.dataset import find_dataset, load_mask
from stpm.calibration.qdq import activations, quantise
from stpm.calibration.ranges import collect, minmax
from stpm.edge.engine.openvino import OpenVinoEngine
from stpm.edge.images import read_image
from stpm.edge.preprocess import Preprocess
from stpm.edge.score import anomaly_map, level_map

SHARED = Path(os.environ.get("STPM_SHARED") or Path(__file__).resolve().parents[2] / "shared")
WEIGHTS = SHARED / "weights" / "resnet18_imagenet1k_v1_conv1_to_layer3.npz"

pytestmark = pytest.mark.skipif(
    not (SHARED / "data" / "screw").is_dir() or not WEIGHTS.is_file(),
    reason="no screw images and ImageNet weights beside the checkout (set STPM_SHARED)",
)


def test_every_photo_is_found_and_every_defect_has_a_mask_with_something_in_it():
    dataset = find_dataset(SHARED / "data", "screw")
    assert len(dataset.normals) == 320
    defects = [item for item in dataset.labelled if item.defective]
    assert (len(dataset.labelled), len(defects)) == (160, 119)
    for item in defects:
        mask = load_mask(item, Preprocess())
        assert mask is not None
        assert 0 < mask.mean() < 0.1


def test_graphs_of_the_imagenet_teacher_on_a_real_screw(tmp_path):
    """torch, ONNX Runtime, OpenVINO and the numpy definition agree in fp32; int8 is near."""
    method, spec = METHODS["stpm"], Preprocess()
    teacher, student = load_teacher(str(WEIGHTS), method.taps), method.new_student(0).eval()
    tensor = spec(read_image(SHARED / "data" / "screw" / "test" / "scratch_head" / "000.png"))
    model = method.graph(teacher, student, 256, 256)
    graph = export_graph(model, spec)
    check_parity(model, graph, tensor)
    with torch.inference_mode():
        pairs = zip(teacher(torch.from_numpy(tensor)), student(torch.from_numpy(tensor)), strict=True)
        wanted = anomaly_map([level_map(t[0].numpy(), s[0].numpy()) for t, s in pairs], 256, 256)
    ranges = {name: minmax(found) for name, found in collect(graph, activations(graph), [tensor]).items()}
    maps = {}
    for name, variant in (("fp32", graph), ("int8", quantise(graph, ranges))):
        onnx.save(variant, tmp_path / f"{name}.onnx")
        with OpenVinoEngine.of_file(tmp_path / f"{name}.onnx", Preprocess()) as engine:
            maps[name] = engine.infer(tensor).maps[0]
    np.testing.assert_allclose(maps["fp32"], wanted, atol=1e-3 * wanted.max())
    assert np.corrcoef(maps["int8"].ravel(), wanted.ravel())[0, 1] > 0.98
