"""A real GPU for the kernels' tests, where there is one: `card()` opens it once, `reason()` says why there is none."""

import atexit
import tempfile
from functools import cache
from pathlib import Path

from stpm.build.gpu.kernels import compile_kernels
from stpm.edge.engine.cuda import Gpu
from stpm.edge.errors import EngineError
from stpm.tools.gpu.base import Memory


class Card(Memory):
    """Runs launches on a GPU, with the methods of cuda_on_cpu's Host; what it is given lives as long as it does."""

    name = "gpu"

    def __init__(self) -> None:
        super().__init__(Gpu())
        try:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "kernels.cubin"
                compile_kernels(self.gpu.sm, file)
                self.gpu.load(file.read_bytes())
        except EngineError:
            self.gpu.close()
            raise

    def close(self) -> None:
        self.gpu.close()


@cache
def _opened() -> Card | str:
    try:
        made = Card()
    except EngineError as error:
        return str(error)
    # pycuda ends the interpreter with an abort when a context is left at its end
    atexit.register(made.close)
    return made


def reason() -> str | None:
    """Why there is no GPU to test on: no pycuda, no driver, no device, or no nvcc; None where there is one."""
    found = _opened()
    return found if isinstance(found, str) else None


def card() -> Card:
    found = _opened()
    assert isinstance(found, Card), found
    return found
