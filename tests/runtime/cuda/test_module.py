"""Modules as fused ops in CUDA graphs, against themselves in PyTorch; without a device in graphs of the CPU."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

import coalescer_fast as cf
from coalescer_fast import networks
from coalescer_fast.ops import native_library
from coalescer_fast.runtime import base
from coalescer_fast.runtime.cuda.module import CudaModuleRuntime
from coalescer_fast.runtime.cuda.program import CudaProgram, TorchWeights
from coalescer_fast.runtime.native.module import runtime_of
from coalescer_fast.runtime.native.record import MetaCopy, record_module
from coalescer_fast.runtime.native.steps import Convolution

from ...helpers.diffusers_networks import NAMES, SIZES, call, error, inputs, network, parts, randn, residuals
from ...helpers.graph_capture import CpuGraphCapture
from ...helpers.modules import VIEWS, Function, layers
from ...helpers.networks import seeded
from ...helpers.numerics import EMULATED

PLENTY = 10**9
# |y - y_ref| / |y_ref| in the root mean square
BUDGET = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
BACKENDS = ["reference", *([] if native_library.unavailable() else ["cpu"]), *EMULATED]


def accelerated(module: Any, dtype: torch.dtype = torch.float32, backend: str = "reference", **kwargs: Any) -> Any:
    """The module, with graphs that are captured on the CPU."""
    for part in parts(module).values():
        CudaModuleRuntime(part, dtype, backend, **{"most_bytes": PLENTY, "capture": CpuGraphCapture(), **kwargs})
    return module


def runtimes(module: nn.Module) -> list[CudaModuleRuntime]:
    return [runtime_of(part) for part in parts(module).values()]


def assert_fast(module: nn.Module) -> None:
    """That its last call ran as fused ops."""
    assert [runtime.refused for runtime in runtimes(module)] == [""] * len(parts(module))


def returned(module: nn.Module, *args: Any) -> list[Tensor]:
    with torch.no_grad():
        return [y for y in tree_leaves(module(*args)) if isinstance(y, Tensor)]


# The same results


@pytest.mark.parametrize("dtype", BUDGET)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_every_network_gives_its_own_results(name, backend, dtype):
    if dtype == torch.float16 and backend == "cpu":
        pytest.skip("the CPU library has no kernels for float16")
    if backend == "cuda" and (dtype != torch.bfloat16 or name not in ("sd_turbo", "scale_shift", "vae_kl")):
        pytest.skip("the emulation is slow: a few networks in one dtype are enough")
    module = network(name)
    small, wide, odd = SIZES[name]
    shapes = ((1, small, 999), (2, wide, 0), (2, odd, 999), (1, odd, 0))
    calls = [inputs(module, n, size, timestep, seed=n) for n, size, timestep in shapes]
    expected = [call(module, given) for given in calls]
    accelerated(module, dtype, backend)
    first = [call(module, given) for given in calls]
    prepared = base.count
    for given, own, mine in zip(calls, expected, first):
        assert error(mine, own) < BUDGET[dtype]
        again = call(module, given)
        assert all(map(torch.equal, again, mine))
        assert [y.dtype for y in again] == [y.dtype for y in own]
    assert_fast(module)
    assert base.count == prepared
    assert all(runtime.graphs.captures == len(calls) for runtime in runtimes(module))


@pytest.mark.parametrize("view", VIEWS)
def test_views_of_any_strides(view):
    function, x = VIEWS[view]
    module = layers(function)
    expected = returned(module, x)
    accelerated(module)
    for _ in range(2):
        for y, own in zip(returned(module, x), expected, strict=True):
            assert y.shape == own.shape
            assert float((y - own).norm()) <= 1e-5 * float(own.norm())
    assert_fast(module)


MODULES = {
    "Sequential": nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 4, 1)),
    "a stride": nn.Sequential(
        nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(8, 6, 1, 2), nn.ReLU(), nn.Upsample(scale_factor=3.0)
    ),
    "a residual": Function(lambda m, x: x + m.c(F.relu(m.d(x))), c=nn.Conv2d(8, 8, 3, padding=1), d=nn.Conv2d(8, 8, 1)),
    "a bias that a residual connection adds": Function(
        lambda m, x: m.d(x) + m.c(x), c=nn.Conv2d(8, 8, 3, padding=1), d=nn.Conv2d(8, 8, 3, padding=1)
    ),
    "a convolution that is read twice": Function(
        lambda m, x: (lambda y: (m.n(y), y))(m.c(x)), c=nn.Conv2d(8, 8, 3, padding=1), n=nn.GroupNorm(2, 8)
    ),
    "a gate of two layers": Function(
        lambda m, x: m.c(x) * F.silu(m.d(x)), c=nn.Conv2d(8, 8, 3, padding=1), d=nn.Conv2d(8, 8, 1)
    ),
    "numbers": Function(lambda m, x: F.silu(3 * torch.tanh(m.c(x) / 2 + 1) - 1), c=nn.Conv2d(8, 8, 1)),
    "a crop": Function(lambda m, x: m.c(x)[:, 2:7].chunk(5, 1)[1], c=nn.Conv2d(8, 8, 1)),
    "what was given": Function(lambda m, x: (x, m.c(x)), c=nn.Conv2d(8, 8, 1)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODULES)
def test_modules(name, backend, dtype):
    module = seeded(copy.deepcopy(MODULES[name]))
    for n, height, width in ((1, 8, 8), (3, 6, 10)):
        x = randn(n, 8, height, width)
        module.__dict__.pop("forward", None)
        expected = returned(module, x)
        accelerated(module, dtype, backend)
        for _ in range(2):
            assert error(returned(module, x), expected) < BUDGET[dtype]
        assert_fast(module)


def heads(m: nn.Module, h: Tensor, r: Tensor, p: Tensor) -> Any:
    return cf.ops.dual_head(m.c(h), m.d.weight, m.d.bias, m.w.weight, m.w.bias, sample=r, anchor=p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dual_head(dtype):
    module = seeded(Function(heads, c=nn.Conv2d(8, 8, 3, padding=1), d=nn.Conv2d(8, 4, 3), w=nn.Linear(8, 1)))
    given = randn(2, 8, 6, 6), randn(2, 4, 6, 6, seed=1), randn(2, 4, 6, 6, seed=2)
    expected = returned(module, *given)
    accelerated(module, dtype)
    for _ in range(2):
        assert error(returned(module, *given), expected) < BUDGET[dtype]
    assert_fast(module)


@pytest.mark.parametrize("name", ["sd15", "lcm", "sdxl_turbo", "ddpm", "scale_shift", "controlnet"])
def test_a_timestep_is_an_input_of_one_graph(name):
    module, twin = network(name), network(name)
    accelerated(module)
    for way, captures in ((lambda t: t, 1), (lambda t: torch.tensor(t), 1), (lambda t: torch.tensor([t, 300]), 2)):
        for t in (0, 500, 999):
            given = inputs(module, 2, timestep=way(t))
            assert error(call(module, given), call(twin, given)) < BUDGET[torch.float32]
        assert_fast(module)
        assert runtimes(module)[0].graphs.captures == captures


def test_a_mask_a_bias_and_residuals_are_inputs():
    module, twin = network("sd15"), network("sd15")
    accelerated(module)
    for seed in range(3):
        mask = torch.rand(2, 11, generator=torch.Generator().manual_seed(seed), dtype=torch.float32) < 0.6
        mask[:, 0] = True
        given = {**inputs(module, 2, seed=seed), "encoder_attention_mask": mask, **residuals(twin, 2, seed=seed)}
        assert error(call(module, given), call(twin, given)) < BUDGET[torch.float32]
    assert_fast(module)
    assert runtimes(module)[0].graphs.captures == 1


def test_results_have_the_dtype_of_the_sample():
    module = network("sd15")
    given = inputs(module, 1)
    expected = call(module, given)
    accelerated(module, torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        rounded = {key: x.to(dtype) if isinstance(x, Tensor) else x for key, x in given.items()}
        results = call(module, rounded)
        assert results[0].dtype == dtype
        assert results[0].is_contiguous()
        assert error(results, expected) < 2 * BUDGET[torch.bfloat16]
    assert runtimes(module)[0].graphs.captures == 2


def test_later_calls_leave_results_alone():
    module = accelerated(network("sd15"))
    results = call(module, inputs(module, 1))
    kept = [y.clone() for y in results]
    call(module, inputs(module, 1, seed=3))
    assert all(map(torch.equal, results, kept))


def test_without_graphs():
    module, twin = network("sd15"), network("sd15")
    accelerated(module, most_bytes=0)
    given = inputs(module, 1)
    assert error(call(module, given), call(twin, given)) < BUDGET[torch.float32]
    assert_fast(module)
    assert runtimes(module)[0].graphs.captures == 0


# What a device needs


class OnMeta(TorchDispatchMode):
    """Holds that whatever runs is on one device, and could be captured in a graph: nothing waits for the device.

    Attributes:
        functions: the names of what has run.
    """

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype, self.functions = dtype, set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for each in tree_leaves((args, kwargs)):
            if isinstance(each, Tensor):
                assert each.is_meta, f"{func} is given a tensor on {each.device}"
            if isinstance(each, torch.device):
                assert each.type == "meta", f"{func} makes a tensor on {each}"
        if func is torch.ops.aten.convolution.default:
            for each in args[:2]:
                assert each.is_contiguous(memory_format=torch.channels_last)
        if func in (torch.ops.aten.convolution.default, torch.ops.aten.addmm.default, torch.ops.aten.mm.default):
            assert {each.dtype for each in args if isinstance(each, Tensor)} == {self.dtype}
        self.functions.add(func._schema.name.partition("::")[2])
        return func(*args, **(kwargs or {}))


def recorded(module: nn.Module, given: dict[str, Any]) -> tuple[Any, Sequence[Tensor]]:
    """What was recorded of a call, and the tensors that it was given."""
    leaves, spec = tree_flatten(given)

    def run(copied: Any, recorder: Any) -> list[Tensor]:
        mine = tree_unflatten([recorder.given(x) if isinstance(x, Tensor) else x for x in leaves], spec)
        return [y for y in tree_leaves(copied.forward(**mine)) if isinstance(y, Tensor)]

    return record_module(MetaCopy(module), run), [x for x in leaves if isinstance(x, Tensor)]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_leaves_the_device_or_waits_for_it(name):
    whole = network(name)
    for part, module in parts(whole).items():
        given = inputs(whole, 2, SIZES[name][0], torch.tensor(500))
        if part:
            (first, *_) = inspect.signature(module.forward).parameters
            given = {first: given["pictures" if part == "encoder" else "latents"]}
        recording, tensors = recorded(module, given)
        meta = {key: p.to("meta") for key, p in module.named_parameters()}
        for step in recording.steps:  # as if they had been recorded of a module on this device
            for field in dataclasses.fields(step):
                if isinstance(value := getattr(step, field.name), Tensor):
                    setattr(step, field.name, value.to("meta"))
            if isinstance(step, Convolution):
                step.weight = dataclasses.replace(step.weight, own=meta.__getitem__)
        program = CudaProgram(recording, TorchWeights(torch.bfloat16), torch.device("meta"))
        there = [x.to("meta") for x in tensors]
        with torch.no_grad(), OnMeta(torch.bfloat16) as mode:
            results = program(*there, dtype=torch.bfloat16)
        assert {y.dtype for y in results} == {torch.bfloat16}
        assert not mode.functions & {"_local_scalar_dense", "nonzero", "lift_fresh", "masked_select", "item"}
        assert "convolution" in mode.functions


def test_a_prologue_moves_to_a_device():
    """Also what it makes of numbers, and on the CPU by name."""

    def forward(m: nn.Module, x: Tensor, t: Tensor) -> Tensor:
        table = torch.tensor([0.5, 2.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0])
        row = t[:, None] * table.to(t.device) + torch.arange(8, device="cpu").to(t.device)
        return m.c(x) + m.l(row)[:, :, None, None]

    module = seeded(Function(forward, c=nn.Conv2d(8, 8, 1), l=nn.Linear(8, 8)))
    given = randn(2, 8, 4, 4), randn(2)
    expected = returned(module, *given)
    assert error(returned(accelerated(copy.deepcopy(module)), *given), expected) < BUDGET[torch.float32]
    recording = record_module(MetaCopy(module), lambda copied, recorder: [copied.forward(*map(recorder.given, given))])
    there, moved = recording.prologue.on(torch.device("meta")), [x.to("meta") for x in given]
    with OnMeta(torch.float32):
        assert all(x.is_meta for x in there(moved))
    assert all(x.device.type == "cpu" for x in recording.prologue(given))  # of which it is a copy


def test_products_of_one_input_are_one():
    module = network("sd15")
    recording, _ = recorded(module, inputs(module, 2, timestep=torch.tensor(5)))

    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)
            return func(*args, **(kwargs or {}))

    convolutions = [step for step in recording.steps if isinstance(step, Convolution)]
    matrices = sum(step.weight.shape[2:] == (1, 1) for step in convolutions)
    rows, attentions = (
        sum(step.row is not None for step in convolutions),
        sum(step.name == "ATTENTION" for step in recording.steps),
    )
    program = CudaProgram(recording, TorchWeights(torch.float32), torch.device("cpu"), "reference")
    given = [x for x in tree_leaves(inputs(module, 2, timestep=torch.tensor(5))) if isinstance(x, Tensor)]
    with torch.no_grad(), Products() as products:
        program(*given)
    # of each self-attention q, k and v, of all cross-attentions k and v, of all blocks the embedding of the timestep
    assert attentions > 2
    assert rows > 2
    assert products.count == matrices - 2 * (attentions // 2) - (2 * (attentions // 2) - 1) - (rows - 1)


# Changes


@pytest.mark.parametrize("how", ["load_state_dict", "in place", "data", "another"])
def test_changed_weights_are_seen_in_the_next_call(how):
    module, twin = network("sd15"), network("sd15")
    accelerated(module)
    given = inputs(module, 1)
    before = call(module, given)
    for each in (module, twin):
        conv, linear = each.conv_out, each.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
        if how == "load_state_dict":
            each.load_state_dict({name: 1.05 * p for name, p in each.state_dict().items()})
        for layer in (conv, linear):
            if how == "in place":
                with torch.no_grad():
                    layer.weight.mul_(1.5)
            elif how == "data":
                layer.weight.data = 1.5 * layer.weight.data
            elif how == "another":
                layer.weight = nn.Parameter(1.5 * layer.weight.detach(), requires_grad=False)
    after = call(module, given)
    assert error(after, before) > 1e-2
    assert error(after, call(twin, given)) < BUDGET[torch.float32]
    assert_fast(module)
    assert len(runtimes(module)[0].graphs.held) == 1


def test_hooks_and_gradients_are_for_torch():
    module, twin = network("sd15"), network("sd15")
    accelerated(module)
    given = inputs(module, 1)
    seen = []
    hook = module.mid_block.register_forward_hook(lambda *_: seen.append(1))
    assert error(call(module, given), call(twin, given)) < BUDGET[torch.float32]
    assert seen == [1]
    assert "mid_block has a forward hook" in cf.explain(module)
    hook.remove()
    call(module, given)
    assert_fast(module)
    wanted = {**given, "sample": given["sample"].clone().requires_grad_()}
    module(**wanted).sample.sum().backward()
    assert wanted["sample"].grad is not None
    assert "needed a gradient" in runtimes(module)[0].refused


def test_restore_and_refresh():
    module, twin = network("sd15"), network("sd15")
    given = inputs(module, 1)
    expected = call(twin, given)
    accelerated(module)
    first = call(module, given)
    cf.refresh(module)
    assert all(map(torch.equal, call(module, given), first))
    assert runtimes(module)[0].graphs.captures == 2
    cf.restore(module)
    assert runtime_of(module) is None
    assert all(map(torch.equal, call(module, given), expected))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_are_accelerated_again(copied, monkeypatch):
    monkeypatch.setattr("coalescer_fast.runtime.cuda.module.CudaGraphCapture", lambda device: CpuGraphCapture())
    module = accelerated(network("sd15"))
    other = copied(module)
    given = inputs(module, 1)
    assert all(map(torch.equal, call(other, given), call(module, given)))
    assert runtimes(other)[0] is not runtimes(module)[0]
    assert_fast(other)


def test_explain_and_verify():
    module = accelerated(network("sd15"))
    assert "it is recorded at its first call" in cf.explain(module)
    verification = cf.verify(module, [inputs(module, 1), inputs(module, 2)])
    assert verification.passed, str(verification)
    shown = cf.explain(module)
    for words in ("torch and fused ops, torch.float32, 2 CUDA graphs", "products", "MB for graphs"):
        assert words in shown


def test_arguments_of_accelerate(monkeypatch):
    with pytest.raises(ValueError, match="Linear is on meta, and is accelerated on a CPU or a CUDA device"):
        cf.accelerate(nn.Linear(2, 2, device="meta"))
    mixed = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match="Sequential is on cpu and meta: move all of it to one device first"):
        cf.accelerate(mixed)
    module = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="backend 'cuda' runs on cuda, and the networks are on cpu: move them first"):
        cf.accelerate(module, backend="cuda")
    monkeypatch.setattr(networks, "device_of", lambda module: torch.device("cuda", 0))
    with pytest.raises(ValueError, match="backend 'cpu' runs on cpu, and the networks are on cuda:0: move them first"):
        cf.accelerate(module, backend="cpu")
    for unwanted in ({"keep_weights": False}, {"cache": "folder"}, {"winograd_memory": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(unwanted))}.* is for a CPU alone"):
            cf.accelerate(module, dtype="float32", **unwanted)
    with pytest.raises(ValueError, match="dtype is 'int8'; use one of auto, float32, bfloat16, float16"):
        cf.accelerate(module, dtype="int8", inputs=[(randn(1, 2),)])
    assert runtime_of(module) is None


# On a GPU


# float32 is compared with a CPU's, and cuDNN has algorithms that round more
GPU_BUDGET = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def on_gpu(given: Any) -> Any:
    return tree_map_only(Tensor, lambda x: x.cuda(), given)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in NAMES),
        *((name, torch.bfloat16) for name in ("sd_turbo", "sdxl_turbo", "scale_shift", "vae_kl")),
        ("sd_turbo", torch.float16),
    ],
)
def test_gpu_every_network_gives_its_own_results(name, dtype):
    """In two shapes, each replayed with other numbers."""
    module = network(name)
    small, wide, _ = SIZES[name]
    calls = [inputs(module, n, size, timestep, n) for n, size, timestep in ((1, small, 999), (2, wide, 7)) * 2]
    calls += [inputs(module, 1, small, 3, seed=5)]
    expected = [call(module, given) for given in calls]
    cf.accelerate(module.cuda(), dtype=dtype)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for given, own in zip(calls, expected):
            results = call(module, on_gpu(given))
            assert error([y.cpu() for y in results], own) < GPU_BUDGET[dtype]
    assert_fast(module)
    assert all(runtime.graphs.captures == 2 for runtime in runtimes(module))


@pytest.mark.gpu
def test_gpu_changed_weights_are_seen_in_the_next_call():
    module = cf.accelerate(network("sd15").cuda(), dtype="float32")
    twin = network("sd15").cuda()
    given = on_gpu(inputs(module, 1))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        before = call(module, given)
        for each in (module, twin):
            with torch.no_grad():
                each.conv_out.weight.mul_(1.5)
                each.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight.add_(0.1)
        after = call(module, given)
        assert error(after, before) > 1e-2
        assert error(after, call(twin, given)) < GPU_BUDGET[torch.float32]
        cf.restore(module)
        assert error(call(module, given), call(twin, given)) < GPU_BUDGET[torch.float32]


@pytest.mark.gpu
def test_gpu_streams_and_timesteps_of_all_kinds():
    module = cf.accelerate(network("sd15").cuda(), dtype="float32")
    twin = network("sd15").cuda()
    stream = torch.cuda.Stream()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for timestep in (999, torch.tensor(500), torch.tensor(20, device="cuda"), torch.tensor([3, 4], device="cuda")):
            given = {**on_gpu(inputs(module, 2)), "timestep": timestep}
            expected = call(twin, given)
            torch.cuda.synchronize()
            with torch.cuda.stream(stream):
                results = call(module, given)
            stream.synchronize()
            assert error(results, expected) < GPU_BUDGET[torch.float32]
            assert_fast(module)
    assert runtimes(module)[0].graphs.captures == 2


@pytest.mark.gpu
def test_gpu_inference_mode_and_channels_last():
    module = network("sd15").cuda().to(torch.bfloat16).to(memory_format=torch.channels_last)
    given = tree_map_only(Tensor, lambda x: x.cuda().bfloat16(), inputs(module, 1))
    expected = call(module.float(), tree_map_only(Tensor, Tensor.float, given))
    cf.accelerate(module.to(torch.bfloat16))
    with torch.inference_mode():
        for _ in range(2):
            result = module(**given, return_dict=False)[0]
            assert result.dtype == torch.bfloat16
            assert error([result], expected) < GPU_BUDGET[torch.bfloat16]
    assert_fast(module)


def test_a_moved_module_is_refused():
    """Also where its inputs have moved with it."""
    module = accelerated(network("vae_kl"))
    for runtime in runtimes(module):
        runtime.device = torch.device("xpu", 0)  # any but the CPU, where the module is
    with pytest.raises(ValueError, match="was accelerated on xpu:0 and is on cpu: move it back, or restore it"):
        call(module, inputs(module, 1, (8, 8)))


@pytest.mark.gpu
def test_gpu_a_moved_module_is_refused():
    module = cf.accelerate(network("vae_kl").cuda())
    module.to("cpu")
    with pytest.raises(ValueError, match="was accelerated on cuda:0 and is on cpu: move it back, or restore it"):
        call(module, inputs(module, 1, (8, 8)))


@pytest.mark.gpu
def test_gpu_convolutions_keep_channels_innermost():
    """No convolution's result is copied to another layout."""
    module = network("sd15").cuda()
    given = on_gpu(inputs(module, 1, timestep=torch.tensor(5)))
    recording, tensors = recorded(module, given)
    program = CudaProgram(recording, TorchWeights(torch.bfloat16), torch.device("cuda", 0))

    class Layouts(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.convolution.default:
                assert result.is_contiguous(memory_format=torch.channels_last)
                self.seen += 1
            return result

    with torch.no_grad(), Layouts() as layouts:
        program(*tensors)
    assert layouts.seen > 10


@pytest.mark.gpu
def test_gpu_a_pipeline():
    from ...helpers.diffusers_pipelines import draw, pipeline, psnr

    pipe = pipeline("StableDiffusionPipeline")
    expected = draw(pipe)
    cf.accelerate(pipe.to("cuda"), dtype="float32")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for _ in range(2):
            assert psnr(draw(pipe).cpu(), expected) > 50
    for name in ("unet", "vae.decoder"):
        assert f"{name}" in cf.explain(pipe)
    assert not any(runtime.refused for runtime in networks.runtimes(pipe).values())
