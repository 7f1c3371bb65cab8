from __future__ import annotations

import math

import pytest
import torch

from coalescer_fast import grading

NUMBERS = {"1": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], "2": [1, 2, 3, 4, 5, 6, 7, 8]}
WORDS = [(0.5, 0.25, -1.0), (1.0, 0.75, 0.5)]


def test_log_odds_by_hand():
    heads = [
        (torch.tensor([0.5, 0.25]), torch.tensor([1.0, 2.0])),
        (torch.tensor([0.75, 1.0]), torch.tensor([3.0, 4.0])),
    ]
    said = [6 * 0.5 + 7 * 0.25 - 8, 6 * 1 + 7 * 0.75 + 8 * 0.5]
    by_heads = [1 + 2 * 0.5 + 3 * 1 + 4 * 0.75 + 5 * 3, 1 + 2 * 0.25 + 3 * 2 + 4 * 1 + 5 * 4]
    assert grading.log_odds(NUMBERS, heads, WORDS) == [a + b for a, b in zip(by_heads, said)]
    said = [4 * 0.5 + 5 * 0.25 - 6, 4 * 1 + 5 * 0.75 + 6 * 0.5]
    assert grading.log_odds(NUMBERS, heads[:1], WORDS) == [1 + 2 * 0.5 + 3 + said[0], 1 + 2 * 0.25 + 6 + said[1]]


def test_a_picture_that_arrived_after_one_evaluation_is_graded_by_it():
    nan = torch.nan
    heads = [(torch.tensor([0.5, 0.5]), torch.tensor([1.0, 1.0])), (torch.tensor([nan, 1.0]), torch.tensor([nan, 1.0]))]
    first, second = grading.log_odds(NUMBERS, heads, WORDS)
    assert first == grading.log_odds(NUMBERS, heads[:1], WORDS)[0]
    assert second == 1 + 2 * 0.5 + 3 + 4 + 5 + 6 * 1 + 7 * 0.75 + 8 * 0.5


def test_probabilities():
    assert grading.probability(0.0) == 0.5
    assert math.isclose(grading.probability(2.0), 1 / (1 + math.exp(-2)))
    assert math.isclose(grading.probability(-2.0), 1 / (1 + math.exp(2)))
    assert (grading.probability(1e6), grading.probability(-1e6)) == (1.0, 0.0)


def test_lengths_have_the_bits_that_a_row_has_alone():
    x = torch.randn(70, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    together = grading.direction_length(x)
    torch.testing.assert_close(together, x.square().mean((1, 2, 3)).sqrt())
    for given in (x, x.to(memory_format=torch.channels_last)):
        alone = torch.cat([grading.direction_length(row[None]) for row in given])
        assert torch.equal(alone, together)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([1.0], r"grading is \[1.0\]; expected lists of numbers by evaluations, 1 and 2"),
        ({"1": NUMBERS["1"]}, "by evaluations, 1 and 2"),
        ({**NUMBERS, "2": [1.0]}, r"grading\['2'\] is \[1.0\]; expected 8 numbers"),
        ({**NUMBERS, "1": [1.0, "2", 3.0, 4.0, 5.0, 6.0]}, r"grading\['1'\] has '2'; expected finite numbers"),
        ({**NUMBERS, "1": [1.0, math.nan, 3.0, 4.0, 5.0, 6.0]}, r"grading\['1'\] has nan; expected finite numbers"),
    ],
)
def test_what_is_no_grading(given, said):
    with pytest.raises(ValueError, match=said):
        grading.check_grading(given, 1e6)


def test_numbers_become_floats():
    found = grading.check_grading(NUMBERS, 1e6)
    assert found == NUMBERS
    assert all(type(number) is float for numbers in found.values() for number in numbers)
