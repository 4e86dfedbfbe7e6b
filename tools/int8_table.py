"""What INT8 costs and brings, over seeds: FP32, post-training quantisation with every observer, and distillation.

Every figure is measured through the compiled OpenVINO engine of its graph. Latency is taken in turns, frame by frame,
so that a busy machine slows all engines alike. "FP32 fine-tuned" is the control of distillation: the same
fine-tuning without fake quantisation, so that what more training brings is not put down to quantisation.

JSON, schema 1: {schema, started, machine, command, rows: [{name, seed, image_auroc, pixel_auroc, aupro,
map_correlation, false_rejects, latency_ms: {p50, p99, ...}}]}; map_correlation is with the FP32 maps of the same seed
on held-out normals.
"""

import argparse
import hashlib
import sys
import tempfile
from collections import defaultdict
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path

import msgspec
import numpy as np
import onnx

from stpm.build.assemble import Assembly, Wish
from stpm.build.cli import size
from stpm.build.compile import OpenVinoCompiler
from stpm.build.distil import distil
from stpm.build.graphs import Graphs
from stpm.build.methods.base import described
from stpm.build.methods.stpm import Stpm
from stpm.build.pipeline import Job, prepare
from stpm.build.pyramid import weights_hash
from stpm.build.steps import STEP_VERSION, Inputs, Steps, default_work
from stpm.build.train import Recipe
from stpm.calibration.gate import FIGURES, Measured, compare, measure
from stpm.calibration.qdq import convolutions, quantise
from stpm.calibration.ranges import OBSERVERS
from stpm.edge.cli import count
from stpm.edge.command import parser, run_command
from stpm.edge.engine.openvino import OpenVinoEngine
from stpm.edge.latency import Latency, Percentiles
from stpm.edge.manifest import Limits, Setting
from stpm.edge.preprocess import Preprocess
from stpm.edge.storage import write_json
from stpm.tools.bench import machine

SCHEMA = 1
FP32, CONTROL = "FP32", "FP32 fine-tuned"

EXAMPLES = """\
  python tools/int8_table.py --category screw --data mvtec --teacher resnet18.npz --seeds 0 1 2 --json int8.json"""


class Row(msgspec.Struct, frozen=True):
    name: str
    seed: int
    image_auroc: float | None
    pixel_auroc: float | None
    aupro: float | None
    map_correlation: float
    false_rejects: float
    latency_ms: Percentiles


class Table(msgspec.Struct, frozen=True):
    schema: int
    started: str
    machine: dict[str, str]
    command: str
    rows: list[Row]


def graphs_of(graphs: Graphs, steps: Steps) -> dict[str, onnx.ModelProto]:
    rows = {FP32: graphs.fp32, CONTROL: _fine_tuned(graphs, steps)}
    rows |= {f"INT8 ptq {observer}": graphs.int8(Setting("ptq", observer)) for observer in OBSERVERS}
    return rows | {"INT8 qad mse": graphs.int8(Setting("qad", "mse"))}


def _fine_tuned(graphs: Graphs, steps: Steps) -> onnx.ModelProto:
    def produce(folder: Path) -> None:
        unquantised = quantise(graphs.fp32, {}, in_float=convolutions(graphs.fp32))
        spec, recipe = graphs.preprocess, graphs.fine_tuning
        tuned, _ = distil(graphs.method, graphs.fp32, unquantised, graphs.pixels, spec, recipe, folder, graphs.device)
        onnx.save(tuned, folder / "graph.onnx")

    weights = {name: weights_hash(getattr(graphs, name).state_dict()) for name in ("teacher", "student")}
    pixels = hashlib.sha256(graphs.pixels.tobytes()).hexdigest()
    inputs: Inputs = {"version": STEP_VERSION, "pixels": pixels, **described(graphs.method), **weights}
    folder = steps.run("control", inputs | msgspec.structs.asdict(graphs.fine_tuning), produce)
    return onnx.load(folder / "graph.onnx")


def rows_of(job: Job, wish: Wish, runs: int) -> list[Row]:
    """All rows of one seed."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        compiler = OpenVinoCompiler()
        assembly = Assembly(job, prepare(job), wish, folder, compiler)
        engines: dict[str, OpenVinoEngine] = {}
        measured: dict[str, Measured] = {}
        spec = job.preprocess
        for name, graph in graphs_of(assembly.graphs, job.steps).items():
            place = folder / name.replace(" ", "-")
            place.mkdir()
            compiler.compile(graph, place / "graph.onnx", spec)
            engine = stack.enter_context(compiler.open(place, spec))
            engines[name] = engine
            measured[name] = measure(engine, assembly.held_out.pixels, assembly.labelled, spec, "tail", 0.01)
        latencies = _latencies(engines, spec, assembly.held_out.pixels, runs)
    return [_row(name, job.recipe.seed, measured, latencies[name].percentiles()["inference"]) for name in measured]


def _row(name: str, seed: int, measured: dict[str, Measured], latency: Percentiles) -> Row:
    compared = compare(Setting("ptq", ""), measured[name], measured[FP32], Limits())
    accuracy = measured[name].accuracy
    return Row(
        name,
        seed,
        accuracy.image_auroc,
        accuracy.pixel_auroc,
        accuracy.aupro,
        compared.map_correlation,
        compared.false_rejects,
        latency,
    )


def _latencies(
    engines: dict[str, OpenVinoEngine], spec: Preprocess, pixels: np.ndarray, runs: int
) -> dict[str, Latency]:
    latencies = {name: Latency() for name in engines}
    for engine in engines.values():
        engine.warm_up()
    for index in range(runs):
        tensor = spec.normalise(pixels[index % len(pixels)])
        for name, engine in engines.items():
            with latencies[name].stage("inference"):
                engine.infer(tensor)
    return latencies


def text_of(rows: list[Row]) -> str:
    """Two Markdown tables over seeds, mean ± standard deviation: the figures, and what is lost against the FP32 engine
    of the same seed (below zero: gained), with how many times as fast it is."""
    by_name = defaultdict(list)
    for row in rows:
        by_name[row.name].append(row)
    fp32 = {row.seed: row for row in by_name[FP32]}
    figures = ["| | image AUROC | pixel AUROC | AUPRO@30 % | maps agree | p50 |", "|---|---|---|---|---|---|"]
    losses = ["| lost against FP32 | image AUROC | pixel AUROC | AUPRO@30 % | × its speed |", "|---|---|---|---|---|"]
    for name, group in by_name.items():
        cells = [_spread([getattr(row, figure) for row in group], 4) for figure in (*FIGURES, "map_correlation")]
        cells.append(f"{_spread([row.latency_ms.p50 for row in group], 1)} ms")
        figures.append(f"| {name} | " + " | ".join(cells) + " |")
        lost = [[_difference(fp32[row.seed], row, figure) for row in group] for figure in FIGURES]
        ratios = _spread([fp32[row.seed].latency_ms.p50 / row.latency_ms.p50 for row in group], 2)
        losses.append(f"| {name} | " + " | ".join([*(_spread(values, 4) for values in lost), ratios]) + " |")
    return "\n".join([*figures, "", *losses])


def _difference(fp32: Row, row: Row, figure: str) -> float | None:
    before, after = getattr(fp32, figure), getattr(row, figure)
    return None if before is None or after is None else before - after


def _spread(values: list[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "not defined"
    mean = f"{np.mean(known):.{digits}f}"
    return mean if len(known) < 2 else f"{mean} ± {np.std(known, ddof=1):.{digits}f}"


def main(arguments: list[str] | None = None) -> int:
    options = parser("int8_table.py", "Accuracy and latency of every way to INT8, over seeds.", EXAMPLES)
    add = options.add_argument
    add("--category", required=True, metavar="NAME")
    add("--data", type=Path, required=True, metavar="ROOT")
    add("--teacher", default="imagenet", metavar="imagenet|builtin|PATH")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED")
    add("--epochs", type=count, default=Recipe().epochs)
    add("--size", type=size, default=(256, 256), metavar="N|WxH", help="as of stpm-build (default: 256)")
    add("--qad-epochs", type=count, default=Wish().fine_tuning_epochs)
    add("--runs", type=count, default=200, help="frames for the latency of each engine (default: 200)")
    add("--work", type=Path, default=default_work(), metavar="DIR")
    add("--json", type=Path, metavar="FILE")
    chosen = options.parse_args(arguments)
    return run_command("int8_table.py", lambda: _run(chosen), "finished steps are kept in --work")


def _run(options: argparse.Namespace) -> None:
    started, rows = datetime.now(timezone.utc).isoformat(timespec="seconds"), []
    width, height = options.size
    for seed in options.seeds:
        recipe = Recipe(epochs=options.epochs, seed=seed)
        steps = Steps(options.work)
        job = Job(options.data, options.category, options.teacher, Stpm(), recipe, Preprocess(height, width), steps)
        rows += rows_of(job, Wish(fine_tuning_epochs=options.qad_epochs), options.runs)
        print(text_of([row for row in rows if row.seed == seed]), flush=True)
    print(f"\n{text_of(rows)}")
    if options.json:
        teacher = Path(options.teacher).name
        command = (
            f"python tools/int8_table.py --category {options.category} --data ROOT --teacher {teacher} "
            f"--epochs {options.epochs} --size {width}x{height} --qad-epochs {options.qad_epochs} "
            f"--runs {options.runs} --seeds {' '.join(map(str, options.seeds))}"
        )
        write_json(options.json, Table(SCHEMA, started, machine(), command, rows))


if __name__ == "__main__":
    sys.exit(main())
