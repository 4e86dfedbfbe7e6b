"""Which layers quantisation hurts: every convolution quantised alone, and what that does to the anomaly map."""

from collections.abc import Callable, Mapping

import numpy as np
import onnx
from tqdm import tqdm

from stpm.calibration.qdq import convolutions, quantise
from stpm.edge.score import Array


def sensitivity(
    graph: onnx.ModelProto, ranges: Mapping[str, float], maps_of: Callable[[onnx.ModelProto], Array]
) -> dict[str, float]:
    """For every convolution of the float graph: how far the anomaly maps move when only it is quantised, as
    ‖m_quantised − m‖ / ‖m‖ over all pixels, most sensitive first. `maps_of` runs a graph on some normals."""
    layers = convolutions(graph)
    wanted = maps_of(graph).astype(np.float64)
    moved = {}
    for layer in tqdm(layers, desc="sensitivity of layers", unit="layer", disable=None, leave=False):
        alone = quantise(graph, ranges, in_float=set(layers) - {layer})
        moved[layer] = float(np.linalg.norm(maps_of(alone) - wanted) / np.linalg.norm(wanted))
    return dict(sorted(moved.items(), key=lambda item: -item[1]))
