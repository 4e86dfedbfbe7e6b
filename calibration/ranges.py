"""Activation ranges of a float graph on normal images: one histogram per tensor, then an observer.

ONNX Runtime runs the graph with the asked tensors as extra outputs. Its own calibrators keep every activation in
memory, or one histogram with a range fixed by the first images; a histogram that doubles its range needs neither.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime

from stpm.edge.errors import InputError
from stpm.edge.preprocess import Tensor

BINS = 4096
LEVELS = 128  # that a symmetric 8-bit number has for magnitudes


@dataclass
class Histogram:
    """Counts of |x| in BINS equal bins from 0 to `limit`."""

    counts: np.ndarray
    limit: float
    largest: float

    @classmethod
    def empty(cls) -> "Histogram":
        return cls(np.zeros(BINS, np.int64), 1e-3, 0.0)

    def add(self, values: np.ndarray) -> None:
        magnitude = np.abs(values).ravel()
        self.largest = max(self.largest, float(magnitude.max()))
        while self.limit < self.largest:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(1), np.zeros(BINS // 2, np.int64)])
            self.limit *= 2
        self.counts += np.histogram(magnitude, BINS, (0, self.limit))[0]


def minmax(histogram: Histogram) -> float:
    """The largest magnitude seen: nothing is clipped."""
    return histogram.largest


def percentile(histogram: Histogram, share: float = 0.9999) -> float:
    """The magnitude below which this share of the non-zero values lies (a ReLU makes half of them zero)."""
    counts = histogram.counts.copy()
    counts[0] = 0
    if not counts.any():
        return histogram.largest
    index = int(np.searchsorted(np.cumsum(counts), share * counts.sum()))
    return min(histogram.largest, (index + 1) * histogram.limit / BINS)


def mse(histogram: Histogram) -> float:
    """The range, from a fifth of the maximum on, whose 8-bit rounding and clipping has the smallest mean square."""
    centres = (np.arange(BINS) + 0.5) * histogram.limit / BINS
    candidates = histogram.largest * np.linspace(0.2, 1, 161)
    errors = []
    for candidate in candidates:
        step = candidate / 127
        rounded = np.clip(np.round(centres / step), 0, 127) * step
        errors.append(float(np.sum(histogram.counts * (centres - rounded) ** 2)))
    return float(candidates[int(np.argmin(errors))])


def entropy(histogram: Histogram) -> float:
    """The range whose 8-bit version loses the least information: the smallest Kullback-Leibler divergence between
    the values, clipped, and their 128 levels. Zeros are left out: 0 is a level of every range."""
    counts = histogram.counts.astype(np.float64)
    counts[0] = 0
    last = int(np.ceil(histogram.largest / histogram.limit * BINS))
    if last <= LEVELS or not counts.any():
        return histogram.largest
    candidates = np.unique(np.linspace(LEVELS, last, 200).astype(int))
    losses = [_information_lost(counts, candidate) for candidate in candidates]
    return min(histogram.largest, float(candidates[int(np.argmin(losses))] * histogram.limit / BINS))


def _information_lost(counts: np.ndarray, end: int) -> float:
    """KL(P‖Q) in nats: P is the histogram with everything from bin `end` on put into the last bin before it; Q has
    the clipped values removed, and the rest spread evenly over the non-empty bins of each level."""
    inside = counts[:end]
    clipped = inside.copy()
    clipped[-1] += counts[end:].sum()
    level = np.arange(end) * LEVELS // end
    filled = inside > 0
    share = np.bincount(level, inside, LEVELS) / np.maximum(np.bincount(level, filled, LEVELS), 1)
    spread = np.where(filled, share[level], 0)
    # a bin that only clipped values fall into would make the divergence infinite
    p, q = clipped / clipped.sum(), np.maximum(spread / max(spread.sum(), 1), 1e-9)
    return float(np.sum(p[p > 0] * np.log(p[p > 0] / q[p > 0])))


OBSERVERS = {"minmax": minmax, "percentile": percentile, "entropy": entropy, "mse": mse}


def collect(graph: onnx.ModelProto, tensors: list[str], batches: Iterable[Tensor]) -> dict[str, Histogram]:
    """Run the graph on each batch and fill one histogram per tensor.

    No batch, a batch of another shape than the graph's input, or a value that is not finite: InputError.
    """
    model = onnx.ModelProto()
    model.CopyFrom(graph)
    input_name = model.graph.input[0].name
    extra = [name for name in tensors if name != input_name]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in extra)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # a fused convolution and ReLU would hide the tensors that are asked for
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    histograms = {name: Histogram.empty() for name in tensors}
    shape = tuple(dimension.dim_value for dimension in model.graph.input[0].type.tensor_type.shape.dim)
    count = 0
    for batch in batches:
        count += 1
        if batch.shape != shape:
            raise InputError(
                f"wanted calibration images of shape {shape} as the graph takes them, found {batch.shape}: "
                "preprocess them with the same preprocessing as the training images"
            )
        values = dict(zip(extra, session.run(extra, {input_name: batch}), strict=True))
        if input_name in histograms:
            values[input_name] = batch
        for name, value in values.items():
            if not np.isfinite(value).all():
                raise InputError(
                    f"the activation {name} is not finite on a calibration image: check the student's training and "
                    "the weights"
                )
            histograms[name].add(value)
    if count == 0:
        raise InputError("wanted images of good parts to calibrate on, found none: give at least one")
    return histograms
