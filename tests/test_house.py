"""The house: who may import whom, and that git has every source."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

OFFICE = ("torch", "torchvision", "onnx", "onnxruntime", "polygraphy", "safetensors", "stpm.build")
GPU = ("tensorrt", "pycuda", "cuda")
BLOCKER = """
import importlib, pkgutil, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if any(name == each or name.startswith(each + ".") for each in {blocked!r}):
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Blocked())
for package in {packages!r}:
    module = importlib.import_module(package)
    for found in pkgutil.walk_packages(module.__path__, package + "."):
        if found.name not in {left_out!r}:
            importlib.import_module(found.name)
            print(found.name)
"""


def import_all(packages, blocked, left_out=()):
    code = BLOCKER.format(packages=packages, blocked=blocked, left_out=left_out)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")


def test_every_edge_module_imports_without_the_office_and_without_an_engine():
    result = import_all(["stpm.edge"], (*OFFICE, "stpm.calibration", "stpm.tools", "openvino", "tqdm", *GPU))
    assert result.returncode == 0, result.stderr
    assert "stpm.edge.engine.openvino" in result.stdout
    assert "stpm.edge.engine.tensorrt" in result.stdout
    assert "stpm.edge.loop" in result.stdout


def test_the_blocker_blocks():
    assert "blocked: numpy" in import_all(["stpm.edge"], ("numpy",)).stderr


def test_evaluation_tuning_and_benchmark_need_no_torch():
    modules = "import stpm.tools.evaluate, stpm.tools.tune, stpm.tools.bench, stpm.tools.plc_sim"
    code = BLOCKER.format(packages=[], blocked=OFFICE, left_out=()) + modules
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert result.returncode == 0, result.stderr


def test_calibration_imports_without_torch():
    result = import_all(["stpm.calibration"], ("torch", "torchvision", "stpm.build", "stpm.tools"))
    assert result.returncode == 0, result.stderr
    assert "stpm.calibration.qdq" in result.stdout


def test_the_office_does_not_look_at_the_tools():
    result = import_all(["stpm.build"], ("stpm.tools",))
    assert result.returncode == 0, result.stderr


def test_benchmark_runs_from_the_tools_folder():
    """tools/ is then first on the path, where a file named like a standard module would break everything."""
    result = subprocess.run([sys.executable, "tools/bench.py", "--help"], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_git_has_every_source():
    """`build/` is a name that many ignore rules hide."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    tracked = set(
        subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    )
    folders = ("edge", "build", "calibration", "tools", "tests")
    sources = {
        str(path.relative_to(ROOT))
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".sh", ".npz", ".txt", ".cu", ".cuh", ".cpp", ".h", ".json"}
    }
    assert sources
    assert sources <= tracked, f"not in git: {sorted(sources - tracked)}"


def test_links_of_the_documents_lead_somewhere():
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)", document.read_text()):
            if "://" not in link:
                assert (document.parent / link).exists(), f"{document.name} links to {link}"


def test_commands_of_the_readme_exist_with_their_options():
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    commands = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    assert any(line.startswith("sh tools/demo.sh") for line in commands)
    assert any(line.startswith("sh tests/run.sh") for line in commands)
    scripts = {
        "stpm-build": "stpm.build.cli",
        "stpm-compile": "stpm.build.gpu.cli",
        "stpm-run": "stpm.edge.cli",
        "stpm-ctl": "stpm.edge.control",
        "stpm-journal": "stpm.edge.journal.cli",
        "stpm-eval": "stpm.tools.evaluate",
        "stpm-tune": "stpm.tools.tune",
        "python": "stpm.tools.bench",
    }
    for line in commands:
        words = line.split()
        if words and words[0] == "sh":
            assert (ROOT / words[1]).is_file()
        if words and words[0] in scripts:
            module = scripts[words[0]]
            text = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True).stdout
            for option in [word for word in words if word.startswith("--")]:
                assert option in text, f"{words[0]} has no {option}"


def test_version_is_the_one_in_the_metadata():
    from importlib.metadata import version

    from stpm.edge import __version__

    assert version("stpm-edge") == __version__
    assert Path(ROOT / "LICENSE").read_text().lstrip().startswith("Apache License")


def test_lines_in_the_plc_document_are_real():
    from stpm.edge.plc.protocol import decode, encode

    text = (ROOT / "docs" / "plc.md").read_text()
    lines = re.findall(r"^    ((?:STATE|PART|BEAT),\d.*)$", text, re.M)
    assert len(lines) > 5
    for number, line in enumerate(lines):
        sequence, message = decode(line.encode())
        assert sequence == number
        assert encode(message, sequence).decode().strip() == line
