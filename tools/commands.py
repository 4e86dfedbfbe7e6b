"""Where the installed commands begin that need an extra: a missing one is a sentence, not a traceback."""

import sys
from importlib import import_module


def build() -> int:
    return _start("stpm-build", "stpm.build.cli", "build_main", "build")


def train() -> int:
    return _start("stpm-train", "stpm.build.cli", "train_main", "build")


def compile_bundle() -> int:
    return _start("stpm-compile", "stpm.build.gpu.cli", "main", "tensorrt")


def tune() -> int:
    return _start("stpm-tune", "stpm.tools.tune", "main", "cpu")


def evaluate() -> int:
    return _start("stpm-eval", "stpm.tools.evaluate", "main", "cpu")


def bench() -> int:
    return _start("stpm-bench", "stpm.tools.bench", "main", "cpu")


def _start(name: str, module: str, function: str, extra: str) -> int:
    try:
        main = getattr(import_module(module), function)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("stpm"):
            raise
        print(f"{name} needs {error.name}, which is not installed: pip install 'stpm-edge[{extra}]'", file=sys.stderr)
        return 1
    result: int = main()
    return result
