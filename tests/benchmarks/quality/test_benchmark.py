from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks.quality import benchmark as quality
from coalescer_fast.training.flow_matching import FlowMatchingUNet

from ...helpers.evaluation import UNET, classifier, pipeline_for, tiny_data


def tiny_flow() -> FlowMatchingUNet:
    torch.manual_seed(1)
    flow = FlowMatchingUNet(**UNET).eval()
    nn.init.normal_(flow.anchor_mlp.linear_out.weight)
    return flow


@pytest.fixture(scope="module")
def rows() -> list[quality.Row]:
    data = tiny_data()
    return list(quality.compare(pipeline_for(data), data, (1, 2), tiny_flow(), progress=False, classifier=classifier()))


def test_a_row_for_every_sampler_guidance_and_step_count(rows):
    seen = [(row["sampler"], row["guidance_scale"], row["steps"], row["nfe"]) for row in rows]
    assert seen == [
        ("coalescer", 1.0, 1, 1),
        ("coalescer", 1.0, 2, 2),
        ("coalescer", 1.5, 1, 2),
        ("coalescer", 1.5, 2, 3),
        ("flow matching", 1.0, 1, 1),
        ("flow matching", 1.0, 2, 2),
        ("flow matching", 1.5, 1, 2),
        ("flow matching", 1.5, 2, 4),
    ]
    assert all(row["torch"] == torch.__version__ and row["prompts"] == "all" for row in rows)
    assert len({row["fd_name"] for row in rows}) == 8
    assert len({row["fd_floor_real"] for row in rows}) == 1
    assert "distance_r2" in rows[0]
    assert "distance_r2" not in rows[-1]


def test_all_steps_guided_and_no_guidance():
    data = tiny_data()
    pipe = pipeline_for(data, guidance_scale=1.0)
    assert [labels["nfe"] for labels, *_ in quality.samplers(pipe, None, (2, 4))] == [2, 4]
    pipe.scheduler.register_to_config(guidance_scale=2.0, guided_steps="all")
    assert [labels["nfe"] for labels, *_ in quality.samplers(pipe, None, (2, 4))] == [2, 4, 4, 8]


def test_the_counted_evaluations_are_those_that_run():
    data = tiny_data()
    pipe, flow = pipeline_for(data), tiny_flow()
    count = 0

    def counting(features):
        def run(sample, conditioning):
            nonlocal count
            count += 1
            return features(sample, conditioning)

        return run

    for network in (pipe.unet, flow):
        network.features = counting(network.features)
    with quality.quiet(pipe):
        for labels, sample, _ in quality.samplers(pipe, flow, (1, 2, 4)):
            count = 0
            sample(["cat", "rice"], torch.randn(2, 12, 4, 4))
            assert count == labels["nfe"], labels


def test_the_baseline_gets_the_pipelines_own_styles():
    data = tiny_data()
    pipe, prompts, heard = pipeline_for(data), ["cat", "dog, noto style", "", "rice"] * 8, []
    noise = torch.randn(len(prompts), 12, 4, 4, generator=torch.Generator().manual_seed(0))
    encode = pipe.description_encoder.forward
    pipe.description_encoder.forward = lambda texts: heard.append(list(texts)) or encode(texts)
    pipe.description_encoder.styles_of = lambda text: ["3d", "flat", "noto"]  # the real one asks the encoder, too
    with quality.quiet(pipe):
        pipe(prompts, latents=noise, guidance_scale=1.0, output_type="latent")
        quality.flow_matching_sampler(pipe, tiny_flow(), 1, 1.5)(prompts, noise)
    assert heard[0] == heard[1]
    assert len(set(heard[0][::4])) == 3


def test_csv_holds_every_row_and_column(rows, tmp_path):
    path = tmp_path / "quality.csv"
    quality.write(path, rows)
    back = quality.read(path)
    assert len(back) == len(rows)
    for row, text in zip(rows, back):
        for key, value in row.items():
            assert text[key] == value if isinstance(value, str) else float(text[key]) == pytest.approx(value, rel=1e-5)
    assert back[-1]["distance_r2"] == ""


def test_plot_is_drawn_from_the_csv_alone(rows, tmp_path):
    table, picture = tmp_path / "quality.csv", tmp_path / "quality.png"
    quality.write(table, rows)
    quality.main(["--plot-only", "--csv", str(table), "--plot", str(picture)])
    first = np.asarray(Image.open(picture))
    assert first.shape[0] > 300
    assert first.std() > 5
    quality.write(table, [{**row, "fd_name": row["fd_name"] * 3} for row in rows])
    quality.main(["--plot-only", "--csv", str(table), "--plot", str(picture)])
    assert not np.array_equal(first, np.asarray(Image.open(picture)))


def test_a_table_without_rows_cannot_be_drawn(tmp_path):
    (tmp_path / "empty.csv").write_text("sampler,steps\n")
    with pytest.raises(ValueError, match="no row"):
        quality.draw(quality.read(tmp_path / "empty.csv"), tmp_path / "out.png")


def test_command_line(tmp_path, monkeypatch):
    data = tiny_data()
    pipeline_for(data).save_pretrained(tmp_path / "pipeline")
    tiny_flow().save_pretrained(tmp_path / "flow")
    emoji = [{"name": c.name, "keywords": c.keywords, "group": c.group, "subgroup": c.subgroup} for c in data.concepts]
    meta = json.dumps({"emoji": emoji, "styles": [{"word": word} for word in data.styles]}).encode()
    arrays = {"images": data.images, "emoji_id": data.concept, "style_id": data.style, "split": data.held_out}
    np.savez(tmp_path / "data.npz", meta_json=np.frombuffer(meta, np.uint8), **arrays)
    out, picture = tmp_path / "results" / "quality.csv", tmp_path / "quality.png"
    argv = ["--data", tmp_path / "data.npz", "--model", tmp_path / "pipeline", "--flow-matching", tmp_path / "flow"]
    argv += ["--steps", "1", "--quick", "--csv", out, "--plot", picture]
    monkeypatch.setattr(quality, "QUICK_LIMIT", 2)
    quality.main([str(part) for part in argv])
    back = quality.read(out)
    assert [row["sampler"] for row in back] == ["coalescer"] * 2 + ["flow matching"] * 2
    assert {row["prompts"] for row in back} == {"2"}
    assert picture.stat().st_size > 1000


def test_what_is_missing_is_said(capsys):
    for argv, words in (
        ([], "--data is missing"),
        (["--plot-only"], "--plot FILE.png"),
        (["--data", "x", "--steps", "0"], "whole number"),
    ):
        with pytest.raises(SystemExit):
            quality.main(argv)
        assert words in capsys.readouterr().err
