from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from coalescer_fast.models import CoalescerAutoencoder, CoalescerUNet
from coalescer_fast.pipeline import CoalescerPipeline, TraceStep
from coalescer_fast.scheduler import CoalescerScheduler
from coalescer_fast.training import evaluation
from coalescer_fast.training.classifier import PictureClassifier
from coalescer_fast.training.coalescer import description_encoder
from coalescer_fast.training.data import Concept, PictureDataset
from coalescer_fast.training.evaluation import RealPictures, evaluate, exclusions, frechet_distance, measure, seeded

STYLES = ("3d", "flat", "noto", "blob")
UNET = dict(
    sample_size=4,
    latent_channels=12,
    block_out_channels=(16, 16),
    norm_num_groups=4,
    attention_levels=(),
    mid_attention=False,
    description_dim=128,
    embedding_dim=16,
    anchor="mlp",
    anchor_hidden_dim=16,
)


def tiny_data() -> PictureDataset:
    """Eight concepts of two groups in four styles, 16x16 noise; the last two concepts are held out."""
    words = ("cat", "dog", "pizza", "bread", "horse", "cake", "tiger", "rice")
    groups = ("animals", "animals", "food", "food", "animals", "food", "animals", "food")
    concepts = tuple(
        Concept(word, tuple(f"{word} {part}" for part in "abc"), group) for word, group in zip(words, groups)
    )
    images = np.random.default_rng(0).integers(0, 256, (32, 16, 16, 3)).astype(np.uint8)
    concept, style = np.divmod(np.arange(32), 4)
    return PictureDataset(images, concepts, concept, STYLES, style, held_out=concept >= 6)


def tiny_pipeline(data: PictureDataset, guidance_scale: float = 1.5) -> CoalescerPipeline:
    """An untrained pipeline that knows the training names and styles of ``data``."""
    torch.manual_seed(0)
    unet = CoalescerUNet(**UNET).eval()
    nn.init.normal_(unet.anchor_mlp.linear_out.weight)
    vae = CoalescerAutoencoder(2, 12, 8, (1, 1), (1, 1)).eval()
    return CoalescerPipeline(
        unet, CoalescerScheduler(guidance_scale=guidance_scale), description_encoder(data.train()), vae
    )


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


def classifier() -> PictureClassifier:
    torch.manual_seed(0)
    return PictureClassifier(size=16, num_features=4).eval()


@pytest.fixture(scope="module")
def real() -> RealPictures:
    return RealPictures(tiny_data(), Lossless(), classifier(), progress=False)


def oracle(real: RealPictures, error: float = 0.0) -> Callable[[list[str], torch.Tensor], torch.Tensor]:
    """A sampler that answers with a fitting real latent (one in the same group, for what it cannot know), off by error * noise."""
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


def test_frechet_distance_agrees_with_scipy():
    torch.manual_seed(0)
    a = torch.randn(300, 8) @ torch.randn(8, 8)
    b = torch.randn(200, 8) @ torch.randn(8, 8) + 1
    mean = [x.double().mean(0).numpy() for x in (a, b)]
    cov = [np.cov(x.double().numpy().T) for x in (a, b)]
    expected = np.square(mean[0] - mean[1]).sum() + np.trace(
        cov[0] + cov[1] - 2 * scipy.linalg.sqrtm(cov[0] @ cov[1]).real
    )
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_known_normal_distributions():
    torch.manual_seed(0)
    a = torch.randn(500, 3, dtype=torch.float64)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + torch.tensor([3.0, 0, 4])) == pytest.approx(25)
    # a doubled standard deviation, about the origin: tr(A + 4A - 2 * 2A) = tr(A)
    a -= a.mean(0)
    assert frechet_distance(a, 2 * a) == pytest.approx(float(torch.cov(a.T).trace()))


def test_frechet_distance_of_fewer_samples_than_features_is_finite():
    assert frechet_distance(torch.randn(5, 64), torch.randn(500, 64)) > 0


def test_nearest_and_hits():
    references = torch.tensor([[0.0, 0], [1, 0], [5, 0], [5, 1]])
    queries = torch.tensor([[0.9, 0], [5, 0.8]])
    distance, index = evaluation.nearest(queries, references, 3)
    assert index.tolist() == [[1, 0, 2], [3, 2, 1]]
    torch.testing.assert_close(distance[:, 0], torch.tensor([0.1, 0.2]))
    labels = torch.tensor([7, 8, 9, 9])
    assert evaluation.hits(labels[index], torch.tensor([7, 9])) == (0.5, 1.0)
    assert evaluation.nearest(queries, references, 10)[1].shape == (2, 4)


def test_chance_is_the_expected_hit_of_a_random_picture():
    labels, wanted = np.array(["a"] * 6 + ["b"] * 3 + ["c"]), np.array(["a", "b", "b", "z"])
    every_pair = np.mean([x == y for x in labels for y in wanted])
    assert evaluation.chance(labels, wanted) == pytest.approx(every_pair) == pytest.approx(0.3)


def test_spearman_and_r_squared():
    rng = np.random.default_rng(0)
    a, b = torch.from_numpy(rng.normal(size=(2, 50)))
    assert evaluation.spearman(a, a + b) == pytest.approx(scipy.stats.spearmanr(a, a + b).statistic)
    assert evaluation.spearman(a, a.exp()) == pytest.approx(1)
    assert evaluation.r_squared(a, a) == 1
    assert evaluation.r_squared(a.mean().expand(50), a) == pytest.approx(0)
    assert evaluation.r_squared(-a, a) < 0


def test_leave_one_out_distances_skip_the_picture_itself(real):
    everything = torch.cdist(real.latents, real.latents).fill_diagonal_(torch.inf)
    torch.testing.assert_close(real.leave_one_out, everything.min(1).values)


def test_prompts(real):
    concepts = real.training.concepts
    assert [concepts[c].name for c in real.names] == ["cat", "dog", "pizza", "bread", "horse", "cake"]
    assert [c for c, _ in real.keywords] == real.names
    assert all(len(set(prompt.split(", ")) & set(concepts[c].keywords)) == 3 for c, prompt in real.keywords)
    assert sorted(real.described) == list(range(24))
    assert [concepts[c].name for c in real.held_out] == ["tiger"] * 5 + ["rice"] * 5
    assert real.variety == real.names


def test_an_oracle_scores_what_is_known(real):
    def first_step(prompts, noise):
        target = oracle(real)(prompts, noise)
        offset = (target - noise).square().mean((1, 2, 3)).sqrt()
        return TraceStep(
            noise, offset, -noise.square().mean((1, 2, 3))
        )  # the longer the noise, the larger the oracle's error

    with tqdm(disable=True, total=real.num_samples) as bar:
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
    assert sum(drawn) == real.num_samples + 4 * 6  # and the timed batches


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
    assert len(real.names) in decoded
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
            "nearest_train_ratio",
            "below_q5",
            "seconds_per_picture",
        )
    }
    assert set(real.floors) == {"fd_floor_real", "fd_floor_autoencoder", "psnr_autoencoder_train"}


def test_a_limit_shortens_every_list_of_prompts():
    real = RealPictures(tiny_data(), Lossless(), classifier(), limit=3, progress=False)
    lists = real.names, real.keywords, real.described, real.variety
    assert [len(x) for x in lists] == [3] * 4
    assert real.num_samples == 3 + 3 + 3 + 3 + 2 * 5 + 3 * 8


def test_nothing_to_measure_against_is_said():
    data = tiny_data().take(np.arange(24, 32))
    with pytest.raises(ValueError, match="0 training pictures"):
        RealPictures(data, Lossless(), classifier(), progress=False)


def test_evaluate_gives_a_row_a_step_count_and_repeats(capsys):
    data = tiny_data()
    pipe = tiny_pipeline(data)
    pipe.set_progress_bar_config(desc="mine")
    rows = evaluate(pipe, data, steps=(1, 2), progress=False, classifier=classifier())
    again = evaluate(pipe, data, steps=(1, 2), progress=False, classifier=classifier())
    assert [(row["steps"], row["guidance_scale"]) for row in rows] == [(1, 1.5), (2, 1.5)]
    assert len(rows[0]) == 24
    assert all(np.isfinite(value) for row in rows for value in row.values())
    for row in rows + again:
        del row["seconds_per_picture"]
    assert rows == again
    # the first step is that of the same noise and descriptions, whatever follows
    assert rows[0]["distance_r2"] == rows[1]["distance_r2"]
    other = evaluate(pipe, data, steps=(2,), guidance_scale=1.0, seed=1, progress=False, classifier=classifier())[0]
    assert other["guidance_scale"] == 1.0
    assert other["fd_name"] != rows[1]["fd_name"]
    assert pipe._progress_bar_config == {"desc": "mine"}
    assert capsys.readouterr() == ("", "")


def test_the_first_step_is_the_pipelines():
    data = tiny_data()
    pipe = tiny_pipeline(data)
    noise = torch.randn(2, 12, 4, 4, generator=torch.Generator().manual_seed(0))
    with evaluation.quiet(pipe):
        step = evaluation.first_step_of(pipe)(["cat, 3d style", "rice"], noise)
        trace = pipe(
            ["cat, 3d style", "rice"], latents=noise, num_inference_steps=3, return_trace=True, output_type="latent"
        ).trace
    assert torch.equal(step.distance, trace[0].distance)
    assert torch.equal(step.direction_length, trace[0].direction_length)


def test_exclusions_are_those_that_leave_only_names_the_model_knows(caplog):
    data = tiny_data()
    flag = Concept("flag: Togo", (), "flags", "country-flag")
    more = PictureDataset(
        data.images,
        (*data.concepts[:3], flag, *data.concepts[4:]),
        data.concept,
        data.styles,
        data.style,
        data.held_out,
    )
    knows_all = description_encoder(more.train())
    knows_no_flags = description_encoder(more.without(groups=("flags",)).train())
    assert exclusions(knows_all, more) == {}
    assert "flags" in exclusions(knows_no_flags, more)["groups"]
    assert not caplog.records
    assert exclusions(description_encoder(data.take(np.arange(4))), data) == {}
    assert "does not know by name" in caplog.text
    plain = PictureDataset(data.images, data.concepts, data.concept)
    assert exclusions(description_encoder(plain), plain) == {}  # nothing is known of what it knows
