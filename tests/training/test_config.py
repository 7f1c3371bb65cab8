from __future__ import annotations

import pytest

from coalescer_fast.training.autoencoder import AutoencoderConfig
from coalescer_fast.training.coalescer import CoalescerConfig
from coalescer_fast.training.config import CONFIGS, changed, find, read, run

SCHEDULE = "[schedule]\nsteps = 10\nbatch_size = 4\nlearning_rate = 1e-3\n"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda p: p.stem)
def test_committed_configurations(path):
    kind = AutoencoderConfig if path.stem.endswith(("autoencoder", "decoder")) else CoalescerConfig
    assert read(path, kind) == read(path.stem, kind)


def test_values_and_nesting(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text(
        'autoencoder = "ae"\nsheet = ["owl"]\npairing = "nearest"\n[prompts]\nempty = 0.5\nqueue_size = 1024\n'
        "[schedule]\nsteps = 10\nbatch_size = 4\nlearning_rate = 1e-3\ncheckpoint_every = 256\n"
        "[anchor]\nsteps = 3\nbatch_size = 2\nlearning_rate = 1.0\n[without]\ngroups = ['flags']\n"
    )
    config = read(file, CoalescerConfig)
    assert (config.pairing, config.sheet, config.prompts.empty, config.anchor.steps) == ("nearest", ("owl",), 0.5, 3)
    assert config.without == {"groups": ["flags"]}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("latent_nose = 1.0\n" + SCHEDULE, ("unknown key latent_nose", "latent_noise")),
        (SCHEDULE + "step = 3\n", ("unknown key schedule.step", "steps")),
        ("latent_noise = 0.1\n", ("key schedule is missing",)),
        ("[schedule]\nsteps = 10\nbatch_size = 4\n", ("key schedule.learning_rate is missing",)),
        ("latent_noise = \n", ("c.toml",)),
    ],
)
def test_mistakes(tmp_path, text, words):
    file = tmp_path / "c.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"c\.toml") as caught:
        read(file, AutoencoderConfig)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('pairing = "farthest"\n', ("'farthest'", "output_transport")),
        ('objective = "diffusion"\n', ("'diffusion'", "coalescer")),
        ("[prompts]\nqueue_size = 2\n", ("queue_size",)),
        ("[prompts]\nqueue_size = 28\n", ("checkpoint_every is 512", "multiple of the 7 steps")),
    ],
)
def test_mistakes_of_a_coalescer(tmp_path, text, words):
    file = tmp_path / "c.toml"
    file.write_text('autoencoder = "ae"\n' + text + SCHEDULE)
    with pytest.raises(ValueError, match=r"c\.toml") as caught:
        read(file, CoalescerConfig)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("schedule = 3\n", ("schedule",)),
        ("prompts = 3\n" + SCHEDULE, ("prompts",)),
        ('direction_loss = "huber"\n' + SCHEDULE, ("'huber'", "sqrt")),
        ('model = "xl"\n' + SCHEDULE, ("'xl'", "emoji-64")),
        (SCHEDULE.replace("batch_size = 4", "batch_size = 0"), ("batch_size", "0")),
        (SCHEDULE + "[anchor]\nsteps = 10\nbatch_size = 4096\nlearning_rate = 1e-3\n", ("anchor", "4096")),
    ],
    ids=[
        "schedule is no table",
        "prompts is no table",
        "direction loss",
        "model",
        "empty batch",
        "batch larger than the queue",
    ],
)
def test_values_that_no_training_can_use(tmp_path, text, words):
    """Found on reading, not after the minutes that the pictures' encoding and the anchor take."""
    file = tmp_path / "c.toml"
    file.write_text('autoencoder = "ae"\n' + text)
    with pytest.raises(ValueError, match=r"c\.toml") as caught:
        read(file, CoalescerConfig)
    for word in words:
        assert word in str(caught.value)


def test_find(tmp_path):
    assert find("emoji-64") == CONFIGS / "emoji-64.toml"
    known = "digits, digits-teacher, emoji-64"
    with pytest.raises(FileNotFoundError, match=f"no configuration nothing: give a TOML file, or {known}"):
        find("nothing")


def test_unknown_training(tmp_path):
    with pytest.raises(ValueError, match="no training of a decoder"):
        run("decoder", "emoji-64", "digits", tmp_path)


def test_size_is_of_a_folder(tmp_path):
    with pytest.raises(ValueError, match="size is of a folder of pictures, and digits has its own: leave --size out"):
        run("coalescer", "digits", "digits", tmp_path, size=32)


def test_changes_to_a_configuration():
    changes = ["objective=mean_flow", "seed=1", "schedule.steps=512", "sheet=['owl', 'cat']"]
    config = read("emoji-64-rivals", CoalescerConfig, changes)
    plain = read("emoji-64-rivals", CoalescerConfig)
    assert (config.objective, config.seed, config.schedule.steps, config.sheet) == ("mean_flow", 1, 512, ("owl", "cat"))
    assert (plain.objective, plain.seed, plain.schedule.steps, plain.sheet) == ("coalescer", 0, 3328, ())
    assert config.schedule.batch_size == plain.schedule.batch_size
    assert read("emoji-64-rivals", CoalescerConfig, ["teacher.steps=4"]).teacher.steps == 4
    assert changed({}, ["a=1.5", "b=x y", "c=true", "d.e=2", "d.f==", 'g="1"']) == {
        "a": 1.5,
        "b": "x y",
        "c": True,
        "d": {"e": 2, "f": "="},
        "g": "1",
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("seed", "a change is 'seed'; expected key=value"),
        ("=1", "expected key=value"),
        ("schedule..steps=1", "expected key=value"),
        ("seeds=1", "unknown key seeds"),
        ("seed=x", "seed is 'x'; expected a whole number"),
        ("seed.x=1", "seed is {'x': 1}; expected a whole number"),
        ("objective=diffusion", "objective is 'diffusion'; use one of coalescer, flow_matching"),
    ],
)
def test_mistaken_changes(change, words):
    with pytest.raises(ValueError, match=r"emoji-64-rivals\.toml: ") as caught:
        read("emoji-64-rivals", CoalescerConfig, [change])
    assert words in str(caught.value)
