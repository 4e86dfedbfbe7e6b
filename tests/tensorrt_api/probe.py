"""What `import tensorrt_bindings` offers, as JSON on stdout: `python -I -S probe.py FOLDER`. record.py has the format.

Runs in a process of its own: with stand-ins for TensorRT's libraries, a wrong step ends it. Nothing is constructed.
"""

import inspect
import json
import re
import sys
import types
from typing import Any

sys.path.insert(0, sys.argv[1])

import tensorrt_bindings as trt

SCALARS = {"None", "bool", "int", "float", "str"}
# a build from ONNX and inference touch none of these
LEFT_OUT = re.compile(
    r"I(?!Layer$)\w*Layer$|I(Loop|IfConditional|Attention)$|I?(Dynamic)?Plugin|IVersioned|I(Sym|Dimension|Expr)\w*$"
    r"|KernelLaunch|NodeIndices|SubGraph|FallbackString|TimingCache|I?Caffe|Uff|IBlob|Field"
)
# Python 3.12 shows the buffer protocol, earlier ones have it too
NOT_PROTOCOL = {"__del__", "__entries", "__getstate__", "__setstate__", "__hash__", "__buffer__", "__release_buffer__"}
NOT_PROTOCOL |= {"__firstlineno__", "__static_attributes__"}
# a loop at the end of the package leaves its variables behind
LEFT_BEHIND = {"attr", "value"}


def is_enum(thing: Any) -> bool:
    return isinstance(thing, type) and hasattr(thing, "__members__")


def balanced(text: str) -> int:
    """Where the bracket closes that `text` starts with."""
    depth = 0
    for position, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if depth == 0:
            return position
    raise ValueError(f"unbalanced: {text}")


def split(text: str) -> list[str]:
    """Parameters at the top level, whatever brackets their types and defaults have."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{<") - (letter in ")]}>")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def parameter(text: str) -> str:
    name = text.split(":")[0].split("=")[0].strip()
    return ("_" if re.fullmatch(r"arg\d+", name) else name) + ("=" if " = " in text else "")


def result(text: str) -> str:
    """` -> Type`, where that is a plain scalar or a class of this module.

    A class that pybind11 learns of later has its C++ name here, and three of those lose an `I` in Python.
    """
    text = text.strip()
    last = re.split(r"\.|::", text)[-1]
    nested = text.removeprefix("tensorrt_bindings.tensorrt.")
    if nested.partition(".")[0] in vars(trt) and nested != last:
        return f" -> {nested}"
    for name in (last, last.removeprefix("I")):
        if isinstance(getattr(trt, name, None), type) and last != text:
            return f" -> {name}"
    return f" -> {text}" if text in SCALARS else ""


def signature(line: str, name: str, static: bool) -> str:
    """`(a, b=) -> Type` from a signature in a pybind11 docstring, without self."""
    text = line[line.index(f"{name}(") + len(name) :]
    end = balanced(text)
    words = [parameter(each) for each in split(text[1:end])][0 if static else 1 :]
    _, arrow, returned = text[end + 1 :].partition("->")
    return f"({', '.join(words)})" + (result(returned) if arrow else "")


def method(function: Any, name: str, static: bool) -> str:
    lines = (function.__doc__ or "").splitlines()
    overloads = [line for line in lines if re.match(rf"\d+\. {re.escape(name)}\(", line)]
    overloads = overloads or [line for line in lines[:1] if line.startswith(f"{name}(")]
    if not overloads:  # the package adds a few functions in Python
        return f"({', '.join(list(inspect.signature(function).parameters)[1:])})"
    return " | ".join(dict.fromkeys(signature(each, name, static) for each in overloads))


def accessor(value: property) -> str:
    words = " ".join(word for word, has in (("get", value.fget), ("set", value.fset)) if has)
    first = ((value.fget.__doc__ if value.fget else "") or "").partition("\n")[0]
    _, arrow, returned = first.partition("->")
    return words + (result(returned) if arrow else "")


def constructible(cls: type) -> bool:
    """pybind11 gives every class an __init__; without a constructor of its own that is a slot wrapper which raises."""
    return "__init__" in vars(cls) and not isinstance(vars(cls)["__init__"], types.WrapperDescriptorType)


def attribute(cls: type, name: str) -> str:
    value = inspect.getattr_static(cls, name)
    if isinstance(value, property):
        return accessor(value)
    if callable(value):
        return method(getattr(cls, name), name, isinstance(value, staticmethod))
    return type(value).__name__


def wanted(cls: type, name: str) -> bool:
    value = vars(cls)[name]
    if name == "__init__":
        return constructible(cls)
    if name.startswith("_") and (hasattr(object, name) or not name.endswith("__") or "pybind11" in name):
        return False
    return not (name in NOT_PROTOCOL or is_enum(value) or is_enum(type(value)) or name in ("__doc__", "__module__"))


def attributes(cls: type) -> dict[str, str]:
    return {name: attribute(cls, name) for name in sorted(vars(cls)) if wanted(cls, name)}


def additions(enum: type) -> dict[str, str]:
    """Properties that the package hangs on an enum."""
    own = {name for name in vars(enum) if not name.startswith("_")} - {"name", "value"}
    return {name: accessor(vars(enum)[name]) for name in sorted(own) if isinstance(vars(enum)[name], property)}


def members(enum: Any) -> dict[str, int]:
    """In the order of the numbers; of two names of one number, the first is the one that `.name` gives."""
    return dict(sorted(((name, int(member)) for name, member in enum.__members__.items()), key=lambda pair: pair[1]))


def everything() -> dict[str, Any]:
    names = {name: getattr(trt, name) for name in dir(trt) if not name.startswith("_") and name not in LEFT_BEHIND}
    names = {name: value for name, value in names.items() if not isinstance(value, types.ModuleType)}
    classes = {name: value for name, value in names.items() if isinstance(value, type) and not is_enum(value)}
    inner = {f"{outer}.{name}": value for outer, cls in classes.items() for name, value in vars(cls).items()}
    enums = {name: value for name, value in (names | inner).items() if is_enum(value)}
    first: dict[Any, str] = {}
    for name, enum in enums.items():
        first.setdefault(enum, name)
    values = {n: f"{first[type(v)]}.{v.name}" for n, v in (names | inner).items() if type(v) in first}
    values |= {name: first[enum] for name, enum in enums.items() if first[enum] != name}
    recorded = {name: attributes(cls) for name, cls in classes.items() if not LEFT_OUT.match(name)}
    recorded |= {name: additions(enum) for name, enum in enums.items() if additions(enum)}
    return {
        "version": trt.__version__,
        "module": sorted(names),
        "values": dict(sorted(values.items())),
        "bases": {n: c.__base__.__name__ for n, c in sorted(classes.items()) if c.__base__.__name__ in classes},
        "classes": dict(sorted(recorded.items())),
        "enums": {name: members(enum) for name, enum in sorted(enums.items()) if first[enum] == name},
        "ordered": sorted(name for name, enum in enums.items() if "__lt__" in vars(enum) and first[enum] == name),
    }


if __name__ == "__main__":
    print(json.dumps(everything()))
