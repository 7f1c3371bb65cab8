from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import coalescer_fast

HEAVY = {
    "torch",
    "torch._dynamo",
    "numpy",
    "PIL",
    "diffusers",
    "transformers",
    "triton",
    "onnx",
    "onnxruntime",
    "tensorrt",
}


def python(code: str, folder: Path) -> str:
    """What ``code`` prints in a fresh interpreter that imports the same copy of the package as this one."""
    env = {**os.environ, "PYTHONPATH": str(Path(coalescer_fast.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_import_loads_nothing_heavy(tmp_path):
    assert python(f"import sys, coalescer_fast; print(sorted({HEAVY} & set(sys.modules)))", tmp_path) == "[]"


def test_ops_need_torch_alone(tmp_path):
    heavy = HEAVY - {"torch", "numpy"}
    code = f"import sys, coalescer_fast; coalescer_fast.ops; print(sorted({heavy} & set(sys.modules)))"
    assert python(code, tmp_path) == "[]"


ROOT = Path(coalescer_fast.__file__).parent
# CONTRIBUTING.md, "Dependencies": by files, what of the package they may import, or with ! what they may not
RULES = {
    "ops/**/*.py": "ops",
    "models/**/*.py": "!runtime pipeline training acceleration",
    "runtime/native/[!rm]*.py": "ops runtime.native files dtypes",  # all but those named here and runtime.py
    "runtime/native/module.py": "ops runtime dtypes",
    "runtime/native/record.py": "ops runtime.native",
    "runtime/**/*.py": "!training export",
    "training/**/*.py": "!export",
    "bulk/**/*.py": "!training export",
    "bulk/[!d]*.py": "files schema console bulk",  # all but drawing.py: a run itself needs no torch
    "serving/**/*.py": "!training export",
}


def imported(path: Path) -> set[str]:
    """What of the package a file imports, also in its functions, and not for types alone."""
    package = ["coalescer_fast", *path.relative_to(ROOT).parts[:-1]]
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("coalescer_fast.") for name in found if name.startswith("coalescer_fast.")}


@pytest.mark.parametrize("files", RULES)
def test_what_may_import_what(files):
    denied, names = RULES[files].startswith("!"), tuple(RULES[files].lstrip("!").split())
    paths = sorted(ROOT.glob(files))
    assert paths
    for path in paths:
        for module in imported(path):
            inside = any(module == name or module.startswith(f"{name}.") for name in names)
            assert inside != denied, f"{path.relative_to(ROOT)} imports {module}"


def test_import_costs_less_than_a_tenth_of_a_second_beyond_torch(tmp_path):
    # The best of several imports, each with everything to do again that the first one did.
    code = """
import sys, time, torch
before, seconds = set(sys.modules), []
for _ in range(7):
    start = time.perf_counter()
    import coalescer_fast
    seconds.append(time.perf_counter() - start)
    for name in set(sys.modules) - before:
        del sys.modules[name]
print(min(seconds))
"""
    assert float(python(code, tmp_path)) < 0.1


@pytest.mark.parametrize("name", coalescer_fast.__all__)
def test_public_names(name):
    pytest.importorskip("diffusers")
    value = getattr(coalescer_fast, name)
    assert name in dir(coalescer_fast)
    if isinstance(value, type):
        assert value.__name__ == name


def test_dir_shows_public_names_alone():
    assert dir(coalescer_fast) == sorted(coalescer_fast.__all__)


def test_ops_is_the_module():
    assert coalescer_fast.ops is importlib.import_module("coalescer_fast.ops")


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = coalescer_fast.nothing


def test_version_is_that_of_pyproject():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8")
    assert re.search(r'^version = "(.+)"$', text, re.MULTILINE)[1] == coalescer_fast.__version__


def test_references_are_imported_with_their_ops(tmp_path):
    """A compiler that looks into an op cannot look into an import."""
    code = "from coalescer_fast import ops; from coalescer_fast.ops.op import OPS; "
    code += "print(all(callable(op.implementations['reference']) for op in OPS.values()), len(OPS) > 0)"
    assert python(code, tmp_path) == "True True"
