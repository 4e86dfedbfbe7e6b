"""What can go wrong, split by who can put it right. Every class carries the exit code of the command it ends.

    StpmError              1   anything that fits nowhere below
    ├── ConfigError        2   the file of a station, or an option that contradicts it
    ├── InputError         3   images, folders, masks, weights: the caller's files
    │   └── RegionError    3   the region of interest does not fit the frame
    ├── BundleError        4   a bundle that is missing, damaged, or of another schema
    ├── EngineError        5   the inference engine cannot be opened or failed
    │   ├── DeviceError    5   the GPU or its driver: absent, too old, out of memory, lost. It does not come back
    │   ├── PlanError      5   an engine that was compiled for another GPU or TensorRT
    │   ├── FrameError     5   a frame of another size than the engine is set up for
    │   └── SelfTestError  5   the engine's answers differ from the golden frames
    ├── CameraError        6   the frame source does not open or has stopped
    ├── PlcError           7   the serial link does not open or has stopped
    ├── StorageError       8   disk full, quota reached, or no permission to write
    ├── TrainingError      9   the loss is not a number
    └── AccuracyError     10   no int8 engine was as accurate as FP32

0 is success (for stpm-run also a stop by Ctrl-C or SIGTERM), 2 a wrong command line, 130 an interrupted build.
A message is one sentence: what was wanted, what was found, what to do next.
"""


class StpmError(Exception):
    exit_code = 1


class ConfigError(StpmError):
    exit_code = 2


class InputError(StpmError):
    exit_code = 3


class RegionError(InputError):
    pass


class BundleError(StpmError):
    exit_code = 4


class EngineError(StpmError):
    exit_code = 5


class DeviceError(EngineError):
    pass


class PlanError(EngineError):
    pass


class FrameError(EngineError):
    pass


class SelfTestError(EngineError):
    pass


class CameraError(StpmError):
    exit_code = 6


class PlcError(StpmError):
    exit_code = 7


class StorageError(StpmError):
    exit_code = 8


class TrainingError(StpmError):
    exit_code = 9


class AccuracyError(StpmError):
    exit_code = 10
