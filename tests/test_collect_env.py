from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import coalescer_fast
from coalescer_fast import __version__, collect_env
from coalescer_fast.ops import native_library
from coalescer_fast.ops.op import OPS

PACKAGE = Path(coalescer_fast.__file__).parent


def report(
    folder: Path, *paths: Path, argv: tuple[str, ...] = ("--json",), package: Path = PACKAGE, **variables: str
) -> str:
    """What the command prints, with ``paths`` first where modules are looked for."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*paths, package.parent))), **variables}
    command = [sys.executable, "-m", "coalescer_fast.collect_env", *argv]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def broken(folder: Path, **modules: str) -> Path:
    """A folder of modules that do this when they are imported."""
    folder.mkdir()
    for name, body in modules.items():
        (folder / f"{name}.py").write_text(body)
    return folder


def test_nothing_but_the_standard_library_is_imported(tmp_path):
    code = """
import sys
before = set(sys.modules)
import coalescer_fast.collect_env
imported = {name.partition('.')[0] for name in set(sys.modules) - before}
print(sorted(imported - sys.stdlib_module_names))
"""
    env = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "['coalescer_fast']"


def test_an_installation_that_works(tmp_path):
    import torch

    facts = json.loads(report(tmp_path, COALESCER_FAST_STRICT="1", OMP_NUM_THREADS="1", SECRET="hush"))
    assert facts["coalescer_fast"] == {"version": __version__, "folder": str(PACKAGE)}
    assert facts["python"]["version"] == sys.version.split()[0]
    assert facts["packages"]["torch"] == facts["torch"]["version"] == str(torch.__version__)
    assert set(facts["packages"]) >= {"triton", "diffusers", "numpy", "safetensors", "tokenizers"}
    assert set(facts["packages"]) >= {"onnx", "onnxruntime", "openvino", "tensorrt"}
    assert facts["torch"]["threads"] == 1
    assert facts["torch"]["cuda"] == torch.version.cuda
    assert facts["pipeline"]["imports"] is True
    assert facts["cpu"]["usable_cores"] >= 1
    assert set(facts["cpu"]["flags"]) >= {"avx2", "avx_vnni", "avx512f", "avx512_bf16", "avx512_vnni"}
    assert set(facts["backends"]) == set(OPS)
    assert facts["backends"]["dual_head"]["reference"] == {"able": True, "reason": ""}
    assert {
        k: v for k, v in facts["environment"].items() if k in ("COALESCER_FAST_STRICT", "OMP_NUM_THREADS", "SECRET")
    } == {
        "COALESCER_FAST_STRICT": "1",
        "OMP_NUM_THREADS": "1",
    }
    if sys.platform == "linux":
        assert facts["python"]["glibc"]
        assert all("omp" in Path(path).name for path in facts["torch"]["openmp"])
    if not native_library.unavailable():
        assert facts["native"]["cpu"] == {
            "loads": True,
            "interface": native_library.ABI_VERSION,
            "isa": native_library.isa(),
        }
        assert facts["backends"]["dual_head"]["cpu"]["able"] is True


def test_torch_that_raises_and_a_library_that_does_not_load(tmp_path):
    package = tmp_path / "copy" / "coalescer_fast"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("weights", "lib", "__pycache__"))
    (package / "lib").mkdir()
    (package / "lib" / "libcoalescer_fast_cpu.so").write_text("this is not a library" * 100)
    (package / "lib" / "build.json").write_text('{"cpu": "", "cuda": "there is no nvcc"}')
    modules = broken(
        tmp_path / "broken",
        torch='print("hello")\nraise OSError("libcudart.so.99: cannot open\\n  shared object file")',
    )
    out = report(tmp_path, modules, argv=(), package=package)
    rows = dict(line.split("  ", 1) for line in out.splitlines())
    rows = {name: value.strip() for name, value in rows.items()}
    message = "ERROR OSError: libcudart.so.99: cannot open shared object file"
    assert rows["torch"] == rows["backends"] == rows["pipeline"] == message
    assert rows["native cpu"].startswith("ERROR OSError: ")
    assert "libcoalescer_fast_cpu.so" in rows["native cpu"]
    assert rows["native cuda"].endswith("libcoalescer_fast_cuda.so is not there")
    assert (rows["native build cpu"], rows["native build cuda"]) == ("built", "not built: there is no nvcc")
    assert rows["packages torch"][0].isdigit()


def test_torch_and_diffusers_that_are_missing(tmp_path):
    missing = "raise ModuleNotFoundError(f\"No module named '{__name__}'\", name=__name__)"
    modules = broken(tmp_path / "broken", torch=missing, diffusers=missing)
    facts = json.loads(report(tmp_path, modules))
    for name in ("torch", "backends", "pipeline"):
        assert facts[name]["error"].startswith("ModuleNotFoundError: No module named '")
    assert facts["python"]["version"]
    if not native_library.unavailable():
        assert facts["native"]["cpu"]["loads"] is True  # without torch


def test_torch_that_crashes_exits_or_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path / "a"), *sys.path])
    broken(tmp_path / "a", torch="import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)")
    assert collect_env.tried("torch") == {"error": f"it crashes with {signal.SIGSEGV.name}"}
    (tmp_path / "a" / "torch.py").write_text("raise SystemExit(3)")
    assert collect_env.tried("torch") == {"error": "SystemExit: 3"}
    (tmp_path / "a" / "torch.py").write_text(
        "import os, sys\nprint('no licence', file=sys.stderr, flush=True)\nos._exit(3)"
    )
    assert collect_env.tried("torch") == {"error": "no licence"}
    monkeypatch.setattr(collect_env, "SECONDS", 2)
    (tmp_path / "a" / "torch.py").write_text("import time\ntime.sleep(600)")
    assert collect_env.tried("torch") == {"error": "it has not ended after 2 s"}


def test_a_library_of_another_interface(tmp_path, monkeypatch):
    monkeypatch.setattr(collect_env, "LIBRARIES", tmp_path)
    (tmp_path / "libcoalescer_fast_cpu.so").symlink_to(shutil.which("true") or "/bin/true")
    assert "error" in collect_env.guarded(collect_env.try_library, "cpu")


def test_gpus(tmp_path, monkeypatch):
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho 'NVIDIA H100, 9.0, 81559 MiB, 580.65.06'\n")
    command.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert collect_env.gpu() == [
        {"name": "NVIDIA H100", "compute_cap": "9.0", "memory.total": "81559 MiB", "driver_version": "580.65.06"}
    ]
    command.write_text('#!/bin/sh\necho "couldn\'t communicate with the NVIDIA driver"\nexit 9\n')
    assert collect_env.guarded(collect_env.gpu) == {
        "error": "nvidia-smi fails: couldn't communicate with the NVIDIA driver"
    }
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert collect_env.guarded(collect_env.gpu) == {"error": "there is no nvidia-smi"}


def test_text():
    facts = {
        "a": {"version": "1.0", "none": None, "flags": {"avx2": True, "amx": False}, "count": 1, "paths": []},
        "gpu": [{"name": "H100"}],
        "op": {"cpu": {"able": False, "reason": "why"}, "reference": {"able": True, "reason": ""}},
        "bad": {"error": "what"},
        "environment": {},
    }
    assert [line.split("  ", 1) for line in collect_env.text(facts).splitlines()] == [
        ["a version", "   1.0"],
        ["a none", "      none"],
        ["a flags avx2", "yes"],
        ["a flags amx", " no"],
        ["a count", "     1"],
        ["a paths", "     none"],
        ["gpu 0 name", "  H100"],
        ["op cpu", "      cannot run: why"],
        ["op reference", "can run"],
        ["bad", "         ERROR what"],
        ["environment", " none"],
    ]


def test_unknown_argument(capsys):
    with pytest.raises(SystemExit) as exit:
        collect_env.main(["--yaml"])
    assert exit.value.code == 2
    assert "--yaml" in capsys.readouterr().err
