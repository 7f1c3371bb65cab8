from __future__ import annotations

import gc
import shutil
import weakref
from dataclasses import replace

import pytest
import torch

import coalescer_fast as cf
from coalescer_fast import acceleration, parity
from coalescer_fast.export.onnx import modules
from coalescer_fast.runtime.engines import artefact, writing
from coalescer_fast.runtime.engines.exported import ExportedRuntime
from coalescer_fast.runtime.engines.hashes import network_hashes
from coalescer_fast.runtime.engines.manifest import KINDS, EngineBuild, Manifest, Schedule

PROMPTS = ["octopus", "pizza"]


def load():
    pipe = cf.CoalescerPipeline.from_pretrained("emoji-64")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompt=PROMPTS, output_type="pt", **kwargs) -> torch.Tensor:
    return pipe(prompt, generator=torch.Generator().manual_seed(0), output_type=output_type, **kwargs).images


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Artefacts whose graphs are read by `open_artefact`."""
    pipe, root = load(), tmp_path_factory.mktemp("artefacts")
    for kind in KINDS:
        inputs, outputs = modules.ports(pipe, kind)
        (root / kind).mkdir()
        (root / kind / "model.onnx").write_text(kind)
        schedule = Schedule.of(*modules.schedule_of(pipe, 2, None)) if kind == "generator" else None
        made = Manifest(
            kind,
            "onnx",
            "cpu",
            "fp32",
            "",
            "model.onnx",
            "emoji-64",
            network_hashes(pipe, kind),
            inputs,
            outputs,
            (1, 2, 4),
            18,
            (),
            schedule,
        )
        writing.write(root / kind, made)
    return root


def open_artefact(found):
    """The same modules in torch: what is tested is what stands around the engine."""
    module = modules.network(load(), found.graph.read_text(), "fp32")

    def run(inputs):
        assert all(x.is_contiguous() and not x.is_neg() and not x.requires_grad for x in inputs)
        assert [str(x.dtype) for x in inputs] == [f"torch.{port.dtype}" for port in found.manifest.inputs]
        assert not torch.is_autocast_enabled("cpu")
        runs.append(found.manifest.kind)
        with torch.no_grad():
            return module(*inputs)

    return run


runs: list[str] = []
GRADING = {"1": [-1.0, 2.0, 0.5, 1.0, 0.5, 2.0], "2": [-1.0, 2.0, 0.5, -3.0, -0.25, 1.0, 0.5, 2.0]}


@pytest.fixture
def accelerated(folder):
    """(kinds) -> a pipeline that runs copies of these artefacts."""

    def make(*kinds: str):
        pipe = load()
        some = folder.parent / "-".join(kinds)
        for kind in kinds:
            shutil.copytree(folder / kind, some / kind, dirs_exist_ok=True)
        pipe.runtime = ExportedRuntime(pipe, "onnxruntime", artefact.find(some), open_artefact)
        pipe.runtime.backend = "reference"
        runs.clear()
        return pipe

    return make


def test_a_call_is_one_run_of_the_generator(accelerated):
    pipe = accelerated("generator")
    drawn = draw(pipe)
    assert runs == ["generator"]
    torch.testing.assert_close(drawn, draw(load()), atol=1e-5, rtol=0)


def test_a_generator_alone_says_nothing_of_quality(accelerated):
    pipe = accelerated("generator")
    pipe.scheduler.register_to_config(grading=GRADING)
    out = pipe("octopus", output_type="pt")
    assert out.quality is None
    assert out.num_evaluations == [3]
    for given, asked in (({"best_of": 2}, "latents"), ({"num_inference_steps": "auto"}, "as many steps as each needs")):
        with pytest.raises(ValueError, match=f"the call asks for {asked}: export that with"):
            pipe("octopus", output_type="pt", **given)


def test_quality_best_of_and_auto_step_by_step(accelerated):
    pipe, reference = accelerated("unet", "decoder"), load()
    noise = reference.initial_noise(4, torch.Generator().manual_seed(0))
    for each in (pipe, reference):
        each.scheduler.register_to_config(grading=GRADING, arrival_distance=1.0)
    for given in ({"best_of": 2}, {"num_images_per_prompt": 2, "num_inference_steps": "auto"}):
        found, expected = (
            each(["octopus", "cat"], latents=noise, output_type="pt", **given) for each in (pipe, reference)
        )
        torch.testing.assert_close(found.quality, expected.quality, atol=1e-4, rtol=0)
        torch.testing.assert_close(found.images, expected.images, atol=1e-4, rtol=0)
        assert found.num_evaluations == expected.num_evaluations


def test_without_a_generator_the_networks_run_step_by_step(accelerated):
    pipe = accelerated("unet", "decoder")
    drawn = draw(pipe)
    assert runs == ["unet", "unet", "unet", "decoder"]
    torch.testing.assert_close(drawn, draw(load()), atol=1e-5, rtol=0)


def test_with_all_of_them_every_call_has_its_run(accelerated):
    pipe, plain = accelerated(*KINDS), load()
    for call, expected in (
        ({}, ["generator"]),
        ({"guidance_scale": 1.7}, ["generator"]),
        ({"guidance_scale": 1.0}, ["unet"] * 2 + ["decoder"]),
        ({"num_inference_steps": 1}, ["unet"] * 2 + ["decoder"]),
        ({"output_type": "latent"}, ["unet"] * 3),
        ({"return_trace": True}, ["unet"] * 3 + ["decoder"]),
    ):
        runs.clear()
        torch.testing.assert_close(draw(pipe, **call), draw(plain, **call), atol=1e-4, rtol=1e-4)
        assert runs == expected


def test_a_generator_alone_refuses_another_schedule(accelerated):
    pipe = accelerated("generator")
    for call in ({"num_inference_steps": 3}, {"guidance_scale": 2.0}, {"output_type": "latent"}):
        with pytest.raises(
            ValueError, match=r"is a generator of pictures in 2 steps .*and the call asks for .*--what all"
        ):
            draw(pipe, **call)
    assert runs == []


def test_a_generator_has_the_empty_description_inside(accelerated):
    pipe, plain = accelerated(*KINDS), load()
    for negative, expected in (
        ("", ["generator"]),
        ("red apple", ["unet"] * 3 + ["decoder"]),
        (["owl", "red apple"], ["unet"] * 3 + ["decoder"]),
    ):
        runs.clear()
        torch.testing.assert_close(
            draw(pipe, negative_prompt=negative), draw(plain, negative_prompt=negative), atol=1e-4, rtol=1e-4
        )
        assert runs == expected
    with pytest.raises(ValueError, match=r"the call asks for 2 steps .* with a negative prompt: .*--what all"):
        draw(accelerated("generator"), negative_prompt="owl")


def test_embeds(accelerated):
    pipe, styled = accelerated(*KINDS), ["octopus, 3d style", "pizza, flat style"]
    (vectors, negative) = pipe.encode_prompt(styled)
    assert torch.equal(draw(pipe, None, prompt_embeds=vectors, negative_prompt_embeds=negative), draw(pipe, styled))
    assert runs == ["generator"] * 2


def test_what_is_not_exported_is_the_pipelines_own_and_explained(accelerated):
    pipe = accelerated("generator")
    torch.testing.assert_close(draw(pipe, return_trace=True), draw(load()), atol=1e-5, rtol=0)
    assert runs == []
    rows = {part.name: part for part in pipe.runtime.explain()}
    assert rows["generator"].runs_on == "onnxruntime, fp32"
    assert rows["unet"].runs_on == "reference"
    assert "a callback or a trace alone" in rows["unet"].because
    assert cf.verify(pipe, ["octopus"]).passed
    assert "callback" not in cf.explain(accelerated("unet"))


def test_verify_asks_for_no_more_pictures_than_there_may_be(accelerated, monkeypatch):
    pipe = accelerated("unet")
    monkeypatch.setattr(parity, "BATCH_SIZE", 6)
    assert cf.verify(pipe, 5).passed  # of at most 4 at a time


def test_batches_outside_the_range(accelerated):
    for kind in ("generator", "unet"):
        with pytest.raises(ValueError, match=r"has shape \(6, 16, 8, 8\) where .* takes \(1 to 4, 16, 8, 8\)"):
            draw(accelerated(kind), num_images_per_prompt=3)


def test_changed_weights_are_refused_in_the_next_call(accelerated):
    pipe = accelerated("generator")
    draw(pipe)
    with torch.no_grad():
        pipe.vae.decoder.layers[0].weight.mul_(1.1)
    for _ in range(2):
        with pytest.raises(ValueError, match="other weights of the decoder"):
            draw(pipe)
    with pytest.raises(ValueError, match="other weights of the decoder"):
        ExportedRuntime(pipe, "onnxruntime", pipe.runtime.artefacts, open_artefact)


def test_auto_takes_what_an_artefact_is_for(folder, monkeypatch):
    pipe = load()
    monkeypatch.setattr(acceleration.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(acceleration.onnxruntime, "open_artefact", open_artefact)
    assert cf.accelerate(pipe, artefact=folder).runtime.name == "onnxruntime"
    runs.clear()
    draw(pipe)
    assert runs == ["generator"]
    engines = folder.parent / "engines"
    shutil.copytree(folder / "unet", engines)
    made = artefact.read(engines).manifest
    built = EngineBuild(version="1.7", compute_capabilities=("8.6",), gpu=None, profile={}, source={})
    writing.write(engines, replace(made, engine="tensorrt_rtx", tensorrt=built))
    with pytest.raises(ValueError, match=r"^backend 'tensorrt' runs on cuda, and the pipeline is on cpu: move it"):
        cf.accelerate(pipe, artefact=engines)


def test_accelerate_says_what_takes_an_artefact(folder, monkeypatch):
    pipe = load()
    with pytest.raises(ValueError, match=r"^backend 'cpu' takes no artefact; use one of auto, onnxruntime, tensorrt$"):
        cf.accelerate(pipe, "cpu", artefact=folder)
    with pytest.raises(ValueError, match="an artefact has its own precision: leave dtype out"):
        cf.accelerate(pipe, "onnxruntime", "float32", artefact=folder)
    monkeypatch.setattr(acceleration.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package onnxruntime"):
        cf.accelerate(pipe, "onnxruntime", artefact=folder)
    assert pipe.runtime.name == "reference"


def test_a_graph_that_is_none(folder):
    pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    with pytest.raises(
        ValueError, match=r"^ONNX Runtime cannot load .*unet.model.onnx .*build it again with"
    ) as caught:
        cf.accelerate(load(), "onnxruntime", artefact=folder / "unet")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "how", [torch.Tensor.half, torch.Tensor.double, torch._neg_view, lambda x: x.mT, lambda x: x.requires_grad_()]
)
@pytest.mark.parametrize("kinds", [("unet", "decoder"), ("generator",)])
def test_graphs_are_given_what_their_ports_say(accelerated, kinds, how):
    pipe = accelerated(*kinds)
    runtime = pipe.runtime
    given = how(torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0)))
    same = torch.empty(given.shape, dtype=torch.float32).copy_(given.detach())
    conditioning = runtime.condition(PROMPTS, runtime.device)
    with torch.autocast("cpu"):
        found = [*runtime.evaluate(given, conditioning), runtime.decode(given)]
    for y, e in zip(found, [*runtime.evaluate(same, conditioning), runtime.decode(same)]):
        assert y.dtype == torch.float32
        assert torch.equal(y, e)


@pytest.mark.parametrize("kinds", [("unet", "decoder"), ("generator",)])
def test_autocast_and_inference_mode_change_nothing(accelerated, kinds):
    pipe = accelerated(*kinds)
    expected = draw(pipe)
    with torch.autocast("cpu"), torch.inference_mode():
        assert torch.equal(draw(pipe), expected)
        pipe = accelerated(*kinds)
        assert torch.equal(draw(pipe), expected)
    assert torch.equal(draw(pipe), expected)


def set_attribute(find, name, value):
    def change(pipe):
        module = find(pipe)
        before = getattr(module, name)
        setattr(module, name, value(before))
        return lambda: setattr(module, name, before)

    return change


def swap_activation(pipe):
    layers = pipe.vae.decoder.layers
    before, layers[1] = layers[1], torch.nn.LeakyReLU(0.01)
    return lambda: layers.__setitem__(1, before)


def hook(name):
    def change(pipe):
        return getattr(pipe.unet.mid[0], name)(lambda *args: None).remove

    return change


def patch_forward(pipe):
    block = pipe.unet.mid[0]
    block.forward = lambda *args: args[0]
    return lambda: delattr(block, "forward")


def adapt(pipe):
    peft = pytest.importorskip("peft", reason="needs the package peft")
    film = pipe.unet.mid[0].film
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["mid.0.film"], r=2), pipe.unet)
    return lambda: setattr(pipe.unet.mid[0], "film", film.requires_grad_(True))


FIXED = {
    "a hook": (hook("register_forward_hook"), r"mid\.0.* hook"),
    "a pre-hook": (hook("register_forward_pre_hook"), r"mid\.0.* hook"),
    "a patched forward": (patch_forward, r"forward of mid\.0 is patched"),
    "an activation": (swap_activation, "other weights of the decoder or settings of its layers"),
    "eps": (
        set_attribute(lambda pipe: pipe.unet.norm_out, "eps", lambda eps: 2 * eps),
        "other weights of the unet or settings of its layers",
    ),
    "num_heads": (
        set_attribute(
            lambda pipe: next(m for m in pipe.unet.modules() if hasattr(m, "num_heads")), "num_heads", lambda n: n // 2
        ),
        "other weights of the unet or settings of its layers",
    ),
    "an adapter": (adapt, "other weights of the unet or settings of its layers"),
}


@pytest.mark.parametrize("what", FIXED)
def test_what_a_graph_fixes_is_refused_in_the_next_call(accelerated, what):
    change, words = FIXED[what]
    pipe = accelerated("generator")
    drawn = draw(pipe)
    undo = change(pipe)
    for _ in range(2):
        with pytest.raises(ValueError, match=words) as caught:
            draw(pipe)
        assert "\n" not in str(caught.value)
    undo()
    assert torch.equal(draw(pipe), drawn)


def test_a_dropped_pipeline_is_freed_at_once(accelerated):
    pipe = accelerated("generator")
    draw(pipe)
    seen = [weakref.ref(each) for each in (pipe, pipe.runtime, pipe.unet)]
    gc.disable()
    try:
        del pipe
        assert [each() for each in seen] == [None] * 3
    finally:
        gc.enable()
