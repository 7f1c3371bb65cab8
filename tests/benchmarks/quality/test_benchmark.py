from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks.harness.results import as_text
from benchmarks.quality import benchmark as quality
from benchmarks.quality import plot
from coalescer_fast import CoalescerPipeline
from coalescer_fast.training.checkpoint import Checkpoint, flat
from coalescer_fast.training.coalescer import OBJECTIVES
from coalescer_fast.training.evaluation import read_wordings
from coalescer_fast.training.rivals import RIVALS, TimeConditionedUNet

from ...helpers.evaluation import UNET, classifier, pipeline_for, tiny_data

WORDINGS = {"puppy": ("dog", "no such name"), "pie": ("pizza", "cake")}


def tiny_rival() -> TimeConditionedUNet:
    torch.manual_seed(1)
    network = TimeConditionedUNet(**UNET).eval()
    nn.init.normal_(network.anchor_mlp.linear_out.weight)
    return network


def methods(pipe: CoalescerPipeline, *names: str) -> list[quality.Method]:
    labels = {"seed": 3, "training_steps": 16}
    rivals = [quality.Method({"method": name, **labels}, tiny_rival()) for name in names]
    return [quality.Method({"method": "coalescer", **labels}, pipe), *rivals]


@pytest.fixture(scope="module")
def rows() -> list[quality.Row]:
    data = tiny_data()
    pipe = pipeline_for(data)
    measured = methods(pipe, "flow matching")
    options = {"progress": False, "classifier": classifier(), "wordings": WORDINGS}
    return list(quality.compare(pipe, data, (1, 2), measured, **options))


def test_a_row_for_every_method_guidance_and_step_count(rows):
    seen = [(row["method"], row["guidance_scale"], row["steps"], row["evaluations"]) for row in rows]
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
    assert all((row["seed"], row["training_steps"]) == (3, 16) for row in rows)
    assert all(row["torch"] == torch.__version__ and row["prompts"] == "all" for row in rows)
    assert len({row["fd_name"] for row in rows}) == 8
    assert len({row["fd_floor_real"] for row in rows}) == 1
    assert all(0 <= row["coverage"] <= 1 for row in rows)
    assert all(row["free_wording"] * 6 == round(row["free_wording"] * 6) for row in rows)  # two wordings, three seeds
    assert "distance_r2" in rows[0]
    assert "distance_r2" not in rows[-1]


def test_a_brief_run_has_the_same_figures_and_fewer(rows):
    data = tiny_data()
    pipe = pipeline_for(data)
    options = {"progress": False, "classifier": classifier(), "wordings": WORDINGS, "brief": True}
    [brief] = quality.compare(pipe, data, (2,), methods(pipe), guidance_scales=(1.0,), **options)
    assert {"name_top1", "free_wording", "below_q5", "coverage", "density", "fd_name"} <= brief.keys()
    assert not {"fd_name_style", "keyword_top1", "held_out_group", "distance_r2"} & brief.keys()
    assert {**brief, "seconds_per_picture": 0} == {name: rows[1][name] for name in brief} | {"seconds_per_picture": 0}


def test_all_steps_guided_and_no_guidance():
    [method] = methods(pipe := pipeline_for(tiny_data(), guidance_scale=1.0))
    assert [labels["evaluations"] for labels, *_ in quality.samplers(pipe, method, (2, 4))] == [2, 4]
    pipe.scheduler.register_to_config(guidance_scale=2.0, guided_steps="all")
    assert [labels["evaluations"] for labels, *_ in quality.samplers(pipe, method, (2, 4))] == [2, 4, 4, 8]


def test_other_guidance_scales():
    pipe = pipeline_for(tiny_data())
    for method in methods(pipe, "shortcut"):
        found = [
            (labels["guidance_scale"], labels["steps"])
            for labels, *_ in quality.samplers(pipe, method, (1, 2), (2,), (1.0, 1.7, 2.0))
        ]
        assert found == [(1.0, 1), (1.0, 2), (1.7, 2), (2.0, 2)]


def test_the_counted_evaluations_are_those_that_run():
    pipe = pipeline_for(tiny_data())
    count = 0

    def counting(features):
        def run(sample, conditioning):
            nonlocal count
            count += 1
            return features(sample, conditioning)

        return run

    measured = methods(pipe, *(name.replace("_", " ") for name in RIVALS))
    for method in measured:
        network = pipe.unet if method.sampler is pipe else method.sampler
        network.features = counting(network.features)
    with quality.quiet(pipe):
        for method in measured:
            for labels, sample, _ in quality.samplers(pipe, method, (1, 2, 4)):
                count = 0
                sample(["cat", "rice"], torch.randn(2, 12, 4, 4))
                assert count == labels["evaluations"], labels


def test_rivals_get_the_pipelines_own_styles():
    data = tiny_data()
    pipe, prompts, heard = pipeline_for(data), ["cat", "dog, noto style", "", "rice"] * 8, []
    noise = torch.randn(len(prompts), 12, 4, 4, generator=torch.Generator().manual_seed(0))
    encode = pipe.description_encoder.forward
    pipe.description_encoder.forward = lambda texts: heard.append(list(texts)) or encode(texts)
    pipe.description_encoder.styles_of = lambda text: ["3d", "flat", "noto"]  # the real one asks the encoder, too
    with quality.quiet(pipe):
        pipe(prompts, latents=noise, guidance_scale=1.0, output_type="latent")
        quality.rival_sampler(pipe, tiny_rival(), "mean flow", 1, 1.5)(prompts, noise)
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
    (tmp_path / "empty.csv").write_text("method,steps\n")
    with pytest.raises(ValueError, match="no row"):
        quality.draw(quality.read(tmp_path / "empty.csv"), tmp_path / "out.png")


def finished_training(folder, objective, sampler, seed=0, **settings):
    sampler.save_pretrained(folder / ("pipeline" if objective == "coalescer" else "unet"))
    settings = flat({"seed": seed, "schedule": {"steps": 32}, **settings})
    Checkpoint(32, 32, settings, {}, {}, {}).write(folder / f"{objective}.pt")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_a_training_was(objective, tmp_path):
    pipe = pipeline_for(tiny_data())
    finished_training(tmp_path, objective, pipe if objective == "coalescer" else tiny_rival(), seed=2)
    method = quality.open_training(tmp_path)
    assert method.labels == {"method": objective.replace("_", " "), "seed": 2, "training_steps": 32}
    assert len(list(quality.samplers(pipe, method, (1,), ()))) == 1


def test_a_training_with_a_teacher_has_another_name(tmp_path):
    finished_training(tmp_path, "coalescer", pipeline_for(tiny_data()), teacher={"steps": 3})
    assert quality.open_training(tmp_path).labels["method"] == "coalescer, teacher"


def test_a_folder_without_a_finished_training(tmp_path):
    with pytest.raises(ValueError, match="holds no training that has finished"):
        quality.open_training(tmp_path)
    Checkpoint(1, 1, {}, {}, {}, {}).write(tmp_path / "shortcut.pt")
    with pytest.raises(ValueError, match="holds no training that has finished"):
        quality.open_training(tmp_path)


def test_the_committed_wordings_fit_the_embedded_model():
    wordings = read_wordings(Path(quality.__file__).parent / "free_wordings.json")
    known = set(CoalescerPipeline.from_pretrained("emoji-64").description_encoder.known_names)
    assert len(wordings) == 24
    assert not known & set(wordings)
    assert all(set(names) & known for names in wordings.values())


def test_a_line_is_the_mean_of_its_trainings(rows):
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    others = [{**row, "seed": 4, "fd_name": row["fd_name"] + 2} for row in rows]
    plot.draw_panel(axis, as_text([*rows, *others]), "fd_name")
    coalescer = axis.get_lines()[0]
    wanted = [row["fd_name"] + 1 for row in rows[:2]]
    assert coalescer.get_label() == "coalescer, no guidance"
    assert list(coalescer.get_ydata()) == pytest.approx(wanted, rel=1e-4)
    assert list(coalescer.get_xdata()) == [1, 2]


def test_command_line(tmp_path, monkeypatch):
    data = tiny_data()
    finished_training(tmp_path / "coalescer", "coalescer", pipeline_for(data))
    finished_training(tmp_path / "shortcut", "shortcut", tiny_rival(), seed=1)
    (tmp_path / "wordings.json").write_text(json.dumps(WORDINGS))
    emoji = [{"name": c.name, "keywords": c.keywords, "group": c.group, "subgroup": c.subgroup} for c in data.concepts]
    meta = json.dumps({"emoji": emoji, "styles": [{"word": word} for word in data.styles]}).encode()
    arrays = {"images": data.images, "emoji_id": data.concept, "style_id": data.style, "split": data.held_out}
    np.savez(tmp_path / "data.npz", meta_json=np.frombuffer(meta, np.uint8), **arrays)
    out, picture = tmp_path / "results" / "quality.csv", tmp_path / "quality.png"
    argv = ["--data", tmp_path / "data.npz", "--model", tmp_path / "coalescer" / "pipeline", "--steps", "1", "--quick"]
    argv += ["--trainings", tmp_path / "coalescer", tmp_path / "shortcut", "--wordings", tmp_path / "wordings.json"]
    argv += ["--csv", out, "--plot", picture]
    monkeypatch.setattr(quality, "QUICK_LIMIT", 2)
    quality.main([str(part) for part in argv])
    back = quality.read(out)
    found = [(row["method"], row["seed"], row["training_steps"]) for row in back]
    assert found == [("coalescer", "0", "32")] * 2 + [("shortcut", "1", "32")] * 2
    assert all(row["free_wording"] for row in back)
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
