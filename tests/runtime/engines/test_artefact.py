from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch

import coalescer_fast as cf
from coalescer_fast import files
from coalescer_fast.runtime.engines import artefact, tensorrt
from coalescer_fast.runtime.engines.artefact import Manifest, Port, Schedule
from coalescer_fast.scheduler import CoalescerScheduler

COMMAND = ("onnx", "--model", "emoji-64", "--what", "generator")


NETWORKS = {"unet": ("unet",), "decoder": ("decoder",), "generator": ("unet", "decoder")}
OUTPUTS = {"unet": (("direction", ("batch", 4, 2, 2)), ("distance", ("batch",)))}
SCHEDULE = Schedule((0.5, 1.0), ("raw", "unit"), 1e-6, (1,), 1.5)


def manifest(kind: str = "generator", **changes) -> Manifest:
    made = Manifest(
        kind=kind,
        engine="onnx",
        target="cpu",
        precision="fp32",
        recipe="all in float32",
        graph="model.onnx",
        model="emoji-64",
        weights={name: "1" * 64 for name in NETWORKS[kind]},
        inputs=(Port("noise", "float32", ("batch", 4, 2, 2)), Port("description", "float32", ("batch", 8))),
        outputs=tuple(
            Port(name, "float32", shape) for name, shape in OUTPUTS.get(kind, (("picture", ("batch", 3, 8, 8)),))
        ),
        batch=(2, 4, 16),
        opset=18,
        command=COMMAND,
        schedule=SCHEDULE if kind == "generator" else None,
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
    for word in (*words, "coalescer-export"):
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


def sealed(folder, **changes) -> None:
    """A manifest with other values and the right hash of itself, as a stranger writes one."""
    content = json.loads((folder / "manifest.json").read_text())
    del content["sha256"]
    for name, value in changes.items():
        *path, last = name.split("__")
        inner = content
        for each in path:
            inner = inner[int(each) if isinstance(inner, list) else each]
        inner[int(last) if isinstance(inner, list) else last] = value
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({**content, "sha256": digest}))


PORT = {"name": "noise", "dtype": "float32", "shape": ["batch", 4]}
FACTS = {"bytes": 1, "sha256": "1" * 64}
WRONG = [
    *[(name, value) for name in ("kind", "engine", "target", "precision") for value in ("zz", None, 3, [])],
    *[
        ("graph", value)
        for value in (
            "../outside.onnx",
            "/etc/passwd",
            "a/b.onnx",
            "..",
            "",
            ".hidden",
            "manifest.json",
            "other.onnx",
            3,
        )
    ],
    *[("recipe", value) for value in (None, {})],
    *[("model", value) for value in (None, 1, "\ud800")],
    *[
        ("weights", value)
        for value in ({}, {"unet": "1" * 64}, {"unet": "x", "decoder": "1" * 64}, [], {"unet": None, "decoder": None})
    ],
    *[
        (name, value)
        for name in ("inputs", "outputs")
        for value in ([], {}, [3], [{}], [{**PORT, "more": 1}], [PORT, PORT], None)
    ],
    *[("inputs__0__dtype", value) for value in ("zz", "complex64", "float16.__class__", 4)],
    *[
        ("inputs__0__shape", value)
        for value in ([], [4], ["batch", -1], ["batch", 2.5], ["batch", True], ["batch", "width"], "batch")
    ],
    *[
        ("batch", value)
        for value in ([1], [4, 2, 1], [0, 1, 2], [1, 2, True], [1, 2, 3, 4], ["1", 2, 3], [1, 2, 2**31], None)
    ],
    *[("opset", value) for value in (None, "18", 0, 10**6, 18.5)],
    *[("command", value) for value in ("onnx", [1], {})],
    *[("schedule", value) for value in ({}, None, [], {"etas": [1.0]})],
    *[("schedule__etas", value) for value in ([], [1.0], "ab", [True, 1.0], [float("nan"), 1.0], [10**400, 1.0])],
    *[("schedule__modes", value) for value in (["raw"], ["raw", "polar"], "raw")],
    *[("schedule__guided", value) for value in ([2], [-1], [0.5], "1")],
    *[("schedule__eps", value) for value in (-1, float("inf"), "1e-6")],
    ("schedule__guidance_scale", float("nan")),
    *[("calibration", value) for value in ("x", 3, [])],
    *[("tensorrt", value) for value in ({}, {"version": "10.8"}, [])],
    *[(name, value) for name in ("flags", "measured", "packages", "files") for value in (None, [], "x", 3)],
    ("measured", {"a": json.loads("[" * 50 + "]" * 50)}),
    ("packages", {"torch": 2}),
    *[
        ("files", {}),
        ("files", {"model.onnx": FACTS, "../model.onnx": FACTS}),
        ("files", {"model.onnx": FACTS, "/etc/passwd": FACTS}),
    ],
    *[
        ("files__model.onnx", value)
        for value in ({}, None, 3, {**FACTS, "bytes": -1}, {**FACTS, "bytes": "1"}, {**FACTS, "sha256": "x"})
    ],
    ("files__manifest.json", FACTS),
    *[("format", value) for value in (2, "1", None, [])],
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=[f"{name}-{i}" for i, (name, _) in enumerate(WRONG)])
def test_a_manifest_that_says_what_it_cannot(tmp_path, name, value):
    """Of every field: the wrong type, out of its range, not one of its words, or against another field."""
    folder = make(tmp_path / "a").folder
    sealed(folder, **{name: value})
    refused(folder, "manifest.json")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, '{"format": 1, "kind": ' + "9" * 5000 + "}", "\x00", "nan"]
)
def test_a_manifest_that_is_hard_to_read(tmp_path, text):
    folder = make(tmp_path / "a").folder
    (folder / "manifest.json").write_text(text)
    refused(folder, "manifest.json is damaged")


def test_a_manifest_of_a_size_that_none_has(tmp_path):
    folder = make(tmp_path / "a").folder
    with (folder / "manifest.json").open("r+b") as file:
        file.truncate(1 << 30)
    refused(folder, "manifest.json is damaged", "1,073,741,824 bytes")


def test_a_link_out_of_the_folder(tmp_path):
    folder = make(tmp_path / "a").folder
    for name in ("model.onnx", "manifest.json"):
        outside = (folder / name).rename(tmp_path / f"outside-{name}")
        (folder / name).symlink_to(outside)
        refused(folder, name, "is a link that leads out of")
        (folder / name).unlink()
        outside.rename(folder / name)
    (folder / "model.onnx").rename(folder / "real")
    (folder / "model.onnx").symlink_to("real")
    artefact.read(folder)


def test_a_graph_that_reads_a_file_for_which_nobody_vouches(tmp_path):
    onnx = pytest.importorskip("onnx")
    folder = tmp_path / "a"
    folder.mkdir()
    tensor = onnx.TensorProto(
        name="w", data_type=onnx.TensorProto.FLOAT, dims=[2], data_location=onnx.TensorProto.EXTERNAL
    )
    for key, value in (("location", "model.onnx.data"), ("offset", "0"), ("length", "8")):
        tensor.external_data.add(key=key, value=value)
    graph = onnx.helper.make_graph([], "g", [], [], [tensor])
    (folder / "model.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    artefact.write(folder, manifest())
    refused(folder, "model.onnx reads 'model.onnx.data', for which its manifest does not vouch")
    (folder / "model.onnx.data").write_bytes(bytes(8))
    artefact.write(folder, manifest())
    artefact.read(folder)


def test_what_could_not_be_read_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="precision is 'fp8'; expected one of fp32, fp16, int8"):
        make(tmp_path / "a", precision="fp8")
    assert not (tmp_path / "a" / "manifest.json").exists()


def test_engines_are_those_that_there_are():
    assert ("onnx", *tensorrt.TITLES) == artefact.ENGINES


def test_no_artefact(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(
            ValueError,
            match=r"is no exported artefact, it has no manifest.json: make one with coalescer-export onnx -o",
        ):
            artefact.find(folder)


def test_one_or_several(tmp_path):
    for kind in ("generator", "unet"):
        make(tmp_path / "all" / kind, kind)
    (tmp_path / "all" / "notes").mkdir()
    assert list(artefact.find(tmp_path / "all")) == ["unet", "generator"]
    assert list(artefact.find(tmp_path / "all" / "unet")) == ["unet"]
    (tmp_path / "all" / "decoder").mkdir()
    with pytest.raises(ValueError, match="decoder is no exported artefact, it has no manifest"):
        artefact.find(tmp_path / "all")
    (tmp_path / "all" / "decoder").rmdir()
    make(tmp_path / "all" / "other", "unet")
    with pytest.raises(ValueError, match="holds two artefacts of the unet, other and unet: name one"):
        artefact.find(tmp_path / "all")


def test_shapes_outside_the_range(tmp_path):
    found = make(tmp_path / "a")
    for n in (2, 16):
        found.check_inputs((torch.zeros(n, 4, 2, 2), torch.zeros(n, 8)))
    for shape, word in (
        ((1, 4, 2, 2), "(1, 4, 2, 2)"),
        ((17, 4, 2, 2), "(17,"),
        ((4, 4, 2, 3), "(4, 4, 2, 3)"),
        ((4, 4), "(4, 4)"),
    ):
        with pytest.raises(ValueError, match="noise has shape") as caught:
            found.check_inputs((torch.zeros(shape), torch.zeros(4, 8)))
        assert word in str(caught.value)
        assert "(2 to 16, 4, 2, 2)" in str(caught.value)
        assert "--max-batch" in str(caught.value)


def test_other_weights(tmp_path):
    pipe = cf.CoalescerPipeline.from_pretrained("emoji-64")
    found = make(tmp_path / "a", weights=artefact.weights(pipe, "generator"))
    assert sorted(found.manifest.weights) == ["decoder", "unet"]
    assert artefact.weights(cf.CoalescerPipeline.from_pretrained("emoji-64"), "unet") == {
        "unet": found.manifest.weights["unet"]
    }
    found.check_weights(pipe)
    with torch.no_grad():
        pipe.vae.encoder.layers[0].weight.mul_(2)
    found.check_weights(pipe)  # the encoder is in no graph
    with torch.no_grad():
        pipe.unet.up[0][0].conv1.weight.view(-1)[7] += 1e-6
    with pytest.raises(
        ValueError,
        match=r"was exported from other weights of the unet .*than the pipeline's .*load that model, or build",
    ):
        found.check_weights(pipe)


def test_a_configuration_is_part_of_a_network():
    layer = torch.nn.Linear(2, 2)
    assert artefact.network_sha256(layer, {"heads": 1, "_name": "a"}) == artefact.network_sha256(
        layer, {"heads": 1, "_name": "b"}
    )
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
    assert artefact.weights(cf.CoalescerPipeline.from_pretrained(tmp_path), "generator") == artefact.weights(
        pipe, "generator"
    )
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
    with (
        pytest.raises(ValueError, match="exists: name another folder, or add --force"),
        artefact.creating(tmp_path / "a"),
    ):
        pass
    with artefact.creating(tmp_path / "a", force=True) as new:
        (new / "file").write_text("1")
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["file"]


def dead_process() -> int:
    """The number of a process that is no more."""
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def create(folder, force=False, meanwhile=lambda: None) -> None:
    with artefact.creating(folder, force) as new:
        (new / "file").write_text("1")
        meanwhile()


def test_what_comes_meanwhile_stays(tmp_path):
    def come() -> None:
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "letter").write_text("dear")

    with pytest.raises(
        ValueError, match=r"a changed while this ran .*stays as it is: what was made is in .*a-2"
    ) as caught:
        create(tmp_path / "a", meanwhile=come)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["a", "a-2"]
    assert (tmp_path / "a" / "letter").read_text() == "dear"
    assert names(tmp_path / "a-2") == ["file"]


@pytest.mark.parametrize("several", [False, True])
def test_force_takes_nothing_that_no_manifest_lists(tmp_path, several):
    folder = tmp_path / "a"
    inner = make(folder / "unet", "unet").folder if several else make(folder).folder
    (inner / "letter").write_text("dear")
    with pytest.raises(
        ValueError, match=rf"{inner} holds letter, which coalescer-export did not write: move it elsewhere"
    ):
        create(folder, force=True)
    assert "letter" in names(inner)
    artefact.read(inner)
    (inner / "letter").unlink()
    with pytest.raises(ValueError, match=r"a changed while this ran \(.* holds letter"):
        create(folder, force=True, meanwhile=lambda: (inner / "letter").write_text("dear"))
    assert (inner / "letter").read_text() == "dear"
    artefact.read(inner)
    assert names(tmp_path) == ["a", "a-2"]


def test_force_takes_nothing_of_a_damaged_manifest(tmp_path):
    folder = make(tmp_path / "a").folder
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=rf"does not say which files are its own: remove {folder} yourself"):
        create(folder, force=True)
    assert names(folder) == ["manifest.json", "model.onnx", "model.onnx.data"]


def test_a_damaged_artefact_is_replaced_by_force(tmp_path):
    """As its own message says."""
    folder = make(tmp_path / "a").folder
    (folder / "model.onnx").write_bytes(b"")
    (folder / "model.onnx.data").unlink()
    with artefact.creating(folder, force=True) as new:
        (new / "file").write_text("1")
    assert names(folder) == ["file"]


@pytest.mark.parametrize("attempt", range(20))
@pytest.mark.parametrize("force", [False, True])
def test_of_two_at_once_one_wins_and_the_other_says_so(tmp_path, force, attempt):
    if force:
        make(tmp_path / "a")
    both, errors = threading.Barrier(2), []

    def export(word: str) -> None:
        try:
            with artefact.creating(tmp_path / "a", force) as new:
                (new / "model.onnx").write_text(word)
                (new / "model.onnx.data").write_text(word)
                artefact.write(new, manifest(model=word))
                both.wait()
        except ValueError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=export, args=(word,)) for word in ("one", "two")]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    # by force the later one may replace the earlier, whole
    assert len(errors) in ((0, 1) if force else (1,))
    for name in names(tmp_path):
        found = artefact.read(tmp_path / name)
        assert found.graph.read_text() == found.manifest.model
    assert names(tmp_path) == ["a", "a-2"][: 1 + len(errors)]


def test_what_a_killed_process_left_is_removed(tmp_path):
    dead, old = dead_process(), make(tmp_path / "a").folder
    for name in (
        f".a.{dead}.partial",
        f".a.{dead}.0badcafe.partial",
        f".a.{os.getpid()}.0badcafe.partial",
        f".b.{dead}.partial",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("1")
    old.rename(tmp_path / f".a.{dead}.0badcafe.replaced")  # between the two steps of a replacement
    with pytest.raises(ValueError, match="exists"), artefact.creating(tmp_path / "a"):
        pass
    artefact.read(tmp_path / "a")
    with artefact.creating(tmp_path / "a", force=True) as new:
        (new / "file").write_text("1")
    assert names(tmp_path) == [f".a.{os.getpid()}.0badcafe.partial", f".b.{dead}.partial", "a"]


def test_a_disk_that_is_full(tmp_path):
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(
        OSError, match=r"a cannot be written \(no space left on device\): free some space, or name a folder"
    ):
        fail(tmp_path / "a", error)
    assert names(tmp_path) == []


def test_everything_is_on_the_disk_before_it_appears(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(files, "sync", lambda folder: seen.append(names(folder)))
    with artefact.creating(tmp_path / "a") as new:
        (new / "file").write_text("1")
    assert seen == [["file"]]


@pytest.mark.parametrize("name", [".", "/", "..", "a/.."])
def test_no_name(name):
    with pytest.raises(ValueError, match="is no name of a folder"), artefact.creating(artefact.Path(name), force=True):
        pass


def test_what_is_no_artefact_is_not_replaced(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("dear")
    (tmp_path / "file").write_text("1")
    (tmp_path / "link").symlink_to(make(tmp_path / "a").folder)
    for name in ("home", "file", "link"):
        with (
            pytest.raises(ValueError, match="exists and is no exported artefact"),
            artefact.creating(tmp_path / name, force=True),
        ):
            pass
    assert names(tmp_path) == ["a", "file", "home", "link"]
    assert (tmp_path / "home" / "letter").read_text() == "dear"
