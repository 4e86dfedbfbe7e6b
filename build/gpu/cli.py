"""stpm-compile: give a bundle an engine for the GPU of this machine."""

import argparse
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import numpy as np
import onnx

from stpm.build.gpu.plan import PlanOptions, compile_tensorrt
from stpm.build.steps import default_work
from stpm.edge.bundle import MANIFEST, Bundle, file_hash, find_bundle, open_bundle
from stpm.edge.cli import count
from stpm.edge.command import parser, run_command
from stpm.edge.engine.tensorrt import TensorRtEngine
from stpm.edge.errors import SelfTestError
from stpm.edge.manifest import Manifest, encode
from stpm.edge.selftest import self_test
from stpm.edge.storage import new_folder

EXAMPLES = """\
  stpm-compile --bundle bundles/screw-int8
  stpm-compile --bundle bundles/screw-fp16 --engine-batch 8 --workspace 512
  stpm-compile --bundle bundles/screw-int8 --tactic-sources EDGE_MASK_CONVOLUTIONS,JIT_CONVOLUTIONS"""


def main(arguments: list[str] | None = None) -> int:
    options = parser(
        "stpm-compile",
        "Compile the graph of a bundle for the GPU of this machine, and keep the engine in the bundle when it gives "
        "the recorded answers on the golden frames.",
        EXAMPLES,
    )
    options.add_argument("--bundle", type=Path, metavar="DIR", help="default: the only bundle in ./bundles")
    add_plan_options(options)
    options.add_argument(
        "--work",
        type=Path,
        default=default_work(),
        metavar="DIR",
        help="where TensorRT's timings are kept for re-use (default: ~/.cache/stpm-edge)",
    )
    chosen = options.parse_args(arguments)

    def command() -> None:
        bundle = open_bundle(chosen.bundle or find_bundle())
        print(_report(compile_bundle(bundle, plan_options(chosen), chosen.work)))

    return run_command("stpm-compile", command, "the bundle is as before")


def add_plan_options(options: argparse.ArgumentParser) -> None:
    default = PlanOptions()
    add = options.add_argument_group("TensorRT").add_argument
    add(
        "--engine-batch",
        type=count,
        action="append",
        metavar="N",
        help="images at once; may be given several times, and 1 is always among them",
    )
    add(
        "--workspace",
        type=count,
        default=default.workspace_mib,
        metavar="MIB",
        help=f"memory that a layer may use while it runs (default: {default.workspace_mib})",
    )
    add(
        "--optimization-level",
        type=int,
        choices=range(6),
        metavar="0-5",
        help="how long to look for fast kernels; from 8.6",
    )
    add("--aux-streams", type=int, metavar="N", help="streams beside the first one for the two branches; from 8.6")
    add("--tactic-sources", metavar="NAME,...", help="libraries to take kernels from, by TensorRT's names")
    add("--hardware-compatible", action="store_true", help="let it run on every GPU from Ampere on; from 8.6")
    add("--version-compatible", action="store_true", help="let it run with later TensorRT versions; from 8.6")
    add("--dla", type=int, metavar="CORE", help="put what it can on this DLA core (Jetson)")
    add(
        "--stem",
        choices=("float", "int8", "apart"),
        default=default.stem,
        help="where the common first convolution is divided for the two networks, or that there is none "
        f"(default: {default.stem})",
    )
    add(
        "--int8-features",
        action="store_true",
        help="hand features to the kernels as INT8 where they are quantised anyway",
    )


def plan_options(chosen: argparse.Namespace) -> PlanOptions:
    # frames from a camera come one at a time, so there is always a profile for one
    batches = {1, *(chosen.engine_batch or ())}
    return PlanOptions(
        tuple(sorted(batches)),
        chosen.workspace,
        chosen.optimization_level,
        chosen.aux_streams,
        tuple(chosen.tactic_sources.split(",")) if chosen.tactic_sources else None,
        chosen.hardware_compatible,
        chosen.version_compatible,
        chosen.dla,
        chosen.int8_features,
        chosen.stem,
    )


def compile_bundle(bundle: Bundle, options: PlanOptions, work: Path) -> Manifest:
    """Replace the bundle by one that also has a TensorRT engine; when anything fails it stays as it is.

    SelfTestError when the engine's answers to the golden frames are not the recorded ones.
    """
    manifest = bundle.manifest
    with TemporaryDirectory() as place:
        made = Path(place)
        graph = onnx.load(bundle.path / manifest.graph)
        files = compile_tensorrt(graph, manifest.preprocess, made, options, work)
        with TensorRtEngine.of_files(made, files, manifest.preprocess) as engine:
            deviation = self_test(bundle, engine)
            _check_batches(bundle, engine)
        print(f"self test passed: largest deviation {deviation:.2%} of the golden scores", flush=True)
        manifest = msgspec.structs.replace(
            manifest,
            engines=manifest.engines | {"tensorrt": files},
            files=manifest.files | {name: file_hash(made / name) for name in files.names},
        )
        with new_folder(bundle.path) as folder:
            for name in manifest.files:
                shutil.copy2((made if name in files.names else bundle.path) / name, folder / name)
            (folder / MANIFEST).write_bytes(encode(manifest))
    return manifest


def _check_batches(bundle: Bundle, engine: TensorRtEngine) -> None:
    """Every number of images has memory formats of its own, and the self test sees one image at a time only."""
    golden, spec = bundle.golden(), bundle.manifest.preprocess
    for images in engine.batches:
        chosen = np.arange(images) % len(golden.frames)
        found = engine.infer(np.concatenate([spec(golden.frames[index]) for index in chosen]))
        deviation = float(np.max(np.abs(found.scores - golden.scores[chosen]) / golden.scores[chosen]))
        if not deviation <= bundle.manifest.golden.tolerance:
            raise SelfTestError(
                f"the engine fails its self test with {images} images at once: it differs by {deviation:.2%} of the "
                f"recorded score and {bundle.manifest.golden.tolerance:.2%} is allowed; compile without "
                f"--engine-batch {images}"
            )


def _report(manifest: Manifest) -> str:
    plan = manifest.engines["tensorrt"].plan
    assert plan is not None
    rows = [
        ("precision", manifest.precision),
        ("GPU", f"{manifest.engines['tensorrt'].device}, SM {plan.sm}, driver for CUDA {plan.driver}"),
        ("TensorRT", plan.tensorrt),
        ("kernels from", ", ".join(plan.tactic_sources)),
        ("images at once", ", ".join(str(images) for images in plan.batches)),
    ]
    return "\n".join(f"  {name:<14} {value}" for name, value in rows)


if __name__ == "__main__":
    sys.exit(main())
