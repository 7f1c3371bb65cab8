from __future__ import annotations

import json
import math

import pytest
import torch

from coalescer_fast import CoalescerScheduler
from coalescer_fast.scheduler import MAX_AUTO_STEPS, guide


def batch(seed: int = 0, n: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """R, direction and distance, in float64."""
    generator = torch.Generator().manual_seed(seed)
    sample, direction = (torch.randn(n, 4, 5, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    return sample, direction, torch.rand(n, generator=generator, dtype=torch.float64) + 0.1


def rms(x: torch.Tensor) -> torch.Tensor:
    """|x| of each sample, to be multiplied with x."""
    return (x**2).mean((1, 2, 3), keepdim=True) ** 0.5


def test_two_steps_by_default():
    scheduler = CoalescerScheduler()
    assert scheduler.num_inference_steps == 2
    assert scheduler.timesteps.tolist() == [0, 1]
    assert scheduler.etas == (0.5, 1.0)
    assert scheduler.modes == ("raw", "unit")
    assert scheduler.order == 1
    assert scheduler.init_noise_sigma == 1.0


def test_two_steps_follow_the_formulas():
    scheduler = CoalescerScheduler()
    sample, direction, distance = batch()
    column = distance.view(-1, 1, 1, 1)
    half = scheduler.step(direction, distance, 0, sample).prev_sample
    torch.testing.assert_close(half, sample + 0.5 * column * direction)
    _, direction, distance = batch(1)
    column = distance.view(-1, 1, 1, 1)
    end = scheduler.step(direction, distance, 1, half).prev_sample
    torch.testing.assert_close(end, half + column * direction / rms(direction))
    torch.testing.assert_close(rms(end - half).flatten(), distance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("step", [0, 1])
def test_the_sample_keeps_its_dtype_and_rounds_once(step, dtype):
    scheduler = CoalescerScheduler()
    sample, direction, distance = (x.to(dtype) for x in batch())
    expected = scheduler.step(direction.double(), distance.double(), step, sample.double()).prev_sample
    moved = scheduler.step(direction, distance, step, sample).prev_sample
    assert moved.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(moved.double(), expected, rtol=eps, atol=8 * torch.finfo(torch.float32).eps)


def test_eps_bounds_the_division():
    scheduler = CoalescerScheduler(eps=0.5)
    sample, direction, distance = batch()
    direction = 0.1 * direction / rms(direction)
    moved = scheduler.step(direction, distance, 1, sample).prev_sample
    torch.testing.assert_close(moved, sample + distance.view(-1, 1, 1, 1) * direction / 0.5)


@pytest.mark.parametrize(
    ("steps", "etas", "modes"),
    [
        (1, (1.0,), ("unit",)),
        (2, (0.5, 1.0), ("raw", "unit")),
        (3, (0.5, 0.5, 1.0), ("raw", "raw", "unit")),
        (6, (0.5,) * 5 + (1.0,), ("raw",) * 5 + ("unit",)),
    ],
)
def test_other_step_counts(steps, etas, modes):
    scheduler = CoalescerScheduler()
    scheduler.set_timesteps(steps)
    assert scheduler.num_inference_steps == steps
    assert scheduler.timesteps.tolist() == list(range(steps))
    assert scheduler.timesteps.device.type == "cpu"
    assert scheduler.etas == etas
    assert scheduler.modes == modes


def test_rows_of_their_own():
    scheduler = CoalescerScheduler(rows={"4": ((0.3, 0.4, 0.5, 1.0), ("unit",) * 4), "1": ((0.8,), ("raw",))})
    scheduler.set_timesteps(4)
    assert scheduler.etas == (0.3, 0.4, 0.5, 1.0)
    assert scheduler.modes == ("unit",) * 4
    scheduler.set_timesteps(1)
    assert (scheduler.etas, scheduler.modes) == ((0.8,), ("raw",))
    scheduler.set_timesteps(3)
    assert scheduler.etas == (0.5, 0.5, 1.0)
    scheduler.set_timesteps(2)
    assert scheduler.etas == (0.5, 1.0)


def test_another_schedule_is_used():
    scheduler = CoalescerScheduler(etas=(0.7, 0.2, 0.9), modes=("unit", "raw", "unit"))
    assert scheduler.num_inference_steps == 3
    sample, direction, distance = batch()
    column = distance.view(-1, 1, 1, 1)
    torch.testing.assert_close(
        scheduler.step(direction, distance, 0, sample).prev_sample, sample + 0.7 * column * direction / rms(direction)
    )
    torch.testing.assert_close(
        scheduler.step(direction, distance, 1, sample).prev_sample, sample + 0.2 * column * direction
    )


@pytest.mark.parametrize("steps", [0, -1, True, 2.5, 2.0, "2", None, 1_000_000_000], ids=repr)
def test_wrong_step_counts(steps):
    with pytest.raises(ValueError, match="num_inference_steps is") as caught:
        CoalescerScheduler().set_timesteps(steps)
    assert repr(steps) in str(caught.value)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"guided_steps": "first"}, ("guided_steps", "'first'")),
        ({"modes": ("raw", "long")}, ("modes", "long")),
        ({"etas": (0.5, 0.7, 1.0)}, ("modes", "etas")),
        ({"etas": (), "modes": ()}, ("etas", "()")),
        ({"rows": {"4": ((0.5, 1.0), ("raw", "unit"))}}, ("rows", "4")),
        ({"etas": (math.nan, 1.0)}, ("etas", "nan")),
        ({"etas": (0.5, math.inf)}, ("etas", "inf")),
        ({"etas": (0.5, 1e300)}, ("etas", "1e+300", "1e+06")),
        ({"etas": (0.5, 10**400)}, ("etas", "1e+06")),
        ({"etas": (0.5, True)}, ("etas", "True")),
        ({"etas": (0.5, "1.0")}, ("etas", "'1.0'")),
        ({"etas": "ab"}, ("etas", "'ab'")),
        ({"etas": 0.5}, ("etas", "0.5")),
        ({"etas": None}, ("etas", "None")),
        ({"modes": "ru"}, ("modes", "'ru'")),
        ({"modes": (["raw"], "unit")}, ("modes", "['raw']")),
        ({"rows": [1]}, ("rows", "[1]")),
        ({"rows": {"1": 0.5}}, ("rows", "0.5")),
        ({"rows": {"1": ((0.5,),)}}, ("rows", "expected (etas, modes)")),
        ({"rows": {"1": ((math.nan,), ("raw",))}}, ("rows", "nan")),
        ({"rows": {1: ((0.5,), ("raw",))}}, ("rows", "1")),
        ({"guidance_scale": math.nan}, ("guidance_scale", "nan")),
        ({"guidance_scale": 1e308}, ("guidance_scale", "1e+308")),
        ({"guidance_scale": None}, ("guidance_scale", "None")),
        ({"guidance_scale": True}, ("guidance_scale", "True")),
        ({"eps": 0.0}, ("eps", "0.0")),
        ({"eps": -1e-6}, ("eps", "-1e-06")),
        ({"eps": 1e-60}, ("eps", "1e-60")),  # zero in float32
        ({"eps": math.nan}, ("eps", "nan")),
        ({"eps": "small"}, ("eps", "'small'")),
    ],
    ids=str,
)
def test_wrong_configurations(config, words):
    with pytest.raises(ValueError, match=words[0]) as caught:
        CoalescerScheduler(**config)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("timestep", [-1, 2, torch.tensor(7)], ids=str)
def test_steps_that_there_are_not(timestep):
    sample, direction, distance = batch()
    with pytest.raises(ValueError, match=f"timestep is {int(timestep)}; expected one of 0 to 1"):
        CoalescerScheduler().step(direction, distance, timestep, sample)


def test_tuple_output_and_timestep_as_a_tensor():
    scheduler = CoalescerScheduler()
    sample, direction, distance = batch()
    expected = scheduler.step(direction, distance, 1, sample).prev_sample
    assert torch.equal(
        scheduler.step(direction, distance, scheduler.timesteps[1], sample, return_dict=False)[0], expected
    )


def test_the_network_sees_the_sample_as_it_is():
    sample = batch()[0]
    assert CoalescerScheduler().scale_model_input(sample, 0) is sample


def test_guided_steps():
    last, every = CoalescerScheduler(), CoalescerScheduler(guided_steps="all")
    assert [last.is_guided(t) for t in last.timesteps] == [False, True]
    assert [every.is_guided(t) for t in every.timesteps] == [True, True]
    last.set_timesteps(4)
    assert [last.is_guided(t) for t in last.timesteps] == [False, False, False, True]


@pytest.mark.parametrize("scale", [0.0, 1.0, 1.5, 4.0])
def test_guidance_extrapolates_the_endpoint(scale):
    """R + distance * guide(...) is x_d + w (x_d - x_empty), w = scale - 1."""
    sample, direction, distance = batch()
    _, empty_direction, empty_distance = batch(1)
    column, empty_column = distance.view(-1, 1, 1, 1), empty_distance.view(-1, 1, 1, 1)
    described, empty = sample + column * direction, sample + empty_column * empty_direction
    guided = guide(direction, distance, empty_direction, empty_distance, scale)
    torch.testing.assert_close(
        sample + column * guided, described + (scale - 1) * (described - empty), rtol=1e-12, atol=1e-12
    )
    if scale == 1:
        torch.testing.assert_close(guided, direction)


def test_guidance_at_distance_zero_is_finite():
    _, direction, distance = batch()
    assert guide(direction, torch.zeros_like(distance), direction, distance, 1.5).isfinite().all()


def test_saved_and_loaded(tmp_path):
    scheduler = CoalescerScheduler(
        etas=(0.4, 0.9),
        modes=("unit", "unit"),
        rows={"4": ((0.3,) * 4, ("unit",) * 4)},
        guidance_scale=1.5,
        guided_steps="all",
        eps=1e-5,
    )
    scheduler.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text("utf-8"))["_class_name"] == "CoalescerScheduler"
    loaded = CoalescerScheduler.from_pretrained(tmp_path)
    for name in ("etas", "modes", "rows", "guidance_scale", "guided_steps", "eps"):
        assert loaded.config[name] == scheduler.config[name]
        assert type(loaded.config[name]) is type(scheduler.config[name])
    assert scheduler.config.etas == [0.4, 0.9]  # a list at once, as JSON has no tuples
    assert scheduler.config.rows == {"4": [[0.3] * 4, ["unit"] * 4]}
    sample, direction, distance = batch()
    for steps in (1, 2, 4, 7):
        loaded.set_timesteps(steps)
        scheduler.set_timesteps(steps)
        assert (loaded.etas, loaded.modes) == (scheduler.etas, scheduler.modes)
        for t in loaded.timesteps:
            assert torch.equal(
                loaded.step(direction, distance, t, sample).prev_sample,
                scheduler.step(direction, distance, t, sample).prev_sample,
            )


def test_made_from_a_configuration():
    scheduler = CoalescerScheduler.from_config(CoalescerScheduler(guidance_scale=1.5).config, eps=1e-3)
    assert scheduler.config.guidance_scale == 1.5
    assert scheduler.config.eps == 1e-3
    assert scheduler.etas == (0.5, 1.0)


def test_auto_is_the_schedule_of_many_steps():
    scheduler = CoalescerScheduler(rows={str(MAX_AUTO_STEPS): [[1.0] * MAX_AUTO_STEPS, ["raw"] * MAX_AUTO_STEPS]})
    scheduler.set_timesteps("auto")
    assert scheduler.is_auto
    assert scheduler.num_inference_steps == MAX_AUTO_STEPS
    assert scheduler.etas == (0.5,) * (MAX_AUTO_STEPS - 1) + (1.0,)
    assert scheduler.modes == ("raw",) * (MAX_AUTO_STEPS - 1) + ("unit",)
    assert [scheduler.is_guided(i) for i in scheduler.timesteps] == [False] * (MAX_AUTO_STEPS - 1) + [True]
    scheduler.set_timesteps(2)
    assert not scheduler.is_auto
    with pytest.raises(
        ValueError, match=r"num_inference_steps is 'many'; expected a whole number from 1 to .*, or 'auto'"
    ):
        scheduler.set_timesteps("many")


def test_a_grading_is_saved(tmp_path):
    numbers = {"1": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], "2": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]}
    CoalescerScheduler(grading=numbers, arrival_distance=0.7).save_pretrained(tmp_path)
    loaded = CoalescerScheduler.from_pretrained(tmp_path)
    assert loaded.config.grading == numbers
    assert loaded.config.arrival_distance == 0.7
    assert CoalescerScheduler().config.grading is None
    with pytest.raises(ValueError, match=r"grading is \{\}"):
        CoalescerScheduler(grading={})
    with pytest.raises(ValueError, match="arrival_distance is nan"):
        CoalescerScheduler(arrival_distance=math.nan)
