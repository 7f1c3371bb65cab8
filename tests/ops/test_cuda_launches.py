"""Every launch of the CUDA backend against the limits of the GPUs that it is for, and the calls of the runtime around
it: device, stream, errors.

The emulation of tests/csrc notes what the library asks of CUDA's runtime; nothing is launched, so that sizes may be any
and addresses need no memory.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import random
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from benchmarks.kernels import shapes
from coalescer_fast.ops import cuda_library
from coalescer_fast.ops.abi import Struct, cf_status, cf_tensor4, cf_vector
from coalescer_fast.ops.cuda_library import Device
from coalescer_fast.ops.native_library import DTYPE_CODES
from coalescer_fast.ops.op import OPS

from ..helpers.numerics import FLOAT_AT_MOST_32

CSRC = Path(__file__).parents[2] / "csrc" / "cuda"
pytestmark = pytest.mark.skipif(not cuda_library.INTERPRETED, reason="needs the emulation")

# By compute capability times ten: kilobytes of shared memory that a block may ask for ("Technical Specifications per
# Compute Capability" in NVIDIA's CUDA C++ Programming Guide), and the multiprocessors of a large GPU of that kind
# (A100, A10, L4, H100, B200, RTX 5090; NVIDIA's data sheets). The guide's other limits are the same for all of them.
GPUS = {80: (163, 108), 86: (99, 72), 89: (99, 58), 90: (227, 132), 100: (227, 148), 120: (99, 170)}
MOST_BLOCKS, MOST_THREADS = 2**31 - 1, 1024
# The portable size; less where there are fewer multiprocessors ("Thread Block Clusters"). Clusters exist from compute
# capability 9.0 on.
MOST_IN_A_CLUSTER = 8
DEFAULT_SHARED_MEMORY = 48 << 10  # more must be asked for, by cudaFuncSetAttribute
INVALID_VALUE = 1  # what a call that is to fail returns
STREAM = 0x5EA0
ADDRESS = 1 << 20  # of every tensor

DEVICES = [
    Device(1, capability, multiprocessors, kilobytes << 10)
    for capability, (kilobytes, most) in GPUS.items()
    for multiprocessors in (1, 14, most)  # a part of a GPU, as MIG gives it, has few
]


class Launch(NamedTuple):
    """A launch that the library asked for."""

    device: int
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: int
    shared: int
    stream: int


@pytest.fixture
def runtime() -> Iterator[types.SimpleNamespace]:
    """Notes the calls of the runtime: `calls()` gives those since the last time, `fail(name)` makes one fail."""
    library = cuda_library._load()[0]
    library.emulation_recorded.restype = ctypes.c_char_p
    library.emulation_record(63)
    yield types.SimpleNamespace(
        library=library,
        calls=lambda: library.emulation_recorded().decode().splitlines(),
        fail=lambda name: library.emulation_fail(name.encode()),
        set_device=library._Z13cudaSetDevicei,
        last_error=library._Z16cudaGetLastErrorv,
    )
    library.emulation_fail(b"")
    library._Z13cudaSetDevicei(0)
    library.emulation_record(0)


def launches(calls: list[str]) -> list[Launch]:
    found = []
    for call in calls:
        if call.startswith("cudaLaunchKernelEx"):
            device, *numbers = map(int, re.findall(r"-?\d+", call))
            found.append(Launch(device, tuple(numbers[:3]), tuple(numbers[3:6]), *numbers[6:]))
    return found


STRIDES = (ctypes.c_int64 * 4)()


def arguments(op: str, dtype: torch.dtype, **fields: Any) -> bytes:
    """The packed arguments of a call: every tensor is at `ADDRESS` and of the dtype unless ``fields`` say otherwise."""
    struct, code = OPS[op].implementation("cpu").binding.struct, DTYPE_CODES[dtype]
    for name, kind, *_ in struct._fields_:
        if name in fields:
            continue
        if kind is ctypes.c_void_p:
            fields[name] = ADDRESS
        elif issubclass(kind, Struct):
            fields[name] = kind(
                **{"data": ADDRESS, "dtype": code} | ({} if kind is cf_vector else {"strides": STRIDES})
            )
        else:
            fields[name] = code if name.endswith("dtype") else 0
    return struct.pack(**fields)


def group_norm(dtype: torch.dtype, n: int, c1: int, c2: int, spatial: int, groups: int, channels_last: bool) -> bytes:
    sizes = {"n": n, "c1": c1, "c2": c2, "spatial": spatial, "groups": groups, "channels_last": channels_last}
    return arguments("group_norm_silu", dtype, **sizes, skip=ADDRESS if c2 else None)


def bias_residual(dtype: torch.dtype, n: int, c: int, spatial: int, channels_last: bool) -> bytes:
    return arguments("bias_residual", dtype, n=n, c=c, spatial=spatial, channels_last=channels_last)


def dual_head(dtype: torch.dtype, n: int, c: int, cz: int, height: int, width: int, anchored: bool) -> bytes:
    none = {} if anchored else {"sample": cf_tensor4(), "anchor": cf_tensor4()}
    return arguments("dual_head", dtype, n=n, c=c, cz=cz, height=height, width=width, **none)


def coalesce_step(dtype: torch.dtype, n: int, size: int, unit: bool) -> bytes:
    return arguments("coalesce_step", dtype, n=n, size=size, unit=unit)


def of_network(call: shapes.Call, n: int, dtype: torch.dtype, channels_last: bool) -> bytes:
    spatial = call.size**2
    if isinstance(call, shapes.GroupNorm):
        return group_norm(dtype, n, call.channels, call.skip, spatial, call.groups, channels_last)
    if isinstance(call, shapes.BiasResidual):
        return bias_residual(dtype, n, call.channels, spatial, channels_last)
    if isinstance(call, shapes.DualHead):
        return dual_head(dtype, n, call.channels, call.latent, call.size, call.size, call.anchored)
    assert isinstance(call, shapes.CoalesceStep)
    return coalesce_step(dtype, n, call.elements, call.mode == "unit")


def launched(runtime: types.SimpleNamespace, op: str, packed: bytes, on: Device) -> tuple[int, list[Launch]]:
    """The status of a call, and its launches, which are within the limits of the device."""
    call = cuda_library._function(f"cf_cuda_{op}", 4)
    status = call(packed, cuda_library._packed(on), ADDRESS, STREAM)
    noted = runtime.calls()
    found = launches(noted)
    for each in found:
        assert each.device == on.ordinal
        assert each.stream == STREAM
        assert 1 <= each.grid[0] <= MOST_BLOCKS
        assert each.grid[1:] == each.block[1:] == (1, 1)
        assert 32 <= each.block[0] <= MOST_THREADS
        assert each.block[0] % 32 == 0
        assert each.shared <= on.shared_memory
        assert 1 <= each.cluster <= (min(MOST_IN_A_CLUSTER, on.multiprocessors) if on.capability >= 90 else 1)
        assert each.grid[0] % each.cluster == 0
    return status, found


@pytest.mark.parametrize("network", shapes.CALLS)
@pytest.mark.parametrize("dtype", FLOAT_AT_MOST_32, ids=str)
def test_launches_of_networks(runtime, network, dtype):
    for call in shapes.CALLS[network]:
        for n in (1, 16, 64):
            for channels_last in (True, False):
                packed = of_network(call, n, dtype, channels_last)
                for on in DEVICES:
                    status, found = launched(runtime, call.op, packed, on)
                    assert status == cf_status.CF_OK, (call, n, on)
                    plan = cuda_library.plan(call.op, packed, on)
                    assert len(found) == plan.launches
                    assert found[0] == Launch(
                        on.ordinal, (plan.blocks, 1, 1), (plan.threads, 1, 1), plan.cluster, plan.shared_memory, STREAM
                    )


LARGEST = 2**37  # elements that a GPU has memory for


def sizes(draw: random.Random, count: int) -> list[int]:
    """Sizes of a tensor of at most `LARGEST` elements: 1, odd, powers of two, and their neighbours, in any order."""
    left, found = LARGEST, []
    for _ in range(count):
        most = draw.choice([1, 3, 64, 4096, 65535, 65537, 2**24, 2**31, 2**33])
        size = draw.choice([draw.randint(1, most), most, 1 << draw.randint(0, most.bit_length() - 1), most - 1, 8])
        found.append(max(1, min(size, left)))
        left //= found[-1]
    draw.shuffle(found)
    return found


def divisors(number: int, draw: random.Random) -> int:
    small = [i for i in range(1, 65) if number % i == 0]
    return draw.choice([*small, *(number // i for i in small)])


def drawn(op: str, draw: random.Random, dtype: torch.dtype) -> tuple[dict[str, int], bytes]:
    if op == "group_norm_silu":
        n, c, spatial = sizes(draw, 3)
        c2 = draw.randint(0, c - 1) if draw.random() < 0.5 else 0
        given = {"n": n, "c1": c - c2, "c2": c2, "spatial": spatial, "groups": divisors(c, draw)}
        given["channels_last"] = draw.random() < 0.5
        return given, group_norm(dtype, **given)
    if op == "bias_residual":
        given = dict(zip(("n", "c", "spatial"), sizes(draw, 3))) | {"channels_last": draw.random() < 0.5}
        return given, bias_residual(dtype, **given)
    if op == "dual_head":
        n, c, height, width = sizes(draw, 4)
        given = {"n": n, "c": c, "cz": draw.choice([1, 4, 16, 17, 1000]), "height": height, "width": width}
        given["anchored"] = draw.random() < 0.5
        return given, dual_head(dtype, **given)
    given = dict(zip(("n", "size"), sizes(draw, 2))) | {"unit": draw.random() < 0.5}
    return given, coalesce_step(dtype, **given)


@pytest.mark.parametrize("op", ["group_norm_silu", "bias_residual", "dual_head", "coalesce_step"])
def test_launches_of_any_sizes(runtime, op):
    """Within the limits, or refused before anything is launched."""
    draw = random.Random(0)
    refused = 0
    for _ in range(3000):
        dtype, on = draw.choice(FLOAT_AT_MOST_32), draw.choice(DEVICES)
        given, packed = drawn(op, draw, dtype)
        status, found = launched(runtime, op, packed, on)
        assert status in (cf_status.CF_OK, cf_status.CF_INVALID_ARGUMENT), (given, on)
        assert bool(found) == (status == cf_status.CF_OK), (given, on)
        refused += status != cf_status.CF_OK
        if status:  # it would need gigabytes
            given |= {"c": given["c1"] + given["c2"]} if "c1" in given else {}
            per_sample = ("c", "cz", "spatial", "height", "width", "size")
            assert given["n"] * math.prod(given.get(name, 1) for name in per_sample) >= 2**29, given
    assert (refused == 0) == (op == "bias_residual")


def test_rows_are_counted_in_32_bits(runtime):
    """The slab of a block in one launch is small; its rows may be far apart."""
    channels, positions = 700_001, 7000
    packed = group_norm(torch.bfloat16, 1, channels, 0, positions, channels, channels_last=True)
    for on in DEVICES:
        status, _ = launched(runtime, "group_norm_silu", packed, on)
        assert status == cf_status.CF_OK
        plan = cuda_library.plan("group_norm_silu", packed, on)
        parts = plan.cluster if plan.launches == 1 else plan.workspace // (8 * channels)
        assert -(-positions // parts) * channels < 2**31


@pytest.mark.parametrize("channels", [2**31 // 36, 2**31 // 36 + 1])
def test_weights_of_a_head_are_counted_in_32_bits(runtime, channels):
    packed = dual_head(torch.bfloat16, 1, channels, 4, 1, 1, anchored=False)
    status, _ = launched(runtime, "dual_head", packed, DEVICES[0])
    if 36 * channels < 2**31:
        assert status == cf_status.CF_OK
    else:
        assert status == cf_status.CF_INVALID_ARGUMENT
        with pytest.raises(RuntimeError, match=r"dual_head on cuda reports .* sizes beyond its 32-bit indices"):
            cuda_library.plan("dual_head", packed, DEVICES[0])


# Of the emulation's devices: those of DEVICES have the number 1, and some launches there have asked for shared memory.
OTHER = Device(2, 90, 132, 227 << 10)
# devices that have not been asked for shared memory yet
NEW = (OTHER._replace(ordinal=ordinal) for ordinal in itertools.count(3))
LARGE_SLAB = group_norm(torch.float32, 64, 256, 0, 256, 32, channels_last=True)


def names(calls: list[str]) -> list[str]:
    return [call.partition(":")[0] for call in calls]


def test_a_launch_on_another_device_and_back(runtime):
    launch = cuda_library._function("cf_cuda_group_norm_silu", 4)
    for on in (OTHER, OTHER._replace(ordinal=0)):
        assert launch(LARGE_SLAB, cuda_library._packed(on), ADDRESS, STREAM) == cf_status.CF_OK
        calls = [call for call in runtime.calls() if not call.startswith("cudaFuncSetAttribute")]
        elsewhere = on.ordinal != 0
        assert names(calls) == [
            "cudaGetDevice on 0",
            *(["cudaSetDevice on 0"] if elsewhere else []),
            f"cudaLaunchKernelEx on {on.ordinal}",
            *([f"cudaSetDevice on {on.ordinal}"] if elsewhere else []),
        ]
        assert not elsewhere or calls[-1].endswith(" to 0")
        assert launches(calls)[0].shared > DEFAULT_SHARED_MEMORY


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("name", ["cudaGetDevice", "cudaSetDevice", "cudaFuncSetAttribute", "cudaLaunchKernelEx"])
def test_the_error_of_every_call_is_told_and_the_device_restored(runtime, name, elsewhere):
    launch = cuda_library._function("cf_cuda_group_norm_silu", 4)
    on, home = next(NEW), 0
    if not elsewhere:
        runtime.set_device(home := on.ordinal)
        runtime.calls()
    runtime.fail(name)
    status = launch(LARGE_SLAB, cuda_library._packed(on), ADDRESS, STREAM)
    calls = names(runtime.calls())
    is_called = name != "cudaSetDevice" or elsewhere
    assert (name in " ".join(calls)) == is_called
    assert status == (cf_status.CF_CUDA_ERROR + INVALID_VALUE if is_called else cf_status.CF_OK)
    assert runtime.last_error() == 0  # it is told once
    if is_called and name != "cudaLaunchKernelEx":
        assert f"cudaLaunchKernelEx on {on.ordinal}" not in calls
    runtime.fail("")
    launch(LARGE_SLAB, cuda_library._packed(on), ADDRESS, STREAM)
    assert names(runtime.calls())[0] == f"cudaGetDevice on {home}"


def test_shared_memory_is_asked_for_until_it_is_granted(runtime):
    launch = cuda_library._function("cf_cuda_group_norm_silu", 4)
    on = next(NEW)
    asked = []
    for failing in ("cudaFuncSetAttribute", "", ""):
        runtime.fail(failing)
        launch(LARGE_SLAB, cuda_library._packed(on), ADDRESS, STREAM)
        asked.append(sum(call.startswith("cudaFuncSetAttribute") for call in runtime.calls()))
    assert asked == [1, 1, 0]


@pytest.mark.parametrize("op", ["group_norm_silu", "dual_head"])
def test_stream_and_workspace_are_of_the_device_of_the_call(monkeypatch, runtime, op):
    """On torch as it is spelled: torch gives the workspace, of the pool of a capture if there is one, and nobody else
    allocates."""
    place, asked, allocated = torch.device("cuda", 2), [], []

    def empty(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        allocated.append((size * dtype.itemsize, device))
        return torch.zeros(size, dtype=dtype)

    def current_stream(ordinal: int) -> int:
        asked.append(ordinal)
        return STREAM + ordinal

    monkeypatch.setattr(cuda_library, "device", lambda place: OTHER)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", current_stream, raising=False)
    call = cuda_library.function(op, place)
    monkeypatch.setattr(torch, "empty", empty)
    two_launches = group_norm(torch.bfloat16, 1, 1920, 0, 4096, 32, channels_last=True)
    packed = two_launches if op == "group_norm_silu" else dual_head(torch.float32, 2, 320, 4, 64, 64, anchored=True)
    for times in (1, 2):
        call(packed)
        assert asked == [2] * times
        assert allocated == [(cuda_library.plan(op, packed, OTHER).workspace, place)] * times
        found = launches(calls := runtime.calls())
        assert [(each.device, each.stream) for each in found] == [(2, STREAM + 2)] * 2
        # none of them waits or allocates: a capture allows them all
        assert {name.partition(" ")[0] for name in calls} <= {
            "cudaGetDevice",
            "cudaSetDevice",
            "cudaFuncSetAttribute",
            "cudaLaunchKernelEx",
        }
    runtime.fail("cudaLaunchKernelEx")
    with pytest.raises(RuntimeError, match=f"{op} on cuda reports invalid argument"):
        call(packed)


def test_the_library_calls_nothing_else_of_the_runtime():
    """Beside the error's text and the device's description, that is what the emulation notes."""
    sources = [path.read_text() for path in CSRC.iterdir() if path.suffix in (".cu", ".h")]
    called = {name for text in sources for name in re.findall(r"\b(cuda[A-Z]\w*)\(", text)}
    assert called == {
        "cudaGetDevice",
        "cudaSetDevice",
        "cudaFuncSetAttribute",
        "cudaLaunchKernelEx",
        "cudaGetLastError",
        "cudaGetErrorString",
        "cudaDeviceGetAttribute",
    }
