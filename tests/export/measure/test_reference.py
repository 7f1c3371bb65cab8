from __future__ import annotations

import pytest
import torch

from coalescer_fast.export.measure.reference import graph_inputs, trajectories
from coalescer_fast.runtime.engines import artefact


def test_a_trajectory_is_a_call(small):
    runtime = small.runtime
    (seen,) = trajectories(small, ["octopus", "pizza"], (2,), seed=3)
    assert small.runtime is runtime
    assert len(seen.evaluations) == 3  # two, and the empty description in the last step
    assert torch.equal(seen.evaluations[0][0][0], seen.noise)
    (r, description), _ = seen.evaluations[1]
    assert torch.equal(description, seen.description[0])
    (same, empty), _ = seen.evaluations[2]
    assert torch.equal(same, r)
    assert not torch.equal(r, seen.noise)
    assert not empty.any()
    expected = small(["octopus", "pizza"], latents=seen.noise, output_type="pt").images
    torch.testing.assert_close(seen.pictures, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close((seen.decoded / 2 + 0.5).clamp(0, 1), seen.pictures)


def test_names_without_repeats_in_calls_of_the_sizes(small):
    first, again = (list(trajectories(small, 10, (1, 2, 5), seed=1, guidance=1)) for _ in range(2))
    assert [len(each.noise) for each in first] == [1, 2, 5, 1, 1]
    assert [len(each.evaluations) for each in first] == [2] * 5
    for a, b in zip(first, again):
        assert torch.equal(a.noise, b.noise)
        assert torch.equal(a.pictures, b.pictures)
    assert [len(each.noise) for each in trajectories(small, 3, (2,))] == [2, 2]


def test_a_pipeline_is_left_as_it_is_when_a_call_fails(small):
    runtime = small.runtime
    with pytest.raises(ValueError, match="num_inference_steps"):
        next(trajectories(small, 1, (1,), steps=0))
    assert small.runtime is runtime


def test_calls_of_a_unet_are_the_evaluations_of_whole_calls(small, exported):
    m = artefact.read(exported / "unet").manifest
    (first, second, empty) = graph_inputs(small, m, ["octopus", "pizza"], 0)
    assert not (first[0] == second[0]).all()
    assert (second[0] == empty[0]).all()
    assert not empty[1].any()
