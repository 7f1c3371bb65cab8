"""What a runtime is given, in whatever dtype, layout and mode: the same bits come out of all of them."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import coalescer_fast as cf
from coalescer_fast import acceleration
from coalescer_fast.ops import library
from coalescer_fast.runtime.base import entered, quiet_torch
from coalescer_fast.runtime.cpu import CpuRuntime
from coalescer_fast.runtime.cuda.runtime import CudaRuntime
from coalescer_fast.runtime.eager import EagerRuntime
from coalescer_fast.runtime.static import StaticRuntime

from .conftest import CpuGraphCapture


def plain(module, args, dtype, folder):
    """Prepares nothing."""
    return lambda rest: lambda x: module(x, *rest)


def engine(name: str):
    return lambda pipe: acceleration.RUNTIMES[name].make(pipe, torch.float32)


def runtimes():
    yield pytest.param(lambda pipe: StaticRuntime(pipe, "plain", plain, torch.float32), id="plain")
    yield pytest.param(
        lambda pipe: CudaRuntime(pipe, "reference", torch.float32, 0, capture=CpuGraphCapture()), id="cuda"
    )
    native = [pytest.mark.skip(reason=reason)] if (reason := library.unavailable()) else []
    yield pytest.param(lambda pipe: CpuRuntime(pipe, torch.float32), marks=native, id="cpu")
    for name in ("onnxruntime", "openvino"):
        missing = [
            package for package in acceleration.RUNTIMES[name].packages if importlib.util.find_spec(package) is None
        ]
        marks = [pytest.mark.skip(reason=f"{', '.join(missing)} is missing")] if missing else []
        yield pytest.param(engine(name), marks=marks, id=name)


@pytest.fixture(scope="module", params=runtimes())
def pipe(request):
    pipe = cf.CoalescerPipeline.from_pretrained("emoji-64")
    pipe.set_progress_bar_config(disable=True)
    pipe.runtime = request.param(pipe)
    return pipe


def draw(pipe) -> torch.Tensor:
    return pipe("octopus", generator=torch.Generator().manual_seed(0), output_type="pt").images


def noise(n: int) -> torch.Tensor:
    return torch.randn(n, 16, 8, 8, generator=torch.Generator().manual_seed(n))


def in_inference_mode(x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return x.clone()


GIVEN = {
    "float16": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "float64": lambda x: x.double(),
    "negated": lambda x: torch._neg_view(x),
    "conjugated": lambda x: torch.fft.fft2(x).conj().imag,
    "transposed": lambda x: x.transpose(2, 3),
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "expanded": lambda x: x[:, :1, :1].expand(x.shape),
    "strided": lambda x: torch.stack([x, -x], -1)[..., 0],
    "at an offset": lambda x: torch.cat([x.new_zeros(3), x.flatten()])[3:].view(x.shape),
    "a parameter": lambda x: torch.nn.Parameter(x),
    "of inference mode": in_inference_mode,
}


@pytest.mark.parametrize("how", GIVEN)
def test_whatever_is_given_its_values_count(pipe, how):
    given = GIVEN[how](noise(1))
    same = torch.empty(given.shape, dtype=torch.float32).copy_(given.detach())
    runtime = pipe.runtime
    conditioning = runtime.condition(["octopus"], runtime.device)
    found = [*runtime.evaluate(given, conditioning), runtime.decode(given)]
    expected = [*runtime.evaluate(same, conditioning), runtime.decode(same)]
    for y, e in zip(found, expected):
        assert y.dtype == torch.float32
        assert not y.is_inference()
        assert y.isfinite().all()
        assert torch.equal(y, e)


@torch.no_grad()
def test_the_first_of_a_shape_decides_nothing(pipe):
    runtime, given = pipe.runtime, noise(2).half()
    conditioning = runtime.condition(["octopus", "pizza"], runtime.device)
    found = [*runtime.evaluate(given, conditioning), runtime.decode(given)]
    reference = [
        *pipe.evaluate(given.float(), pipe.condition(["octopus", "pizza"], pipe.device)),
        pipe.decode(given.float()),
    ]
    for y, again, e in zip(
        found, [*runtime.evaluate(given.float(), conditioning), runtime.decode(given.float())], reference
    ):
        assert torch.equal(y, again)
        assert float((y - e).norm() / e.norm()) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(pipe, dtype):
    with torch.autocast("cpu", dtype):
        drawn = draw(pipe)  # the first of its shape, where it runs first
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(drawn, draw(pipe))


def test_a_callback_may_return_another_dtype(pipe):
    def halve(pipe, step, timestep, given):
        return {"latents": given["latents"].half()}

    def call():
        return pipe(
            "octopus", generator=torch.Generator().manual_seed(0), output_type="pt", callback_on_step_end=halve
        ).images

    found = call()
    runtime, pipe.runtime = pipe.runtime, EagerRuntime(pipe)
    try:
        expected = call()
    finally:
        pipe.runtime = runtime
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)


def test_entered_is_no_copy_where_none_is_needed():
    x = noise(1).to(memory_format=torch.channels_last)
    assert entered(x, x.device).data_ptr() == x.data_ptr()
    assert entered(x, x.device).stride() == x.stride()
    assert not entered(torch._neg_view(x), x.device).is_neg()
    assert entered(x, torch.device("meta")).is_meta


def test_quiet_torch_holds_inside_alone():
    with torch.inference_mode(), torch.autocast("cpu"):
        with quiet_torch():
            x = torch.ones(2, 2, dtype=torch.float32)
            assert not x.is_inference()
            assert (x @ x).dtype == torch.float32
            assert not torch.is_grad_enabled()
        assert torch.is_inference_mode_enabled()
        assert torch.is_autocast_enabled("cpu")
