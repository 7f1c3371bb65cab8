"""Training from a diffusion model's weights, and with its sampler as the teacher."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from safetensors.torch import load_file, save_file

from coalescer_fast import CoalescerPipeline, CoalescerScheduler, CoalescerUNet
from coalescer_fast.training import config as training_config
from coalescer_fast.training.coalescer import description_encoder, train_coalescer
from coalescer_fast.training.items import Items
from coalescer_fast.training.loop import Schedule, Trainer, make_accelerator
from coalescer_fast.training.prompts import PromptConfig, PromptSampler
from coalescer_fast.training.teacher import Pairs, Teacher, TeacherConfig, TeacherItems, draw_pairs, load_pipeline

from ..helpers.training import configuration, squares

UNET = dict(
    sample_size=4,
    block_out_channels=(16, 16),
    layers_per_block=1,
    norm_num_groups=4,
    attention_head_dim=2,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)
SHAPE = (4, 4, 4)


def conditional(cross_attention_dim: int = 128) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**UNET, cross_attention_dim=cross_attention_dim)


def plain_pipeline() -> DDIMPipeline:
    """A UNet that attends to the token rows of the package's description encoder."""
    return DDIMPipeline(conditional(), DDIMScheduler(clip_sample=False, prediction_type="sample"))


def stable_diffusion() -> StableDiffusionPipeline:
    """A text encoder and tokenizer of its own, with letters as tokens."""
    transformers = pytest.importorskip("transformers")
    letters = [chr(c) for c in range(97, 123)]
    tokens = [*letters, *[f"{letter}</w>" for letter in letters], "<|startoftext|>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer({token: i for i, token in enumerate(tokens)}, [], model_max_length=12)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = {
        "vocab_size": 54,
        "max_position_embeddings": 12,
        "bos_token_id": 52,
        "eos_token_id": 53,
        "pad_token_id": 53,
    }
    text_encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes, **words))
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=conditional(16),
        scheduler=PNDMScheduler(skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def encoder():
    return description_encoder(squares())


@pytest.fixture
def sampler(encoder):
    return PromptSampler(squares(), encoder, PromptConfig(queue_size=32, min_group=4))


def with_teacher(folder, **changes):
    """A configuration whose teacher draws 32 pictures in two steps."""
    return configuration(
        folder, **{"anchor": None, "sheet": (), "teacher": TeacherConfig(steps=2, pictures=32), **changes}
    )


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_it_draws_what_diffusers_draws(encoder, scale):
    pipe, texts = stable_diffusion(), ["red cat", "dog"]
    noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    drawn = Teacher(pipe, encoder, TeacherConfig(steps=5, guidance_scale=scale)).draw(noise, texts)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    size = {"height": 8, "width": 8, "output_type": "latent"}
    expected = pipe(texts, latents=noise, num_inference_steps=5, guidance_scale=scale, **size).images
    torch.testing.assert_close(drawn, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(drawn[0], Teacher(pipe, encoder, TeacherConfig(steps=5)).draw(noise, ["dog"] * 2)[0])


def test_a_unet_without_text_encoder_attends_to_the_token_rows(encoder):
    teacher = Teacher(plain_pipeline(), encoder, TeacherConfig(steps=3))
    noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    alone = teacher.draw(noise[:1], ["red"])
    with_longer = teacher.draw(noise, ["red", "a blue square in flat style"])  # rows that are masked for the first
    torch.testing.assert_close(with_longer[:1], alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(alone, teacher.draw(noise[:1], ["blue"]))


def test_an_unconditional_teacher(encoder):
    unet = UNet2DModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16,),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",),
    )
    teacher = Teacher(DDIMPipeline(unet, DDIMScheduler()), encoder, TeacherConfig(steps=2, guidance_scale=2.0))
    noise = torch.randn(2, *SHAPE)
    assert torch.equal(teacher.draw(noise, ["red", "blue"]), teacher.draw(noise, ["", "dog"]))


def test_a_teacher_in_half_precision(tmp_path):
    stable_diffusion().save_pretrained(tmp_path)
    pipe, noise = load_pipeline(str(tmp_path), "bfloat16"), torch.randn(1, *SHAPE)
    assert pipe.unet.dtype == torch.bfloat16
    drawn, exact = (
        Teacher(each, None, TeacherConfig(steps=2)).draw(noise, ["red"]) for each in (pipe, stable_diffusion())
    )
    assert drawn.dtype == torch.float32
    assert 0 < (drawn - exact).norm() / exact.norm() < 0.1


def test_descriptions_of_a_text_encoder(encoder):
    vectors, rows = Teacher(stable_diffusion(), encoder, TeacherConfig()).describe(["cat", ""])
    assert rows.shape == (2, 12, 16)
    torch.testing.assert_close(vectors.square().mean(1), torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(torch.cosine_similarity(vectors[0], rows[0].mean(0), 0), torch.tensor(1.0))


def test_pictures_are_drawn_once(sampler, encoder, tmp_path, monkeypatch):
    teacher = Teacher(plain_pipeline(), encoder, TeacherConfig(steps=2, pictures=24, batch_size=7))
    monkeypatch.setattr("coalescer_fast.training.teacher.CHUNK", 16)
    drawn = draw_pairs(teacher, sampler, SHAPE, tmp_path, seed=0, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.safetensors", "00001.safetensors"]
    assert drawn.noise.shape == drawn.latents.shape == (24, *SHAPE)
    assert len(set(drawn.texts)) > 4
    expected = teacher.draw(drawn.noise[20:22], drawn.texts[20:22])
    torch.testing.assert_close(drawn.latents[20:22], expected, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(teacher, "draw", None)
    again = draw_pairs(teacher, sampler, SHAPE, tmp_path, seed=0, progress=False)
    assert torch.equal(again.latents, drawn.latents)
    assert again.texts == drawn.texts
    with pytest.raises(
        ValueError, match=r"00000\.safetensors was drawn with seed 0, which is 1 now: train into another"
    ):
        draw_pairs(teacher, sampler, SHAPE, tmp_path, seed=1, progress=False)


@pytest.mark.parametrize("damage", ["cut", "shapes", "not finite", "no settings"])
def test_damaged_pictures_are_refused(sampler, encoder, tmp_path, damage):
    teacher = Teacher(plain_pipeline(), encoder, TeacherConfig(steps=1, pictures=8))
    draw_pairs(teacher, sampler, SHAPE, tmp_path, seed=0, progress=False)
    path = tmp_path / "00000.safetensors"
    tensors = load_file(path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    elif damage == "shapes":
        save_file({**tensors, "noise": tensors["noise"][:4]}, path, {"texts": json.dumps(["a"] * 8), "settings": "{}"})
    elif damage == "not finite":
        save_file({**tensors, "noise": tensors["noise"] / 0}, path, {"texts": json.dumps(["a"] * 8), "settings": "{}"})
    else:
        save_file(tensors, path)
    with pytest.raises(ValueError, match=r"00000\.safetensors is damaged \(.*\): remove it, to draw anew"):
        draw_pairs(teacher, sampler, SHAPE, tmp_path, seed=0, progress=False)


def test_items_use_every_pair_once_an_epoch(tmp_path):
    pairs = Pairs(torch.randn(10, *SHAPE), [f"text {i}" for i in range(10)], torch.randn(10, *SHAPE))
    schedule = Schedule(steps=5, batch_size=4, learning_rate=1.0)
    trainer = Trainer("t", torch.nn.Linear(1, 1), schedule, tmp_path, make_accelerator(), progress=False)
    batches: list[Items] = [TeacherItems(trainer, pairs, 0.5, 5).at(step) for step in range(5)]  # as after a resume
    found = torch.cat([batch.close for batch in batches])
    assert sorted(found[:10].tolist()) == sorted(found[10:].tolist()) == list(range(10))
    assert found[:10].tolist() != found[10:].tolist()
    for batch in batches:
        assert torch.equal(batch.source, batch.close)
        assert torch.equal(batch.noise, pairs.noise[batch.close])
        assert batch.texts == [f"text {i}" for i in batch.close.tolist()]
    radius = torch.cat([batch.radius for batch in batches])
    assert 0 < (radius == 1).sum() < 20


def test_training_from_a_pretrained_network_with_its_sampler(autoencoder, tmp_path):
    """The loss falls, the saved pipeline draws, and a training that was stopped goes on from the same pictures."""
    pipe = plain_pipeline()
    pipe.save_pretrained(tmp_path / "pretrained")
    schedule = Schedule(
        steps=64, batch_size=16, learning_rate=3e-3, warmup_steps=1, ema_decay=0.9, checkpoint_every=32, sample_every=64
    )
    teacher = TeacherConfig(pipeline=str(tmp_path / "pretrained"), steps=2, pictures=32)
    config = with_teacher(
        autoencoder, schedule=schedule, teacher=teacher, init=str(tmp_path / "pretrained"), overrides={}, sheet=("red",)
    )
    losses = []
    network = train_coalescer(
        config,
        squares(),
        tmp_path / "run",
        progress=False,
        on_step=lambda step, figures: losses.append(figures["loss"]),
    )
    assert len(losses) == 64
    assert sum(losses[-8:]) < 0.7 * sum(losses[:8])
    assert network.config.sample_residual == pytest.approx(-(0.5**0.5))
    drawn = CoalescerPipeline.from_pretrained(tmp_path / "run" / "pipeline")("red, flat style")
    assert drawn.images[0].size == (16, 16)
    assert (tmp_path / "run" / "coalescer-000064.png").is_file()
    again = train_coalescer(config, squares(), tmp_path / "run", progress=False)  # finds all as it was
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), network.state_dict().values()))
    longer = replace(config, schedule=replace(schedule, steps=96))
    train_coalescer(longer, squares(), tmp_path / "run", progress=False, allow_changes=True)
    other = replace(config, teacher=replace(teacher, guidance_scale=2.0))
    with pytest.raises(ValueError, match=r"was drawn with teacher\.guidance_scale 1\.0, which is 2\.0 now"):
        train_coalescer(other, squares(), tmp_path / "run", progress=False)


def test_a_teacher_with_a_text_encoder_needs_no_autoencoder(tmp_path):
    pipe = stable_diffusion()
    pipe.save_pretrained(tmp_path / "pretrained")
    config = with_teacher(
        tmp_path, autoencoder=None, init=str(tmp_path / "pretrained"), init_timestep=900, overrides={}
    )
    train_coalescer(config, squares(), tmp_path / "run", progress=False, teacher=pipe)
    network = CoalescerUNet.from_pretrained(tmp_path / "run" / "unet")
    with torch.no_grad():  # as docs/training.md says
        conditioning = network.condition(*Teacher(pipe).describe(["red"]))
        scheduler, sample = CoalescerScheduler(), torch.randn(1, *SHAPE)
        for i in scheduler.timesteps:
            direction, distance = network(sample, conditioning, return_dict=False)
            sample = scheduler.step(direction, distance, i, sample).prev_sample
        assert pipe.vae.decode(sample / pipe.vae.config.scaling_factor).sample.shape == (1, 3, 8, 8)
    assert not (tmp_path / "run" / "pipeline").exists()


def test_from_scratch_with_cross_attention_and_the_search(autoencoder, tmp_path):
    """Token rows reach a network that is trained without a teacher, too."""
    overrides = {"sample_size": 4, "latent_channels": 4, "block_out_channels": (16, 16), "norm_num_groups": 4}
    overrides |= {"attention_levels": (0,), "num_attention_heads": 2, "cross_attention_dim": 128, "anchor": None}
    config = configuration(autoencoder, overrides=overrides, anchor=None, pairing_warmup=0)
    network = train_coalescer(config, squares(), tmp_path, progress=False)
    fresh = CoalescerUNet(**{**network.config, **overrides})
    assert not torch.equal(network.transformer_layers[0].to_kv.weight, fresh.transformer_layers[0].to_kv.weight)
    assert CoalescerPipeline.from_pretrained(tmp_path / "pipeline")("red").images[0].size == (16, 16)


def test_mistakes(autoencoder, encoder, tmp_path):
    def train(**changes):
        train_coalescer(with_teacher(autoencoder, **changes), squares(), tmp_path / "run", progress=False)

    with pytest.raises(ValueError, match="init is given: leave out overrides"):
        with_teacher(autoencoder, init="there")
    with pytest.raises(ValueError, match="objective is 'flow_matching'; a teacher is for the coalescer"):
        with_teacher(autoencoder, objective="flow_matching")
    with pytest.raises(ValueError, match=r"teacher\.pictures is 0; expected a whole number from 1"):
        TeacherConfig(pictures=0)
    with pytest.raises(ValueError, match=r"teacher\.dtype is 'int8'; use one of float32, bfloat16, float16"):
        TeacherConfig(dtype="int8")
    with pytest.raises(ValueError, match="autoencoder is missing"):
        train(autoencoder=None, teacher=None)
    with pytest.raises(ValueError, match="nowhere cannot be loaded as a diffusers pipeline"):
        load_pipeline(str(tmp_path / "nowhere"))
    with pytest.raises(
        ValueError, match="teacher is a DDIMPipeline without a text encoder; its UNet attends to token rows"
    ):
        Teacher(DDIMPipeline(conditional(16), DDIMScheduler()), encoder, TeacherConfig())
    with pytest.raises(ValueError, match="expected a diffusers pipeline with a unet and a scheduler of DDPM"):
        Teacher(CoalescerPipeline.from_pretrained("emoji-64"), encoder, TeacherConfig())
    stable_diffusion().save_pretrained(tmp_path / "sd")
    with pytest.raises(ValueError, match="description_dim 16, and descriptions have 128: give a teacher with the text"):
        train(init=str(tmp_path / "sd"), overrides={}, teacher=None)
    flow = DDIMPipeline(conditional(), DDIMScheduler())
    flow.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="a scheduler of DDPM"):
        Teacher(flow, encoder, TeacherConfig())


def test_command_line_arguments_reach_the_configuration(tmp_path, monkeypatch):
    (tmp_path / "c.toml").write_text(
        'autoencoder = "ae"\n[overrides]\nsample_size = 4\n[schedule]\nsteps = 8\nbatch_size = 8\nlearning_rate = 1\n'
        "[teacher]\nsteps = 3\n"
    )
    found = []
    monkeypatch.setattr(
        "coalescer_fast.training.coalescer.train_coalescer", lambda config, data, out, **rest: found.append(config)
    )
    monkeypatch.setattr(training_config, "load", lambda path, size: squares())
    training_config.run("coalescer", tmp_path / "c.toml", "digits", tmp_path, init="here", teacher="there")
    assert (found[0].init, found[0].overrides, found[0].teacher.pipeline, found[0].teacher.steps) == (
        "here",
        {},
        "there",
        3,
    )
    with pytest.raises(ValueError, match="init and teacher are for a coalescer"):
        training_config.run("autoencoder", tmp_path / "c.toml", "digits", tmp_path, init="here")
