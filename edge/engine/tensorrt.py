"""TensorRT on an NVIDIA GPU: one engine with both networks, our kernels before and after it, one CUDA graph a frame.

    pinned frame → copy → preprocess → engine → match → combine → copy → score and box
                   '------------------ one CUDA graph ----------------'

The engine ends at the features of the taps; the head is edge/kernels. Nothing is allocated after the first frame: it
sets the size of the frames, and the power-on self test brings it.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from stpm.edge.bundle import Bundle
from stpm.edge.engine.base import ClosesOnExit, Inference, Inspection, check_input
from stpm.edge.engine.cuda import LONGEST_SET_UP_S, LONGEST_WAIT_S, Gpu
from stpm.edge.engine.cuda_graph import Graph
from stpm.edge.engine.plan import AGAIN, INPUT, STUDENT, TEACHER, Networks, check_plan, import_tensorrt
from stpm.edge.errors import EngineError, FrameError, PlanError
from stpm.edge.kernels import launches
from stpm.edge.kernels.launches import CALL, DTYPES, FINDING, Features, Launch, Resize, Tap
from stpm.edge.manifest import EngineFiles
from stpm.edge.preprocess import Image, Preprocess, Tensor, widen_grey

WARM_UP_RUNS = 5


class TensorRtEngine(ClosesOnExit):
    def __init__(self, bundle: Bundle) -> None:
        files = bundle.manifest.engines.get("tensorrt")
        if files is None:
            raise EngineError(
                f"{bundle.path} was compiled for {', '.join(bundle.manifest.engines)}, not for tensorrt: compile it "
                f"on this machine with `stpm-compile --bundle {bundle.path}`"
            )
        self._load(bundle.path, files, bundle.manifest.preprocess)

    @classmethod
    def of_files(cls, folder: Path, files: EngineFiles, preprocess: Preprocess) -> "TensorRtEngine":
        """The engine of files that are not in a bundle yet."""
        engine = cls.__new__(cls)
        engine._load(folder, files, preprocess)
        return engine

    def _load(self, folder: Path, files: EngineFiles, preprocess: Preprocess) -> None:
        plan = files.plan
        assert plan is not None, "a TensorRT engine has a plan"
        self._preprocess = preprocess
        self._closing = ExitStack()
        with ExitStack() as on_failure:
            on_failure.callback(self._closing.close)
            # the driver is looked at first: TensorRT 8.6 ends the interpreter where there is none
            self._gpu = Gpu()
            self._closing.callback(self._gpu.close)
            tensorrt = import_tensorrt()
            check_plan(plan, files.device, self._gpu, tensorrt.__version__, folder)
            self._gpu.load((folder / plan.kernels).read_bytes())
            networks = Networks(tensorrt, folder / files.main, plan)
            self._passes: dict[int, Pass] = {}
            self._frames: Frames | None = None
            self._closing.callback(self._let_go)
            for profile, images in enumerate(plan.batches):
                self._passes[images] = Pass(self._gpu, networks, profile, images, preprocess)
            on_failure.pop_all()
        # what runs on a DLA cannot be captured
        self._captures = plan.dla_core is None
        self._closed = False
        self._description = {
            "backend": "tensorrt",
            "device": self._gpu.name,
            "tensorrt": tensorrt.__version__,
            "sm": self._gpu.sm,
            "driver": f"CUDA {self._gpu.driver}",
        }

    @property
    def batches(self) -> list[int]:
        """The numbers of images that there are profiles for; `infer` cuts what it gets into these."""
        return sorted(self._passes)

    def warm_up(self) -> None:
        height, width = self._preprocess.height, self._preprocess.width
        for images in self._passes:
            for _ in range(WARM_UP_RUNS):
                self.infer(np.zeros((images, 3, height, width), np.float32))

    def infer(self, tensor: Tensor) -> Inference:
        check_input(tensor, self._preprocess)
        self._check_open()
        done = [self._passes[len(part)].infer(part) for part in self._parts(tensor)]
        return Inference(*(np.concatenate(each) for each in zip(*done, strict=True)))

    def inspect(self, frame: Image, threshold: float, with_map: bool = False) -> Inspection:
        self._check_open()
        frame = widen_grey(frame)
        return self._frames_of(*frame.shape[:2]).inspect(frame, threshold, with_map)

    def inspect_on_gpu(self, frame: Any, threshold: float, with_map: bool = False) -> Inspection:
        """A frame that lies on the GPU already, uint8 H×W×3 BGR with `__cuda_array_interface__`; it is not copied.

        Rows may be padded. Whoever wrote it must be done: its stream is not waited for. FrameError for another shape,
        type or size than that of the frames before.
        """
        self._check_open()
        height, width, address, pitch = _on_gpu(frame)
        return self._frames_of(height, width).inspect_on_gpu((height, width), address, pitch, threshold, with_map)

    def _frames_of(self, height: int, width: int) -> "Frames":
        """Set up by the first frame. When that fails the engine is closed: there is no second first frame."""
        if self._frames is None:
            try:
                self._frames = Frames(self._gpu, self._passes[1], self._preprocess, height, width, self._captures)
            except EngineError:
                self.close()
                raise
        return self._frames

    def profile(self, frame: Image, runs: int) -> dict[str, list[float]]:
        self.inspect(frame, np.inf)
        assert self._frames is not None
        timed = [self._frames.timed() for _ in range(runs)]
        return {part: [each[part] for each in timed] for part in ("preprocess", "pyramids", "head")}

    def describe(self) -> dict[str, str]:
        return dict(self._description)

    def close(self) -> None:
        if not self._closed:
            self._gpu.check_thread()
            self._closed = True
            self._closing.close()

    def _let_go(self) -> None:
        """Graphs first, then contexts, which hold the engine; the memory that they point to goes with the GPU."""
        self._gpu.settle()
        if self._frames is not None:
            self._frames.close()
        for each in self._passes.values():
            each.close()
        self._frames, self._passes = None, {}

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("the engine is closed: open it again")

    def _parts(self, tensor: Tensor) -> Iterator[Tensor]:
        """Cut into the numbers of images that there are profiles for, the largest first."""
        while len(tensor):
            images = max(each for each in self._passes if each <= len(tensor))
            yield tensor[:images]
            tensor = tensor[images:]


class Pass:
    """A number of images through the networks and the head: a TensorRT context and the memory around it.

    `tensor` is the networks' input, float32 or float16 images × 3 × height × width.
    """

    def __init__(self, gpu: Gpu, networks: Networks, profile: int, images: int, preprocess: Preprocess) -> None:
        self._gpu, self._networks, self._profile, self._images = gpu, networks, profile, images
        self._longest_s = LONGEST_SET_UP_S  # the first time, when kernels are loaded
        height, width = preprocess.height, preprocess.width
        self._context = networks.context(profile, images, height, width, gpu.stream)
        self.tensor = gpu.staged((images, 3, height, width), DTYPES[networks.kind(INPUT)])
        networks.bind(self._context, INPUT, self.tensor.device)
        self.call = gpu.shared((1,), CALL)
        self.map = gpu.staged((images, height, width), np.float32)
        self.mask = gpu.staged((images, height, width), np.uint8)
        self.findings = gpu.shared((images,), FINDING)
        taps = [self._tap(name) for name in networks.taps]
        findings = self.findings.device
        self._match = launches.match(taps, findings, images)
        self._combine = launches.combine(
            taps, self.call.device, self.map.device, self.mask.device, findings, height, width, images
        )

    def _tap(self, name: str) -> Tap:
        """With memory for the features of both networks and for the level maps."""
        shape = tuple(self._context.get_tensor_shape(TEACHER + name))
        if len(shape) != 4 or min(shape) < 1:
            raise PlanError(f"wanted features of images × channels × height × width, found {shape} at {name}: {AGAIN}")
        _, channels, height, width = shape
        teacher, student = (self._features(side + name, channels, height * width) for side in (TEACHER, STUDENT))
        levels = self._gpu.allocate(self._images * height * width * 4)
        return Tap(teacher, student, levels, channels, height, width)

    def _features(self, name: str, channels: int, pixels: int) -> Features:
        kind, vector = self._networks.kind(name), self._networks.vector(name, channels, self._profile)
        size = self._images * -(-channels // vector) * vector * pixels * np.dtype(DTYPES[kind]).itemsize
        address = self._gpu.allocate(size)
        self._networks.bind(self._context, name, address)
        return Features(address, kind, vector, self._networks.scale(name))

    def infer(self, tensor: Tensor) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Maps and scores of a float32 tensor with this pass's number of images."""
        np.copyto(self.tensor.host, tensor, casting="same_kind")
        self.call.host["threshold"] = np.inf
        self._gpu.send(self.call)
        self._gpu.send(self.tensor)
        self.enqueue_networks()
        self.enqueue_head()
        self._gpu.fetch(self.map)
        self._gpu.fetch(self.findings)
        self._gpu.wait(self._longest_s)
        self._longest_s = LONGEST_WAIT_S * self._images
        return self.map.host.copy(), self.findings.host["score"].copy()

    def enqueue_networks(self) -> None:
        if not self._context.execute_async_v3(self._gpu.stream):
            raise EngineError(f"TensorRT failed on a frame ({self._networks.complaint()})")

    def enqueue_head(self) -> None:
        self._gpu.launch(self._match)
        self._gpu.launch(self._combine)

    def close(self) -> None:
        """Let go of TensorRT's objects; the memory belongs to the GPU."""
        del self._context, self._networks


class Frames:
    """Frames of one size, from the camera's pixels to score and box, through a pass of one image."""

    def __init__(self, gpu: Gpu, one: Pass, preprocess: Preprocess, height: int, width: int, captures: bool) -> None:
        self._gpu, self._pass, self._size = gpu, one, (height, width)
        resize = Resize.of(preprocess, height, width)
        rows, columns = resize.placed(gpu.constant)
        self._pixels = gpu.shared((height, width, 3), np.uint8)
        half = one.tensor.host.dtype == np.float16
        self._launch: Launch = launches.preprocess(
            preprocess, rows, columns, resize.half_up, one.call.device, one.tensor.device, half, 1
        )
        self._call(self._pixels.device, width * 3, np.inf)
        # once for real, because TensorRT sets things up that must not be captured
        self._enqueue(copied=True)
        gpu.wait(LONGEST_SET_UP_S)
        # a graph for frames that are copied to the GPU, and one for those that are there
        self._graphs: dict[bool, Graph] = {}
        if captures:
            self._graphs = {copied: gpu.captured(partial(self._enqueue, copied)) for copied in (True, False)}

    def _enqueue(self, copied: bool) -> None:
        self._enqueue_frame(copied)
        self._pass.enqueue_networks()
        self._pass.enqueue_head()
        self._gpu.fetch(self._pass.findings)

    def _enqueue_frame(self, copied: bool) -> None:
        if copied:
            self._gpu.send(self._pixels)
        self._gpu.send(self._pass.call)
        self._gpu.launch(self._launch)

    def inspect(self, frame: Image, threshold: float, with_map: bool) -> Inspection:
        self._check_size(frame.shape[:2])
        np.copyto(self._pixels.host, frame)
        self._call(self._pixels.device, self._size[1] * 3, threshold)
        return self._run(True, with_map)

    def inspect_on_gpu(
        self, size: tuple[int, int], address: int, pitch: int, threshold: float, with_map: bool
    ) -> Inspection:
        self._check_size(size)
        self._call(address, pitch, threshold)
        return self._run(False, with_map)

    def timed(self) -> dict[str, float]:
        """Milliseconds of the parts of the frame that came last, without the graph."""
        one = self._pass
        return self._gpu.timed(
            {
                "preprocess": partial(self._enqueue_frame, copied=True),
                "pyramids": one.enqueue_networks,
                "head": one.enqueue_head,
            }
        )

    def close(self) -> None:
        for graph in self._graphs.values():
            graph.close()

    def _call(self, address: int, pitch: int, threshold: float) -> None:
        self._pass.call.host[0] = (address, pitch, 0, threshold, 0)

    def _run(self, copied: bool, with_map: bool) -> Inspection:
        if copied in self._graphs:
            self._gpu.replay(self._graphs[copied])
        else:
            self._enqueue(copied)
        if with_map:
            self._gpu.fetch(self._pass.map)
            self._gpu.fetch(self._pass.mask)
        self._gpu.wait()
        found = self._pass.findings.host[0]
        box = None
        if found["area"]:
            left, top, right, bottom = (int(found[name]) for name in ("left", "top", "right", "bottom"))
            box = left, top, right + 1 - left, bottom + 1 - top
        inspection = Inspection(float(found["score"]), box, int(found["area"]))
        if not with_map:
            return inspection
        return replace(inspection, map=self._pass.map.host[0].copy(), mask=self._pass.mask.host[0].astype(bool))

    def _check_size(self, size: tuple[int, ...]) -> None:
        if size != self._size:
            raise FrameError(
                f"wanted frames of {self._size[1]}×{self._size[0]} pixels like the first one, found {size[1]}×"
                f"{size[0]}: set the camera to the size that the bundle was built for"
            )


def _on_gpu(frame: Any) -> tuple[int, int, int, int]:
    """Height, width, address and bytes from row to row."""
    interface = getattr(frame, "__cuda_array_interface__", None)
    if interface is None:
        raise FrameError(
            f"wanted a frame on the GPU with __cuda_array_interface__, found {type(frame).__name__}: give a frame in "
            "host memory to `inspect`"
        )
    shape, kind = tuple(interface["shape"]), interface["typestr"]
    if len(shape) != 3 or shape[2] != 3 or kind != "|u1":
        raise FrameError(f"wanted a frame of uint8 H×W×3 (BGR) on the GPU, found {kind} {shape}: convert it first")
    address, (row, pixel, channel) = int(interface["data"][0]), interface.get("strides") or (shape[1] * 3, 3, 1)
    if (pixel, channel) != (3, 1) or row < 3 * shape[1]:
        raise FrameError(f"wanted pixels of 3 bytes side by side, found strides {row, pixel, channel}: copy it first")
    if not address:
        raise FrameError("wanted a frame on the GPU, found one whose memory is not there: make it again")
    return shape[0], shape[1], address, row
