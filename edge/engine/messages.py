"""What an engine process and the line say to each other."""

import msgspec


class EngineSettings(msgspec.Struct, frozen=True):
    bundle: str
    backend: str = "auto"
    script: str = ""  # of the fake engine: see FakeEngine.of
    sha256: str = ""  # of the bundle that must be there; of a first start it is not known yet


class EngineReady(msgspec.Struct, frozen=True, tag=True):
    """Loaded, self test passed, warm; and what the line must know of the bundle."""

    description: dict[str, str]
    deviation: float  # largest, as a share of the golden scores
    category: str
    sha256: str  # of the bundle
    threshold: float
    photo_size: tuple[int, int]  # width and height of the photos it was trained on
    roi: tuple[int, int, int, int] | None


class EngineFailed(msgspec.Struct, frozen=True, tag=True):
    """The engine does not open, or fails its self test, or is lost; the process ends after this."""

    kind: str  # name of the error class
    sentence: str
    exit_code: int


class Inspect(msgspec.Struct, frozen=True, tag=True):
    """Line → engine: judge the frame in a slot."""

    part: int
    slot: int
    shape: tuple[int, int, int]
    threshold: float
    with_map: bool  # write the anomaly map into the slot


class Inspected(msgspec.Struct, frozen=True, tag=True):
    part: int
    score: float
    box: tuple[int, int, int, int] | None
    area: int
    map_shape: tuple[int, int] | None  # of the map in the slot
    began_ns: int  # monotonic: the inspection alone
    ended_ns: int


class InspectionFailed(msgspec.Struct, frozen=True, tag=True):
    """This frame could not be judged; the engine goes on."""

    part: int
    kind: str
    sentence: str


class TestYourself(msgspec.Struct, frozen=True, tag=True):
    """Line → engine: run the golden frames again; answered by EngineReady or EngineFailed."""


FromEngine = EngineReady | EngineFailed | Inspected | InspectionFailed
ToEngine = Inspect | TestYourself
