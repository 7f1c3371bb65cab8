from __future__ import annotations

import copy
import gc
import re
import resource
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import coalescer_fast as cf
from coalescer_fast import acceleration
from coalescer_fast.models.unet import CoalescerUNet
from coalescer_fast.ops import native_library
from coalescer_fast.ops.abi import cf_form
from coalescer_fast.runtime import base
from coalescer_fast.runtime.eager import EagerRuntime
from coalescer_fast.runtime.native import forms, module

PROMPTS = ["octopus", "pizza", "rocket", "owl, 3d style"]


@pytest.fixture
def pipe():
    pipe = cf.CoalescerPipeline.from_pretrained("emoji-64")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompt=PROMPTS, seed=0, **kwargs) -> torch.Tensor:
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), output_type="pt", **kwargs).images


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Decibels, a picture."""
    return -10 * (a - b).square().mean((1, 2, 3)).log10()


def dtypes() -> list[str]:
    return ["float32", "bfloat16"] if module.native_bfloat16() else ["float32"]


@pytest.mark.parametrize("dtype", [*dtypes(), *(["int8"] if torch.uint8 in native_library.products() else [])])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_same_call_same_seed_same_pictures(pipe, dtype, steps):
    reference = draw(pipe, num_inference_steps=steps)
    assert cf.accelerate(pipe, dtype=dtype) is pipe
    accelerated = draw(pipe, num_inference_steps=steps)
    assert accelerated.shape == reference.shape
    assert psnr(accelerated, reference).median() >= (70 if dtype == "float32" else 35)
    assert torch.equal(draw(pipe, num_inference_steps=steps), accelerated)  # two runs, equal bits


def test_restore_gives_the_reference_back_bit_for_bit(pipe):
    before = {name: p.clone() for name, p in pipe.unet.state_dict().items()}
    reference = draw(pipe)
    cf.accelerate(pipe)
    draw(pipe)
    assert cf.restore(pipe) is pipe
    assert torch.equal(draw(pipe), reference)
    assert all(torch.equal(before[name], p) for name, p in pipe.unet.state_dict().items())


def test_a_sample_does_not_depend_on_its_neighbours(pipe):
    cf.accelerate(pipe)
    latents = torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    together = pipe(PROMPTS, latents=latents, output_type="pt").images
    others = pipe(
        [*PROMPTS[:2], "ghost", "guitar"], latents=torch.cat([latents[:2], -latents[2:]]), output_type="pt"
    ).images
    assert torch.equal(together[:2], others[:2])
    assert psnr(pipe(PROMPTS[:1], latents=latents[:1], output_type="pt").images, together[:1]) > 40


def test_guidance_trace_and_callback(pipe):
    reference = pipe("octopus", generator=torch.Generator().manual_seed(0), guidance_scale=1, return_trace=True)
    cf.accelerate(pipe)
    seen = []
    result = pipe(
        "octopus",
        generator=torch.Generator().manual_seed(0),
        guidance_scale=1,
        return_trace=True,
        callback_on_step_end=lambda pipe, i, t, kwargs: seen.append(i) or kwargs,
    )
    assert seen == [0, 1]
    for one, other in zip(result.trace, reference.trace):
        assert one.sample.dtype == one.distance.dtype == torch.float32
        torch.testing.assert_close(one.distance, other.distance, rtol=0.02, atol=0)


def test_changed_weights_take_effect(pipe, change_weights):
    cf.accelerate(pipe, dtype="float32")
    before = draw(pipe)
    change_weights(pipe)
    after = draw(pipe)
    assert not torch.equal(after, before)
    cf.restore(pipe)
    assert psnr(after, draw(pipe)).median() > 70


def test_after_a_warmup_nothing_is_prepared(pipe):
    cf.accelerate(pipe)
    before = base.count
    cf.warmup(pipe, batch_sizes=(1, 4))
    assert base.count == before + 6  # the UNet, the decoder and the description's layers for each
    draw(pipe, "octopus")
    draw(pipe)
    draw(pipe, "owl", guidance_scale=1)
    assert base.count == before + 6
    draw(pipe, PROMPTS * 3)  # a batch size that was not warmed up just works
    assert base.count == before + 9


def test_other_sizes_just_work():
    torch.manual_seed(0)
    small = dict(
        block_out_channels=(32, 32), norm_num_groups=4, embedding_dim=32, attention_levels=(1,), num_attention_heads=2
    )
    reference = cf.CoalescerPipeline.from_pretrained("emoji-64")
    pipe = cf.CoalescerPipeline(
        CoalescerUNet(**small), reference.scheduler, reference.description_encoder, reference.vae
    )
    pipe.set_progress_bar_config(disable=True)
    for size in (64, 48, 80):
        expected = draw(cf.restore(pipe), height=size, width=64)
        assert psnr(draw(cf.accelerate(pipe, dtype="float32"), height=size, width=64), expected).median() > 60


def test_many_batch_sizes_leave_memory_flat(pipe):
    cf.accelerate(pipe)
    conditioning = pipe.runtime.condition(["octopus"], torch.device("cpu"))

    def loop(calls: int) -> None:
        for i in range(calls):
            n = 1 + i % 50
            pipe.runtime.evaluate(torch.randn(n, 16, 8, 8), conditioning.expand(n))
        gc.collect()

    with torch.inference_mode():
        loop(100)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        loop(200)
    # kilobytes: the allocator's own ups and downs are up to 25 MB; programs that stayed would be hundreds
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_threads_may_draw_at_once(pipe):
    cf.accelerate(pipe)
    noise = torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(0))

    def evaluate(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            return pipe.runtime.evaluate(noise[i : i + 1], pipe.runtime.condition([PROMPTS[i]], torch.device("cpu")))

    with ThreadPoolExecutor(4) as pool:  # the first calls of all, so that they pack the weights beside each other
        at_once = list(pool.map(evaluate, range(4)))
    for i, results in enumerate(at_once):
        assert all(torch.equal(a, b) for a, b in zip(results, evaluate(i)))


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"backend": "magic"}, "backend is 'magic'; use one of auto, cpu, cuda, compile"),
        (
            {"backend": "cuda"},
            "backend 'cuda' runs on cuda, and the pipeline is on cpu: move it with pipe.to('cuda') first",
        ),
        ({"dtype": "int4"}, "dtype is 'int4'; use one of auto, float32, bfloat16"),
        ({"dtype": torch.float16}, "dtype is torch.float16; use one of auto, float32, bfloat16"),
        (
            {"backend": "onnxruntime", "dtype": "bfloat16"},
            "dtype is 'bfloat16'; use one of auto, float32 with backend 'onnxruntime'",
        ),
        (
            {"cache": "packed", "winogradmemory": 0},
            "a CoalescerPipeline takes no cache and no winogradmemory: leave out all but backend, dtype, artefact, ",
        ),
        ({"keep_weights": False}, "a CoalescerPipeline takes no keep_weights: leave out"),
        ({"backend": "compile", "winograd_memory": 0}, "winograd_memory is for backend 'cpu' alone: leave it out"),
        ({"artefact": "there", "winograd_memory": 0}, "winograd_memory is for networks, and an artefact is ready"),
    ],
)
def test_bad_use_is_one_sentence(pipe, kwargs, words):
    with pytest.raises(ValueError, match=r"is|takes") as caught:
        cf.accelerate(pipe, **kwargs)
    assert str(caught.value).startswith(words)
    assert "\n" not in str(caught.value)
    assert isinstance(pipe.runtime, EagerRuntime)


@pytest.mark.parametrize("batch_sizes", [4, ["a cat"], (1, 0), (True,), "12"])
def test_batch_sizes_are_whole_numbers(pipe, batch_sizes):
    with pytest.raises(TypeError) as caught:
        cf.warmup(cf.accelerate(pipe), batch_sizes)
    assert str(caught.value) == f"batch_sizes is {batch_sizes!r}; expected whole numbers from 1 up, as in (1, 4)"


@pytest.mark.skipif(bool(native_library.unavailable()), reason="needs the native library")
def test_winograd_memory_of_our_pipeline(pipe, monkeypatch):
    monkeypatch.setattr(forms, "seconds", lambda form, *sizes: float(form == cf_form.CF_DIRECT))
    fast = draw(cf.accelerate(pipe, "cpu", "float32"))
    unet, decoder = (cf.explain(pipe).splitlines()[n] for n in (1, 2))
    assert all("3x3 convolutions by Winograd" in line for line in (unet, decoder))
    direct = draw(cf.accelerate(pipe, "cpu", "float32", winograd_memory=0))
    assert pipe.runtime.name == "cpu (winograd_memory=0)"
    unet, decoder = (cf.explain(pipe).splitlines()[n] for n in (1, 2))
    assert all("3x3 convolutions direct" in line and "Winograd" not in line for line in (unet, decoder))
    assert not fast.equal(direct)
    assert psnr(fast, direct).min() > 70
    assert draw(copy.deepcopy(pipe)).equal(direct)


@pytest.mark.skipif(bool(module.no_programs(torch.uint8)), reason="the processor does not multiply int8 itself")
def test_explain_of_int8_before_the_first_call(pipe):
    lines = cf.explain(cf.accelerate(pipe, "cpu", "int8")).splitlines()
    assert re.match(r"unet +native program, torch\.\w+, int8 where it pays +it can run on .*; it is recorded", lines[1])
    draw(pipe)
    lines = cf.explain(pipe).splitlines()
    assert re.match(r"unet +native program, torch\.\w+, \d+ of \d+ products in int8, .* it can run on \w+ *$", lines[1])
    assert "int8" not in lines[2]


def test_a_missing_package_is_one_sentence(pipe, monkeypatch):
    monkeypatch.setattr(acceleration.importlib.util, "find_spec", lambda name: None)
    words = (
        "^backend 'openvino' needs the package openvino, which is not installed: "
        "run pip install openvino onnx onnxscript$"
    )
    with pytest.raises(ValueError, match=words):
        cf.accelerate(pipe, "openvino")
    assert isinstance(pipe.runtime, EagerRuntime)


def test_without_the_native_library(pipe, monkeypatch):
    monkeypatch.setattr(native_library, "unavailable", lambda: "there is no compiler")
    with pytest.raises(ValueError, match="backend 'cpu' cannot run: there is no compiler"):
        cf.accelerate(pipe, backend="cpu")
    reference = draw(pipe)
    cf.accelerate(pipe)
    assert pipe.runtime.dtype == torch.float32
    assert psnr(draw(pipe), reference).median() > 70


AMX = "the processor has AMX, which torch's convolutions use and native ones do not; backend='cpu' takes those"


@pytest.mark.skipif(torch.uint8 not in native_library.products(), reason="needs bfloat16 and 8 bits")
@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "int8"])
def test_where_torch_has_amx_auto_takes_its_convolutions(pipe, monkeypatch, dtype):
    reference = draw(pipe)
    monkeypatch.setattr(native_library, "amx", lambda: True)
    cf.accelerate(pipe, dtype=dtype)
    assert pipe.runtime.refused == {"unet": AMX, "decoder": AMX}
    assert pipe.runtime.precision == "bfloat16"
    assert psnr(draw(pipe), reference).median() >= 35
    for name, line in zip(("unet", "decoder"), cf.explain(pipe).splitlines()[1:]):
        assert re.match(rf"{name} +torch, channels innermost, torch.bfloat16 +{re.escape(AMX)}$", line.rstrip())
    assert copy.deepcopy(pipe).runtime.refused == pipe.runtime.refused
    # whoever asks for native programs gets them, and in float32 AMX multiplies nothing
    assert not cf.accelerate(pipe, "cpu", dtype).runtime.refused
    assert not cf.accelerate(pipe, dtype="float32").runtime.refused
    monkeypatch.setattr(native_library, "amx", lambda: False)
    assert not cf.accelerate(pipe, dtype=dtype).runtime.refused


def test_amx_is_torchs_word_for_it(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: asked.append(1) or True)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    found = native_library.amx.__wrapped__
    assert found() is torch.backends.mkldnn.is_available()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    assert not found()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX10_1_512_AMX")
    assert found() is torch.backends.mkldnn.is_available()
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: False)  # the system does not let the process use it
    assert not found()
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert not found()
    assert asked


class Odd(torch.nn.Module):
    """What no program has a step for."""

    def __init__(self, convolution):
        super().__init__()
        self.convolution = convolution

    def forward(self, x):
        return self.convolution(x).double().float()


def test_int8_needs_a_processor_that_has_it(pipe, monkeypatch):
    monkeypatch.setattr(native_library, "products", lambda: (torch.float32, torch.bfloat16))
    with pytest.raises(ValueError, match=r"dtype .int8. cannot run: the processor does not multiply uint8 itself"):
        cf.accelerate(pipe, dtype="int8")
    assert isinstance(pipe.runtime, EagerRuntime)


def test_a_network_that_does_something_else_runs_all_the_same_and_says_why(pipe):
    pipe.unet.conv_in = Odd(pipe.unet.conv_in)
    reference = draw(pipe)
    cf.accelerate(pipe, dtype="float32")
    assert psnr(draw(pipe), reference).median() > 70
    lines = cf.explain(pipe).splitlines()
    assert re.match(r"unet +reference +conv_in is a tests\.test_acceleration\.Odd", lines[1])
    assert re.match(r"decoder +native program, torch.float32.* it can run", lines[2])


def test_a_pipeline_that_was_moved_is_refused(pipe):
    cf.accelerate(pipe)
    pipe.to("meta")
    with pytest.raises(ValueError, match="was accelerated on cpu and is on meta: accelerate it again, or restore it"):
        pipe("octopus")
    with pytest.raises(
        ValueError, match=r"runs on cpu and cuda, and the pipeline is on meta: move it with pipe.to\('cpu'\) first"
    ):
        cf.accelerate(pipe)
    with pytest.raises(ValueError, match="backend 'compile' runs on cpu and cuda, and the pipeline is on meta"):
        cf.accelerate(pipe, "compile")


@pytest.mark.parametrize("backend", ["auto", "cuda"])
@pytest.mark.parametrize(
    ("native", "dtype", "expected"),
    [
        (True, "auto", torch.bfloat16),
        (False, "auto", torch.float16),
        (True, torch.float16, torch.float16),
        (False, "float32", torch.float32),
        (False, "bfloat16", "dtype is 'bfloat16', which cuda:0 lacks: use float16"),
        (True, "int8", "dtype is 'int8'; use one of auto, float32, bfloat16, float16 with backend 'cuda' on cuda"),
    ],
    ids=str,
)
def test_on_a_cuda_device_it_is_the_cuda_runtime(pipe, backend, native, dtype, expected, monkeypatch):
    monkeypatch.setattr(type(pipe), "device", torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    monkeypatch.setattr(acceleration, "CudaRuntime", lambda *args: args)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match="dtype is") as caught:
            cf.accelerate(pipe, backend, dtype)
        assert str(caught.value) == expected
    else:
        assert cf.accelerate(pipe, backend, dtype).runtime == (pipe, "auto", expected)
    with pytest.raises(
        ValueError,
        match=r"backend 'cpu' runs on cpu, and the pipeline is on cuda:0: move it with pipe.to\('cpu'\) first",
    ):
        cf.accelerate(pipe, backend="cpu")


def test_the_empty_description_is_prepared_once_for_its_weights(pipe):
    cf.accelerate(pipe, dtype="float32")
    first = pipe.runtime.condition([""], pipe.device)
    assert pipe.runtime.condition([""], pipe.device) is first
    with torch.no_grad():
        pipe.unet.null.add_(1)
    pipe.runtime.refresh()
    assert not torch.equal(pipe.runtime.condition([""], pipe.device).film[0][0], first.film[0][0])


@pytest.mark.parametrize("call", [cf.accelerate, cf.explain, cf.refresh, cf.restore, cf.warmup, cf.verify])
@pytest.mark.parametrize("what", [None, 3, torch.nn.Linear])
def test_what_is_no_pipeline(call, what):
    with pytest.raises(TypeError, match=rf"^pipe is of type {type(what).__name__}; expected a CoalescerPipeline"):
        call(what)


def test_explain_says_what_runs_and_why(pipe):
    assert re.search(r"\nall +reference +the pipeline is not accelerated$", cf.explain(pipe))
    with pytest.raises(ValueError, match="the pipeline is not accelerated"):
        cf.warmup(pipe)
    lines = cf.explain(cf.accelerate(pipe)).splitlines()
    assert lines[0].split() == ["part", "runs", "on", "because"]
    assert any(line.startswith("group_norm_silu") and " cpu " in line for line in lines)
