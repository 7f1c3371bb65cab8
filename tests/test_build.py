"""Building the package with and without a compiler (setup.py)."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from coalescer_fast import CoalescerPipeline

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]


def build(target: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {
        k: v for k, v in os.environ.items() if k not in ("CXX", "NVCC", "COALESCER_FAST_BUILD", "TORCH_CUDA_ARCH_LIST")
    }
    arguments = [sys.executable, "setup.py", "-q", *(command or ("build_py", "--build-lib", str(target)))]
    return subprocess.run(arguments, cwd=ROOT, env=inherited | environment, capture_output=True, text=True, check=False)


def built(target: Path, part: str = "cpu") -> tuple[bool, str]:
    folder = target / "coalescer_fast" / "lib"
    return (folder / f"libcoalescer_fast_{part}.so").is_file(), json.loads((folder / "build.json").read_text())[part]


def lines(result: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("coalescer_fast: ")]


@pytest.fixture
def quick(tmp_path_factory) -> str:
    """A PATH whose c++ and nvcc do not optimise: what is looked at is what was built, not how fast it is."""
    folder = tmp_path_factory.mktemp("bin")
    for name, flags in (("c++", "-O0"), ("nvcc", "-Xptxas -O0 -Xcicc -O0")):
        if (real := shutil.which(name)) is not None:
            (folder / name).write_text(f'#!/bin/sh\nexec {real} "$@" {flags}\n')
            (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def test_what_was_compiled_of_the_same_sources_is_kept(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("setup_of_the_package", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    compiled = []

    def compile_part(part):
        def work(target, *targets):
            compiled.append((part, *targets))
            target.write_text(part)
            return ""

        return work

    monkeypatch.setattr(setup, "build_cpu", compile_part("cpu"))
    monkeypatch.setattr(setup, "build_cuda", compile_part("cuda"))
    monkeypatch.setattr(setup, "nvcc", lambda: "")  # as where the libraries are used
    monkeypatch.setenv("COALESCER_FAST_BUILD", "cuda")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    setup.build(tmp_path)
    assert compiled == [("cpu",), ("cuda", [90])]
    for keep, changed in ((True, []), (False, ["cpu", "cuda"])):
        del compiled[:]
        setup.build(tmp_path, keep)
        assert [part for part, *_ in compiled] == changed
    setup.build(tmp_path, keep=True)
    digest = setup.digest
    monkeypatch.setattr(setup, "digest", lambda part, targets: digest(part, targets) + "new" * (part == "cpu"))
    (tmp_path / "libcoalescer_fast_cuda.so").unlink()
    del compiled[:]
    setup.build(tmp_path, keep=True)  # other sources of one, and the other is not there
    assert [part for part, *_ in compiled] == ["cpu", "cuda"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    del compiled[:]
    setup.build(tmp_path, keep=True)
    assert compiled == [("cuda", [80])]
    (tmp_path / "build.json").write_text("not JSON")
    del compiled[:]
    setup.build(tmp_path, keep=True)
    assert [part for part, *_ in compiled] == ["cpu", "cuda"]


needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


@needs_nvcc
def test_all_that_is_required_is_built(tmp_path, quick):
    result = build(tmp_path, COALESCER_FAST_BUILD="require", TORCH_CUDA_ARCH_LIST="8.0", PATH=quick)
    assert result.returncode == 0, result.stderr
    assert lines(result) == []
    assert built(tmp_path) == built(tmp_path, "cuda") == (True, "")
    library = tmp_path / "coalescer_fast" / "lib" / "libcoalescer_fast_cuda.so"
    if shutil.which("readelf"):
        needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
        assert "libc.so" in needed
        assert "cuda" not in needed.replace(library.name, "")
        assert "torch" not in needed
    code = (
        "import ctypes, sys; f = ctypes.CDLL(sys.argv[1]).cf_cuda_architectures; "
        "f.restype = ctypes.c_char_p; print(f().decode())"
    )
    assert (
        subprocess.run([sys.executable, "-c", code, library], capture_output=True, text=True, check=True).stdout
        == "80\n"
    )
    found = subprocess.run([sys.executable, "-c", code, library], capture_output=True, text=True, check=True).stdout
    assert found == "80\n"


def test_by_default_without_a_gpu_there_are_cpu_kernels(tmp_path, quick):
    result = build(tmp_path, PATH=quick)
    assert result.returncode == 0, result.stderr
    assert built(tmp_path) == (True, "")
    if shutil.which("nvidia-smi") is None:
        reason = "there was no GPU when it was installed; without a GPU, set COALESCER_FAST_BUILD=cuda"
        assert built(tmp_path, "cuda") == (False, reason)


def test_a_compiler_without_avx_vnni_builds_all_else(tmp_path):
    cxx = tmp_path / "old-c++"
    cxx.write_text(f'#!/bin/sh\ncase "$*" in *-mavxvnni*) exit 1 ;; esac\nexec {shutil.which("c++")} "$@" -O0\n')
    cxx.chmod(0o755)
    result = build(tmp_path, CXX=str(cxx), COALESCER_FAST_BUILD="cpu")
    assert result.returncode == 0, result.stderr
    assert built(tmp_path) == (True, "")
    library = tmp_path / "coalescer_fast" / "lib" / "libcoalescer_fast_cpu.so"
    code = "import ctypes, sys; f = ctypes.CDLL(sys.argv[1]).cf_cpu_set_isa; print(f(b'avx2_vnni'), f(b'portable'))"
    said = subprocess.run([sys.executable, "-c", code, library], capture_output=True, text=True, check=True).stdout
    assert said == "1 0\n"


@pytest.mark.parametrize(
    ("cxx", "reason"),
    [
        ("no-such-compiler", "there is no C++ compiler no-such-compiler: install g++ or set CXX"),
        ("false", "false cannot compile it: false failed"),
    ],
)
def test_without_a_compiler_the_package_is_there_and_one_line_says_what_is_missing(tmp_path, cxx, reason):
    result = build(tmp_path, CXX=cxx)
    assert result.returncode == 0
    assert lines(result) == [f"coalescer_fast: installed without the CPU kernels: {reason}"]
    assert built(tmp_path) == (False, reason)
    assert (tmp_path / "coalescer_fast" / "ops" / "dispatch.py").is_file()


@pytest.mark.parametrize(
    ("nvcc", "reason"),
    [
        ("no-such-nvcc", "there is no nvcc: install the CUDA toolkit, or set CUDA_HOME or NVCC"),
        ("false", "nvcc cannot compile it: nvcc failed"),
    ],
)
def test_without_nvcc_the_rest_is_there(tmp_path, quick, nvcc, reason):
    result = build(tmp_path, NVCC=nvcc, COALESCER_FAST_BUILD="cuda", TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX", PATH=quick)
    assert result.returncode == 0
    assert lines(result) == [f"coalescer_fast: installed without the CUDA kernels: {reason}"]
    assert built(tmp_path) == (True, "")
    assert built(tmp_path, "cuda") == (False, reason)


@pytest.mark.parametrize(("variable", "part"), [("CXX", "CPU"), ("NVCC", "CUDA")])
def test_required_and_missing_fails(tmp_path, quick, variable, part):
    result = build(tmp_path, COALESCER_FAST_BUILD="require", PATH=quick, **{variable: "no-such-compiler"})
    assert result.returncode != 0
    error = (
        f"coalescer_fast: the {part} kernels cannot be built, which COALESCER_FAST_BUILD=require asks for: there is no "
    )
    assert result.stderr.splitlines()[-1].startswith(error)


def test_switched_off(tmp_path):
    assert build(tmp_path, COALESCER_FAST_BUILD="off").returncode == 0
    assert built(tmp_path) == built(tmp_path, "cuda") == (False, "COALESCER_FAST_BUILD=off when it was installed")


@needs_nvcc
@pytest.mark.parametrize("value", ["Hopper", "9", "8.0;nine"])
def test_an_architecture_that_is_none(tmp_path, value):
    result = build(tmp_path, COALESCER_FAST_BUILD="cuda", TORCH_CUDA_ARCH_LIST=value)
    assert result.returncode != 0
    assert (
        result.stderr.splitlines()[-1]
        == f"TORCH_CUDA_ARCH_LIST is {value!r}; expected compute capabilities such as 8.0;9.0"
    )


def test_unknown_choice(tmp_path):
    result = build(tmp_path, COALESCER_FAST_BUILD="gpu")
    assert result.returncode != 0
    assert result.stderr.splitlines()[-1] == "COALESCER_FAST_BUILD is 'gpu'; use one of auto, off, cpu, cuda, require"


def test_the_source_distribution_has_all_that_a_build_and_the_tests_need(tmp_path):
    assert build(tmp_path, "sdist", "--dist-dir", str(tmp_path)).returncode == 0
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    wanted = set(listed.stdout.splitlines())
    if listed.returncode or not wanted:  # no checkout
        wanted = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()} | {
            "setup.py",
            "pyproject.toml",
        }
    assert wanted <= names
    assert not [name for name in names if name.endswith((".pyc", ".so"))]


@pytest.mark.parametrize(
    ("variables", "tag"),
    [({"COALESCER_FAST_BUILD": "off"}, "any"), ({"CXX": "no-such-compiler"}, "any"), ({}, "linux")],
)
def test_the_tag_of_a_wheel_says_whether_it_holds_a_library(tmp_path, quick, variables, tag):
    if tag == "linux" and not (sys.platform == "linux" and shutil.which("c++")):
        pytest.skip("needs Linux and a C++ compiler")
    folders = ("bdist_wheel", "--dist-dir", str(tmp_path), "--bdist-dir", str(tmp_path / "bdist"))
    result = build(tmp_path, "build", "--build-base", str(tmp_path / "build"), *folders, **{"PATH": quick, **variables})
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(rf"coalescer_fast-[\d.]+-py3-none-{tag}(_\w+)?\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        facts = next(file.read(name).decode() for name in names if name.endswith(".dist-info/WHEEL"))
    assert ("coalescer_fast/lib/libcoalescer_fast_cpu.so" in names) == (tag == "linux")
    assert {
        "coalescer_fast/py.typed",
        "coalescer_fast/__main__.py",
        "coalescer_fast/training/configs/digits.toml",
    } <= set(names)
    assert {name.partition("/")[0] for name in names} == {"coalescer_fast", names[-1].partition("/")[0]}
    assert f"Root-Is-Purelib: {'false' if tag == 'linux' else 'true'}" in facts


ZIG = """
import pathlib, shutil, sys
if "-o" in sys.argv:
    target = pathlib.Path(sys.argv[sys.argv.index("-o") + 1])
    ready = pathlib.Path(__file__).with_name("ready.so")
    shutil.copy(ready, target) if "-shared" in sys.argv and ready.exists() else target.write_text(" ".join(sys.argv))
"""


@pytest.fixture
def zig(tmp_path) -> Path:
    """A folder with a package `ziglang` that compiles nothing: a library is the command that would link it."""
    folder = tmp_path / "packages"
    (folder / "ziglang").mkdir(parents=True)
    (folder / "ziglang" / "__init__.py").touch()
    (folder / "ziglang" / "__main__.py").write_text(ZIG)
    [version] = re.findall(r"^ZIG = \"ziglang==(.*)\"$", (ROOT / "setup.py").read_text("utf-8"), re.MULTILINE)
    (folder / f"ziglang-{version}.dist-info").mkdir()
    (folder / f"ziglang-{version}.dist-info" / "METADATA").write_text(f"Name: ziglang\nVersion: {version}\n")
    return folder


@pytest.mark.parametrize(
    ("target", "compiles_for", "platforms"),
    [
        ("x86_64-linux", "x86_64-linux-gnu.2.17", ["manylinux2014_x86_64", "manylinux_2_17_x86_64"]),
        ("aarch64-linux", "aarch64-linux-gnu.2.17", ["manylinux2014_aarch64", "manylinux_2_17_aarch64"]),
        ("aarch64-macos", "aarch64-macos.11.0", ["macosx_11_0_arm64"]),
    ],
)
def test_a_wheel_for_another_platform(tmp_path, zig, target, compiles_for, platforms):
    folders = ("bdist_wheel", "--dist-dir", str(tmp_path), "--bdist-dir", str(tmp_path / "bdist"))
    environment = {"COALESCER_FAST_TARGET": target, "PYTHONPATH": str(zig), "CXX": "no-such-compiler"}
    result = build(tmp_path, "build", "--build-base", str(tmp_path / "build"), *folders, **environment)
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(rf"coalescer_fast-[\d.]+-py3-none-{re.escape('.'.join(platforms))}\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as file:
        facts = next(file.read(name).decode() for name in file.namelist() if name.endswith(".dist-info/WHEEL"))
        linked = file.read("coalescer_fast/lib/libcoalescer_fast_cpu.so").decode().split()
        reasons = json.loads(file.read("coalescer_fast/lib/build.json"))
    assert re.findall(r"^Tag: py3-none-(.*)$", facts, re.MULTILINE) == platforms
    assert linked[linked.index("-target") + 1] == compiles_for
    assert ("avx2.o" in {Path(word).name for word in linked}) == (target == "x86_64-linux")
    assert ("-s" in linked and "-Wl,--version-script=" in " ".join(linked)) == ("linux" in target)
    assert reasons["cpu"] == ""
    assert reasons["cuda"].startswith("wheels have none")


def test_no_wheel_for_another_platform_without_its_library(tmp_path, zig):
    (zig / "ziglang" / "__main__.py").write_text("raise SystemExit('error: no')")
    result = build(tmp_path, COALESCER_FAST_TARGET="aarch64-linux", PYTHONPATH=str(zig))
    assert result.returncode != 0
    asked = "coalescer_fast: the CPU kernels cannot be built, which COALESCER_FAST_TARGET asks for: "
    assert result.stderr.splitlines()[-1] == f"{asked}{sys.executable} cannot compile it: error: no"


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_a_library_that_would_be_slow_without_a_word_is_none(tmp_path, zig, isa):
    flags = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not flags.exists() or not {"avx2", "fma"} <= set(flags.read_text().split()):
        pytest.skip("needs a processor with AVX2")
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    source = f'extern "C" const char* cf_cpu_isa() {{ return "{isa}"; }}'
    command = ["c++", "-shared", "-fPIC", "-x", "c++", "-", "-o", zig / "ziglang" / "ready.so"]
    subprocess.run(command, input=source, text=True, check=True)
    result = build(tmp_path, COALESCER_FAST_TARGET="x86_64-linux", PYTHONPATH=str(zig))
    assert (result.returncode == 0) == (isa == "avx2"), result.stderr
    if isa == "portable":
        assert result.stderr.splitlines()[-1].endswith("it does not see that this processor has AVX2")


def test_an_unknown_target(tmp_path):
    result = build(tmp_path, COALESCER_FAST_TARGET="riscv64-linux")
    assert result.returncode != 0
    said = "COALESCER_FAST_TARGET is 'riscv64-linux'; use one of x86_64-linux, aarch64-linux, aarch64-macos"
    assert result.stderr.splitlines()[-1] == said


def requirements(extra: str = "") -> dict[str, str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    listed = project["optional-dependencies"][extra] if extra else project["dependencies"]
    return {re.match(r"[\w-]+", each)[0]: each for each in listed}


def test_what_safe_loading_rests_on_has_a_lower_bound():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]
    assert {"diffusers>=0.35", "torch>=2.9", "safetensors>=0.8"} <= set(listed)


def test_a_diffusers_that_loads_without_safety_loads_nothing(monkeypatch):
    """Networks of others run with it, see tests/diffusers_versions.sh."""
    monkeypatch.setattr("diffusers.__version__", "0.37.3")
    with pytest.raises(ValueError, match=r"^diffusers 0\.37\.3 may run code .* needs 0\.38 or newer; run pip install"):
        CoalescerPipeline.from_pretrained("emoji-64")


def test_extras():
    """What a machine without a GPU cannot install is in none of those that `all` brings."""
    assert requirements("tensorrt") == {
        "tensorrt": "tensorrt>=10.8,<12; platform_system == 'Linux' or platform_system == 'Windows'"
    }
    assert requirements("profile") == {"nvtx": "nvtx"}
    assert "mlxtend" in requirements("data")
    assert "onnx" in requirements("export")
    assert {"pytest", "triton"} <= set(requirements("test"))
    assert requirements("all") == {"coalescer_fast": "coalescer_fast[train,data,export,test]"}
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    for name in ("torch", "triton", "onnx", "tensorrt", "diffusers", "numpy", "pytest", "nvtx"):
        assert re.search(rf'^    "{name}\b', text, re.MULTILINE), name
