"""The engine process of one bundle: a slot of the ring in, a score out.

In a process of its own, because an inference that hangs in a driver cannot be interrupted, one that crashes takes its
process with it, and the line must answer for its parts all the same.
"""

import time
from pathlib import Path

from stpm.edge.bundle import Bundle, open_bundle
from stpm.edge.channel import Channel, ChannelClosedError
from stpm.edge.engine import Engine, open_engine
from stpm.edge.engine.messages import (
    EngineFailed,
    EngineReady,
    EngineSettings,
    Inspect,
    Inspected,
    InspectionFailed,
    TestYourself,
    ToEngine,
)
from stpm.edge.errors import BundleError, DeviceError, EngineError, FrameError, InputError, StpmError
from stpm.edge.ring import MAP_BYTES, Ring
from stpm.edge.selftest import self_test
from stpm.edge.worker import serve

# an engine that fails this often in a row will not recover by itself; frames that cannot be judged do not count
FAILURES_IN_A_ROW = 10


def main(settings: EngineSettings, channel: Channel[ToEngine], ring: Ring) -> None:
    engine: Engine | None = None
    try:
        bundle = open_bundle(Path(settings.bundle))
        if settings.sha256 not in ("", bundle.sha256):
            raise BundleError(
                f"{bundle.path} is another bundle than the one that judged before the engine was started again: "
                "`stpm-ctl reload` takes it, or put the earlier one back"
            )
        engine = open_engine(bundle, settings.backend, settings.script)
        channel.send(_ready(bundle, engine))
        _answer(bundle, engine, channel, ring)
    except StpmError as error:
        # before it is closed, because the driver of a device that is gone may hang there
        channel.send(EngineFailed(type(error).__name__, str(error), error.exit_code))
    except ChannelClosedError:
        pass  # the line has ended, or has given us up
    finally:
        if engine is not None:
            engine.close()


def _ready(bundle: Bundle, engine: Engine) -> EngineReady:
    deviation = self_test(bundle, engine)
    engine.warm_up()
    manifest = bundle.manifest
    return EngineReady(
        engine.describe(),
        deviation,
        manifest.category,
        bundle.sha256,
        manifest.threshold.value,
        manifest.training.photo_size,
        manifest.preprocess.roi,
    )


def _answer(bundle: Bundle, engine: Engine, channel: Channel[ToEngine], ring: Ring) -> None:
    failures = 0
    while True:
        for message in channel.receive(timeout=60):
            if isinstance(message, TestYourself):
                channel.send(_ready(bundle, engine))
                continue
            try:
                channel.send(_inspect(engine, ring, message))
                failures = 0
            except (InputError, FrameError) as error:  # the frame's fault; it says nothing of the engine
                channel.send(_failed(message, error))
            except DeviceError:
                raise  # a GPU that is gone does not come back: a new process is needed
            except EngineError as error:
                channel.send(_failed(message, error))
                failures += 1
                if failures >= FAILURES_IN_A_ROW:
                    raise EngineError(
                        f"the engine has failed {failures} times in a row and does not recover, the last time: {error}"
                    ) from error


def _failed(asked: Inspect, error: StpmError) -> InspectionFailed:
    return InspectionFailed(asked.part, type(error).__name__, str(error))


def _inspect(engine: Engine, ring: Ring, asked: Inspect) -> Inspected:
    began = time.monotonic_ns()
    found = engine.inspect(ring.image(asked.slot, asked.shape), asked.threshold, asked.with_map)
    shape = None
    if found.map is not None and found.map.nbytes <= MAP_BYTES:  # a larger one is judged, and not drawn
        shape = (found.map.shape[0], found.map.shape[1])
        ring.map(asked.slot, shape)[:] = found.map
    return Inspected(asked.part, found.score, found.box, found.area, shape, began, time.monotonic_ns())


if __name__ == "__main__":
    serve(EngineSettings, ToEngine, main)
