"""Builds the native libraries where they can be built. Everything else about the package is in pyproject.toml.

The libraries are plain C behind csrc/abi.h, loaded by ctypes. They use no header of torch or Python, so one wheel
serves every version of both. ``python setup.py build_native`` builds them in a checkout. Two environment variables say
what is built:

- COALESCER_FAST_BUILD: ``off`` for nothing, ``cpu`` for the CPU kernels, ``cuda`` for the CUDA kernels as well,
  ``auto`` (the default) for the CUDA kernels only where there is a GPU. A part that cannot be built is left out; one
  line says why, and `coalescer_fast.ops.backends` repeats it. With ``require``, which is ``cuda`` otherwise, the
  installation fails instead.
- TORCH_CUDA_ARCH_LIST: the compute capabilities that CUDA kernels are compiled for, such as ``8.0;9.0``.

A third one, COALESCER_FAST_TARGET, builds a wheel for another platform, or for every Linux of this one, on any machine:
one of `TARGETS`. Its CPU kernels are compiled by zig, which pip fetches, and without them there is no wheel; it holds
no CUDA kernels. docs/building.md has the commands.

``python setup.py build_native --keep`` compiles only what is not there yet: build.json says of what sources, and for
which GPUs, each library is. So a library that was compiled elsewhere, without a GPU, is used as it is.
"""

import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar, NamedTuple

from setuptools import Command, Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
CHOICES = ("auto", "off", "cpu", "cuda", "require")
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
)
# Instruction sets are chosen at run time, so each has its own file and flags.
AVX2 = ("-mavx2", "-mfma", "-mf16c")
# -Wno-...: the compiler's own intrinsics
AVX512 = (
    *AVX2,
    "-mavx512f",
    "-mavx512bw",
    "-mavx512dq",
    "-mavx512vl",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
)
X86_FLAGS = {
    "avx2": AVX2,
    "avx2_vnni": (*AVX2, "-mavxvnni"),
    "avx512": AVX512,
    "avx512_bf16": (*AVX512, "-mavx512bf16", "-mavx512vnni"),
}

NVCC_FLAGS = ("-std=c++17", "-O3", "--compress-mode=size", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall")
ARCHITECTURES = (80, 86, 89, 90, 100, 120)  # compute capabilities times ten


class Target(NamedTuple):
    """A platform that a wheel is built for by zig, wherever it is built.

    Attributes:
        zig: zig's name of it, with the oldest version of its C library or system.
        machine: Python's name of its processor.
        tag: the wheel's platform tag.
    """

    zig: str
    machine: str
    tag: str


TARGETS = {
    "x86_64-linux": Target("x86_64-linux-gnu.2.17", "x86_64", "manylinux2014_x86_64.manylinux_2_17_x86_64"),
    "aarch64-linux": Target("aarch64-linux-gnu.2.17", "aarch64", "manylinux2014_aarch64.manylinux_2_17_aarch64"),
    "aarch64-macos": Target("aarch64-macos.11.0", "arm64", "macosx_11_0_arm64"),
}
ZIG = "ziglang==0.17.1"


def target() -> Target | None:
    """What COALESCER_FAST_TARGET names; None: this machine, with its own compiler."""
    name = os.environ.get("COALESCER_FAST_TARGET")
    if name and name not in TARGETS:
        raise SystemExit(f"COALESCER_FAST_TARGET is {name!r}; use one of {', '.join(TARGETS)}")
    return TARGETS[name] if name else None


def machine() -> str:
    """The processor that is compiled for."""
    return found.machine if (found := target()) else platform.machine()


def for_macos() -> bool:
    return "macos" in found.zig if (found := target()) else sys.platform == "darwin"


def chosen() -> str:
    value = os.environ.get("COALESCER_FAST_BUILD", "auto")
    if value not in CHOICES:
        raise SystemExit(f"COALESCER_FAST_BUILD is {value!r}; use one of {', '.join(CHOICES)}")
    return value


def compiler() -> list[str]:
    if found := target():
        return [sys.executable, "-m", "ziglang", "c++", "-target", found.zig]
    if "CXX" in os.environ:
        return shlex.split(os.environ["CXX"])
    return [next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), "")]


def link_flags() -> list[str]:
    """Without a C++ library, which the kernels do not use, and with the functions of abi.h as the only symbols."""
    if for_macos():
        return ["-Wl,-install_name,@rpath/libcoalescer_fast_cpu.so"]  # else the path of the build
    script = ROOT / "csrc" / "cpu" / "exports.map"
    stripped = ["-s"] if target() else []
    return ["-static-libstdc++", "-static-libgcc", f"-Wl,--version-script={script}", "-lm", "-pthread", *stripped]


def silently_slow(library: Path) -> str:
    """Why the CPU kernels would run on portable code though this processor has better, or "" if they would not."""
    try:
        known = set(Path("/proc/cpuinfo").read_text("utf-8").split())
    except OSError:
        known = set()
    if not known >= {"avx2", "fma", "f16c"} or machine() != platform.machine() or for_macos():
        return ""
    code = (
        "import ctypes, sys; f = ctypes.CDLL(sys.argv[1]).cf_cpu_isa; f.restype = ctypes.c_char_p; print(f().decode())"
    )
    said = subprocess.run([sys.executable, "-c", code, str(library)], capture_output=True, text=True).stdout
    return "it does not see that this processor has AVX2" if said.strip() == "portable" else ""


def build_cpu(library: Path) -> str:
    """Compile csrc/cpu into the shared library; returns why that cannot be done, or ""."""
    if not target() and os.name != "posix":
        return f"it is not built on {platform.system()}"
    cxx = compiler()
    if not shutil.which(cxx[0]):
        return f"there is no C++ compiler{' ' + cxx[0] if cxx[0] else ''}: install g++ or set CXX"
    if target() and importlib.util.find_spec("ziglang") is None:
        return f"there is no zig: run pip install {ZIG}"
    names = sorted(path.stem for path in (ROOT / "csrc" / "cpu").glob("*.cpp"))
    flags = X86_FLAGS if machine() in ("x86_64", "AMD64") else {}
    extra = {name: flags.get(name, ()) for name in names if name in flags or name not in X86_FLAGS}
    with tempfile.TemporaryDirectory() as scratch:

        def run(*arguments: str, command: list[str] = cxx) -> str:
            result = subprocess.run([*command, *arguments], capture_output=True, text=True)
            return (result.stderr.strip() or f"{cxx[0]} failed") if result.returncode else ""

        if "avx2_vnni" in extra and run("-mavxvnni", "-E", "-x", "c++", os.devnull):  # GCC has it from version 11 on
            del extra["avx2_vnni"]
            extra["isa"] = ("-DCF_WITHOUT_AVX2_VNNI",)

        def compile_one(name: str) -> str:
            return run(
                *FLAGS, *extra[name], "-c", str(ROOT / "csrc" / "cpu" / f"{name}.cpp"), "-o", f"{scratch}/{name}.o"
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            failures = list(filter(None, pool.map(compile_one, extra)))
        if not failures:
            objects = (f"{scratch}/{name}.o" for name in extra)
            # zig would compile its C++ library first
            linker = ["cc" if word == "c++" else word for word in cxx] if target() else cxx
            failures = [run("-shared", *link_flags(), "-o", str(library), *objects, command=linker)]
    if failures[0]:
        return f"{cxx[0]} cannot compile it: {failures[0].splitlines()[0]}"
    return silently_slow(library)


def nvcc() -> str:
    """Its path, or ""."""
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    candidates = (
        [os.environ["NVCC"]] if "NVCC" in os.environ else ["nvcc", *(f"{home}/bin/nvcc" for home in homes if home)]
    )
    return next(filter(None, map(shutil.which, candidates)), "")


def gpus() -> list[int]:
    """The compute capabilities, times ten, of the GPUs here."""
    try:
        command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return []
    return sorted({int(line.replace(".", "")) for line in lines if re.fullmatch(r"\d+\.\d", line)})


def architectures() -> list[int]:
    """The compute capabilities, times ten, to compile for.

    Those of TORCH_CUDA_ARCH_LIST. Without it: with COALESCER_FAST_BUILD=auto those of the GPUs here, else all of
    `ARCHITECTURES` that nvcc knows.
    """
    if listed := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        found = re.findall(r"(\d+)\.(\d)[a-z]?(?:\+PTX)?(?=[;,\s]|$)", listed)
        if not found or len(found) != len(re.split(r"[;,\s]+", listed.strip(";, "))):
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST is {listed!r}; expected compute capabilities such as 8.0;9.0")
        return sorted({int(major + minor) for major, minor in found})
    if chosen() == "auto":
        return gpus()
    known = subprocess.run([nvcc(), "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    return [each for each in ARCHITECTURES if f"sm_{each}" in known]


def build_cuda(library: Path, architectures: list[int]) -> str:
    """Compile csrc/cuda into the shared library; returns why that cannot be done, or ""."""
    if not nvcc():
        return "there is no nvcc: install the CUDA toolkit, or set CUDA_HOME or NVCC"
    codes = [f"-gencode=arch=compute_{each},code=sm_{each}" for each in architectures]
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    define = f'-DCF_ARCHITECTURES="{",".join(map(str, architectures))}"'
    with tempfile.TemporaryDirectory() as scratch:

        def run(*arguments: str) -> str:
            result = subprocess.run([nvcc(), *arguments], capture_output=True, text=True)
            return (result.stderr.strip() or result.stdout.strip() or "nvcc failed") if result.returncode else ""

        def compile_one(source: Path) -> str:
            return run(*NVCC_FLAGS, *codes, define, "-c", str(source), "-o", f"{scratch}/{source.stem}.o")

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            failures = list(filter(None, pool.map(compile_one, sources)))
        if not failures:
            # the runtime inside, its symbols to itself: beside torch's own, and without a link to the driver
            flags = ("-shared", "-cudart=static", "-Xlinker=--exclude-libs,ALL")
            failures = [run(*flags, *codes, "-o", str(library), *(f"{scratch}/{source.stem}.o" for source in sources))]
    return f"nvcc cannot compile it: {failures[0].splitlines()[0]}" if failures[0] else ""


def digest(part: str, targets: list[int]) -> str:
    """A hash of all that the library of this part is compiled of."""
    how = (NVCC_FLAGS, targets) if part == "cuda" else (FLAGS, X86_FLAGS, target() or platform.machine())
    found = hashlib.sha256(repr(how).encode())
    for source in (ROOT / "csrc" / "abi.h", *sorted((ROOT / "csrc" / part).iterdir())):
        found.update(source.read_bytes())
    return found.hexdigest()


def written(folder: Path) -> dict:
    """What build.json says, nothing if there is none."""
    try:
        return json.loads((folder / "build.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}


def build(folder: Path, keep: bool = False) -> None:
    """Build the libraries that are asked for into the folder, and write to build.json why others are missing.

    Args:
        folder: of the libraries.
        keep: leave those that are there and were compiled of the same.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = {}
    known = written(folder).get("sources", {}) if keep else {}
    named = nvcc() or "TORCH_CUDA_ARCH_LIST" in os.environ
    targets = architectures() if named and chosen() not in ("off", "cpu") and not target() else []
    sources = {part: digest(part, targets) for part in ("cpu", "cuda")}
    for part in ("cpu", "cuda"):
        library = folder / f"libcoalescer_fast_{part}.so"
        if library.is_file() and known.get(part) == sources[part]:
            missing[part] = ""
            print(f"coalescer_fast: the library of {part.upper()} kernels was compiled of these sources already")
            continue
        library.unlink(missing_ok=True)
        if chosen() == "off" or (part, chosen()) == ("cuda", "cpu"):
            missing[part] = f"COALESCER_FAST_BUILD={chosen()} when it was installed"
            continue
        if part == "cpu":
            missing[part] = build_cpu(library)
        elif target():
            missing[part] = "wheels have none; pip install --no-binary coalescer_fast coalescer_fast builds it"
            continue
        elif chosen() == "auto" and not gpus():
            missing[part] = "there was no GPU when it was installed; without a GPU, set COALESCER_FAST_BUILD=cuda"
            continue
        else:
            missing[part] = build_cuda(library, targets)
        if missing[part] and (chosen() == "require" or target()):
            asks = "COALESCER_FAST_TARGET" if target() else "COALESCER_FAST_BUILD=require"
            what = f"the {part.upper()} kernels cannot be built, which {asks} asks for"
            raise SystemExit(f"coalescer_fast: {what}: {missing[part]}")
        if missing[part]:
            print(f"coalescer_fast: installed without the {part.upper()} kernels: {missing[part]}", file=sys.stderr)
    sources = {part: sources[part] for part, reason in missing.items() if not reason}
    (folder / "build.json").write_text(json.dumps({**missing, "sources": sources}) + "\n", encoding="utf-8")


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        build((ROOT / "coalescer_fast" if self.editable_mode else Path(self.build_lib) / "coalescer_fast") / "lib")


class BuildNative(Command):
    """Build the native libraries in this checkout, for use without an installation."""

    user_options: ClassVar[list[tuple[str, str | None, str]]] = [("keep", None, "compile only what is not there yet")]
    boolean_options: ClassVar[list[str]] = ["keep"]

    def initialize_options(self) -> None:
        self.keep = False

    def finalize_options(self) -> None: ...

    def run(self) -> None:
        build(ROOT / "coalescer_fast" / "lib", bool(self.keep))


class BdistWheel(bdist_wheel):
    def run(self) -> None:
        """For one platform if a library was built, else for any."""
        self.run_command("build")
        libraries = Path(self.get_finalized_command("build_py").build_lib).glob("coalescer_fast/lib/*.so")
        self.distribution.native = any(libraries)
        self.root_is_pure = not self.distribution.native
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        """Any Python 3: nothing in the wheel links to it."""
        found = target() if self.distribution.native else None
        return ("py3", "none", found.tag if found else super().get_tag()[2])


class NativeDistribution(Distribution):
    native: bool | None = None  # whether there is a library; None: it is not built yet

    def has_ext_modules(self) -> bool:
        return chosen() != "off" if self.native is None else self.native


def packages() -> list[str]:
    """export/ is coalescer_fast.export: a folder of its own, for nothing in coalescer_fast may import it."""
    return find_packages(str(ROOT), include=["coalescer_fast*"]) + [
        f"coalescer_fast.{each}" for each in find_packages(str(ROOT), include=["export*"])
    ]


if __name__ == "__main__":
    commands = {"build_native": BuildNative, "build_py": BuildPy, "bdist_wheel": BdistWheel}
    needed = [ZIG] if target() else []  # beside those of pyproject.toml; pip installs them into the build's environment
    setup(packages=packages(), distclass=NativeDistribution, cmdclass=commands, setup_requires=needed)
