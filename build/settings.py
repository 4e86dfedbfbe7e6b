"""Which int8 settings are tried, in which order, until one is as accurate as FP32."""

from collections.abc import Callable, Iterator

from stpm.calibration.ranges import OBSERVERS
from stpm.edge.manifest import Setting

# More than this in FP16 and the engine is hardly faster than an FP16 one.
LAYERS_IN_FP16 = (1, 2, 4, 8)


def settings(first: Setting, most_sensitive: Callable[[], list[str]]) -> Iterator[Setting]:
    """The asked one; post-training quantisation by every observer, which takes seconds; distillation, which takes
    minutes; then more and more of the most sensitive layers in FP16, distilled against that teacher.

    `most_sensitive` is called when it comes to that: finding out takes time.
    """
    yield first
    for observer in OBSERVERS:
        if Setting("ptq", observer) != first:
            yield Setting("ptq", observer)
    if first.quantize == "ptq":
        yield Setting("qad", first.observer)
    layers = most_sensitive()
    for count in LAYERS_IN_FP16:
        yield Setting("qad", first.observer, layers[:count])
