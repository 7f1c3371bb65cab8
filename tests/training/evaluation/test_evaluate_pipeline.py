from __future__ import annotations

import numpy as np
import torch

from coalescer_fast.training.coalescer import description_encoder
from coalescer_fast.training.data import Concept, PictureDataset
from coalescer_fast.training.evaluation import evaluate, exclusions, first_step_of, quiet

from ...helpers.evaluation import classifier, pipeline_for, tiny_data


def test_evaluate_gives_a_row_a_step_count_and_repeats(capsys):
    data = tiny_data()
    pipe = pipeline_for(data)
    pipe.set_progress_bar_config(desc="mine")
    rows = evaluate(pipe, data, steps=(1, 2), progress=False, classifier=classifier())
    again = evaluate(pipe, data, steps=(1, 2), progress=False, classifier=classifier())
    assert [(row["steps"], row["guidance_scale"]) for row in rows] == [(1, 1.5), (2, 1.5)]
    assert len(rows[0]) == 26
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
    pipe = pipeline_for(data)
    noise = torch.randn(2, 12, 4, 4, generator=torch.Generator().manual_seed(0))
    with quiet(pipe):
        step = first_step_of(pipe)(["cat, 3d style", "rice"], noise)
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
