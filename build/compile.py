"""From a graph to the files of a backend's engine."""

import errno
import shutil
from pathlib import Path

import onnx
import openvino

from stpm.edge.engine.openvino import OpenVinoEngine
from stpm.edge.errors import EngineError
from stpm.edge.manifest import EngineFiles
from stpm.edge.preprocess import Preprocess

BACKENDS = ("auto", "openvino", "tensorrt")
OPENVINO = EngineFiles("openvino.xml", "CPU")


def check_backend(asked: str) -> None:
    """EngineError for a backend that this version cannot compile for; "auto" is openvino."""
    if asked == "tensorrt":
        raise EngineError(
            "this version cannot compile TensorRT engines yet: use --backend openvino (the graph in the bundle is "
            "written for TensorRT 8.5 and later, so `trtexec --onnx` can compile it by hand)"
        )


def compiled_for_openvino(graph: onnx.ModelProto, file: Path, preprocess: Preprocess) -> OpenVinoEngine:
    """The engine of a graph. The graph is saved as `file`, and the files of the engine beside it."""
    onnx.save(graph, file)
    compile_openvino(file, file.parent)
    return OpenVinoEngine.of_file(file.parent / OPENVINO.main, preprocess)


def compile_openvino(graph: Path, folder: Path) -> None:
    """Write openvino.xml and openvino.bin, OpenVINO's form of an ONNX file, with the precision as it is there.

    A full disk is an OSError, as from any other write.
    """
    try:
        openvino.save_model(openvino.convert_model(graph), folder / OPENVINO.main, compress_to_fp16=False)
    except RuntimeError as error:
        if shutil.disk_usage(folder).free < graph.stat().st_size:
            raise OSError(errno.ENOSPC, "No space left on device") from error
        raise EngineError(f"OpenVINO cannot convert the graph ({error})") from error
