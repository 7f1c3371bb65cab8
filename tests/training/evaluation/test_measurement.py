from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from coalescer_fast.pipeline import TraceStep
from coalescer_fast.training.data import Concept, PictureDataset
from coalescer_fast.training.evaluation import RealPictures, frechet_distance, measure, read_wordings
from coalescer_fast.training.evaluation.real_pictures import seeded

from ...helpers.evaluation import STYLES, classifier, tiny_data


class Lossless(nn.Module):
    """An autoencoder that only moves pixels about."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))

    def encode(self, pictures: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(latents=F.pixel_unshuffle(pictures, 4))

    def decode(self, latents: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=F.pixel_shuffle(latents, 4))


@pytest.fixture(scope="module")
def real() -> RealPictures:
    return RealPictures(tiny_data(), Lossless(), classifier(), progress=False)


def oracle(real: RealPictures, error: float = 0.0) -> Callable[[list[str], torch.Tensor], torch.Tensor]:
    """Answers with a fitting real latent, or one in the same group if it cannot know, off by error * noise."""
    data = real.training

    def sample(prompts: list[str], noise: torch.Tensor) -> torch.Tensor:
        out = []
        for prompt, z in zip(prompts, noise):
            name, *rest = prompt.split(", ")
            (concept,) = (c for c in data.concepts if c.name == name or name in c.keywords)
            known = {c for c in data.concepts if c.name in {data.concepts[i].name for i in data.concept}}
            fits = [
                i
                for i, (c, s) in enumerate(zip(data.concept, data.style))
                if data.concepts[c] == concept or (concept not in known and data.concepts[c].group == concept.group)
                if not rest or "style" not in rest[0] or rest[0] == f"{STYLES[s]} style"
            ]
            out.append(real.latents[fits[int(z.sum().abs() * 1000) % len(fits)]].view(z.shape) + error * z)
        return torch.stack(out)

    return sample


def test_leave_one_out_distances_skip_the_picture_itself(real):
    everything = torch.cdist(real.latents, real.latents).fill_diagonal_(torch.inf)
    torch.testing.assert_close(real.leave_one_out, everything.min(1).values)


def test_prompts(real):
    concepts, asked = real.training.concepts, real.prompts
    assert [concepts[c].name for c in asked.names] == ["cat", "dog", "pizza", "bread", "horse", "cake"]
    assert [c for c, _ in asked.keywords] == asked.names
    assert all(len(set(prompt.split(", ")) & set(concepts[c].keywords)) == 3 for c, prompt in asked.keywords)
    assert sorted(asked.described) == list(range(24))
    assert [concepts[c].name for c in asked.held_out] == ["tiger"] * 5 + ["rice"] * 5
    assert asked.variety == asked.names


def test_an_oracle_scores_what_is_known(real):
    def first_step(prompts, noise):
        target = oracle(real)(prompts, noise)
        offset = (target - noise).square().mean((1, 2, 3)).sqrt()
        return TraceStep(
            noise, offset, -noise.square().mean((1, 2, 3))
        )  # the longer the noise, the larger the oracle's error

    with tqdm(disable=True, total=real.prompts.count) as bar:
        drawn = []
        sampler = oracle(real, error=1e-3)
        row = measure(lambda p, z: drawn.append(len(p)) or sampler(p, z), real, first_step=first_step, bar=bar)
    retrieval = (
        "name_top1",
        "name_top10",
        "name_top1_pixels",
        "name_style_top1",
        "keyword_top1",
        "keyword_top10",
        "held_out_group",
    )
    assert {key: row[key] for key in retrieval} == dict.fromkeys(retrieval, 1.0)
    assert row["below_q5"] == 1
    assert row["held_out_group_chance"] == 0.5
    assert row["nearest_train_ratio"] < 0.01
    assert row["styles_real"] == 4
    assert 2 < row["styles_hit"] <= 4  # 8 draws of 4 styles miss some
    assert row["direction_length_spearman"] == pytest.approx(1)
    assert row["distance_r2"] == pytest.approx(1)
    assert row["seconds_per_picture"] > 0
    assert row["fd_name_style"] == pytest.approx(0, abs=1e-3)
    assert 0.5 < row["coverage"] <= 1  # many pictures are drawn
    assert row["density"] == pytest.approx(1, abs=0.3)
    assert sum(drawn) == real.prompts.count + 4 * 6  # and the timed batches


def test_samples_at_a_time_and_what_decodes_them(real):
    drawn, decoded = [], []
    sampler = oracle(real, error=1e-3)
    row = measure(
        lambda p, z: drawn.append(len(p)) or sampler(p, z),
        real,
        decode=lambda z: decoded.append(len(z)) or real.decode(-z),
        most=7,
    )
    assert max(drawn) == 7
    assert len(real.prompts.names) in decoded
    plain = measure(sampler, real)
    assert row["name_top1"] == plain["name_top1"] == 1  # of latents
    assert row["name_top1_pixels"] < plain["name_top1_pixels"]
    assert row["fd_name"] > plain["fd_name"]


def test_floors_of_a_lossless_autoencoder(real):
    assert real.floors["psnr_autoencoder_held_out"] == real.floors["psnr_autoencoder_train"] > 99
    order = torch.randperm(24, generator=seeded(0))
    half, others = real.features[order[:12]], real.features[order[12:]]
    assert real.floors["fd_floor_autoencoder"] == pytest.approx(frechet_distance(half, real.features), rel=1e-3)
    assert real.floors["fd_floor_real"] == frechet_distance(half, others)


def test_a_sampler_that_knows_one_picture(real):
    row = measure(lambda prompts, noise: real.latents[:1].view(1, *real.shape).expand(len(prompts), -1, -1, -1), real)
    assert row["name_top1"] == pytest.approx(1 / 6)
    assert row["name_style_top1"] == pytest.approx(4 / 24)
    assert row["held_out_group"] == 0.5
    assert row["styles_hit"] == 1
    assert row["nearest_train_ratio"] == pytest.approx(0, abs=1e-6)
    assert "distance_r2" not in row  # nobody said what its heads are


def test_columns_without_anything_behind_them_are_left_out():
    data = tiny_data()
    plain = tuple(Concept(c.name) for c in data.concepts)
    data = PictureDataset(data.images, plain, data.concept)
    real = RealPictures(data, Lossless(), classifier(), progress=False)
    row = measure(lambda prompts, noise: noise, real)
    assert set(row) == {
        *(
            "name_top1",
            "name_top10",
            "name_top1_pixels",
            "fd_name",
            "density",
            "coverage",
            "nearest_train_ratio",
            "below_q5",
            "seconds_per_picture",
        )
    }
    assert set(real.floors) == {"fd_floor_real", "fd_floor_autoencoder", "psnr_autoencoder_train"}


def test_a_limit_shortens_every_list_of_prompts():
    real = RealPictures(tiny_data(), Lossless(), classifier(), limit=3, progress=False)
    asked = real.prompts
    lists = asked.names, asked.keywords, asked.described, asked.variety
    assert [len(x) for x in lists] == [3] * 4
    assert real.prompts.count == 3 + 3 + 3 + 3 + 2 * 5 + 3 * 8


def test_nothing_to_measure_against_is_said():
    data = tiny_data().take(np.arange(24, 32))
    with pytest.raises(ValueError, match="0 training pictures"):
        RealPictures(data, Lossless(), classifier(), progress=False)


def test_free_wordings():
    """Accepted is the nearest training picture's name; every wording is asked for three times."""
    wordings = {"kitten": ["cat", "unheard of"], "meal": ["pizza", "bread"], "pony": ["dog"]}
    real = RealPictures(tiny_data(), Lossless(), classifier(), progress=False, wordings=wordings)
    shown = {"kitten": "cat", "meal": "bread", "pony": "horse"}
    asked = []

    def sample(prompts, noise):
        asked.extend(p for p in prompts if p in shown)
        return oracle(real)([shown.get(p, p) for p in prompts], noise)

    assert measure(sample, real)["free_wording"] == pytest.approx(2 / 3)
    assert asked == [wording for wording in wordings for _ in range(3)]
    with pytest.raises(ValueError, match="no training picture has a name that is accepted for 'pup'"):
        RealPictures(tiny_data(), Lossless(), classifier(), progress=False, wordings={"pup": ["tiger"]})  # held out


@pytest.mark.parametrize("text", ['["a"]', '{"a": "b"}', '{"a": [1]}', "{", '{"a": ' + "[" * 5000])
def test_a_file_without_wordings(tmp_path, text):
    (tmp_path / "wordings.json").write_text(text)
    with pytest.raises(ValueError, match=r"wordings\.json holds no wordings .*; expected JSON"):
        read_wordings(tmp_path / "wordings.json")
