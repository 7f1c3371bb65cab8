"""What the Triton backend does beyond the matrix of its ops: splits, tiles and seams, large indices, its table and its
refusals."""

from __future__ import annotations

import contextlib
import sys
import types

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from benchmarks.kernels import triton_aot, tune_triton  # noqa: E402
from coalescer_fast import ops  # noqa: E402
from coalescer_fast.ops import dispatch, layout, triton_launch  # noqa: E402
from coalescer_fast.ops.kernels.bias_residual import triton as residual  # noqa: E402
from coalescer_fast.ops.kernels.coalesce_step import triton as step  # noqa: E402
from coalescer_fast.ops.kernels.dual_head import triton as head  # noqa: E402
from coalescer_fast.ops.kernels.group_norm_silu import triton as group_norm  # noqa: E402

from ..helpers.numerics import INTERPRETED, ON_GPU, arrange, make, randn  # noqa: E402
from ..helpers.rules import dual_head, group_norm_silu  # noqa: E402

on_gpu = pytest.mark.gpu if "triton" in ON_GPU else ()
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")


def mark(*values):
    return [pytest.param(value, marks=on_gpu) for value in values]


@pytest.mark.parametrize("memory", mark("channels_last", "contiguous"))
@pytest.mark.parametrize("multiprocessors", [1, 3, 64])
@pytest.mark.parametrize(
    ("n", "spatial"),
    [(1, (8, 25)), (2, (20, 20)), (3, (1, 193)), (1, (64, 8)), (1, (3, 10, 11))],
    ids=["uneven last split", "uneven last block", "one row in the last block", "even", "3D"],
)
def test_splits(monkeypatch, n, spatial, multiprocessors, memory):
    monkeypatch.setattr(group_norm, "multiprocessors", lambda device: multiprocessors)
    x = arrange(make("off_centre", n, 12, *spatial), memory)
    group_norm_silu.check(
        "triton", x, 3, randn(12, seed=1), randn(12, seed=2), scale=randn(n, 12, seed=3), shift=randn(n, 12, seed=4)
    )


def test_without_a_gpu_the_tests_run_in_the_interpreter():
    assert triton_launch.INTERPRETED is not torch.cuda.is_available()


def test_parts_are_never_empty():
    for blocks in range(1, 70):
        for wanted in range(70):
            count, each = group_norm.parts(blocks, wanted)
            assert 1 <= count <= max(wanted, 1)
            assert (count - 1) * each < blocks <= count * each


@pytest.mark.parametrize("memory", mark("channels_last", "contiguous"))
@pytest.mark.parametrize(
    ("channels", "skip", "num_groups"),
    [
        (160, 0, 1),
        (160, 0, 2),
        (130, 0, 13),
        (130, 0, 130),
        (130, 0, 65),
        (40, 56, 8),
        (63, 66, 3),
        (1, 128, 43),
        (96, 160, 8),
    ],
    ids=lambda value: str(value),
)
def test_tiles_of_groups(memory, channels, skip, num_groups):
    """Groups larger than a tile, several to a tile and across its edge; a seam within a tile and within a group."""
    x, other = (
        arrange(randn(2, channels, 3, 5), memory),
        arrange(5 + randn(2, skip, 3, 5, seed=1), memory) if skip else None,
    )
    weight, bias, pre_bias = (randn(channels + skip, seed=seed) for seed in (2, 3, 4))
    group_norm_silu.check("triton", x, num_groups, weight, bias, skip=other, pre_bias=pre_bias)


@pytest.mark.parametrize("latent", mark(16, 17, 70, 130))
def test_heads_of_any_number_of_channels(latent):
    points = [randn(2, latent, 3, 4, seed=seed) for seed in (1, 2)]
    dual_head.check("triton", randn(2, 40, 3, 4), dual_head.parameters(40, latent), *points)


@pytest.mark.parametrize("size", mark((17, 19), (1, 300), (300, 1)))
def test_head_of_many_tiles_with_an_expanded_anchor(size):
    point, anchor = (
        randn(2, 3, *size, seed=1).to(memory_format=torch.channels_last),
        randn(1, 3, *size, seed=2).expand(2, -1, -1, -1),
    )
    dual_head.check("triton", randn(2, 5, *size), dual_head.parameters(5, 3), point, anchor)


@triton.jit
def copy_tile(x, out, n, row, channel, spatial, channels, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr):
    r, c = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    z = group_norm.load_tile(
        x, None, tl.cast(n, tl.int64), row, r, channel + c, spatial, channels, 0, CHANNELS_LAST, False
    )
    tl.store(out + r * BLOCK + c, z)


@pytest.fixture
def sparse(tmp_path):
    """Makes float16 tensors of more than 2^31 elements: holes of a file, of which only the pages in use take memory."""

    def make(*shape: int) -> torch.Tensor:
        numel = 1
        for size in shape:
            numel *= size
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        return torch.from_file(str(path), shared=True, size=numel, dtype=torch.float16).view(shape)

    return make


@interpreted
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("n", [0, 1])
def test_tile_beyond_2_to_the_31_elements(sparse, channels_last, n):
    spatial, channels = 2**27 + 16, 24
    x = sparse(2, *(spatial, channels) if channels_last else (channels, spatial))
    if channels_last:
        x = x.transpose(1, 2)
    tile = randn(4, 4, dtype=torch.float16)
    x[n, 20:, -4:] = tile.t()
    out = torch.zeros(4, 4)
    copy_tile[(1,)](x, out, n, spatial - 4, 20, spatial, channels, channels_last, 4)
    assert torch.equal(out, tile.float())


@pytest.fixture
def no_overflow(monkeypatch):
    """Makes it an error if a sum, a difference or a product of a kernel does not fit its integers."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    original = builder.binary_op

    def binary_op(lhs, rhs, op):
        result = original(lhs, rhs, op)
        if op in (np.add, np.subtract, np.multiply) and result.data.dtype == np.int32:
            exact = op(lhs.data.astype(np.int64), rhs.data.astype(np.int64))
            assert (result.data == exact).all(), f"{op.__name__} of 32 bits gives {exact.min()} to {exact.max()}"
        return result

    monkeypatch.setattr(builder, "binary_op", binary_op)


@triton.jit
def multiply(x, y, out):
    tl.store(out, tl.load(x) * y)


@interpreted
def test_an_overflow_is_found(no_overflow):
    x, out = torch.tensor([2**16], dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    multiply[(1,)](x, 2**14, out)
    assert out.item() == 2**30
    with pytest.raises(Exception, match=r"multiply of 32 bits gives 2147483648"):
        multiply[(1,)](x, 2**15, out)


@interpreted
@pytest.mark.parametrize("memory", ["channels_last", "contiguous"])
@pytest.mark.parametrize("op", ["bias_residual", "coalesce_step", "dual_head", "group_norm_silu"])
def test_last_sample_beyond_2_to_the_31_elements(monkeypatch, no_overflow, sparse, op, memory):
    """Of each launch only the last program runs, which works on the last sample."""
    from triton.runtime import interpreter

    n, shape = 2**31 // 1024 + 8, (16, 8, 8)
    x, y = (
        sparse(n, 8, 8, 16).permute(0, 3, 1, 2) if memory == "channels_last" else sparse(n, *shape) for _ in range(2)
    )
    x[-1] = randn(*shape, dtype=torch.float16)
    last = x[-1:].clone(memory_format=torch.preserve_format)
    builder = interpreter.interpreter_builder
    set_grid_idx = builder.set_grid_idx

    def launch(kernel, programs, device, *args, **options):
        # the second kernel of group_norm_silu counts backwards
        program = 0 if kernel is group_norm.apply_kernel else programs - 1
        monkeypatch.setattr(builder, "set_grid_idx", lambda *index: set_grid_idx(program, 0, 0))
        monkeypatch.setattr(builder, "set_grid_dim", lambda *dims: setattr(builder, "grid_dim", (programs, 1, 1)))
        kernel[(1,)](*args, **options)

    for module in (group_norm, head, residual, step):
        monkeypatch.setattr(module, "launch", launch)
    monkeypatch.setattr(layout, "empty", lambda *args: y)
    monkeypatch.setattr(torch, "empty", lambda *size, **options: torch.zeros(*size, **options))
    if op == "bias_residual":
        residual.bias_residual(x, None, x)
        expected = last + last
    elif op == "coalesce_step":
        step.coalesce_step(x, x, torch.ones(1).expand(n), 1.0, "raw", 1e-6)
        expected = last + last
    elif op == "dual_head":
        weights = dual_head.parameters(16, 16, torch.float16)
        head.dual_head(x, *weights, None, None)
        expected = ops.dual_head(last, *weights, backend="reference")[0]
    else:
        group_norm.group_norm_silu(x, 1, None, None, 1e-5, None, None, None, None, None)
        expected = torch.nn.functional.group_norm(last.float(), 1).half()
    written = y[-1:].abs() > 0
    assert written.sum() >= 64  # its tile at least
    torch.testing.assert_close(y[-1:][written], expected[written], rtol=2e-3, atol=2e-3)


def test_table_has_every_class_and_no_other():
    table = {
        (kernel, memory, size): entry
        for kernel, layouts in triton_launch._table().items()
        for memory, sizes in layouts.items()
        for size, entry in sizes.items()
    }
    assert set(table) == set(tune_triton.CANDIDATES)
    for key, entry in table.items():
        assert entry["configuration"] in tune_triton.CANDIDATES[key]
        assert entry["basis"] == "compiled, not measured" or entry["basis"].startswith("measured on ")
    reached = set()
    for dtype in (torch.bfloat16, torch.float32):
        for _, op, args in triton_aot.calls(dtype, all_flags=True):
            reached |= {
                launch.key
                for launch in triton_aot.record(lambda op=op, args=args: triton_aot.implementation(op)(*args))
            }
    assert reached == set(table)


@pytest.mark.parametrize("name", ["emoji-64", "m", "l"])
def test_table_serves_every_shape_of_a_unet(name):
    pytest.importorskip("diffusers")
    from coalescer_fast.models.unet import CONFIGURATIONS

    config = CONFIGURATIONS[name]
    levels = config["block_out_channels"]

    def launched(op, *args):
        return len(triton_aot.record(lambda: triton_aot.implementation(op)(*args)))

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            for level, channels in enumerate(levels):
                side = config["sample_size"] >> level
                x = torch.empty(1, channels, side, side, dtype=dtype, device="meta").to(memory_format=memory_format)
                for behind in {levels[max(level - 1, 0)], channels, levels[min(level + 1, len(levels) - 1)]}:
                    skip = torch.empty(1, behind, side, side, dtype=dtype, device="meta").to(
                        memory_format=memory_format
                    )
                    groups = config["norm_num_groups"]
                    assert launched("group_norm_silu", x, groups, None, None, 1e-5, None, None, skip, None, "silu") == 2
                assert launched("bias_residual", x, None, x) == 1
            latent, side = config["latent_channels"], config["sample_size"]
            h = torch.empty(1, levels[0], side, side, dtype=dtype, device="meta").to(memory_format=memory_format)
            point = torch.empty(1, latent, side, side, device="meta")
            weight = torch.empty(latent, levels[0], 3, 3, device="meta")
            flat = [torch.empty(size, device="meta") for size in (latent, levels[0], 1)]
            assert launched("dual_head", h, weight, *flat, point, point) == 2
            assert launched("coalesce_step", point, point, flat[-1], 1.0, "unit", 1e-6) == 1


def reason(**tensors: torch.Tensor) -> str:
    return dispatch.BACKENDS["triton"].refusal(tensors)


@interpreted
def test_bfloat16_is_refused_in_the_interpreter_with_the_reason():
    assert not reason(x=torch.zeros(1))
    assert "x has dtype torch.bfloat16, to which Triton's interpreter truncates" in reason(
        x=torch.zeros(1, dtype=torch.bfloat16)
    )
    with pytest.raises(ValueError, match=r"bias has dtype torch\.bfloat16"):
        ops.bias_residual(torch.zeros(1, 2, 3), torch.zeros(2).bfloat16(), backend="triton")


def test_float64_is_refused():
    assert (
        "x has dtype torch.float64"
        in ops.backends("bias_residual", torch.zeros(1, 2, 3, dtype=torch.float64))["triton"][1]
    )


@pytest.mark.parametrize(
    ("shape", "is_refused"),
    [
        ((1, 256, 4096, 4096), False),  # of a decoder, 4096 pixels wide: 2^32 elements, but few in a tile
        ((2**22, 16, 8, 8), False),
        ((1, 1, 2**16, 2**15 - 1), False),
        ((1, 1, 2**16, 2**15), True),  # positions
        ((2, 3, 2**31 + 5), True),
        ((1, 2**20, 16, 16), False),
        ((1, 2**20 + 1, 16, 16), True),  # a tile of all positions
        ((1, 2**16, 1, 2**15), True),  # a row of the image
        ((1, 127, 2**24 + 132_000), True),  # the last block of a sample's elements ends behind 2^31
        ((1, 2**29), True),
        ((2**31,), False),
    ],
    ids=str,
)
def test_samples_beyond_32_bit_indices_are_refused(shape, is_refused):
    x = torch.empty(1, dtype=torch.float16).expand(shape)
    assert ("which are too large for the 32-bit indices" in triton_launch.refusal(x)) == is_refused


def test_a_head_with_weights_beyond_32_bit_indices_is_refused():
    h, few = torch.zeros(1, 2**13, 1, 1), torch.zeros(1)
    weight = few.expand(2**15, 2**13, 3, 3)
    with pytest.raises(ValueError, match="direction_weight has 2415919104 elements"):
        head.dual_head(h, weight, few, few, few, None, None)


@pytest.mark.parametrize("current", [0, 1])
@pytest.mark.parametrize("fails", [False, True])
def test_a_launch_is_on_the_device_of_its_tensors(monkeypatch, current, fails):
    """On torch as it is spelled. Triton launches on the current device, on torch's current stream of it."""
    devices, launched = [current], []

    @contextlib.contextmanager
    def device(place):
        devices.append(place.index)
        try:
            yield
        finally:
            devices.pop()

    class Kernel:
        def __getitem__(self, grid):
            def run(*args, **options):
                launched.append((grid, devices[-1]))
                if fails:
                    raise RuntimeError("out of resources")

            return run

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: devices[-1])
    with pytest.raises(RuntimeError, match="out of resources") if fails else contextlib.nullcontext():
        triton_launch.launch(Kernel(), 5, torch.device("cuda", 1), 1, None)
    triton_launch.launch(Kernel(), 0, torch.device("cuda", 1), 1, None)
    assert launched == [((5,), 1)]
    assert devices == [current]


def test_old_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(triton_launch, "_capability", lambda device: (7, 5))
    old = types.SimpleNamespace(device=torch.device("cuda", 1), dtype=torch.float16, shape=(1, 2, 3))
    assert triton_launch.refusal(old) == "is on cuda:1 of compute capability 7.5; expected 8.0 or newer"
    monkeypatch.setattr(triton_launch, "_capability", lambda device: (8, 0))
    assert triton_launch.refusal(old) == ""


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (None, "triton cannot be imported"),
        (types.SimpleNamespace(__version__="3.4.0"), "triton is 3.4.0; expected 3.5 or newer"),
    ],
    ids=["missing", "old"],
)
def test_why_triton_cannot_run(monkeypatch, module, words):
    monkeypatch.setitem(sys.modules, "triton", module)
    triton_launch.unavailable.cache_clear()
    try:
        assert words in triton_launch.unavailable()
        assert words in reason(x=torch.zeros(1, device="meta" if not INTERPRETED else "cpu")) or not INTERPRETED
    finally:
        triton_launch.unavailable.cache_clear()


@pytest.mark.parametrize("version", ["3.5.0", "3.10.1", "4.0.0+git1"])
def test_newer_versions_can_run(monkeypatch, version):
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__=version))
    triton_launch.unavailable.cache_clear()
    try:
        assert triton_launch.unavailable() == ""
    finally:
        triton_launch.unavailable.cache_clear()
