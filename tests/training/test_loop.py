from __future__ import annotations

import dataclasses
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from coalescer_fast import files
from coalescer_fast.training import checkpoint
from coalescer_fast.training.loop import EMA, Schedule, Trainer, generator, make_accelerator

SCHEDULE = Schedule(steps=12, batch_size=4, learning_rate=0.1, warmup_steps=2, checkpoint_every=4)


def network(width=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width), nn.Linear(width, 1))


def trainer(folder, schedule=SCHEDULE, width=3, seed=5, **options):
    return Trainer("net", network(width), schedule, folder, make_accelerator(), seed, **options)


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
    """Keys of (stream, step), as a training draws them, give different seeds of the 32 bits that torch uses."""
    keys = [(seed, stream, step, 0) for seed in (0, 1) for stream in (1, 2, 3) for step in range(1500)]
    states = {generator(*key).initial_seed() & 0xFFFFFFFF for key in keys}
    assert len(states) >= len(keys) - 1  # 9,000 random 32-bit numbers hold a pair once in a hundred times


def test_it_learns_and_reports(tmp_path):
    run = trainer(
        tmp_path, Schedule(steps=300, batch_size=4, learning_rate=0.02, checkpoint_every=300, sample_every=100)
    )
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


CHANGES = {
    "steps": "schedule.steps 12, which is 24 now",
    "batch_size": "schedule.batch_size 4, which is 8 now",
    "learning_rate": "schedule.learning_rate 0.1, which is 0.2 now",
    "decay_from": "schedule.decay_from 0.5, which is 0.25 now",
    "seed": "seed 5, which is 6 now",
    "model": 'model.width 3, which is "wide" now',
    "data": "other pictures or descriptions",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_training_does_not_go_on_unless_told(tmp_path, change):
    settings = {"model": {"width": 3}, "data": "1" * 64}
    run = trainer(tmp_path, settings=settings)
    run.run(loss_of(run))
    values = {"steps": 24, "batch_size": 8, "learning_rate": 0.2, "decay_from": 0.25}
    schedule = replace(SCHEDULE, **{change: values[change]}) if change in values else SCHEDULE
    settings |= {"model": {"model": {"width": "wide"}}, "data": {"data": "2" * 64}}.get(change, {})
    seed = 6 if change == "seed" else 5
    with pytest.raises(ValueError, match=r"net\.pt was trained with ") as caught:
        trainer(tmp_path, schedule, seed=seed, settings=settings)
    assert CHANGES[change] in str(caught.value)
    assert "add --allow-changes (allow_changes=True)" in str(caught.value)
    assert trainer(tmp_path, schedule, seed=seed, settings=settings, allow_changes=True).step == 12


def test_how_often_is_saved_is_no_change(tmp_path):
    run = trainer(tmp_path)
    run.run(loss_of(run))
    assert trainer(tmp_path, replace(SCHEDULE, checkpoint_every=3, sample_every=5)).finished


def test_fewer_steps_than_were_taken(tmp_path):
    run = trainer(tmp_path)
    run.run(loss_of(run))
    with pytest.raises(ValueError, match=r"net\.pt is at step 12 of a schedule of 8: give more steps"):
        trainer(tmp_path, replace(SCHEDULE, steps=8), allow_changes=True)


def rewritten(path, **changes) -> None:
    """The checkpoint with other fields (None: without them), and the right hash."""
    fields = {
        field.name: getattr(checkpoint.read(path), field.name) for field in dataclasses.fields(checkpoint.Checkpoint)
    } | changes
    path.unlink()
    with path.open("w+b") as file:
        torch.save({key: value for key, value in fields.items() if value is not ...}, file)
        file.seek(0)
        digest = files.sha256(file)
        file.write(checkpoint.HEAD + digest.encode() + b"\n")


WRONG = [
    *[("step", value) for value in (..., -1, True, 2.0, "4", None, 2**63, [4])],
    *[("ema_updates", value) for value in (..., -1, False, "4", None)],
    *[
        (name, value)
        for name in ("model", "ema")
        for value in (..., None, [], {}, {"0.weight": 3}, {"0.weight": torch.zeros(3, 2)})
    ],
    *[("optimizer", value) for value in (..., None, [], {}, {"state": {}}, {"state": {}, "param_groups": []})],
    *[("settings", value) for value in (..., None, [], {"seed": 5})],
    *[("format", value) for value in (..., None, 2, "1")],
    ("more", 3),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=[f"{name}-{i}" for i, (name, _) in enumerate(WRONG)])
def test_a_field_that_is_none(tmp_path, name, value):
    run = trainer(tmp_path)
    run.run(loss_of(run))
    rewritten(tmp_path / "net.pt", **{name: value})
    with pytest.raises(ValueError, match=r"net\.pt (is no checkpoint that|was written for another model)") as caught:
        trainer(tmp_path)
    assert "\n" not in str(caught.value)


def test_numbers_that_are_not_finite(tmp_path):
    run = trainer(tmp_path)
    run.run(loss_of(run))
    state = checkpoint.read(tmp_path / "net.pt").model
    state["0.weight"][0, 0] = math.nan
    rewritten(tmp_path / "net.pt", model=state)
    with pytest.raises(ValueError, match=r"model\.0\.weight holds numbers that are not finite"):
        trainer(tmp_path)


def test_moments_of_another_shape(tmp_path):
    run = trainer(tmp_path)
    run.run(loss_of(run))
    state = checkpoint.read(tmp_path / "net.pt").optimizer
    state["state"][0]["exp_avg"] = torch.zeros(1)
    rewritten(tmp_path / "net.pt", optimizer=state)
    with pytest.raises(ValueError, match="was written for another model"):
        trainer(tmp_path)


def test_one_flipped_byte_anywhere(tmp_path):
    run = trainer(tmp_path)
    run.run(loss_of(run))
    path = tmp_path / "net.pt"
    content = path.read_bytes()
    for place in range(0, len(content), max(1, len(content) // 60)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(ValueError, match=r"net\.pt is damaged") as caught:
            trainer(tmp_path)
        assert "remove it to begin anew" in str(caught.value)
    path.write_bytes(content)
    assert trainer(tmp_path).finished


def test_what_is_no_file(tmp_path):
    """A device would be read without an end."""
    for make in (lambda path: path.symlink_to("/dev/zero"), lambda path: path.mkdir()):
        make(tmp_path / "net.pt")
        with pytest.raises(ValueError, match=r"net\.pt is no file: remove it"):
            trainer(tmp_path)
        (tmp_path / "net.pt").rmdir() if (tmp_path / "net.pt").is_dir() else (tmp_path / "net.pt").unlink()


def test_a_checkpoint_without_a_checksum(tmp_path):
    """As older versions wrote them."""
    run = trainer(tmp_path)
    run.run(loss_of(run))
    torch.save(torch.load(tmp_path / "net.pt", weights_only=True), tmp_path / "net.pt")
    with pytest.raises(
        ValueError, match="is damaged, or of an older version, for it has no checksum at its end: remove it"
    ):
        trainer(tmp_path)


def test_it_runs_no_code(tmp_path):
    """A checkpoint with the right hash whose pickle calls a function."""

    class Attack:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    run = trainer(tmp_path)
    run.run(loss_of(run))
    rewritten(tmp_path / "net.pt", optimizer={"state": Attack(), "param_groups": []})
    with pytest.raises(ValueError, match=r"net\.pt is no checkpoint that a training can go on from"):
        trainer(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("steps", 0), ("steps", 2**31), ("learning_rate", -1.0), ("learning_rate", math.nan), ("warmup_steps", -1)),
        *(("decay_from", 1.5), ("final_learning_rate", 2.0), ("betas", (0.9, 1.0)), ("betas", (0.9,))),
        *(("max_grad_norm", -1.0), ("ema_decay", 1.5)),
    ],
)
def test_schedules_that_are_none(name, value):
    with pytest.raises(ValueError, match=f"{name} is "):
        replace(SCHEDULE, **{name: value})


@pytest.mark.parametrize("content", [b"", b"PK", None], ids=["empty", "no archive", "truncated"])
def test_damaged_checkpoint(tmp_path, content):
    run = trainer(tmp_path)
    run.run(loss_of(run))
    path = tmp_path / "net.pt"
    path.write_bytes(path.read_bytes()[:1000] if content is None else content)
    with pytest.raises(ValueError, match=r"net\.pt") as caught:
        trainer(tmp_path)
    assert "\n" not in str(caught.value)
