"""From a graph to the engine of a backend, and its files."""

import errno
import shutil
from pathlib import Path
from typing import Protocol

import onnx
import openvino

from stpm.build.gpu.plan import PlanOptions, check_gpu, compile_tensorrt
from stpm.edge.engine import Engine
from stpm.edge.engine.openvino import OpenVinoEngine
from stpm.edge.engine.tensorrt import TensorRtEngine
from stpm.edge.errors import EngineError
from stpm.edge.manifest import EngineFiles
from stpm.edge.preprocess import Preprocess

BACKENDS = ("openvino", "tensorrt")
OPENVINO = EngineFiles("openvino.xml", "CPU")


class Compiler(Protocol):
    name: str
    files: EngineFiles  # of the graph that was compiled last

    def check(self) -> None:
        """EngineError when this machine cannot compile; before hours of training, not after."""

    def compile(self, graph: onnx.ModelProto, file: Path, preprocess: Preprocess) -> None:
        """Save the graph as `file`, and the files of its engine beside it, in place of earlier ones."""

    def open(self, folder: Path, preprocess: Preprocess) -> Engine:
        """The engine that was compiled last, into this folder."""


class OpenVinoCompiler:
    name = "openvino"
    files = OPENVINO

    def check(self) -> None:
        """Any CPU will do."""

    def compile(self, graph: onnx.ModelProto, file: Path, preprocess: Preprocess) -> None:
        onnx.save(graph, file)
        compile_openvino(file, file.parent)

    def open(self, folder: Path, preprocess: Preprocess) -> OpenVinoEngine:
        return OpenVinoEngine.of_file(folder / OPENVINO.main, preprocess)


class TensorRtCompiler:
    """`caches` is where TensorRT's timings are kept."""

    name = "tensorrt"
    files: EngineFiles

    def __init__(self, options: PlanOptions, caches: Path) -> None:
        self._options, self._caches = options, caches

    def check(self) -> None:
        check_gpu()

    def compile(self, graph: onnx.ModelProto, file: Path, preprocess: Preprocess) -> None:
        onnx.save(graph, file)
        self.files = compile_tensorrt(graph, preprocess, file.parent, self._options, self._caches)

    def open(self, folder: Path, preprocess: Preprocess) -> TensorRtEngine:
        return TensorRtEngine.of_files(folder, self.files, preprocess)


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
