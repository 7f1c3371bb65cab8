"""The rivals' losses against independent formulas, their samplers, and whole trainings."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from coalescer_fast import CoalescerPipeline
from coalescer_fast.training import rivals
from coalescer_fast.training.coalescer import description_encoder, train_coalescer
from coalescer_fast.training.loop import generator
from coalescer_fast.training.rivals import RIVALS, Batch, TimeConditionedUNet
from coalescer_fast.training.teacher import FlowMatchingTeacher, TeacherConfig, load_teacher

from ..helpers.training import OVERRIDES, configuration, squares

N, SHAPE = 32, (2, 3, 3)


class Smooth(nn.Module):
    """Not linear in anything, and differentiable; with an anchor that depends on the description."""

    def __init__(self, anchor: bool = True):
        super().__init__()
        self.anchor = anchor
        self.gain = nn.Parameter(torch.tensor(0.7))
        self.calls: list[tuple[torch.Tensor, ...]] = []

    def forward(self, x, description, time, span):
        self.calls.append((x, description, time, span))
        t, s, d = (v.view(-1, 1, 1, 1) for v in (time, span, description[:, 0]))
        net = self.gain * torch.sin(x + t - 2 * s) + d
        return net, 0.1 * d + torch.zeros_like(x) if self.anchor else None


class Empty(nn.Module):
    """No network and no anchor: what is left is the boundary of each form."""

    def forward(self, x, description, time, span):
        return torch.zeros_like(x), None


def batch(seed: int = 0, averaged: nn.Module | None = None, progress: float = 0.5, n: int = N) -> Batch:
    draws = torch.Generator().manual_seed(100 + seed)
    z, x = (torch.randn(n, *SHAPE, generator=draws) for _ in range(2))
    description = torch.randn(n, 5, generator=draws)
    return Batch(z, x, description, torch.Generator().manual_seed(seed), progress, averaged or Smooth())


def mean_velocity(network, x, time, span, description):
    """u as the docstring of the module has it, of one sample."""
    net, p = network(x[None], description[None], time[None], span[None])
    return (net + (1 - time) * (p - x) + time * x)[0]


def test_flow_matching_loss():
    network, b = Smooth(), batch()
    given = rivals.flow_matching_loss(network, b)
    [(x, description, time, span)] = network.calls
    assert span.eq(0).all()
    assert 0 <= time.min() < 0.1 < 0.9 < time.max() < 1
    errors = []
    for i in range(N):
        torch.testing.assert_close(x[i], (1 - time[i]) * b.noise[i] + time[i] * b.picture[i])
        u = mean_velocity(network, x[i], time[i], span[i], description[i])
        errors.append(((u - (b.picture[i] - b.noise[i])) ** 2).mean())
    torch.testing.assert_close(given, torch.stack(errors).mean())


def test_the_velocity_of_two_points_is_the_best():
    """Pictures are -1 and 1 everywhere: v = (tanh(D t x / (1 - t)^2) - x) / (1 - t) for D equal elements x."""
    shift = 0.0

    class Known(nn.Module):
        def forward(self, x, description, time, span):
            t = time.view(-1, 1, 1, 1)
            evidence = (x * t / (1 - t) ** 2).sum((1, 2, 3), keepdim=True)
            return (torch.tanh(evidence) - x) / (1 - t) + shift, None

    b = batch(n=4096)
    signs = torch.randint(2, (4096, 1, 1, 1), generator=torch.Generator().manual_seed(3)) * 2.0 - 1
    losses = {}
    for shift in (-0.2, 0.0, 0.2):
        b = replace(b, picture=signs.expand(-1, *SHAPE), generator=torch.Generator().manual_seed(0))
        losses[shift] = float(rivals.flow_matching_loss(Known(), b))
    for other in (-0.2, 0.2):  # the best is where the loss has no slope: |shift|^2 is all that is added
        assert losses[other] - losses[0.0] == pytest.approx(0.04, abs=0.015)


def test_mean_flow_loss_against_forward_mode_derivatives():
    network, b = Smooth(), batch()
    given = rivals.mean_flow_loss(network, b)
    x, description, time, span = network.calls[0]
    assert span[N // 4 :].eq(0).all()
    assert span[: N // 4].gt(0).all()
    assert (time + span).max() < 1
    losses, gradients = [], 0.0
    for i in range(N):
        v, end = b.picture[i] - b.noise[i], time[i] + span[i]

        def u_at(x, t, i=i, end=end):
            return mean_velocity(network, x, t, end - t, description[i])

        u, rate = torch.func.jvp(u_at, (x[i], time[i]), (v, torch.ones(())))
        target = (v + span[i] * rate).detach()
        error = ((u - target) ** 2).mean()
        losses.append(error.detach() / (error.detach() + 0.001))
        gradients += torch.autograd.grad(error, network.gain)[0] / (error.detach() + 0.001) / N
    torch.testing.assert_close(given.detach(), torch.stack(losses).mean(), rtol=1e-3, atol=0)
    torch.testing.assert_close(torch.autograd.grad(given, network.gain)[0], gradients, rtol=2e-2, atol=1e-3)


def test_mean_flow_of_one_picture_has_no_error():
    """Then every path is straight, and (x - x_t) / (1 - t) is its velocity and its mean velocity."""
    b = batch()
    one = b.picture[:1].expand(N, *SHAPE)

    class Straight(nn.Module):
        def forward(self, x, description, time, span):
            return (one[: len(x)] - x) / (1 - time).view(-1, 1, 1, 1), None

    assert float(rivals.mean_flow_loss(Straight(), replace(b, picture=one))) < 1e-3


def test_shortcut_loss():
    network, averaged = Smooth(), Smooth()
    averaged.gain.data.fill_(0.4)
    b = batch(averaged=averaged)
    given = rivals.shortcut_loss(network, b)
    [(x, description, time, span)] = network.calls
    (_, _, first, asked), (_, _, second, again) = averaged.calls
    q = N // 4
    assert span[q:].eq(0).all()
    assert set(span[:q].tolist()) <= {2.0**-k for k in range(7)}
    assert len(span[:q].unique()) > 3
    torch.testing.assert_close(time[:q] / span[:q], (time[:q] / span[:q]).round())
    assert torch.equal(asked, again)
    assert torch.equal(second - first, span[:q] / 2)
    errors = []
    for i in range(N):
        u = mean_velocity(network, x[i], time[i], span[i], description[i])
        target = b.picture[i] - b.noise[i]
        if i < q:
            half = span[i] / 2
            said = half if half >= 2**-6 else torch.zeros(())
            one = mean_velocity(averaged, x[i], time[i], said, description[i])
            two = mean_velocity(averaged, x[i] + half * one, time[i] + half, said, description[i])
            target = ((one + two) / 2).detach()
        errors.append(((u - target) ** 2).mean())
    torch.testing.assert_close(given, torch.stack(errors).mean())
    assert averaged.gain.grad is None
    given.backward()
    assert averaged.gain.grad is None


def test_all_step_sizes_are_drawn():
    seen = set()
    for seed in range(20):
        network = Smooth()
        rivals.shortcut_loss(network, batch(seed))
        seen |= set(network.calls[0][3].tolist())
    assert seen == {0.0, *(2.0**-k for k in range(7))}


def test_consistency_function_at_the_boundary():
    b = batch()
    sigma = torch.full((N,), rivals.SIGMA_MIN)
    torch.testing.assert_close(rivals.consistent(Smooth(), b.picture, sigma, b.description), b.picture)
    sigma = torch.full((N,), rivals.SIGMA_MAX)
    network = Smooth()
    f = rivals.consistent(network, rivals.SIGMA_MAX * b.noise, sigma, b.description)
    x, _, time, span = network.calls[0]
    torch.testing.assert_close(x, b.noise, rtol=1e-4, atol=1e-4)  # of RMS 1 whatever the noise level
    assert time.sub(1).abs().max() < 1e-6
    assert span.eq(0).all()
    net, p = network(x, b.description, time, span)
    torch.testing.assert_close(f, p + net, rtol=0, atol=0.03)  # skip x is about z / 160


@pytest.mark.parametrize("progress", [0.0, 0.3, 0.999])
def test_consistency_loss_is_that_of_the_paper_for_pictures_of_half_the_length(progress):
    """With sigma_data 0.5, sigma in [0.002, 80], c = 0.00054 sqrt(D), 2-norms; twice everything gives the same loss."""
    network, b = Smooth(anchor=False), batch(progress=progress)
    given = rivals.consistency_loss(network, b)
    (_, _, low, _), (_, _, high, _) = network.calls
    steps = min(10 * 2 ** math.floor(progress * 8), 1280)  # s0 2^floor(k / K'), K' = K / (log2(s1 / s0) + 1)
    grid = [(0.002 ** (1 / 7) + i / steps * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7 for i in range(steps + 1)]
    assert len(rivals.noise_levels(progress)) == len(grid)

    def f(x, sigma, time, description):
        skip = 0.25 / ((sigma - 0.002) ** 2 + 0.25)
        out = 0.5 * (sigma - 0.002) / math.sqrt(sigma**2 + 0.25)
        scaled = x / math.sqrt(sigma**2 + 0.25)
        return skip * x + out * network(scaled[None], description[None], time[None], torch.zeros(1))[0][0]

    losses, values = [], math.log(80 / 0.002)
    for i in range(N):
        x, z = b.picture[i] / 2, b.noise[i]
        below, above = (0.002 * math.exp(float(t[i]) * values) for t in (low, high))
        index = min(range(steps + 1), key=lambda j, below=below: abs(math.log(grid[j] / below)))
        assert below == pytest.approx(grid[index], rel=1e-3)
        assert above == pytest.approx(grid[index + 1], rel=1e-3)
        below, above = grid[index], grid[index + 1]
        error = f(x + above * z, above, high[i], b.description[i]) - f(x + below * z, below, low[i], b.description[i])
        c = 0.00054 * math.sqrt(x.numel())
        huber = (error.square().sum() + c**2).sqrt() - c
        losses.append(huber / (above - below) / math.sqrt(x.numel()))
    torch.testing.assert_close(given, torch.stack(losses).mean(), rtol=5e-3, atol=0)


def test_noise_levels_are_drawn_log_normally():
    network = Smooth()
    rivals.consistency_loss(network, batch(progress=0.999, n=20000))
    log_sigma = network.calls[0][2] * math.log(40000) + math.log(0.004)
    assert float(log_sigma.mean()) == pytest.approx(-1.1 + math.log(2), abs=0.06)
    assert float(log_sigma.std()) == pytest.approx(2.0, abs=0.08)


def test_the_target_of_consistency_has_no_gradient():
    network, b = Smooth(), batch()
    [gradient] = torch.autograd.grad(rivals.consistency_loss(network, b), network.gain)
    teacher = copy.deepcopy(network)
    b = replace(b, generator=torch.Generator().manual_seed(0))
    turn = iter((teacher, network))  # the low noise level is asked for first
    [by_another] = torch.autograd.grad(rivals.consistency_loss(lambda *x: next(turn)(*x), b), network.gain)
    torch.testing.assert_close(gradient, by_another)


STRAIGHT = ("flow_matching", "mean_flow", "shortcut")


@pytest.mark.parametrize("steps", [1, 3, 8, 50])
@pytest.mark.parametrize("name", STRAIGHT)
def test_samplers_are_exact_on_straight_paths(name, steps):
    """With one picture, x_t moves on a line whatever the number of steps."""
    b, heard = batch(), []

    def network(x, description, time, span):
        heard.append((time, span))
        return (b.picture - x) / (1 - time).view(-1, 1, 1, 1), None

    torch.testing.assert_close(RIVALS[name].sample(network, b.noise, b.description, steps), b.picture)
    torch.testing.assert_close(torch.stack([t[0] for t, _ in heard]), torch.arange(steps) / steps)
    spans = {"flow_matching": 0.0, "mean_flow": 1 / steps, "shortcut": {1: 1.0, 3: 0.25, 8: 0.125, 50: 1 / 64}[steps]}
    assert [float(s[0]) for _, s in heard] == pytest.approx([spans[name]] * steps)


def test_more_steps_than_a_shortcut_knows_are_by_the_velocity():
    spans = []

    def network(x, description, time, span):
        spans.append(float(span[0]))
        return torch.zeros_like(x), None

    rivals.shortcut_steps(network, batch().noise, batch().description, 128)
    assert set(spans) == {0.0}


@pytest.mark.parametrize("name", STRAIGHT)
def test_an_untrained_network_draws_the_anchor_in_one_step(name):
    b = batch()
    anchor = torch.full_like(b.noise, 0.3)
    drawn = RIVALS[name].sample(lambda x, *_: (torch.zeros_like(x), anchor), b.noise, b.description, 1)
    torch.testing.assert_close(drawn, anchor)


def test_consistency_steps_add_noise_of_the_right_amount():
    b, heard = batch(), []

    def network(x, description, time, span):
        sigma = 0.004 * math.exp(float(time[0]) * math.log(40000))
        heard.append((sigma, x * math.sqrt(sigma**2 + 1)))
        x = x * math.sqrt(sigma**2 + 1)
        skip = 1 / ((sigma - 0.004) ** 2 + 1)
        return (b.picture - skip * x) * math.sqrt(sigma**2 + 1) / (sigma - 0.004), None

    drawn = RIVALS["consistency"].sample(network, b.noise, b.description, 4)
    torch.testing.assert_close(drawn, b.picture, rtol=1e-3, atol=1e-3)
    assert [sigma for sigma, _ in heard] == pytest.approx([160, 3, 1, 1 / 3], rel=1e-3)
    noises = [(x - b.picture * (i > 0)) / math.sqrt(s**2 - (0.004**2 if i else 0)) for i, (s, x) in enumerate(heard)]
    for i, noise in enumerate(noises):
        torch.testing.assert_close(noise.flatten(1).sort().values, b.noise.flatten(1).sort().values, rtol=0, atol=1e-2)
        assert i == 0 or (noise - noises[i - 1]).abs().mean() > 0.5


@pytest.mark.parametrize("name", RIVALS)
def test_a_sample_depends_on_its_own_noise_alone(name):
    network, b = Smooth(), batch()
    drawn = RIVALS[name].sample(network, b.noise, b.description, 3)
    torch.testing.assert_close(RIVALS[name].sample(network, b.noise[5:7], b.description[5:7], 3), drawn[5:7])


@pytest.mark.parametrize("name", RIVALS)
def test_guidance(name):
    """One step is linear in what the network says, so the formula holds for the result."""
    b = batch()
    zeros = torch.zeros_like(b.description)
    wanted, empty, guided = (
        RIVALS[name].sample(Smooth(), b.noise, description, 1, scale)
        for description, scale in ((b.description, 1.0), (zeros, 1.0), (b.description, 1.5))
    )
    torch.testing.assert_close(guided, empty + 1.5 * (wanted - empty))


@pytest.mark.parametrize("name", RIVALS)
def test_it_learns_two_points(name):
    """Pictures are -1 or 1 everywhere; after a few seconds, two to eight evaluations reach both."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(
                nn.Linear(18 + 8, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 18)
            )

        def forward(self, x, description, time, span):
            angles = torch.cat([v[:, None] * math.pi * torch.tensor([1.0, 3.0]) for v in (time, span)], 1)
            net = self.layers(torch.cat([x.flatten(1), angles.sin(), angles.cos()], 1))
            return net.view_as(x), None

    torch.manual_seed(0)
    network = Net()
    averaged = copy.deepcopy(network)
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
    steps = 600
    for step in range(steps):
        b = batch(step, averaged, step / steps, n=128)
        signs = torch.randint(2, (128, 1, 1, 1), generator=b.generator) * 2.0 - 1
        loss = RIVALS[name].loss(network, replace(b, picture=signs.expand(-1, *SHAPE)))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for mine, theirs in zip(averaged.parameters(), network.parameters()):
                mine.lerp_(theirs, 0.05)
    b = batch(n=500)
    drawn = RIVALS[name].sample(averaged, b.noise, b.description, 8 if name == "flow_matching" else 2)
    sides = drawn.mean((1, 2, 3))
    share = float(((drawn - sides.sign().view(-1, 1, 1, 1)).square().mean((1, 2, 3)) < 0.1).float().mean())
    assert share > 0.6  # before the training: none
    assert 0.3 < float((sides > 0).float().mean()) < 0.7


@pytest.fixture(scope="module")
def anchor(autoencoder, tmp_path_factory):
    """The folder of a training whose anchor all share."""
    folder = tmp_path_factory.mktemp("coalescer")
    train_coalescer(configuration(autoencoder), squares(), folder, progress=False)
    return folder


def rival(autoencoder, anchor, name, **changes):
    return configuration(autoencoder, objective=name, pairing="paired", anchor_from=str(anchor), **changes)


@pytest.mark.parametrize("name", RIVALS)
def test_trained_resumed_and_saved(autoencoder, anchor, tmp_path, name):
    """The anchor is the shared one; a run that was stopped and resumed has the bits of one that was not."""
    config = rival(autoencoder, anchor, name)
    whole = train_coalescer(config, squares(), tmp_path / "whole", progress=False)
    shared = torch.load(anchor / "anchor.pt", weights_only=True)["ema"]
    assert all(torch.equal(whole.anchor_mlp.state_dict()[key], shared[key]) for key in shared)

    class Stopped(Exception):
        pass

    def stop(step, figures):
        if step == 11:
            raise Stopped

    with pytest.raises(Stopped):
        train_coalescer(config, squares(), tmp_path / "parts", progress=False, on_step=stop)
    assert torch.load(tmp_path / "parts" / f"{name}.pt", weights_only=True)["step"] == 8
    resumed = train_coalescer(config, squares(), tmp_path / "parts", progress=False)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()))

    loaded = TimeConditionedUNet.from_pretrained(tmp_path / "whole" / "unet").eval()
    noise, description = torch.randn(2, 4, 4, 4), torch.randn(2, 128)
    drawn = RIVALS[name].sample(loaded, noise, description, 2)
    assert torch.equal(drawn, RIVALS[name].sample(whole.eval(), noise, description, 2))
    assert drawn.isfinite().all()
    with pytest.raises(ValueError, match=r"was trained with seed 0, which is 1 now"):
        train_coalescer(replace(config, seed=1), squares(), tmp_path / "whole", progress=False)


def test_the_networks_of_all_rivals_are_alike_and_hear_both_times():
    torch.manual_seed(0)
    network = TimeConditionedUNet(**OVERRIDES)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    x, description = torch.randn(1, 4, 4, 4), torch.randn(1, 128)
    answers = [network(x, description, torch.tensor([t]), torch.tensor([s]))[0] for t, s in ((0, 0), (1, 0), (0, 1))]
    assert min((a - b).abs().max() for a, b in zip(answers, answers[1:] + answers[:1])) > 1e-3
    with torch.autocast("cpu", torch.bfloat16):
        half = network(x, description, torch.zeros(1), torch.zeros(1))[0]
        network.full_precision = True
        exact = network(x, description, torch.zeros(1), torch.zeros(1))[0]
    assert half.dtype == torch.bfloat16
    assert torch.equal(exact, answers[0])


def test_a_training_of_flow_matching_as_the_teacher(autoencoder, anchor, tmp_path):
    """Its pictures are those of Euler steps from the same noise, and a coalescer learns from them."""
    data = squares()
    train_coalescer(rival(autoencoder, anchor, "flow_matching"), data, tmp_path / "flow", progress=False)
    how = TeacherConfig(str(tmp_path / "flow"), steps=3, pictures=32, guidance_scale=1.5)
    network, encoder = load_teacher(how), description_encoder(data)
    noise, texts = torch.randn(4, 4, 4, 4, generator=generator(0, 1)), ["red", "blue, flat style", "", "green"]
    drawn = FlowMatchingTeacher(network, encoder, how).draw(noise, texts)
    assert torch.equal(drawn, rivals.euler(network, noise, encoder(texts), 3, 1.5))

    config = configuration(autoencoder, anchor_from=str(anchor), teacher=how)
    taught = train_coalescer(config, data, tmp_path / "taught", progress=False)
    assert CoalescerPipeline.from_pretrained(tmp_path / "taught" / "pipeline")("red").images[0].size == (16, 16)
    again = train_coalescer(config, data, tmp_path / "again", progress=False)
    assert all(torch.equal(a, b) for a, b in zip(taught.state_dict().values(), again.state_dict().values()))
    with pytest.raises(ValueError, match=r"was drawn with teacher\.steps 3, which is 2 now"):
        train_coalescer(replace(config, teacher=replace(how, steps=2)), data, tmp_path / "taught", progress=False)


def test_a_teacher_that_has_not_finished(tmp_path):
    (tmp_path / "flow_matching.pt").touch()
    with pytest.raises(ValueError, match="holds a training of flow matching that has not finished: finish it first"):
        load_teacher(TeacherConfig(str(tmp_path)))
