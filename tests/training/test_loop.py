from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from coalescer_fast.training.loop import EMA, Schedule, Trainer, generator, make_accelerator

SCHEDULE = Schedule(steps=12, batch_size=4, learning_rate=0.1, warmup_steps=2, checkpoint_every=4)


def network(width=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width), nn.Linear(width, 1))


def trainer(folder, schedule=SCHEDULE, width=3):
    return Trainer("net", network(width), schedule, folder, make_accelerator(), seed=5)


def loss_of(run):
    def loss(model, step):
        x = torch.randn(4, 2, generator=run.generator(step))
        return (model(x) - x.sum(1, keepdim=True)).square().mean(), {}

    return loss


def test_learning_rate():
    s = Schedule(steps=100, batch_size=1, learning_rate=2.0, warmup_steps=10, decay_from=0.5, final_learning_rate=0.1)
    assert s.rate(0) == pytest.approx(0.2)
    assert s.rate(9) == s.rate(30) == s.rate(50) == pytest.approx(2.0)
    assert s.rate(75) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert s.rate(99) == pytest.approx(2.0 * (0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi * 0.98))))
    assert s.rate(100) == pytest.approx(0.2)


def test_average():
    model = network()
    ema = EMA(model, decay=0.25)
    expected = model[0].weight.detach().clone()
    for n in range(1, 4):
        with torch.no_grad():
            model[0].weight.add_(1.0)
            model[1].running_mean.add_(1.0)
        ema.update(model)
        decay = min(0.25, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * model[0].weight.detach()
    torch.testing.assert_close(ema.model[0].weight, expected)
    assert torch.equal(ema.model[1].running_mean, model[1].running_mean)
    assert not any(p.requires_grad for p in ema.model.parameters())


def test_frozen_parameters_are_not_averaged():
    model = network()
    model[0].requires_grad_(False)
    ema = EMA(model, decay=0.5)
    before = model[0].weight.clone()
    ema.update(model)
    assert torch.equal(ema.model[0].weight, before)


def test_generators_are_a_function_of_seed_and_key():
    draw = lambda *key: float(torch.rand((), generator=generator(*key), dtype=torch.float64))  # noqa: E731
    keys = [(seed, step, process) for seed in (0, 1, 2) for step in (*range(300), 2**31) for process in (0, 1)]
    assert [draw(*k) for k in keys] == [draw(*k) for k in keys]
    assert len({draw(*k) for k in keys}) == len(keys)


def test_streams_of_a_training_do_not_meet():
    """Keys of (stream, step), as a training draws them: torch seeds its CPU generator with 32 bits, and a shared one repeats all draws."""
    keys = [(seed, stream, step, 0) for seed in (0, 1) for stream in (1, 2, 3) for step in range(1500)]
    states = {generator(*key).initial_seed() & 0xFFFFFFFF for key in keys}
    assert len(states) >= len(keys) - 1  # 9,000 random 32-bit numbers hold a pair once in a hundred times


def test_it_learns_and_reports(tmp_path):
    run = trainer(tmp_path, Schedule(steps=300, batch_size=4, learning_rate=0.02, checkpoint_every=300, sample_every=100))
    seen = []
    run.run(loss_of(run), lambda model, step: seen.append(step))
    assert run.finished
    assert seen == [100, 200, 300]
    x = torch.randn(64, 2, generator=generator(1))
    assert float((run.ema.model(x) - x.sum(1, keepdim=True)).square().mean()) < 0.2  # the variance of the target is 2


@pytest.mark.parametrize("stop", [4, 7])
def test_stopped_and_resumed_equals_undisturbed(tmp_path, stop):
    """Stopped at, or after, a checkpoint: the same bits in weights, averaged weights and optimiser."""

    class Stop(Exception):
        pass

    undisturbed = trainer(tmp_path / "a")
    undisturbed.run(loss_of(undisturbed))
    first = trainer(tmp_path / "b")
    ordinary = loss_of(first)

    def stopping(model, step):
        if step == stop:
            raise Stop
        return ordinary(model, step)

    with pytest.raises(Stop):
        first.run(stopping)
    second = trainer(tmp_path / "b")
    assert second.step == second.first_step == 4
    second.run(loss_of(second))
    a, b = (torch.load(tmp_path / name / "net.pt", weights_only=True) for name in "ab")
    for part in ("model", "ema"):
        assert all(torch.equal(a[part][key], b[part][key]) for key in a[part])
    for one, other in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values()):
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_checkpoints_are_whole(tmp_path):
    run = trainer(tmp_path)
    run.run(loss_of(run))
    assert [p.name for p in tmp_path.iterdir()] == ["net.pt"]


def test_checkpoint_of_another_model(tmp_path):
    run = trainer(tmp_path)
    run.run(loss_of(run))
    with pytest.raises(ValueError, match="written for another model: train into another folder") as caught:
        trainer(tmp_path, width=5)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"PK", None], ids=["empty", "no archive", "truncated"])
def test_damaged_checkpoint(tmp_path, content):
    run = trainer(tmp_path)
    run.run(loss_of(run))
    path = tmp_path / "net.pt"
    path.write_bytes(path.read_bytes()[:1000] if content is None else content)
    with pytest.raises(ValueError, match=r"net\.pt") as caught:
        trainer(tmp_path)
    assert "\n" not in str(caught.value)
