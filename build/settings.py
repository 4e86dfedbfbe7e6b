"""Which int8 settings are tried, in which order, until one is as accurate as FP32."""

from collections.abc import Callable, Iterator

from stpm.calibration.ranges import OBSERVERS
from stpm.edge.manifest import Setting

# More than this in FP16 and the engine is hardly faster than an FP16 one.
LAYERS_IN_FP16 = (1, 2, 4, 8)


def settings(first: Setting, most_sensitive: Callable[[], list[str]]) -> Iterator[Setting]:
    """The asked one; the other observers; with distillation if it was without, or the other way; then more and more of
    the most sensitive layers in FP16. `most_sensitive` is called when it comes to that: finding out takes time."""
    yield first
    for observer in OBSERVERS:
        if observer != first.observer:
            yield Setting(first.quantize, observer)
    yield Setting("ptq" if first.quantize == "qad" else "qad", first.observer)
    layers = most_sensitive()
    for count in LAYERS_IN_FP16:
        yield Setting("qad", first.observer, layers[:count])
