from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch

import coalescer_fast as cf
from coalescer_fast.runtime import artefact
from coalescer_fast.runtime.artefact import Manifest, Port, Schedule
from coalescer_fast.scheduler import CoalescerScheduler

COMMAND = ("onnx", "--model", "emoji-64", "--what", "generator")


def manifest(kind: str = "generator", **changes) -> Manifest:
    made = Manifest(
        kind=kind,
        engine="onnx",
        target="cpu",
        precision="fp32",
        recipe="all in float32",
        graph="model.onnx",
        model="emoji-64",
        weights={"unet": "1" * 64},
        inputs=(Port("noise", "float32", ("batch", 4, 2, 2)), Port("description", "float32", ("batch", 8))),
        outputs=(Port("picture", "float32", ("batch", 3, 8, 8)),),
        batch=(2, 4, 16),
        opset=18,
        command=COMMAND,
        schedule=Schedule((0.5, 1.0), ("raw", "unit"), 1e-6, (1,), 1.5),
        measured={"error": {"largest error": 1e-6}},
        packages={"torch": "2.13.0"},
    )
    return replace(made, **changes)


def make(folder, kind: str = "generator", **changes):
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(b"a graph, or so they say")
    (folder / "model.onnx.data").write_bytes(b"weights")
    return artefact.write(folder, manifest(kind, **changes))


def refused(folder, *words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(str(folder))) as caught:
        artefact.read(folder)
    message = str(caught.value)
    assert "\n" not in message
    for word in (*words, "coalescer-export", "--force"):
        assert word in message


def test_what_is_written_is_read(tmp_path):
    written = make(tmp_path / "a")
    found = artefact.read(tmp_path / "a")
    assert found == written
    assert found.manifest == replace(manifest(), files=found.manifest.files)
    assert list(found.manifest.files) == ["model.onnx", "model.onnx.data"]
    assert found.graph == tmp_path / "a" / "model.onnx"
    assert Manifest.from_json(found.manifest.to_json()) == found.manifest
    assert found.mend == f"build it again with: coalescer-export {' '.join(COMMAND)} -o {tmp_path / 'a'} --force"


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_a_file_that_is_not_as_it_was(tmp_path, name):
    folder = make(tmp_path / "a").folder
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1] + b"!")
    refused(folder, name, "was changed after it was written", *COMMAND)
    (folder / name).write_bytes(content[:-1])
    refused(folder, name, f"{len(content) - 1} bytes", str(len(content)), *COMMAND)
    (folder / name).unlink()
    refused(folder, name, "is missing", *COMMAND)


def test_a_manifest_that_is_not_as_it_was(tmp_path):
    folder = make(tmp_path / "a").folder
    path = folder / "manifest.json"
    text = path.read_text()
    for damaged in (text[:-20], "", "[]", "{}", "\udce4"):
        path.write_text(damaged, errors="surrogateescape")
        refused(folder, "manifest.json is damaged")
    path.write_text(text.replace("1" * 64, "2" * 64))
    refused(folder, "manifest.json was changed")
    path.write_text(json.dumps({**json.loads(text), "more": 1}))
    refused(folder, "manifest.json was changed")
    path.write_text(json.dumps({**json.loads(text), "format": 2}))
    refused(folder, "has format 2", "reads format 1")


def test_no_artefact(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match=r"is no exported artefact, it has no manifest.json: make one with coalescer-export onnx -o"):
            artefact.find(folder)


def test_one_or_several(tmp_path):
    for kind in ("generator", "unet"):
        make(tmp_path / "all" / kind, kind)
    (tmp_path / "all" / "notes").mkdir()
    assert list(artefact.find(tmp_path / "all")) == ["unet", "generator"]
    assert list(artefact.find(tmp_path / "all" / "unet")) == ["unet"]
    make(tmp_path / "all" / "other", "unet")
    with pytest.raises(ValueError, match="holds two artefacts of the unet, other and unet: name one"):
        artefact.find(tmp_path / "all")


def test_shapes_outside_the_range(tmp_path):
    found = make(tmp_path / "a")
    for n in (2, 16):
        found.check_inputs((torch.zeros(n, 4, 2, 2), torch.zeros(n, 8)))
    for shape, word in (((1, 4, 2, 2), "(1, 4, 2, 2)"), ((17, 4, 2, 2), "(17,"), ((4, 4, 2, 3), "(4, 4, 2, 3)"), ((4, 4), "(4, 4)")):
        with pytest.raises(ValueError, match="noise has shape") as caught:
            found.check_inputs((torch.zeros(shape), torch.zeros(4, 8)))
        assert word in str(caught.value)
        assert "(2 to 16, 4, 2, 2)" in str(caught.value)
        assert "--max-batch" in str(caught.value)


def test_other_weights(tmp_path):
    pipe = cf.CoalescerPipeline.from_pretrained("emoji-64")
    found = make(tmp_path / "a", weights=artefact.weights(pipe, "generator"))
    assert sorted(found.manifest.weights) == ["decoder", "unet"]
    assert artefact.weights(cf.CoalescerPipeline.from_pretrained("emoji-64"), "unet") == {"unet": found.manifest.weights["unet"]}
    found.check_weights(pipe)
    with torch.no_grad():
        pipe.vae.encoder.layers[0].weight.mul_(2)
    found.check_weights(pipe)  # the encoder is in no graph
    with torch.no_grad():
        pipe.unet.up[0][0].conv1.weight.view(-1)[7] += 1e-6
    with pytest.raises(ValueError, match=r"was exported from other weights of the unet .*than the pipeline's .*load that model, or build"):
        found.check_weights(pipe)


def test_a_configuration_is_part_of_a_network():
    layer = torch.nn.Linear(2, 2)
    assert artefact.network_sha256(layer, {"heads": 1, "_name": "a"}) == artefact.network_sha256(layer, {"heads": 1, "_name": "b"})
    assert artefact.network_sha256(layer, {"heads": 1}) != artefact.network_sha256(layer, {"heads": 2})
    half = artefact.network_sha256(layer.half(), {"heads": 1})
    assert half != artefact.network_sha256(layer.float(), {"heads": 1})
    assert artefact.network_sha256(layer.bfloat16(), {"heads": 1}) != half


def test_the_structure_is_part_of_a_network():
    def build() -> torch.nn.Sequential:
        norm, act = torch.nn.GroupNorm(2, 4, affine=False), torch.nn.LeakyReLU(0.1)
        return torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, padding=1), norm, act)

    same = artefact.structure_sha256(build())
    network = build()
    assert artefact.structure_sha256(network.train().double()) == same  # these are not of the structure
    network.backend, network.gradient_checkpointing = "cpu", True
    assert artefact.structure_sha256(network) == same
    seen = {same}
    for place, name, value in (
        (0, "padding", (0, 0)),
        (0, "stride", (2, 2)),
        (0, "padding_mode", "circular"),
        (1, "eps", 1e-3),
        (1, "num_groups", 4),
    ):
        network = build()
        setattr(network[place], name, value)
        seen.add(artefact.structure_sha256(network))
    network = build()
    network[2] = torch.nn.ELU(0.1)
    seen.add(artefact.structure_sha256(network))
    network[2] = torch.nn.LeakyReLU(0.2)
    seen.add(artefact.structure_sha256(network))
    network[2] = torch.nn.Sequential(torch.nn.LeakyReLU(0.1))
    seen.add(artefact.structure_sha256(network))
    assert len(seen) == 9
    torch.manual_seed(0)
    first = build()
    torch.manual_seed(0)
    second = build()
    second[1].eps = 1e-3
    assert artefact.network_sha256(first, {}) != artefact.network_sha256(second, {})


def test_a_saved_network_is_the_same_when_it_is_loaded(tmp_path):
    pipe = cf.CoalescerPipeline.from_pretrained("emoji-64")
    pipe.save_pretrained(tmp_path)
    assert artefact.weights(cf.CoalescerPipeline.from_pretrained(tmp_path), "generator") == artefact.weights(pipe, "generator")
    fresh = type(pipe.unet)(**{name: value for name, value in pipe.unet.config.items() if not name.startswith("_")})
    assert artefact.structure_sha256(fresh) == artefact.structure_sha256(pipe.unet)


def test_schedules():
    scheduler = CoalescerScheduler(guidance_scale=1.5)
    assert Schedule.of(scheduler, 1.5) == Schedule((0.5, 1.0), ("raw", "unit"), 1e-6, (1,), 1.5)
    assert Schedule.of(scheduler, 1).guided == ()
    assert str(Schedule.of(scheduler, 1.5)) == "2 steps (0.5 raw, 1 unit) with guidance 1.5 in 1 of them"
    scheduler.set_timesteps(1)
    assert str(Schedule.of(scheduler, 1)) == "1 step (1 unit) with guidance 1"


# how artefacts appear


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_it_appears_when_it_is_whole(tmp_path):
    with artefact.creating(tmp_path / "some" / "folder") as new:
        (new / "file").write_text("1")
        assert not (tmp_path / "some" / "folder").exists()
    assert names(tmp_path / "some") == ["folder"]
    assert names(tmp_path / "some" / "folder") == ["file"]


def fail(folder, error):
    with artefact.creating(folder, force=True) as new:
        (new / "half").write_text("1")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_of_a_failure(tmp_path, error):
    make(tmp_path / "a")
    for folder in (tmp_path / "a", tmp_path / "b"):
        with pytest.raises(error):
            fail(folder, error)
    assert names(tmp_path) == ["a"]
    artefact.read(tmp_path / "a")


def test_one_that_is_there_is_replaced_by_force_alone(tmp_path):
    make(tmp_path / "a")
    with pytest.raises(ValueError, match="exists: name another folder, or add --force"), artefact.creating(tmp_path / "a"):
        pass
    with artefact.creating(tmp_path / "a", force=True) as new:
        (new / "file").write_text("1")
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["file"]


def test_what_is_no_artefact_is_not_replaced(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("dear")
    (tmp_path / "file").write_text("1")
    (tmp_path / "link").symlink_to(make(tmp_path / "a").folder)
    for name in ("home", "file", "link"):
        with pytest.raises(ValueError, match="exists and is no exported artefact"), artefact.creating(tmp_path / name, force=True):
            pass
    assert names(tmp_path) == ["a", "file", "home", "link"]
    assert (tmp_path / "home" / "letter").read_text() == "dear"
