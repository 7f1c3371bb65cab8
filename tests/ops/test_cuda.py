"""What the CUDA backend does beyond the matrix of its ops: the choice of launch, every path of it, its refusals and its
interface.

On a machine without a GPU the kernels run on the CPU, in the emulation of tests/csrc.
"""

from __future__ import annotations

import contextlib
import csv
import ctypes
import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.kernels import shapes
from coalescer_fast import ops
from coalescer_fast.ops import cuda_library, dispatch, native_library
from coalescer_fast.ops.cuda_library import Device, LaunchPlan
from coalescer_fast.ops.op import OPS

from ..helpers.numerics import FLOAT_AT_MOST_32, INTERPRETED, LAYOUTS, ON_GPU, arrange, make, randn
from ..helpers.rules import bias_residual, coalesce_step, dual_head, group_norm_silu

ABLE, REASON = ops.backends("bias_residual")["cuda"]
pytestmark = [pytest.mark.gpu] if "cuda" in ON_GPU else [pytest.mark.skipif(not ABLE, reason=REASON)]

A100, H100, B200, RTX5090 = (
    Device(0, capability, multiprocessors, kilobytes * 1024)
    for capability, multiprocessors, kilobytes in ((80, 108, 163), (90, 132, 227), (100, 148, 227), (120, 170, 99))
)
SMALL = 24 * 1024  # bytes of shared memory in which few slabs fit


def planned(op: str, on: Device, *args) -> LaunchPlan:
    """The plan of a call that is not made."""
    return cuda_library.plan(op, OPS[op].implementation("cpu").packed(*args), on)


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16, layout: str = "channels_last") -> torch.Tensor:
    memory_format = torch.channels_last if layout == "channels_last" and len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, memory_format=memory_format)


def plan_of_norm(
    n: int, channels: int, skip: int, side: int, on: Device, dtype=torch.bfloat16, groups=32, layout="channels_last"
) -> LaunchPlan:
    x = tensor(n, channels, side, side, dtype=dtype, layout=layout)
    other = tensor(n, skip, side, side, dtype=dtype, layout=layout) if skip else None
    return planned("group_norm_silu", on, x, groups, None, None, 1e-5, None, None, other, None, "silu")


@pytest.fixture
def limited(monkeypatch):
    """Makes the backend take the device for one with these properties, while the code is that of the real one."""
    original = cuda_library.device
    monkeypatch.setattr(cuda_library, "covers", lambda built, capability: True)

    def limit(**changes: int) -> None:
        dispatch.forget()
        monkeypatch.setattr(cuda_library, "device", lambda place: original(place)._replace(**changes))

    yield limit
    dispatch.forget()


@pytest.mark.parametrize(
    ("n", "channels", "skip", "side", "on", "expected"),
    [
        # a small slab is one block's
        (1, 256, 0, 8, H100, "one block"),
        (1, 256, 0, 8, A100, "one block"),
        (1, 128, 0, 32, H100, "one block"),
        # a cluster shares a large one, so that more multiprocessors read, and all of it fits
        (1, 320, 0, 64, H100, "cluster of 8"),
        (1, 320, 0, 64, B200, "cluster of 8"),
        (64, 320, 0, 64, H100, "cluster of 8"),
        (1, 640, 320, 64, H100, "cluster of 8"),
        # at batch 64 there are blocks enough, and each has a slab of its own where it has room
        (64, 128, 0, 32, H100, "one block"),
        (64, 256, 0, 16, H100, "one block"),
        (64, 1280, 1280, 8, H100, "one block"),
        # so much that a multiprocessor holds one block of it at a time
        (64, 640, 320, 64, H100, "two launches"),
        # 60 channels a group and 64x64: whole groups do not fit eight blocks
        (1, 960, 960, 64, H100, "two launches"),
        # no clusters: two launches unless one block has room
        (1, 320, 0, 64, A100, "two launches"),
        (64, 320, 0, 64, A100, "two launches"),
        (64, 128, 0, 32, A100, "one block"),
        # clusters, but 99 kB
        (1, 128, 0, 32, RTX5090, "one block"),
        (1, 320, 0, 64, RTX5090, "cluster of 8"),
        (64, 320, 0, 64, RTX5090, "two launches"),
    ],
)
def test_which_path_a_normalisation_takes(n, channels, skip, side, on, expected):
    plan = plan_of_norm(n, channels, skip, side, on)
    assert name_of(plan) == expected
    assert plan.vector == 8


@pytest.mark.parametrize("on", [A100, H100, B200, RTX5090], ids=["A100", "H100", "B200", "RTX 5090"])
@pytest.mark.parametrize("dtype", FLOAT_AT_MOST_32, ids=str)
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_plans_stay_within_the_device(on, dtype, layout):
    for n in (1, 8):
        for channels, skip, groups in ((96, 0, 8), (128, 0, 32), (640, 320, 32), (1280, 640, 32), (1280, 0, 1)):
            for side in (1, 2, 16, 64):
                plan = plan_of_norm(n, channels, skip, side, on, dtype, groups, layout)
                assert plan.shared_memory <= on.shared_memory
                assert plan.threads <= 512
                assert plan.threads % 32 == 0
                assert plan.cluster in ((1, 2, 4, 8) if on.capability >= 90 else (1,))
                assert plan.blocks % plan.cluster == 0
                assert (plan.launches == 2) == (plan.workspace > 0)
                if layout == "channels_last":
                    assert plan.vector * dtype.itemsize == 16
                assert plan.blocks <= n * channels * side * side


def name_of(plan: LaunchPlan) -> str:
    return "two launches" if plan.launches == 2 else "one block" if plan.cluster == 1 else f"cluster of {plan.cluster}"


def test_the_docs_say_which():
    page = (Path(__file__).parents[2] / "docs" / "kernels" / "group_norm_silu.md").read_text("utf-8")
    found = re.findall(r"^\| (\d+) channels, (\d+)×\d+ \| (.*) \| (.*) \| (.*) \| (.*) \|$", page, re.MULTILINE)
    assert len(found) == 5
    for channels, side, *names in found:
        calls = ((H100, 1), (H100, 64), (A100, 1), (A100, 64))
        assert names == [name_of(plan_of_norm(n, int(channels), 0, int(side), on)) for on, n in calls]


def test_batch_one_fills_a_gpu_with_two_launches():
    plan = plan_of_norm(1, 960, 960, 64, H100)
    assert plan.launches == 2
    assert plan.blocks >= 0.9 * 132


GROUPINGS = [
    (20, 0, 2),
    (185, 0, 5),
    (60, 0, 2),
    (40, 80, 4),
    (120, 0, 10),
    (24, 0, 24),
    (7, 14, 3),
    (64, 0, 1),
    (9, 0, 9),
    (32, 0, 8),
]
PATHS = ("two launches", "two launches, few blocks", "one block", "clusters", "small clusters")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOAT_AT_MOST_32, ids=str)
@pytest.mark.parametrize(("channels", "skip", "groups"), GROUPINGS, ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_every_path_normalises(limited, path, channels, skip, groups, dtype, layout):
    """10, 30 and 12 channels a group, one and C groups; wide vectors and, by odd channels, narrow ones; a seam in a
    vector, in a group."""
    x = arrange(make("off_centre", 2, channels, 9, 8, dtype=dtype), layout)
    other = arrange(1e3 + randn(2, skip, 9, 8, seed=1), layout).to(dtype) if skip else None

    def plan(on: Device) -> LaunchPlan:
        return planned("group_norm_silu", on, x, groups, None, None, 1e-5, None, None, other, None, "silu")

    limited(**device_for(path, plan, cuda_library.device(x.device))._asdict())
    film = {"scale": randn(2, channels + skip, seed=3), "shift": randn(2, channels + skip, seed=4)}
    group_norm_silu.check(
        "cuda", x, groups, randn(channels + skip, seed=5), randn(channels + skip, seed=6), skip=other, **film
    )


def device_for(path: str, plan: Callable[[Device], LaunchPlan], like: Device) -> Device:
    """A device on which the call takes the path; of one row there are no parts, and so no clusters."""
    found: list[tuple[LaunchPlan, Device]] = []

    def try_out(*memories: int) -> None:
        for capability, multiprocessors in itertools.product((80, 90), (1, 2, 8, 33, 132, 100_000)):
            for shared_memory in memories:
                on = like._replace(
                    capability=capability,
                    multiprocessors=multiprocessors,
                    shared_memory=min(shared_memory, like.shared_memory),
                )
                with contextlib.suppress(RuntimeError):  # too little of it
                    found.append((plan(on), on))

    try_out(*(99 * 1024 * 7**i // 10**i for i in range(18)))
    try_out(*{p.shared_memory - 1 for p, _ in found})  # too little for the plan that was best
    name = path.partition(",")[0]
    if name in ("clusters", "small clusters"):
        able = [(p, on) for p, on in found if p.cluster > 1] or found
        return min(able, key=lambda each: each[0].cluster if name == "small clusters" else -each[0].cluster)[1]
    able = [(p, on) for p, on in found if name_of(p) == name]
    return min(able, key=lambda each: each[0].blocks if "few" in path else -each[0].blocks)[1]


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize(
    "shape", [(2, 2100, 2, 3), (1, 6, 2, 1100), (3, 2064, 1, 2), (1, 1, 1, 5000), (1, 4100, 1, 1)], ids=str
)
@pytest.mark.parametrize("groups", [1, 3])
def test_rows_longer_than_a_block(limited, shape, groups, layout):
    """Groups cut into pieces, and many channels of one group."""
    if shape[1] % groups:
        groups = 1
    for changes in ({}, {"capability": 80, "shared_memory": 40 * 1024}):
        limited(**changes)
        x = arrange(make("off_centre", *shape), layout)
        group_norm_silu.check(
            "cuda", x, groups, randn(shape[1], seed=1), randn(shape[1], seed=2), pre_bias=randn(shape[1], seed=3)
        )


@pytest.mark.parametrize("place", [0, 36, 71])
def test_an_outlier_where_values_are_sampled_to_be_taken_off(place):
    """Of three values that are looked at, one may be anything."""
    x = randn(2, 8, 72)
    x[:, ::4, place] = 1e4
    group_norm_silu.check("cuda", x, 2)


@pytest.mark.parametrize("mode", coalesce_step.MODES)
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", FLOAT_AT_MOST_32, ids=str)
@pytest.mark.parametrize("size", [4096, 4104, 5001, 8192, 40_000, 70_000])
def test_every_path_steps(limited, size, dtype, capability, mode):
    """Less and more than a block's registers hold, and than a cluster's; sizes that are no multiple of a vector."""
    limited(capability=capability)
    sample, direction, distance = coalesce_step.batch(shape=(size,), dtype=dtype)
    plan = planned("coalesce_step", cuda_library.device(sample.device), sample, direction, distance, 1.0, mode, 1e-6)
    assert plan.cluster == (
        1 if mode == "raw" or capability == 80 or plan.blocks == len(sample) else plan.blocks // len(sample)
    )
    assert (plan.cluster > 1) == (mode == "unit" and capability == 90 and size > 512 * plan.vector)
    coalesce_step.check("cuda", sample, direction, distance, mode=mode)


@pytest.mark.parametrize("multiprocessors", [1, 8, 132])
@pytest.mark.parametrize("dtype", FLOAT_AT_MOST_32, ids=str)
@pytest.mark.parametrize(
    ("channels", "latent", "size"), [(40, 16, (9, 4)), (33, 5, (3, 70)), (264, 17, (5, 6)), (1, 1, (1, 1))], ids=str
)
def test_heads_with_any_number_of_lanes(limited, multiprocessors, channels, latent, size, dtype):
    limited(multiprocessors=multiprocessors)
    points = [
        arrange(randn(2, latent, *size, seed=seed), layout)
        for seed, layout in ((1, "contiguous"), (2, "channels_last"))
    ]
    h = arrange(randn(2, channels, *size, dtype=dtype), "channels_last")
    dual_head.check("cuda", h, dual_head.parameters(channels, latent, dtype), *points)


def test_a_head_of_many_blocks_with_an_expanded_anchor():
    point, anchor = randn(2, 3, 20, 30, seed=1), randn(1, 3, 20, 30, seed=2).expand(2, -1, -1, -1)
    dual_head.check("cuda", randn(2, 5, 20, 30), dual_head.parameters(5, 3), point, anchor)


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("dtype", FLOAT_AT_MOST_32, ids=str)
@pytest.mark.parametrize("shape", [(3, 40, 7, 9), (1, 2056, 2, 2), (2, 3, 5, 1100), (5, 16, 1, 1)], ids=str)
def test_sums_of_any_width(shape, dtype, layout):
    x, other = (arrange(randn(*shape, dtype=dtype, seed=seed), layout) for seed in (0, 1))
    bias_residual.check("cuda", x, randn(shape[1], seed=2), other)


def test_tensors_off_the_16_byte_grid_are_copied_to_it():
    place = "cpu" if INTERPRETED else "cuda"
    with torch.no_grad():
        for start in (0, 1, 0, 1):  # the second time by a launcher that was prepared for the other
            flat = randn(1 + 2 * 16 * 4 * 4).to(place)
            x = flat[start : start + 2 * 16 * 4 * 4].view(2, 4, 4, 16).permute(0, 3, 1, 2)
            assert (x.data_ptr() % 16 != 0) == (start == 1)
            result = ops.group_norm_silu(x, 4, skip=x, backend="cuda")
            torch.testing.assert_close(result, ops.group_norm_silu(x, 4, skip=x, backend="reference"))
            torch.testing.assert_close(ops.bias_residual(x, None, x, backend="cuda"), 2 * x)


def at_an_offset(x: torch.Tensor, start: int) -> torch.Tensor:
    """A copy with the same strides, so many elements behind a multiple of 16 bytes."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    place = torch.zeros(start + extent, dtype=x.dtype, device=x.device).as_strided(x.shape, x.stride(), start)
    assert place.data_ptr() % 16 == start * x.itemsize % 16
    return place.copy_(x)


@pytest.mark.parametrize("dtype", FLOAT_AT_MOST_32, ids=str)
@pytest.mark.parametrize("channels", [1, 15, 16])
@pytest.mark.parametrize(
    "make_call",
    [
        lambda channels: shapes.GroupNorm(channels, size=3, groups=1, skip=channels, film=True, pre_bias=True),
        lambda channels: shapes.BiasResidual(channels, size=3),
        lambda channels: shapes.DualHead(channels, latent=3, size=3, anchored=True),
        lambda channels: shapes.CoalesceStep(channels, size=4, mode="unit"),
    ],
    ids=["group_norm_silu", "bias_residual", "dual_head", "coalesce_step"],
)
def test_any_argument_may_begin_anywhere_in_a_word_of_16_bytes(make_call, channels, dtype):
    """The emulation fails at a vector at an address that is no multiple of its size, as a GPU does."""
    call = make_call(channels)
    inputs = call.inputs(2, dtype, torch.device("cpu" if INTERPRETED else "cuda"))
    op = getattr(ops, call.op)
    tensors = [name for name, value in inputs.items() if isinstance(value, torch.Tensor)]
    with torch.no_grad():
        expected = op(**inputs, backend="cuda")
        for start in range(1, 16 // dtype.itemsize):
            for names in ([name] for name in tensors) if start == 1 else [tensors]:
                moved = inputs | {name: at_an_offset(inputs[name], start) for name in names}
                torch.testing.assert_close(op(**moved, backend="cuda"), expected, rtol=0, atol=0)
        # every other channel of wider tensors, whose copies may have another layout
        wide = {name: inputs[name].repeat_interleave(2, 1)[:, ::2] for name in tensors if inputs[name].ndim == 4}
        torch.testing.assert_close(op(**inputs | wide, backend="cuda"), expected)


def test_a_prepared_call_is_used_again():
    x = randn(1, 8, 4, 4).to("cpu" if INTERPRETED else "cuda")
    dispatch.forget()
    with torch.no_grad():
        for _ in range(3):
            ops.bias_residual(x, backend="cuda")
    assert len(OPS["bias_residual"].launchers) == 1


@pytest.mark.skipif(not INTERPRETED, reason="needs the emulation")
@pytest.mark.parametrize("on", [H100, A100._replace(shared_memory=20 * 1024)], ids=["cluster", "two launches"])
def test_the_order_of_threads_and_blocks_changes_no_bit(limited, on):
    limited(**on._asdict())
    x = randn(2, 120, 9, 9).to(memory_format=torch.channels_last)
    results = []
    for seed in range(5):
        cuda_library._load()[0].emulation_seed(ctypes.c_uint64(seed))
        results.append(ops.group_norm_silu(x, 12, backend="cuda"))
    assert all(torch.equal(result, results[0]) for result in results)


def test_what_code_runs_where():
    assert cuda_library.covers((80, 90), 86)
    assert cuda_library.covers((80, 90), 90)
    assert not cuda_library.covers((86,), 80)
    assert not cuda_library.covers((80, 90), 100)
    assert not cuda_library.covers((), 90)


def test_a_missing_library_says_why(monkeypatch, tmp_path):
    monkeypatch.setattr(native_library, "FOLDER", tmp_path)
    monkeypatch.setattr(cuda_library, "PATH", None)
    (tmp_path / "build.json").write_text(
        json.dumps({"cpu": "", "cuda": "there is no nvcc: install the CUDA toolkit, or set CUDA_HOME"})
    )
    assert cuda_library._load.__wrapped__()[1] == (
        "the library of CUDA kernels is not there: there is no nvcc: install the CUDA toolkit, or set CUDA_HOME; "
        "install coalescer_fast again to build it"
    )


@pytest.mark.parametrize("op", [name for name, op in OPS.items() if "cuda" in op.implementations])
def test_the_interface_refuses_a_dtype_that_does_not_exist(op):
    arguments = (9).to_bytes(8, "little") * len(OPS[op].implementation("cpu").binding.struct.leaves())
    with pytest.raises(RuntimeError, match=f"{op} on cuda reports an argument that it does not take"):
        cuda_library.plan(op, arguments, H100)
    with pytest.raises(RuntimeError, match=f"{op} on cuda reports an argument that it does not take"):
        cuda_library.function(op, torch.device("cpu"))(arguments)


@pytest.mark.skipif(not INTERPRETED, reason="would be a launch that a GPU refuses")
def test_a_refused_launch_is_an_error_that_says_why(limited):
    limited(shared_memory=300 * 1024, multiprocessors=1, capability=80)  # more than any device has
    x = randn(1, 64, 32, 32).to(memory_format=torch.channels_last)  # 262 kB
    with pytest.raises(RuntimeError, match=r"group_norm_silu on cuda reports \w+"):
        ops.group_norm_silu(x, 1, backend="cuda")
    dispatch.forget()
    limited(shared_memory=H100.shared_memory)
    ops.group_norm_silu(x, 1, backend="cuda")  # and the next call runs


def test_many_odd_channels_of_a_small_image_have_a_plan():
    """39 channels a group that are no multiple of a vector, and 9 rows."""
    plan = plan_of_norm(3, 575, 49, 3, H100._replace(multiprocessors=8), dtype=torch.float32, groups=16)
    assert (plan.vector, plan.blocks) == (1, 12)


@pytest.mark.skipif(not INTERPRETED, reason="the library must take the device for another")
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_a_first_row_that_is_not_like_the_rest(limited, layout):
    """A thread of this device has hundreds of rows, and sums what lies above the first of them."""
    limited(capability=80, multiprocessors=4, shared_memory=163 * 1024)
    x = randn(1, 32, 256, 256)
    x[:, :, 0, 0] = 1e6
    expected = torch.nn.functional.group_norm(x.double(), 8)
    y = ops.group_norm_silu(arrange(x, layout), 8, activation=None, backend="cuda")
    assert float(((y - expected).abs() / expected.abs().clamp(min=1)).max()) < 5e-6


def test_plans_are_near_the_best_that_were_measured():
    """Of all ways to cut a call: rows of 32, 64, ... bytes, in 1, 2, ... parts, in one launch or two."""
    path = Path(__file__).parents[2] / "benchmarks" / "results" / "nvidia-h100-80gb-hbm3" / "launch_plans.csv"
    times: dict[tuple[str, int], dict[tuple[int, int, int], float]] = {}
    calls = {str(call): call for of_model in shapes.CALLS.values() for call in of_model if call.op == "group_norm_silu"}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["op"] == "group_norm_silu":
                launches, run, parts = re.fullmatch(r"(one|two) .* of (\d+) bytes, (\d+) parts", row["plan"]).groups()
                call, n, splits = calls[row["call"]], int(row["batch"]), int(parts)
                per_group = (call.channels + call.skip) // call.groups
                columns = min(math.lcm(per_group, max(int(run) // 2, 8)), call.channels + call.skip)
                tiles = -(-call.groups // (columns // per_group))
                key = 1 + (launches == "two"), tiles, splits
                times.setdefault((row["call"], n), {})[key] = float(row["us"])
    ratios = []
    for (name, n), measured in times.items():
        call = calls[name]
        plan = plan_of_norm(n, call.channels, call.skip, call.size, H100, groups=call.groups)
        splits = plan.cluster if plan.launches == 1 else plan.workspace // (8 * n * call.groups)
        time = measured.get((plan.launches, plan.blocks // (n * splits), splits))
        ratios += [] if time is None else [time / min(measured.values())]
    assert len(times) == len(ratios) == 212
    assert sum(ratios) / len(ratios) < 1.03
    assert max(ratios) < 1.25
