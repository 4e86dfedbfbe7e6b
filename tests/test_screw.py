"""The same contracts on real photos and real weights, where they are at hand: a folder `shared` beside the checkout,
or the one named by STPM_SHARED, with data/screw (MVTec AD) and weights/*.npz (ResNet-18, ImageNet)."""

import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from cuda_on_cpu.library import Host

from stpm.build.export import check_parity, export_graph
from stpm.build.gpu.graph import for_tensorrt
from stpm.build.methods.stpm import Stpm
from stpm.build.weights import load_teacher
from stpm.calibration.dataset import find_dataset, load_mask
from stpm.calibration.qdq import activations, quantise
from stpm.calibration.ranges import collect, minmax
from stpm.edge.engine.openvino import OpenVinoEngine
from stpm.edge.images import read_image
from stpm.edge.kernels import launches
from stpm.edge.kernels.launches import CALL, Resize
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
    method, spec = Stpm(), Preprocess()
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


def test_the_gpu_sees_the_same_pixels_of_real_photos(library):
    """The preprocess kernel, on the CPU, bit for bit: the photos are halved, where OpenCV rounds in its own way."""
    photos = sorted((SHARED / "data" / "screw" / "test").rglob("*.png"))[::20]
    spec = Preprocess()
    for photo in photos:
        frame, device = read_image(photo), Host(library)
        resize = Resize.of(spec, *frame.shape[:2])
        rows, columns = resize.placed(device.put)
        call = np.zeros(1, CALL)
        call["frame"], call["pitch"] = device.put(frame), frame.strides[0]
        tensor = device.put(np.zeros((1, 3, spec.height, spec.width), np.float32))
        device.run(launches.preprocess(spec, rows, columns, resize.half_up, device.put(call), tensor, False, 1))
        np.testing.assert_array_equal(device.get(tensor), spec(frame))


def test_the_graph_for_tensorrt_on_a_real_screw():
    """The common stem and the scaled student, with the ImageNet teacher: the anomaly map stays what it was."""
    method = Stpm()
    teacher, student = load_teacher(str(WEIGHTS), method.taps), method.new_student(0)
    spec = Preprocess()
    photos = sorted((SHARED / "data" / "screw" / "train" / "good").glob("*.png"))[:4]
    tensors = [spec(read_image(photo)) for photo in photos]
    fp32 = export_graph(method.graph(teacher, student, spec.height, spec.width), spec)
    ranges = {name: minmax(histogram) for name, histogram in collect(fp32, activations(fp32), iter(tensors)).items()}
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    for graph, allowed in ((fp32, 1e-4), (quantise(fp32, ranges), 0.02)):
        whole, cut = (
            onnxruntime.InferenceSession(model.SerializeToString(), options)
            for model in (graph, for_tensorrt(graph).model)
        )
        wanted = whole.run(["anomaly_map"], {"input": tensors[0]})[0][0, 0]
        names = [output.name for output in cut.get_outputs()]
        found = dict(zip(names, cut.run(None, {"input": tensors[0]}), strict=True))
        levels = [level_map(found[f"teacher/{tap}"][0], found[f"student/{tap}"][0]) for tap in method.taps]
        np.testing.assert_allclose(
            anomaly_map(levels, spec.height, spec.width), wanted, atol=allowed * float(wanted.max())
        )
