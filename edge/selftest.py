"""Power-on self test: the golden frames, as a camera gives them, must come out with the recorded answers."""

import numpy as np

from stpm.edge.bundle import Bundle
from stpm.edge.engine.base import Engine
from stpm.edge.errors import SelfTestError


def self_test(bundle: Bundle, engine: Engine) -> float:
    """The largest deviation found, as a share of the recorded score; SelfTestError when it is beyond the tolerance."""
    golden, tolerance = bundle.golden(), bundle.manifest.golden.tolerance
    worst = 0.0
    for index, frame in enumerate(golden.frames):
        found = engine.inspect(frame, bundle.manifest.threshold.value, with_map=True)
        deviation = max(
            abs(found.score - float(golden.scores[index])), float(np.abs(found.map - golden.maps[index]).max())
        ) / float(golden.scores[index])
        # written this way round so that NaN fails too
        if not deviation <= tolerance:
            raise SelfTestError(
                f"the engine fails its self test: on golden frame {index} it differs by {deviation:.2%} of the "
                f"recorded score and {tolerance:.2%} is allowed; build the bundle again on this kind of machine"
            )
        worst = max(worst, deviation)
    return worst
