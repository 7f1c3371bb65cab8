"""Runtimes: the same bits whatever the dtype, layout and mode of what they are given, and what they have in common."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import coalescer_fast as cf
from coalescer_fast import acceleration
from coalescer_fast.ops import native_library
from coalescer_fast.runtime.base import Part, PipelineRuntime, Runtime, entered, quiet_torch
from coalescer_fast.runtime.cuda.runtime import CudaRuntime
from coalescer_fast.runtime.eager import EagerRuntime
from coalescer_fast.runtime.engines.per_shape import PerShapeRuntime
from coalescer_fast.runtime.native.runtime import NativeRuntime
from coalescer_fast.sampling import Call

from ..helpers.graph_capture import CpuGraphCapture


def plain(module, args, dtype, folder):
    """Prepares nothing."""
    return lambda rest: lambda x: module(x, *rest)


def engine(name: str):
    return lambda pipe: acceleration.RUNTIMES[name].make(pipe, torch.float32)


def runtimes():
    yield pytest.param(lambda pipe: PerShapeRuntime(pipe, "plain", plain, torch.float32), id="plain")
    yield pytest.param(
        lambda pipe: CudaRuntime(pipe, "reference", torch.float32, 0, capture=CpuGraphCapture()), id="cuda"
    )
    native = [pytest.mark.skip(reason=reason)] if (reason := native_library.unavailable()) else []
    yield pytest.param(lambda pipe: NativeRuntime(pipe, torch.float32), marks=native, id="cpu")
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


def test_every_kind_is_a_runtime(pipe):
    runtime = pipe.runtime
    assert isinstance(runtime, PipelineRuntime)
    assert runtime.pipe is pipe
    assert runtime.max_batch is None
    assert runtime.precision == "float32"
    assert all(isinstance(part, Part) for part in runtime.explain())


class Doubling(Runtime):
    """The least that a runtime has to have, with a wrong decoder."""

    name, device, dtype, backend = "doubling", torch.device("cpu"), torch.bfloat16, "reference"

    def condition(self, texts, device):
        return self.pipe.condition(texts, device)

    def evaluate(self, sample, conditioning):
        return self.pipe.evaluate(sample, conditioning)

    def decode(self, latents):
        return 2 * self.pipe.decode(latents)

    def explain(self):
        return [Part("decoder", "itself twice", "for a test"), Part.of_op("coalesce_step", "auto", "each call chooses")]


@pytest.fixture
def fresh():
    pipe = cf.CoalescerPipeline.from_pretrained("emoji-64")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_runtime_of_ones_own(fresh):
    reference = draw(fresh)
    fresh.runtime = Doubling(fresh)
    torch.testing.assert_close(draw(fresh), (2 * (2 * reference - 1) / 2 + 0.5).clamp(0, 1), atol=1e-6, rtol=0)
    assert fresh.runtime.precision == "bfloat16"
    assert cf.explain(fresh).splitlines() == [
        "part           runs on       because",
        "decoder        itself twice  for a test",
        "coalesce_step  auto          each call chooses",
    ]
    assert [part.backend for part in fresh.runtime.explain()] == [None, None]
    assert cf.refresh(fresh) is fresh  # nothing to do
    with pytest.raises(TypeError, match="abstract"):
        Runtime(fresh)


def test_the_reference_is_a_runtime_too(fresh):
    runtime = fresh.runtime
    assert isinstance(runtime, EagerRuntime)
    assert (runtime.name, runtime.precision, runtime.backend) == ("reference", "float32", "reference")
    fresh.to(torch.bfloat16)
    fresh.unet.set_backend("auto")
    assert (runtime.dtype, runtime.precision, runtime.backend) == (torch.bfloat16, "bfloat16", "auto")
    assert runtime.device == fresh.device
    assert cf.restore(fresh).runtime is not runtime


def test_a_runtime_does_not_keep_its_pipeline(fresh):
    runtime = CudaRuntime(fresh, "reference", torch.float32, 0, capture=CpuGraphCapture())
    with pytest.raises(RuntimeError, match="the pipeline of this runtime is gone"):
        (lambda pipe: EagerRuntime(pipe))(fresh.twin()).pipe  # noqa: B018
    assert runtime.pipe is fresh


def test_a_twin_is_the_same_and_not_accelerated(fresh):
    reference = draw(fresh)
    cf.accelerate(fresh, dtype="float32")
    runtime, twin = fresh.runtime, fresh.twin()
    assert isinstance(twin.runtime, EagerRuntime)
    assert twin.recipe is None
    assert twin.unet is fresh.unet
    assert torch.equal(draw(twin), reference)
    twin.set_progress_bar_config(disable=False)
    assert fresh._progress_bar_config == {"disable": True}
    assert fresh.runtime is runtime
    assert fresh.recipe is not None


def test_steps_are_told_and_may_be_interrupted(fresh):
    """By the loop that every runtime has."""
    sample, seen = noise(1), []
    scheduler = fresh.scheduler
    scheduler.set_timesteps(4)
    conditioning = fresh.runtime.condition(["octopus"], fresh.device)
    call = Call(1.0, 4, progress=seen.append)

    def generate(decode=False, **more):
        return fresh.runtime.generate(scheduler, sample, conditioning, None, 1.0, decode, **more)

    latents = generate(call=call)
    assert seen == [1, 1, 1, 1]
    torch.testing.assert_close(generate(decode=True), fresh.decode(latents))
    call.interrupt = True
    assert generate(call=call) is sample
    assert len(seen) == 4


@torch.no_grad()
def test_no_picture_of_latents_that_are_not_finite(fresh):
    fresh.runtime = Doubling(fresh)
    sample = noise(3)
    sample[1, 0, 0, 0] = torch.inf
    fresh.runtime.evaluate = lambda sample, conditioning: (torch.zeros_like(sample), torch.zeros(len(sample)))
    fresh.scheduler.set_timesteps(1)
    pictures = fresh.runtime.generate(fresh.scheduler, sample, None, None, 1.0, decode=True)
    assert [bool(picture.isfinite().all()) for picture in pictures] == [True, False, True]
    assert pictures[1].isnan().all()


def test_quality_and_evaluations_are_the_references(pipe):
    call = {"latents": noise(3), "output_type": "pt"}
    reference = pipe.twin()
    found, expected = (each(["octopus", "fast food", "red heart"], **call) for each in (pipe, reference))
    torch.testing.assert_close(found.quality, expected.quality, atol=0.01, rtol=0)
    assert found.num_evaluations == expected.num_evaluations == [3] * 3
    assert 0 < min(found.quality) < max(found.quality) < 1


def test_auto_and_best_of(pipe):
    auto = pipe(["octopus", "fast food"], latents=noise(2), num_inference_steps="auto", output_type="pt")
    for i, used in enumerate(auto.num_evaluations):
        plain = pipe(
            ["octopus", "fast food"][i], latents=noise(2)[i : i + 1], num_inference_steps=used - 1, output_type="pt"
        )
        assert (auto.images[i] - plain.images[0]).square().mean() < 1e-3
    best = pipe("octopus", latents=noise(2), best_of=2, output_type="pt")
    each = pipe("octopus", 2, latents=noise(2), output_type="pt", return_trace=True)
    kept = int(each.trace[1].distance.argmax())
    torch.testing.assert_close(best.quality, each.quality[kept : kept + 1], atol=1e-3, rtol=0)
    torch.testing.assert_close(best.images, each.images[kept : kept + 1], atol=1e-3, rtol=0)
