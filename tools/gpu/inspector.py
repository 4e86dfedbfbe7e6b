"""What TensorRT's engine inspector says of an INT8 plan."""

import json
import re
from collections.abc import Iterable
from typing import Any

import msgspec

from stpm.edge.bundle import Bundle, open_bundle
from stpm.edge.engine.cuda import Gpu
from stpm.tools.gpu.base import FailedError, Job, Result, SkippedError
from stpm.tools.gpu.engines import with_plan


class Inspected(msgspec.Struct, frozen=True):
    bundle: str
    layers: int
    kinds: dict[str, int]  # how many layers of each LayerType
    findings: list[str]
    untold: int  # layers whose types TensorRT does not tell


def inspector(job: Job) -> Result:
    """No float Add and no reformat between INT8 convolutions, by the engine inspector."""
    quantised = [path for path in job.bundles if open_bundle(path).manifest.precision == "int8"]
    if not quantised:
        raise SkippedError("needs an int8 bundle: give --bundle DIR")
    inspected = []
    for path in quantised:
        layers = layers_of(with_plan(job, path)[0])
        if not any(isinstance(layer, dict) for layer in layers):
            raise SkippedError(
                "the plan tells the names of its layers and nothing else: it would have to be compiled with "
                "ProfilingVerbosity.DETAILED"
            )
        kinds: dict[str, int] = {}
        for layer in layers:
            kind = str(layer.get("LayerType")) if isinstance(layer, dict) else "name only"
            kinds[kind] = kinds.get(kind, 0) + 1
        inspected.append(Inspected(str(path), len(layers), kinds, findings(layers), untold(layers)))
    wrong = [finding for each in inspected for finding in each.findings]
    if wrong:
        raise FailedError(f"{len(wrong)} findings, the first: {wrong[0]}", inspected)
    hidden = sum(each.untold for each in inspected)
    note = f"; {hidden} layers do not tell their types" if hidden else ""
    total = sum(each.layers for each in inspected)
    return Result(f"no float Add and no reformat between INT8 convolutions in {total} layers{note}", inspected)


def layers_of(bundle: Bundle) -> list[Any]:
    """As TensorRT tells them: dicts, or names where the plan was compiled with less to tell."""
    import tensorrt

    from stpm.build.gpu.graph import INPUT

    files = bundle.manifest.engines["tensorrt"]
    gpu = Gpu()  # for its context
    try:
        runtime = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.Severity.ERROR))
        engine = runtime.deserialize_cuda_engine((bundle.path / files.main).read_bytes())
        if engine is None:
            raise FailedError(f"TensorRT cannot load {bundle.path / files.main}")
        context, inspector = engine.create_execution_context(), engine.create_engine_inspector()
        # the plan is for any number of images; types are told for a given size only
        spec = bundle.manifest.preprocess
        context.set_input_shape(INPUT, (1, 3, spec.height, spec.width))
        inspector.execution_context = context
        text = inspector.get_engine_information(tensorrt.LayerInformationFormat.JSON)
        del inspector, context, engine, runtime  # before the context that they live in
    finally:
        gpu.close()
    try:
        layers: list[Any] = json.loads(text)["Layers"]
    except (ValueError, KeyError, TypeError) as error:
        raise FailedError(f"the inspector's answer cannot be read ({error}): {text[:80]!r}") from error
    return layers


# what a list of layers says

_TYPES = {"int8": ("int8",), "half": ("fp16", "half"), "float": ("fp32", "float")}
# "Add" in a path, as a word, or in the joined names of generated kernels (__myl_CastAddMax); not in "Address"
_ADD = re.compile(r"(?<![A-Za-z])(add|sum|plus)(?![a-z])|(Add|Sum|Plus|SUM)(?![a-z])")


def findings(layers: Iterable[Any]) -> list[str]:
    """Layers that an INT8 network should not have; one sentence each, empty is right.

    A float Add by itself; a convolution that adds a shortcut in float although its own input is INT8; and a reformat
    from INT8 to INT8 between two convolutions. Layers of which only the name is known, and tensors without a type,
    raise no finding: `untold` counts them. What happens inside a convolution, and whether an unfused Q or DQ costs
    more than it saves, cannot be seen here.
    """
    known = [layer for layer in layers if isinstance(layer, dict)]
    makers = {tensor.get("Name"): layer for layer in known for tensor in _tensors(layer, "Outputs")}
    readers: dict[Any, list[dict[str, Any]]] = {}
    for layer in known:
        for tensor in _tensors(layer, "Inputs"):
            readers.setdefault(tensor.get("Name"), []).append(layer)
    found = []
    for layer in known:
        name, inputs, outputs = layer.get("Name", "?"), _tensors(layer, "Inputs"), _tensors(layer, "Outputs")
        types = [_type(tensor) for tensor in (*inputs, *outputs)]
        if _reformats(layer):
            before = [makers.get(tensor.get("Name"), {}) for tensor in inputs]
            after = [reader for tensor in outputs for reader in readers.get(tensor.get("Name"), [])]
            if set(types) == {"int8"} and _some_convolve(before) and _some_convolve(after):
                found.append(f"{name} reformats INT8 between two convolutions")
        elif _convolves(layer):
            if _adds_float(inputs, outputs):
                found.append(f"{name} is an INT8 convolution and adds a shortcut in float")
        elif _adds(layer) and {"float", "half"} & set(types):
            found.append(f"{name} adds in float")
    return found


def untold(layers: Iterable[Any]) -> int:
    """How many layers do not tell the type of any tensor."""
    return sum(
        not isinstance(layer, dict)
        or not any(_type(tensor) for side in ("Inputs", "Outputs") for tensor in _tensors(layer, side))
        for layer in layers
    )


def _tensors(layer: dict[str, Any], side: str) -> list[dict[str, Any]]:
    return [tensor for tensor in layer.get(side) or [] if isinstance(tensor, dict)]


def _type(tensor: dict[str, Any]) -> str | None:
    """Out of "Format/Datatype", which is a word or a sentence: "Half", "Row major linear FP16 format"."""
    keys = ("Format/Datatype", "Datatype", "DataType", "Format")
    text = " ".join(str(tensor[key]) for key in keys if key in tensor).lower()
    return next((kind for kind, words in _TYPES.items() if any(word in text for word in words)), None)


def _kinds(layer: dict[str, Any]) -> str:
    return f"{layer.get('LayerType', '')} {layer.get('ParameterType', '')}".lower()


def _convolves(layer: dict[str, Any]) -> bool:
    return "conv" in _kinds(layer) or "/Conv" in f"{layer.get('Name', '')}{layer.get('Metadata', '')}"


def _some_convolve(layers: list[dict[str, Any]]) -> bool:
    return any(_convolves(layer) and not _reformats(layer) for layer in layers)


def _reformats(layer: dict[str, Any]) -> bool:
    return "reformat" in _kinds(layer) or str(layer.get("Name", "")).startswith("Reformatting CopyNode")


def _adds(layer: dict[str, Any]) -> bool:
    said = [layer.get(key, "") for key in ("Name", "Metadata", "ParameterSubType", "Operation")]
    return any(_ADD.search(str(text)) for text in (*said, *(layer.get("Operations") or ())))


def _adds_float(inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> bool:
    """A second input with the size of the output is a shortcut."""
    sizes = [tensor.get("Dimensions") for tensor in outputs]
    shortcuts = [tensor for tensor in inputs[1:] if tensor.get("Dimensions") in sizes]
    return bool(inputs) and _type(inputs[0]) == "int8" and any(_type(each) in ("float", "half") for each in shortcuts)
