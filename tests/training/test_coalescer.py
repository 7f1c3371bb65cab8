from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import coalescer_fast
from coalescer_fast import CoalescerAutoencoder, CoalescerPipeline
from coalescer_fast.training.autoencoder import AutoencoderConfig, encode, psnr, train_autoencoder
from coalescer_fast.training.coalescer import (
    description_encoder,
    train_coalescer,
)
from coalescer_fast.training.data import Concept
from coalescer_fast.training.items import PAIRINGS, Pairing, draw_items
from coalescer_fast.training.loop import Schedule, generator
from coalescer_fast.training.pictures import to_tensor
from coalescer_fast.training.prompts import PromptConfig, PromptSampler

from ..helpers import processes
from ..helpers.training import COLOURS, configuration, squares, train


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("autoencoder")
    config = AutoencoderConfig(
        Schedule(steps=500, batch_size=8, learning_rate=2e-3, ema_decay=0.98, checkpoint_every=250, sample_every=250),
        model={"latent_channels": 4, "width": 32, "encoder_blocks": (1, 1), "decoder_blocks": (1, 1)},
        latent_noise=0.1,
        permute_colours=0.0,
    )
    model = train_autoencoder(config, squares(), folder)
    return folder, model


def test_autoencoder_learns_and_standardises(autoencoder):
    folder, model = autoencoder
    pictures = to_tensor(squares().images)
    with torch.no_grad():
        assert float(psnr(model(pictures).sample, pictures).mean()) > 22  # white alone gives 4 dB
    latents = encode(model, squares())
    assert latents.mean((0, 2, 3)).abs().max() < 1e-4
    torch.testing.assert_close(latents.square().mean((0, 2, 3)), torch.ones(4), rtol=1e-3, atol=0)
    assert (folder / "autoencoder-000250.png").exists()


def test_decoder_alone_keeps_the_latents(autoencoder, tmp_path):
    folder, model = autoencoder
    config = AutoencoderConfig(
        Schedule(steps=10, batch_size=8, learning_rate=5e-3, checkpoint_every=10, sample_every=5),
        init=str(folder / "autoencoder"),
        train_encoder=False,
    )
    tuned = train_autoencoder(config, squares(), tmp_path)
    assert torch.equal(encode(tuned, squares()), encode(model, squares()))
    assert not torch.equal(tuned.decoder.layers[0].weight, model.decoder.layers[0].weight)


def test_an_autoencoder_starts_from_that_of_the_embedded_model(tmp_path):
    from coalescer_fast.folders import WEIGHTS

    schedule = Schedule(steps=1, batch_size=2, learning_rate=1e-9, checkpoint_every=1, sample_every=1)
    config = AutoencoderConfig(schedule, init="emoji-64", train_encoder=False)
    tuned = train_autoencoder(config, squares(), tmp_path).state_dict()
    embedded = CoalescerAutoencoder.from_pretrained(WEIGHTS / "emoji-64" / "vae").state_dict()
    for name, value in embedded.items():
        torch.testing.assert_close(tuned[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("styles", [(), ("flat",)])
def test_names_of_the_training_are_known(styles):
    data = replace(squares(), styles=styles, style=np.full(len(squares()), len(styles) - 1))
    data = replace(data, concepts=(Concept("trouser"), *data.concepts[1:]))
    encoder = description_encoder(data)
    assert encoder.known_names == [c.name for c in data.concepts]
    assert encoder.words("trouser") == {"trouser": True}
    assert encoder.styles_of("trouser") == list(styles)


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_every_pairing_trains_and_saves_a_pipeline(autoencoder, tmp_path, pairing):
    loss = {"nearest": "mse", "paired": "distance_marching"}.get(pairing, "sqrt")
    train_coalescer(configuration(autoencoder[0], pairing=pairing, direction_loss=loss), squares(), tmp_path)
    pipe = CoalescerPipeline.from_pretrained(tmp_path / "pipeline")
    assert pipe("red", generator=torch.Generator().manual_seed(0)).images[0].size == (16, 16)
    assert (tmp_path / "coalescer-000016.png").exists()


def test_missing_parts(autoencoder, tmp_path):
    config = configuration(autoencoder[0], autoencoder="nowhere")
    with pytest.raises(ValueError, match=r"autoencoder is 'nowhere', where there is no config\.json: train that first"):
        train_coalescer(config, squares(), tmp_path)
    with pytest.raises(ValueError, match=r"anchor_from is 'nowhere', where there is no anchor\.pt"):
        train_coalescer(configuration(autoencoder[0], anchor_from="nowhere"), squares(), tmp_path)
    with pytest.raises(ValueError, match="init is 'nowhere'"):
        train_autoencoder(AutoencoderConfig(Schedule(1, 1, 1.0), init="nowhere"), squares(), tmp_path)


def test_queue(autoencoder):
    """Sources and close pictures fit the description that was drawn for them; half of the radii are the prior's."""
    data = squares()
    encoder = description_encoder(data)
    prompts = PromptConfig(name_style=1.0, missing_style=0, keyword=0, style=0, empty=0, queue_size=400)
    sampler, latents = PromptSampler(data, encoder, prompts), encode(autoencoder[1], data)
    looks = {}
    for i in range(len(data)):
        looks.setdefault((int(data.concept[i]), int(data.style[i])), set()).add(i)
    landings = []

    def endpoint(noise, description, texts):
        landings.append(len(noise))
        torch.testing.assert_close(encoder(texts), description)
        return noise

    queue = draw_items(sampler, latents, Pairing(), generator(0, 1), 400, endpoint)
    assert len(queue.noise) == 400
    assert landings == [400]
    assert 0.4 < float((queue.radius == 1).double().mean()) < 0.6
    for close, source in zip(queue.close.tolist(), queue.source.tolist()):
        look = (int(data.concept[close]), int(data.style[close]))
        assert source in looks[look]
    again = draw_items(sampler, latents, Pairing(), generator(0, 1), 400, endpoint)
    for a, b in zip(vars(queue).values(), vars(again).values()):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_it_learns_two_steps(autoencoder, tmp_path):
    """Two steps from noise land nearer to the described colour than to any other."""
    schedule = Schedule(
        steps=120, batch_size=32, learning_rate=3e-3, ema_decay=0.9, checkpoint_every=120, sample_every=1000
    )
    anchor = Schedule(steps=150, batch_size=32, learning_rate=5e-3, ema_decay=0.9, checkpoint_every=150)
    config = configuration(
        autoencoder[0], schedule=schedule, anchor=anchor, prompts=PromptConfig(queue_size=128, min_group=4)
    )
    data = squares()
    train_coalescer(config, data, tmp_path)
    pipe = CoalescerPipeline.from_pretrained(tmp_path / "pipeline")
    pictures = pipe(
        list(COLOURS), num_images_per_prompt=8, generator=torch.Generator().manual_seed(0), output_type="np"
    ).images
    middle = pictures[:, 7:9, 7:9].mean((1, 2)) * 255
    distance = np.linalg.norm(middle[:, None] - np.array(list(COLOURS.values()))[None], axis=2)
    assert (distance.argmin(1) == np.arange(4).repeat(8)).mean() >= 0.9  # .25 by chance


def test_a_finished_run_goes_on_with_more_steps(autoencoder, tmp_path):
    """Also from a last step in the middle of a pairing's time: six steps, of pairings that last four."""
    base = configuration(autoencoder[0], sheet=())
    for steps in (6, 16):
        config = replace(base, schedule=replace(base.schedule, steps=steps))
        if steps == 16:
            with pytest.raises(
                ValueError,
                match=r"coalescer\.pt was trained with schedule\.steps 6, which is 16 now: .* --allow-changes",
            ):
                train_coalescer(config, squares(), tmp_path)
        train_coalescer(config, squares(), tmp_path, allow_changes=steps == 16)
        assert torch.load(tmp_path / "coalescer.pt", weights_only=True)["step"] == steps


def test_killed_and_resumed_equals_undisturbed(autoencoder, tmp_path):
    """SIGKILL somewhere in the UNet's training; resumed, every weight has the bits of a run that was left alone."""
    processes.call(train, autoencoder[0], tmp_path / "a")
    killed = processes.context().Process(target=train, args=(autoencoder[0], tmp_path / "b"))
    killed.start()
    checkpoint = tmp_path / "b" / "coalescer.pt"
    until = time.monotonic() + 60
    while not checkpoint.exists() and time.monotonic() < until:
        time.sleep(0.005)
    killed.kill()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert torch.load(checkpoint, weights_only=True)["step"] < 64
    processes.call(train, autoencoder[0], tmp_path / "b")
    a, b = (torch.load(tmp_path / name / "coalescer.pt", weights_only=True) for name in "ab")
    assert a["step"] == b["step"] == 64
    for part in ("model", "ema"):
        assert all(torch.equal(a[part][key], b[part][key]) for key in a[part])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "count"), [("accelerate.commands.launch --cpu", 1), ("torch.distributed.run --nproc_per_node", 2)]
)
def test_launchers(autoencoder, tmp_path, launcher, count):
    """accelerate launch runs the training; torchrun's two processes train one model, each on batches of its own."""
    (tmp_path / "train.py").write_text(
        "import sys\nsys.path.append(sys.argv[1])\nfrom tests.helpers.training import train\ntrain(*sys.argv[2:])\n"
    )
    command = [sys.executable, "-m", *launcher.split(), *(["2"] if count == 2 else [])]
    arguments = [tmp_path / "train.py", Path(__file__).parents[2], autoencoder[0], tmp_path / "launched"]
    environment = {**os.environ, "PYTHONPATH": str(Path(coalescer_fast.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *map(str, arguments)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    processes.call(train, autoencoder[0], tmp_path / "alone")
    launched, alone = (
        torch.load(tmp_path / name / "coalescer.pt", weights_only=True) for name in ("launched", "alone")
    )
    assert launched["step"] == 64
    assert torch.equal(launched["model"]["conv_in.weight"], alone["model"]["conv_in.weight"]) == (count == 1)
    assert CoalescerPipeline.from_pretrained(tmp_path / "launched" / "pipeline")("red").images[0].size == (16, 16)
