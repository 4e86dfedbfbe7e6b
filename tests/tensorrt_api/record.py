"""Write down which names the real TensorRT Python bindings have: `python tests/tensorrt_api/record.py [--check]`.

The bindings wheel (1 MB) needs no GPU to be imported, only the shared libraries it is linked with. Those are 1 GB and
want a driver, so empty ones stand in for them: one C function for every symbol that the bindings leave undefined.
Importing then works. Making a Builder is a TypeError, as without a GPU; making a Runtime may kill the process.

`<major.minor>.json` has, for one version:

    module   every public name of the module, except imported Python modules
    values   names of the module, or `Class.NAME`, that are members of an enum or a second name of one
    bases    base class of each class that has one in the module
    classes  class -> attribute -> what it is: `get`, `set` or `get set` for a property, and for a method its
             parameters as `(a, b=)`, with `=` where there is a default and `_` where there is no name; overloads are
             joined by ` | `. What comes back follows as `-> Type` where the bindings say it. Attributes of a base
             class are not repeated, and a class without `__init__` cannot be constructed. Left out are what a build
             from ONNX and inference do not touch: layers other than ILayer, plugins, the Caffe and UFF parsers.
    enums    enum -> member -> int
    ordered  enums whose members can be compared with `<`; with `==` all can, and none is an int

Exit status: 0 written, or equal with --check; 1 different; 3 not possible here, with the reason as the last line.
"""

import argparse
import contextlib
import ctypes
import difflib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / ".cache" / "tensorrt-bindings"
WHEELS = {
    "8.6": ("tensorrt_bindings", "8.6.1"),
    "10.3": ("tensorrt_cu12_bindings", "10.3.0"),
    "10.13": ("tensorrt_cu12_bindings", "10.13.3.9"),
    "11.4": ("tensorrt_cu13_bindings", "11.4.0.106"),
}
IMPOSSIBLE = 3


class NotPossibleHereError(Exception):
    """This computer lacks something that recording needs; says what."""


def wheel(version: str, cache: Path) -> Path:
    """The bindings of `version` for this Python, downloaded once."""
    name, exact = WHEELS[version]
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    pattern = f"{name}-{exact}-{tag}-*.whl"
    if not list(cache.glob(pattern)):
        cache.mkdir(parents=True, exist_ok=True)
        _download(f"{name}=={exact}", cache)
    found = list(cache.glob(pattern))
    if not found:
        raise NotPossibleHereError(f"no wheel {pattern} on the package index")
    return found[0]


def _download(requirement: str, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--retries=1", "--timeout=10", "--dest", str(folder), requirement]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        raise NotPossibleHereError(f"pip could not fetch {requirement} in 60 s") from None
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or ["no message"]
        raise NotPossibleHereError(f"pip could not fetch {requirement}: {errors[-1]}")


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        raise NotPossibleHereError(f"{command[0]} is not installed")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _undefined(library: Path) -> list[str]:
    """Symbols that this process does not have either. Those of libstdc++ carry a version, TensorRT's do not."""
    process = ctypes.CDLL(None)
    found = []
    for line in _output("nm", "-D", "--undefined-only", str(library)).splitlines():
        kind, symbol = line.split()[-2:]
        if kind == "U" and "@" not in symbol and not symbol.startswith(("Py", "_Py")) and not hasattr(process, symbol):
            found.append(symbol)
    return found


def _write_stubs(library: Path, folder: Path) -> None:
    needed = re.findall(r"\(NEEDED\).*\[(libnv[^]]+)\]", _output("readelf", "-d", str(library)))
    source = folder / "stubs.c"
    source.write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in _undefined(library)))
    _output("gcc", "-shared", "-fPIC", "-nostdlib", "-o", str(folder / "stubs.so"), str(source))
    for name in needed:
        shutil.copy(folder / "stubs.so", folder / name)


@contextlib.contextmanager
def unpacked(version: str, cache: Path) -> Iterator[Path]:
    """A folder with `tensorrt_bindings` and the libraries that stand in for TensorRT's."""
    archive = wheel(version, cache)
    with tempfile.TemporaryDirectory(prefix="tensorrt-") as name:
        folder = Path(name)
        with zipfile.ZipFile(archive) as content:
            content.extractall(folder)
        _write_stubs(folder / "tensorrt_bindings" / "tensorrt.so", folder)
        yield folder


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run Python with `words` in a process that finds the stand-ins, and no package that is installed here."""
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("LD_LIBRARY_PATH"))))
    environment = {**os.environ, "LD_LIBRARY_PATH": path}
    command = [sys.executable, "-I", "-S", *words, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


def _lines(words: list[str], indent: str, width: int = 116) -> str:
    lines = [indent]
    for word in words:
        if len(lines[-1]) + len(word) + 2 > width:
            lines.append(indent)
        lines[-1] += ("" if lines[-1] == indent else " ") + word + ","
    return "\n".join(lines).removesuffix(",")


def _table(rows: dict[str, str], indent: str) -> str:
    return "{\n" + ",\n".join(f"{indent} {json.dumps(key)}: {text}" for key, text in rows.items()) + f"\n{indent}}}"


def text_of(record: dict) -> str:
    """JSON for people: a line for each attribute, names and enum members wrapped."""

    def wrapped(names: list[str], indent: str) -> str:
        return "[\n" + _lines([json.dumps(name) for name in names], indent) + f"\n{indent[1:]}]"

    def members(values: dict[str, int]) -> str:
        return "{\n" + _lines([f"{json.dumps(key)}: {value}" for key, value in values.items()], "   ") + "\n  }"

    def strings(values: dict[str, str], indent: str) -> str:
        return _table({key: json.dumps(value) for key, value in values.items()}, indent) if values else "{}"

    parts = {
        "version": json.dumps(record["version"]),
        "module": wrapped(record["module"], "  "),
        "values": strings(record["values"], " "),
        "bases": strings(record["bases"], " "),
        "classes": _table({name: strings(found, "  ") for name, found in record["classes"].items()}, " "),
        "enums": _table({name: members(found) for name, found in record["enums"].items()}, " "),
        "ordered": wrapped(record["ordered"], "  "),
    }
    return _table(parts, "") + "\n"


def record(version: str, cache: Path = CACHE) -> str:
    """The text of `<version>.json`, as the real bindings say now."""
    with unpacked(version, cache) as folder:
        result = run(folder, str(HERE / "probe.py"))
    if result.returncode:
        raise RuntimeError(f"the bindings of {version} ended with {result.returncode}:\n{result.stderr}")
    return text_of(json.loads(result.stdout))


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Record which names the real TensorRT bindings have.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file would change")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of downloaded wheels")
    parser.add_argument("--only", choices=sorted(WHEELS), action="append", help="a version; may be repeated")
    parser.add_argument("--into", type=Path, default=HERE, help="folder of the JSON files")
    options = parser.parse_args(words)
    different = False
    for version in options.only or WHEELS:
        path = options.into / f"{version}.json"
        try:
            new = record(version, options.cache)
        except NotPossibleHereError as problem:
            print(problem)
            return IMPOSSIBLE
        old = path.read_text() if path.exists() else ""
        if not options.check:
            path.write_text(new)
        elif new != old:
            different = True
            names = (path.name, "the real bindings")
            sys.stdout.writelines(difflib.unified_diff(old.splitlines(True), new.splitlines(True), *names, n=1))
    return int(different)


if __name__ == "__main__":
    sys.exit(main())
