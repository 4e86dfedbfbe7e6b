"""A `tensorrt` module without TensorRT: it has the names that the real bindings of a version have, and no others.

`record.py` wrote those names down, so code that runs against this module cannot use one that its version lacks:

- an unknown name of the module or of a class, and a keyword or number of arguments that no overload takes, is an error
  of the type that the real bindings raise; so is setting a property that cannot be set, or a new attribute;
- enum members have the real numbers and are no ints: `1 << member` is a TypeError, `1 << int(member)` is not;
- classes can be subclassed, and one that has no constructor cannot be constructed.

What the objects *do* comes from the test: `behaviour` maps the name of a class to a plain Python class, or of a
function to a function. Such a class needs only the attributes that the code under test uses. Objects are wrapped on
their way out of a behaviour, as the class that the bindings promise there, and unwrapped on their way in. A class
without behaviour records its calls in a MagicMock; its methods return objects of the right class, True, 0, an empty
text or the first member of an enum, and a network has no layers.

Not checked: types of arguments, what an enum argument means, and anything inside layers and plugins.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import numpy as np

HERE = Path(__file__).resolve().parent
VERSIONS = ("8.5", "8.6", "10.3", "10.13", "11.4")

# What 8.6.1 has and the sources of the 8.5 bindings (python/src in NVIDIA/TensorRT) have not.
NEW_CLASSES = {"ICastLayer", "INormalizationLayer", "IReverseSequenceLayer"}
NEW_ENUMS = {"HardwareCompatibilityLevel", "OnnxParserFlag", "TempfileControlFlag"}
NEW_ATTRIBUTES = {
    "Builder": {"get_plugin_registry"},
    "IAlgorithmIOInfo": {"components_per_element", "vectorized_dim"},
    "IBuilderConfig": {
        "builder_optimization_level",
        "hardware_compatibility_level",
        "max_aux_streams",
        "plugins_to_serialize",
    },
    "ICudaEngine": {"hardware_compatibility_level", "num_aux_streams"},
    "IExecutionContext": {"set_aux_streams"},
    "ILayer": {"metadata"},
    "INetworkDefinition": {"add_cast", "add_normalization", "add_reverse_sequence", "builder"},
    "OnnxParser": {"clear_flag", "flags", "get_flag", "get_used_vc_plugin_libraries", "set_flag"},
    "Runtime": {
        "engine_host_code_allowed",
        "get_plugin_registry",
        "load_runtime",
        "tempfile_control_flags",
        "temporary_directory",
    },
}
NEW_MEMBERS = {
    "BuilderFlag": {"VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME", "FP8"},
    "DataType": {"FP8"},
    "LayerType": {"REVERSE_SEQUENCE", "NORMALIZATION", "CAST"},
    "MemoryPoolType": {"TACTIC_DRAM"},
    "PreviewFeature": {"PROFILE_SHARING_0806"},
    "TensorFormat": {"DHWC"},
    "UnaryOperation": {"ISINF"},
}
# 8.6 can ask about one optimization profile, 8.5 only about the first
PROFILE_OVERLOAD = " | (name, profile_index)"

ITEM_SIZE = {"FLOAT": 4, "HALF": 2, "BF16": 2, "INT8": 1, "INT32": 4, "INT64": 8, "BOOL": 1, "UINT8": 1, "FP8": 1}
ITEM_SIZE |= {"INT4": 0.5, "FP4": 0.5}
NUMPY_TYPE = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT8": np.int8,
    "INT32": np.int32,
    "INT64": np.int64,
    "BOOL": np.bool_,
    "UINT8": np.uint8,
}
SCALARS: dict[str, Any] = {"None": None, "bool": True, "int": 0, "float": 0.0, "str": ""}


def names(version: str) -> dict[str, Any]:
    """The record of a version as record.py describes it, with the attributes of base classes filled in.

    8.5 is derived, as 8.6.1 without what 8.6 added, and not recorded: its bindings come only with all of TensorRT,
    549 MB, and only up to Python 3.10. Compared once with the real 8.5.3.1: equal, save four helpers (`find_lib`,
    `try_load`, `lib`, `CURDIR`) that its wheel leaves in the module.
    """
    record = json.loads((HERE / f"{'8.6' if version == '8.5' else version}.json").read_text())
    if version == "8.5":
        _take_back(record)
    for name in record["classes"]:
        base = record["bases"].get(name)
        while base:
            record["classes"][name] = {**record["classes"].get(base, {}), **record["classes"][name]}
            base = record["bases"].get(base)
    return record


def _take_back(record: dict[str, Any]) -> None:
    record["version"] = "8.5.3.1"
    for name, gone in NEW_ATTRIBUTES.items():
        for attribute in gone:
            del record["classes"][name][attribute]
    for name, gone in NEW_MEMBERS.items():
        for member in gone:
            del record["enums"][name][member]
    for name in NEW_ENUMS:
        del record["enums"][name]
    for attribute, facts in record["classes"]["ICudaEngine"].items():
        record["classes"]["ICudaEngine"][attribute] = facts.split(PROFILE_OVERLOAD)[0]
    record["module"] = [name for name in record["module"] if name not in NEW_CLASSES | NEW_ENUMS | {"fp8"}]
    record["bases"] = {name: base for name, base in record["bases"].items() if name not in NEW_CLASSES}
    del record["values"]["fp8"]


class Member:
    """Member of an enum as pybind11 makes them: hashable, with name, value and int(), equal to its own kind only."""

    __slots__ = ("_number",)
    __members__: dict[str, "Member"]

    def __init__(self, value: int) -> None:
        object.__setattr__(self, "_number", int(value))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{self!r} has no attribute {name!r} that can be set")

    @property
    def name(self) -> str:
        return next((name for name, member in self.__members__.items() if member._number == self._number), "???")

    @property
    def value(self) -> int:
        return self._number

    def __int__(self) -> int:
        return self._number

    __index__ = __int__

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other._number == self._number

    def __hash__(self) -> int:
        return hash(self._number)

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return type(self), (self._number,)

    def __str__(self) -> str:
        return f"{type(self).__name__}.{self.name}"

    def __repr__(self) -> str:
        return f"<{self}: {self._number}>"


class OrderedMember(Member):
    __slots__ = ()

    def __lt__(self, other: object) -> bool:
        return self._number < other._number if type(other) is type(self) else NotImplemented

    def __le__(self, other: object) -> bool:
        return self._number <= other._number if type(other) is type(self) else NotImplemented


def _enum(name: str, numbers: dict[str, int], ordered: bool) -> type[Member]:
    body: dict[str, Any] = {"__slots__": (), "__module__": "tensorrt", "__members__": {}}
    if name == "DataType":
        body["itemsize"] = property(lambda member: ITEM_SIZE.get(member.name))
    enum = type(name.rpartition(".")[2], (OrderedMember if ordered else Member,), body)
    for member, number in numbers.items():
        enum.__members__[member] = enum(number)
        setattr(enum, member, enum.__members__[member])
    return enum


class _Type(type):
    """pybind11 insists that a subclass calls the constructor of its base."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        made = super().__call__(*args, **kwargs)
        if not hasattr(made, "_inner"):
            raise TypeError(f"{cls.__name__}.__init__() must be called when overriding __init__")
        return made


class _Attribute:
    """A method or property of a class, by what record.py wrote of it, that passes on to the object inside."""

    def __init__(self, world: "_World", owner: str, name: str, facts: str) -> None:
        self.world, self.owner, self.name = world, owner, name
        self.overloads = facts.split(" | ") if facts.startswith("(") else []
        self.getter, self.setter = (word in facts.split() for word in ("get", "set"))
        self.result = facts.rpartition("-> ")[2] if "->" in facts else ""

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        if self.overloads:
            return lambda *args, **kwargs: self(instance, *args, **kwargs)
        if not self.getter:
            raise AttributeError(f"unreadable attribute {self.owner}.{self.name}")
        return self.world.wrapped(getattr(instance._inner, self.name), self.result)

    def __set__(self, instance: Any, value: Any) -> None:
        if not self.setter:
            raise AttributeError(f"can't set attribute {self.owner}.{self.name}")
        setattr(instance._inner, self.name, self.world.unwrapped(value))

    def __call__(self, instance: Any, *args: Any, **kwargs: Any) -> Any:
        self.check(args, kwargs)
        if self.name in ("__enter__", "__exit__"):
            return instance if self.name == "__enter__" else None
        args = tuple(self.world.unwrapped(value) for value in args)
        kwargs = {key: self.world.unwrapped(value) for key, value in kwargs.items()}
        if self.name.startswith("__") and not hasattr(instance._inner, self.name):
            # Python asks for the length of whatever it iterates over, and takes a TypeError for an answer
            raise TypeError(f"the behaviour of {self.owner} has no {self.name}")
        return self.world.wrapped(getattr(instance._inner, self.name)(*args, **kwargs), self.result)

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not any(_takes(overload, len(args), set(kwargs)) for overload in self.overloads):
            wanted = " or ".join(self.overloads)
            raise TypeError(
                f"{self.owner}.{self.name}{wanted}: incompatible function arguments, "
                f"{len(args)} by position and {sorted(kwargs)} by keyword"
            )


def _takes(overload: str, positions: int, keywords: set[str]) -> bool:
    words = [word for word in overload[1 : overload.index(")")].split(", ") if word]
    if any(word.startswith("*") for word in words):
        return True
    rest = words[positions:]
    required = {word for word in rest if not word.endswith("=")}
    return positions <= len(words) and required <= keywords <= {word.removesuffix("=") for word in rest}


class _HostMemory(bytearray):
    """Host memory is a buffer, which a class in Python can only be by being one. Nothing else of it shows."""

    __slots__ = ("_inner",)
    __hash__ = object.__hash__

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_") and hasattr(bytearray, name):
            raise AttributeError(f"'tensorrt.IHostMemory' object has no attribute {name!r}")
        return super().__getattribute__(name)

    def __bool__(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return self is other

    @property
    def nbytes(self) -> int:
        return len(memoryview(self))


class _World:
    """The classes of one module, and every object that was made of them."""

    def __init__(self, record: dict[str, Any], behaviour: Mapping[str, Any]) -> None:
        self.record, self.behaviour = record, behaviour
        self.enums = {name: _enum(name, each, name in record["ordered"]) for name, each in record["enums"].items()}
        self.classes: dict[str, type] = {}
        self.made: list[tuple[str, Any]] = []
        self.wrappers: dict[int, Any] = {}
        for name in record["module"]:
            if name[0].isupper() and name not in record["enums"] and name not in record["values"]:
                self.class_of(name)

    def value(self, path: str) -> Any:
        """`DataType.FLOAT`, or the enum itself."""
        if path in self.enums:
            return self.enums[path]
        enum, _, member = path.rpartition(".")
        return self.enums[enum].__members__[member]

    def class_of(self, name: str) -> type:
        if name not in self.classes:
            self.classes[name] = self._class(name)
        return self.classes[name]

    def _class(self, name: str) -> type:
        facts = self.record["classes"].get(name, {})
        base = self.record["bases"].get(name)
        body: dict[str, Any] = {"__slots__": () if base else ("_inner", "__weakref__"), "__module__": "tensorrt"}
        body |= {each: _Attribute(self, name, each, facts[each]) for each in facts if each != "__init__"}
        for path, value in {**self.record["values"], **{enum: enum for enum in self.enums}}.items():
            if path.startswith(f"{name}."):
                body[path.removeprefix(f"{name}.")] = self.value(value)
        if name == "IHostMemory":
            body = {"__slots__": ("__weakref__",), "__module__": "tensorrt"}
            body |= {each: _Attribute(self, name, each, facts[each]) for each in facts if each != "nbytes"}
        body["__init__"] = self._constructor(name, facts.get("__init__"))
        bases = (_HostMemory,) if name == "IHostMemory" else (self.class_of(base),) if base else ()
        return _Type(name, bases, body)

    def _constructor(self, name: str, facts: str | None) -> Callable[..., None]:
        def construct(instance: Any, *args: Any, **kwargs: Any) -> None:
            if name not in self.record["classes"]:
                raise TypeError(f"tensorrt.{name}: record.py leaves this class out")
            if facts is None:
                raise TypeError(f"tensorrt.{name}: No constructor defined!")
            _Attribute(self, name, "__init__", facts).check(args, kwargs)
            if name in self.behaviour:
                args = tuple(self.unwrapped(value) for value in args)
                kwargs = {key: self.unwrapped(value) for key, value in kwargs.items()}
                inside = self.behaviour[name](*args, **kwargs)
            else:
                inside = self.recorder(name)
            self._put(instance, name, inside)

        return construct

    def _put(self, instance: Any, name: str, inside: Any) -> Any:
        instance._inner = inside
        self.made.append((name, inside))
        self.wrappers[id(inside)] = instance
        return instance

    def recorder(self, name: str) -> MagicMock:
        """A mock with the attributes of the class, that answers what the bindings say they answer."""
        facts = {each: text for each, text in self.record["classes"].get(name, {}).items() if each != "__init__"}
        mock = MagicMock(spec_set=list(facts), name=name)
        for each, text in facts.items():
            result = text.rpartition("-> ")[2] if "->" in text else ""
            if text.startswith("(") and result:
                getattr(mock, each).return_value = self._answer(result)
            elif result:
                # what can be set is not set yet
                empty = "set" in text.split() and result in self.classes
                setattr(mock, each, None if empty else self._answer(result))
        if "__getitem__" in facts:
            mock.__getitem__.side_effect = IndexError
        if "__len__" in facts:
            # `if not engine` asks for the length too
            mock.__len__.return_value = 1
        return mock

    def _answer(self, result: str) -> Any:
        if result in SCALARS:
            return SCALARS[result]
        if result in self.enums:
            return next(iter(self.enums[result].__members__.values()))
        return _Later(result)

    def wrapped(self, value: Any, result: str) -> Any:
        """An object of a behaviour, as the class that the code under test may know."""
        if isinstance(value, _Later):
            return value.made(self)
        if id(value) in self.wrappers:
            return self.wrappers[id(value)]
        kind = next((name for name, each in self.behaviour.items() if type(value) is each), result)
        plain = value is None or isinstance(value, str | bool | int | float | tuple | list | Member)
        plain = plain or (isinstance(value, bytes) and kind != "IHostMemory")
        if kind not in self.classes or plain or isinstance(type(value), _Type):
            return value
        instance = self.classes[kind].__new__(self.classes[kind])
        if kind == "IHostMemory":
            bytearray.extend(instance, bytes(value))
        return self._put(instance, kind, value)

    def unwrapped(self, value: Any) -> Any:
        """What a behaviour gets to see: its own objects. Objects of a subclass in Python stay as they are."""
        if type(value) in (list, tuple):
            return type(value)(self.unwrapped(each) for each in value)
        return value._inner if type(value) in self.classes.values() else value


class _Later:
    """The object that a recorder will return, always the same, made when it is first asked for."""

    def __init__(self, name: str) -> None:
        self.name, self.thing = name, None

    def made(self, world: _World) -> Any:
        if self.thing is None:
            inside = b"serialized" if self.name == "IHostMemory" else world.recorder(self.name)
            self.thing = world.wrapped(inside, self.name)
        return self.thing


def module(version: str, behaviour: Mapping[str, Any] | None = None) -> ModuleType:
    """A `tensorrt` of `version`. See above for `behaviour`."""
    record, behaviour = names(version), behaviour or {}
    unknown = set(behaviour) - set(record["module"])
    if unknown:
        raise ValueError(f"TensorRT {version} has no {sorted(unknown)}")
    world = _World(record, behaviour)
    fake = ModuleType("tensorrt", f"Names of TensorRT {record['version']}, see {__name__}.")
    vars(fake).update(__version__=record["version"], __surface__=world)
    for name in record["module"]:
        setattr(fake, name, _thing(world, name))
    return fake


def _thing(world: _World, name: str) -> Any:
    if name in world.enums or name in world.record["values"]:
        return world.value(world.record["values"].get(name, name))
    if name in world.classes:
        return world.classes[name]
    if name in world.behaviour:
        return lambda *args, **kwargs: world.behaviour[name](*map(world.unwrapped, args), **kwargs)
    return {"volume": _volume, "nptype": _nptype}.get(name) or MagicMock(name=name, return_value=True)


def _volume(shape: Any) -> int:
    return int(np.prod(list(shape), dtype=np.int64))


def _nptype(kind: Member) -> type:
    if kind.name not in NUMPY_TYPE:
        raise TypeError("Could not resolve TensorRT datatype to an equivalent numpy datatype.")
    return NUMPY_TYPE[kind.name]


def inside(thing: Any) -> Any:
    """The behaviour, or the MagicMock, behind an object of a fake class."""
    return thing._inner


def made(tensorrt: ModuleType, name: str) -> list[Any]:
    """What is inside each object of the class `name` that came to be in this module, oldest first."""
    return [each for kind, each in vars(tensorrt)["__surface__"].made if kind == name]


@contextlib.contextmanager
def installed(
    version: str, behaviour: Mapping[str, Any] | None = None, fresh: tuple[str, ...] = ("polygraphy",)
) -> Iterator[ModuleType]:
    """`import tensorrt` gives the fake of `version`, and the packages in `fresh` are imported anew.

    polygraphy keeps the first tensorrt it sees. Name here every module of ours that keeps polygraphy or tensorrt.
    """
    fresh = (*fresh, "tensorrt")
    before = _loaded(fresh)
    for name in before:
        del sys.modules[name]
    fake = sys.modules["tensorrt"] = module(version, behaviour)
    try:
        yield fake
    finally:
        for name in _loaded(fresh):
            del sys.modules[name]
            _forget(name)
        for name, each in before.items():
            sys.modules[name] = each
            parent, _, child = name.rpartition(".")
            if parent in sys.modules:
                setattr(sys.modules[parent], child, each)


def _loaded(packages: tuple[str, ...]) -> dict[str, ModuleType]:
    wanted = tuple(f"{name}." for name in packages)
    return {name: each for name, each in sys.modules.items() if name in packages or name.startswith(wanted)}


def _forget(name: str) -> None:
    """An imported module is an attribute of its package too."""
    parent, _, child = name.rpartition(".")
    if parent in sys.modules:
        vars(sys.modules[parent]).pop(child, None)
