from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence

import pytest
import torch

import coalescer_fast
import coalescer_fast as cf
from coalescer_fast import CoalescerPipeline, accelerate, ops, verify
from coalescer_fast.ops import dispatch, native_library
from coalescer_fast.parity import Budget, Verification, at_least
from coalescer_fast.runtime.base import Part, Runtime

from .helpers.pipelines import FREE, tiny_pipeline

OPS = ("bias_residual", "coalesce_step", "dual_head", "group_norm_silu")


class StandIn(Runtime):
    """A runtime that `verify` knows nothing of: copies of a pipeline's networks, with faults that a test plants."""

    def __init__(
        self,
        pipe: CoalescerPipeline,
        dtype: torch.dtype = torch.float32,
        name: str = "stand-in",
        parts: Sequence[Part] = (),
    ):
        super().__init__(pipe)
        self.name, self.dtype, self.parts = name, dtype, list(parts)
        self.unet, self.vae, self.encoder = (
            copy.deepcopy(pipe.unet).to(dtype),
            copy.deepcopy(pipe.vae).to(dtype),
            pipe.description_encoder,
        )
        self.device, self.backend = pipe.device, "reference"
        self.direction_fault = self.distance_fault = self.picture_fault = lambda x: x

    def explain(self):
        return self.parts

    def condition(self, texts, device):
        rows = self.encoder.token_rows(texts) if self.unet.config.cross_attention_dim else ()
        return self.unet.condition(self.encoder(texts).to(device), *rows)

    def evaluate(self, sample, conditioning):
        direction, distance = self.unet(sample, conditioning, return_dict=False)
        return self.direction_fault(direction), self.distance_fault(distance)

    def decode(self, latents):
        return self.picture_fault(self.vae.decode(latents.to(self.dtype)).sample.float())


def accelerated(
    unet: dict | None = None,
    dtype: torch.dtype = torch.float32,
    name: str = "stand-in",
    parts: Sequence[Part] = (),
    **scheduler,
) -> CoalescerPipeline:
    pipe = tiny_pipeline(unet, **scheduler)
    pipe.runtime = StandIn(pipe, dtype, name, parts)
    return pipe


def failed(result: Verification) -> set[str]:
    return {row.what for row in result.rows if not row.ok}


def figure(result: Verification, what: str) -> float:
    (value,) = (row.value for row in result.rows if row.what == what)
    return value


def test_the_reference_against_itself():
    pipe = accelerated()
    result = verify(pipe)
    assert result.passed
    assert (result.runtime, result.dtype, result.pictures) == ("stand-in", "float32", 2)  # both known names
    assert figure(result, "pictures: PSNR, minimum") == math.inf
    assert figure(result, "step 2: latents, relative L2 error") == 0
    assert figure(result, "step 1: direction, cosine") == pytest.approx(1, abs=1e-12)
    assert len(result.rows) == 2 * 4 + 2  # a stand-in runs no op of ours


def test_it_draws_what_the_pipeline_draws():
    """The figures, from the pipeline's public calls alone."""
    pipe = accelerated(guidance_scale=1.5)
    pipe.runtime.direction_fault = lambda x: x + 0.05 * torch.linspace(-1, 1, x[0].numel()).view(x[0].shape)
    prompts = ["octopus", "cat, 3d style", "dog", "red", ""]
    result = verify(pipe, prompts, num_images=2, seed=5, budget={"psnr_median": 0, "psnr_minimum": 0})
    noise = torch.randn(10, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    call = dict(num_images_per_prompt=2, latents=noise)
    latents, pictures = (
        pipe(prompts, output_type="latent", **call).images,
        pipe(prompts, output_type="pt", **call).images,
    )
    cf.restore(pipe)
    expected, reference = (
        pipe(prompts, output_type="latent", **call).images,
        pipe(prompts, output_type="pt", **call).images,
    )
    square = ((latents - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).square()
    assert figure(result, "step 2: latents, relative L2 error") == pytest.approx(square.mean().sqrt().item(), rel=1e-4)
    psnr = -10 * (pictures - reference).double().square().flatten(1).mean(1).log10()
    assert figure(result, "pictures: PSNR, minimum") == pytest.approx(psnr.min().item(), abs=1e-3)
    assert figure(result, "pictures: PSNR, median") == pytest.approx(psnr.median().item(), abs=1e-3)
    assert result.pictures == 10


def test_rotated_direction_fails():
    pipe = accelerated()
    pipe.runtime.direction_fault = lambda x: x.rot90(dims=(2, 3))
    result = verify(pipe)
    assert not result.passed
    assert {"step 1: direction, cosine", "step 2: direction, cosine"} <= failed(result)
    assert not failed(result) & {"step 1: distance, relative error", "step 2: distance, relative error"}


def test_a_direction_a_little_off_fails_on_its_cosine_alone():
    pipe = accelerated()
    generator = torch.Generator().manual_seed(0)
    pipe.runtime.direction_fault = lambda x: (
        x + 0.06 * x.square().mean().sqrt() * torch.randn(x.shape, generator=generator)
    )
    result = verify(pipe, budget={"psnr_median": 5, "psnr_minimum": 5})
    assert failed(result) == {"step 1: direction, cosine", "step 2: direction, cosine"}
    assert verify(pipe, budget=Budget(5, 5, direction_cosine=0.99)).passed


def test_longer_distance_fails():
    pipe = accelerated(dtype=torch.bfloat16)
    pipe.runtime.distance_fault = lambda x: 1.03 * x
    result = verify(pipe, budget={"psnr_median": 5, "psnr_minimum": 5})
    assert failed(result) == {"step 1: distance, relative error", "step 2: distance, relative error"}


def test_noise_in_the_pictures_fails_on_them_alone():
    pipe = accelerated()
    generator = torch.Generator().manual_seed(0)
    pipe.runtime.picture_fault = lambda x: x + 0.02 * torch.randn(x.shape, generator=generator)
    assert failed(verify(pipe)) == {"pictures: PSNR, median"}  # 40 dB
    assert verify(pipe, budget=Budget.of(torch.bfloat16)).passed


def test_one_bad_picture_of_many_fails():
    pipe = accelerated()
    bad = iter([0, 0, 1, 0])  # calls of decode

    def spoil(x):
        x = x.clone()
        x[0] += next(bad, 0)
        return x

    pipe.runtime.picture_fault = spoil
    result = verify(pipe, ["octopus"] * 9)
    assert failed(result) == {"pictures: PSNR, minimum"}


@pytest.mark.parametrize("where", ["direction_fault", "distance_fault", "picture_fault"])
def test_nan_fails(where):
    pipe = accelerated()

    def spoil(x):
        x = x.clone()
        x[-1] = math.nan  # the last of the batch
        return x

    setattr(pipe.runtime, where, spoil)
    result = verify(pipe, 2)
    assert "pictures: PSNR, minimum" in failed(result)
    assert math.isnan(figure(result, "pictures: PSNR, minimum"))
    assert str(result).splitlines()[-1].startswith("FAIL: ")
    json.loads(json.dumps(result.to_dict(), allow_nan=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("unet", [None, FREE], ids=["anchored", "free"])
def test_ops_on_the_native_kernels(dtype, unet):
    if reason := dispatch.BACKENDS["cpu"].refusal({}):
        pytest.skip(reason)
    pipe = accelerated(unet, dtype, "cpu", [Part.of_op(op, "cpu", "") for op in OPS])
    pipe.runtime.unet.set_backend("cpu")
    result = verify(pipe, 1)
    assert "pictures: PSNR, median" not in failed(result)
    named = [row for row in result.rows if "; cpu, " in row.what]
    assert {row.what.partition(";")[0].partition(",")[0] for row in named} == set(OPS)
    assert all(0 < row.value <= 1 for row in named)
    expected = {"coalesce_step": "float32"}
    for row in named:
        assert f"; cpu, {expected.get(row.what.partition(',')[0], str(dtype)[6:])}: " in row.what


def test_ops_are_those_that_the_runtime_explains():
    pipe = accelerated(
        parts=[
            Part.of_op("bias_residual", "reference", "a"),
            Part.of_op("bias_residual", "reference", "b"),
            Part("dual_head", "oneDNN", ""),
            Part.of_op("coalesce_step", "auto", "each call chooses"),
            Part("decode", "reference", ""),
        ]
    )
    rows = verify(pipe).rows
    assert [row.what for row in rows if "allowed error" in row.what] == [
        "bias_residual; reference, float32: error / allowed error"
    ]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("fault", [1e-4, math.nan])
def test_a_wrong_op_fails(monkeypatch, op, fault):
    right = getattr(ops, op)

    def wrong(*args, backend, **kwargs):
        out = right(*args, backend="reference", **kwargs)
        if backend == "triton":  # not what the reference and the truth are computed on
            last = out[-1] if isinstance(out, tuple) else out
            last[-1] += fault
        return out

    monkeypatch.setattr(ops, op, wrong)
    pipe = accelerated(parts=[Part.of_op(op, "triton", "")])
    wrong_ones = failed(verify(pipe))
    assert wrong_ones
    assert all(what.startswith(op) and "triton" in what for what in wrong_ones)


def test_the_pipeline_is_left_as_it_was():
    pipe = accelerated()
    pipe.unet.set_backend("auto")
    runtime, parameters = pipe.runtime, {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    verify(pipe)
    assert pipe.runtime is runtime
    assert pipe.unet.backend == "auto" == pipe.unet.residual_blocks[0].norm1.backend
    assert pipe._progress_bar_config == {"disable": True}
    assert all(torch.equal(value, parameters[name]) for name, value in pipe.unet.state_dict().items())

    def fail(x):
        raise RuntimeError("planted")

    pipe.runtime.direction_fault = fail
    with pytest.raises(RuntimeError, match="planted"):
        verify(pipe)
    assert (pipe.runtime, pipe.unet.backend) == (runtime, "auto")


def test_same_seed_same_figures():
    pipe = accelerated(dtype=torch.bfloat16)
    assert verify(pipe, 1, seed=3) == verify(pipe, 1, seed=3)
    assert verify(pipe, 1, seed=3) != verify(pipe, 1, seed=4)


def test_an_untrained_network_passes():
    pipe = accelerated(FREE)
    for parameter in (*pipe.unet.direction_head.parameters(), *pipe.runtime.unet.direction_head.parameters()):
        parameter.data.zero_()  # as it is initialised: the direction is 0 everywhere
    assert verify(pipe).passed


def test_budgets():
    assert Budget.of(torch.bfloat16) == Budget(35, 25, 0.999, 0.01, 0.03)
    assert Budget.of(torch.float32) == Budget(60, 25, 0.999, 0.01, 1e-4)
    assert Budget.of(torch.int8) == Budget(35, 25, 0.999, 0.01, 0.1)
    pipe = accelerated(dtype=torch.bfloat16)
    assert failed(verify(pipe, budget={"psnr_minimum": 200})) == {"pictures: PSNR, minimum"}


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"prompts": 0}, "from 1 up"),
        ({"prompts": []}, "empty list"),
        ({"num_images": 0}, "whole number"),
        ({"budget": {"psnr": 30}}, "psnr_median, psnr_minimum"),
        ({"budget": {"psnr_median": "high"}}, "expected numbers"),
        ({"budget": 30}, "budget is 30"),
    ],
)
def test_what_a_caller_can_get_wrong(kwargs, words):
    with pytest.raises(ValueError, match=words) as caught:
        verify(accelerated(), **kwargs)
    assert "\n" not in str(caught.value)


def test_a_pipeline_that_is_not_accelerated():
    with pytest.raises(ValueError, match="not accelerated") as caught:
        verify(tiny_pipeline())
    assert "accelerate(pipe)" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pipeline_that_is_no_float32_reference():
    pipe = accelerated()
    pipe.unet.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"torch\.float32"):
        verify(pipe)


def test_a_model_that_knows_no_names(monkeypatch):
    pipe = accelerated()
    monkeypatch.setattr(type(pipe.description_encoder), "known_names", [])
    with pytest.raises(ValueError, match="give prompts"):
        verify(pipe)
    assert verify(pipe, "octopus, 3d style").passed


def test_the_table():
    rows = (at_least("a", 0.99951, 0.999), at_least("pictures: PSNR, median", 12.3456, 35.0, " dB"))
    receipt = {"pixels": "0123456789abcdef" * 4, "instruction_set": "avx2"}
    assert str(Verification("cpu", "bfloat16", 1, rows, receipt)).splitlines() == [
        "what                      value       limit",
        "a                       0.99951  >= 0.99900  PASS",
        "pictures: PSNR, median  12.3 dB    >= 35 dB  FAIL",
        "pixels: SHA-256 0123456789abcdef..., avx2",
        "FAIL: 1 of 2 figures hold, cpu in bfloat16 against the float32 reference, 1 picture",
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_embedded_model(dtype):
    pipe = CoalescerPipeline.from_pretrained("emoji-64")
    pipe.set_progress_bar_config(disable=True)
    result = coalescer_fast.verify(accelerate(pipe, dtype=dtype), 4)
    assert result.passed, str(result)
    assert (result.runtime, result.dtype, result.pictures) == ("cpu", dtype, 4)
    low, high = {"float32": (90, 170), "bfloat16": (40, 70)}[dtype]
    assert low < figure(result, "pictures: PSNR, minimum") < high


def test_a_receipt_says_whether_two_machines_drew_the_same():
    pipe = cf.CoalescerPipeline.from_pretrained("emoji-64")
    pipe.set_progress_bar_config(disable=True)
    names, noise = ["octopus", "owl"], torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))

    def receipt(**call):
        return cf.receipt(pipe, names, noise, pipe(names, latents=noise, **call).images, **call)

    reference = receipt()
    assert (reference["runtime"], reference["dtype"], reference["instruction_set"]) == ("reference", "float32", None)
    tensors = pipe(names, latents=noise, output_type="pt").images
    assert cf.receipt(pipe, names, noise, tensors) == reference == json.loads(json.dumps(reference))
    cf.accelerate(pipe, dtype="float32")
    first = receipt()
    assert first["instruction_set"] == (None if native_library.unavailable() else native_library.isa())
    assert receipt() == first
    assert {name for name in first if first[name] != reference[name]} >= {"runtime"}
    assert {name for name in first if receipt(num_inference_steps=3)[name] != first[name]} == {
        "schedule",
        "pixels",
        "pictures",
    }
    noise[1] *= -1
    other = receipt()
    assert {name for name in first if other[name] != first[name]} == {"noise", "pixels", "pictures"}
    assert other["pictures"][0] == first["pictures"][0] != other["pictures"][1]
    with torch.no_grad():
        pipe.unet.conv_in.weight[0] += 1
    changed = receipt()
    assert {name for name, digest in changed["weights"].items() if digest != first["weights"][name]} == {"unet"}
    names[0] = "pizza"
    assert receipt()["prompts"] == ["pizza", "owl"]


def test_verify_has_a_receipt_of_the_accelerated_pictures():
    pipe = cf.CoalescerPipeline.from_pretrained("emoji-64")
    pipe.set_progress_bar_config(disable=True)
    result = verify(cf.accelerate(pipe), 5, seed=3)
    assert len(result.receipt["prompts"]) == len(result.receipt["pictures"]) == 5
    noise = torch.Generator().manual_seed(3)
    torch.randperm(len(pipe.description_encoder.known_names), generator=noise)
    latents = torch.randn(5, 16, 8, 8, generator=noise)
    prompts = result.receipt["prompts"]
    assert result.receipt == cf.receipt(pipe, prompts, latents, pipe(prompts, latents=latents).images)
    assert result.receipt["pixels"][:16] in str(result)
    assert result.to_dict()["receipt"] == result.receipt
