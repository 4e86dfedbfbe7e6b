"""The one place that imports torchvision.

torchvision's wheel on the package index is built against a CUDA torch. Beside a CPU-only torch its compiled
operators do not load, and `import torchvision` then fails while it registers a fake kernel for two of them.
Nothing here uses those operators, so declaring their names is enough.
"""

import warnings

import torch

try:
    import torchvision
except RuntimeError as error:
    if "torchvision::" not in str(error):
        raise
    torch.library.define("torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torch.library.define("torchvision::qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torchvision

models = torchvision.models
