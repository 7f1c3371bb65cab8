from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from coalescer_fast import sampling
from coalescer_fast.models.unet import Conditioning
from coalescer_fast.sampling import Call
from coalescer_fast.scheduler import CoalescerScheduler, guide


class Networks:
    """direction = a - R and distance = a, by the conditioning's own number a of each sample."""

    backend = "reference"

    def __init__(self) -> None:
        self.asked: list[tuple[float, ...]] = []

    def evaluate(self, sample: torch.Tensor, conditioning: Conditioning) -> tuple[torch.Tensor, torch.Tensor]:
        a = conditioning.film[0][0][:, 0]
        self.asked.append(tuple(a.tolist()))
        return a[:, None, None, None] - sample, a


def conditioning(*numbers: float) -> Conditioning:
    column = torch.tensor(numbers)[:, None]
    return Conditioning([(column, column)], None, [])


def scheduler(steps: int | str = 2, **config) -> CoalescerScheduler:
    made = CoalescerScheduler(**config)
    made.set_timesteps(steps)
    return made


R = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
DESCRIBED, EMPTY = conditioning(0.5, 2.0), conditioning(0.25)


def test_the_formulas_by_hand():
    networks = Networks()
    found = sampling.sample(networks, scheduler(), R, DESCRIBED, EMPTY, 1.5)
    assert networks.asked == [
        (0.5, 2.0),
        (0.5, 2.0),
        (0.25, 0.25),
    ]  # guided in the last step, by the one empty description
    a, e = torch.tensor([0.5, 2.0]).view(2, 1, 1, 1), 0.25
    middle = R + 0.5 * a * (a - R)
    direction = guide(a - middle, a.flatten(), e - middle, torch.full((2,), e), 1.5)
    expected = middle + a * direction / direction.square().mean((1, 2, 3), keepdim=True).sqrt()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("guided_steps", ["last", "all"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_evaluations(steps, guided_steps):
    networks = Networks()
    sampling.sample(networks, scheduler(steps, guided_steps=guided_steps), R, DESCRIBED, EMPTY, 2.0)
    assert networks.asked.count((0.25, 0.25)) == (steps if guided_steps == "all" else 1)
    assert networks.asked.count((0.5, 2.0)) == steps
    networks.asked.clear()
    sampling.sample(networks, scheduler(steps, guided_steps=guided_steps), R, DESCRIBED, None, 2.0)
    assert networks.asked == [(0.5, 2.0)] * steps


def test_each_step_is_shown_and_may_be_replaced():
    seen = []

    def on_step(i, start, direction, distance, end):
        seen.append(SimpleNamespace(i=i, start=start, direction=direction, distance=distance, end=end))
        return end if i else torch.zeros_like(end)

    found = sampling.sample(Networks(), scheduler(3), R, DESCRIBED, EMPTY, 1.5, on_step)
    assert [step.i for step in seen] == [0, 1, 2]
    assert torch.equal(seen[0].start, R)
    assert not seen[1].start.any()
    assert torch.equal(seen[2].start, seen[1].end)
    assert torch.equal(found, seen[2].end)
    for step in seen:  # before guidance
        assert torch.equal(step.direction, DESCRIBED.film[0][0].view(2, 1, 1, 1) - step.start)
        assert torch.equal(step.distance, DESCRIBED.film[0][0][:, 0])


def test_guidance_may_change_on_the_way():
    call, networks = Call(1.0, 4), Networks()

    def on_step(i, start, direction, distance, end):
        call.guidance_scale = (2.0, 2.0, 1.0, 2.0)[i]
        return end

    sampling.sample(networks, scheduler(4, guided_steps="all"), R, DESCRIBED, EMPTY, 1.0, on_step, call)
    assert [numbers == (0.25, 0.25) for numbers in networks.asked] == [False, False, True, False, True, False]


def test_a_changed_guidance_is_that_of_the_steps_after():
    def on_step(i, start, direction, distance, end):
        call.guidance_scale = 3.0
        return end

    call = Call(1.0, 2)
    changed = sampling.sample(Networks(), scheduler(), R, DESCRIBED, EMPTY, 1.0, on_step, call)
    assert torch.equal(
        changed, sampling.sample(Networks(), scheduler(), R, DESCRIBED, EMPTY, 3.0)
    )  # the last step alone is guided


@pytest.mark.parametrize("last", [0, 1, 2])
def test_an_interrupted_call_ends_with_what_it_has(last):
    call, networks, seen = Call(1.0, 5), Networks(), []

    def on_step(i, start, direction, distance, end):
        call.interrupt = i == last
        seen.append(end)
        return end

    found = sampling.sample(networks, scheduler(5), R, DESCRIBED, None, 1.0, on_step, call)
    assert len(networks.asked) == last + 1
    assert found is seen[last]


def test_a_call_that_is_interrupted_at_once():
    networks = Networks()
    assert sampling.sample(networks, scheduler(), R, DESCRIBED, None, 1.0, call=Call(1.0, 2, interrupt=True)) is R
    assert networks.asked == []


def test_empty_descriptions_of_each_sample():
    networks = Networks()
    sampling.sample(networks, scheduler(), R, DESCRIBED, conditioning(0.25, 0.75), 1.5)
    assert networks.asked[-1] == (0.25, 0.75)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [0.0, 1.4, 7.3])
def test_a_scale_in_a_tensor_gives_the_bits_of_the_number(scale, dtype):
    direction, away = torch.randn(2, 4, 3, 5, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    distance, far = torch.rand(2, 4, generator=torch.Generator().manual_seed(2)) + 0.5
    expected = guide(direction, distance, away, far, scale)
    found = guide(direction, distance, away, far, torch.tensor(scale, dtype=torch.float64))
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


class Shrinking(Networks):
    """direction = 1 and distance = mean(a - R): what is left of the way to a."""

    def evaluate(self, sample: torch.Tensor, conditioning: Conditioning) -> tuple[torch.Tensor, torch.Tensor]:
        a = conditioning.film[0][0][:, 0]
        self.asked.append(tuple(a.tolist()))
        return torch.ones_like(sample), (a[:, None, None, None] - sample).mean((1, 2, 3))


@pytest.mark.parametrize("guided_steps", ["last", "all"])
def test_auto_evaluates_those_that_have_not_arrived(guided_steps):
    networks, call = Shrinking(), Call(1.5, 8)
    auto = scheduler("auto", arrival_distance=1.0, guided_steps=guided_steps)
    start, away = torch.zeros(3, 1, 2, 2), conditioning(0.25)
    found = sampling.sample(networks, auto, start, conditioning(4.0, 0.5, 1.5), away, 1.5, call=call)
    asked = [one for one in networks.asked if one[0] != 0.25]
    if guided_steps == "last":  # 4 -> 2 -> 1 -> 0.5: the first distance below 1 is that of the last step
        assert asked == [(4.0, 0.5, 1.5), (4.0, 1.5), (4.0,), (4.0,)]
        assert call.evaluations.tolist() == [5, 2, 3]
    counts = [sum(a in one for one in asked) for a in (4.0, 0.5, 1.5)]
    assert call.evaluations.tolist() == [2 * n if guided_steps == "all" else n + 1 for n in counts]
    lengths, distances = call.heads[1]
    assert distances.isnan().tolist() == lengths.isnan().tolist() == [False, True, False]
    for row, (a, steps) in enumerate(zip((4.0, 0.5, 1.5), counts)):
        plain = scheduler(steps, guided_steps=guided_steps)
        alone = sampling.sample(Shrinking(), plain, start[:1], conditioning(a), away, 1.5)
        assert torch.equal(found[row : row + 1], alone)


def test_auto_ends_at_the_most_steps():
    networks, call = Networks(), Call(1.0, 8)
    auto = scheduler("auto", arrival_distance=-1.0)
    found = sampling.sample(networks, auto, R, DESCRIBED, None, 1.0, call=call)
    assert call.evaluations.tolist() == [8, 8]
    assert torch.equal(found, sampling.sample(Networks(), scheduler(8), R, DESCRIBED, None, 1.0))


def test_a_call_is_told_of_heads_and_evaluations():
    call = Call(1.5, 3)
    sampling.sample(Networks(), scheduler(3), R, DESCRIBED, EMPTY, 1.5, call=call)
    assert call.evaluations == 4
    assert len(call.heads) == 2
    length, distance = call.heads[0]
    torch.testing.assert_close(distance, torch.tensor([0.5, 2.0]))
    expected = (torch.tensor([0.5, 2.0]).view(2, 1, 1, 1) - R).square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(length, expected)
