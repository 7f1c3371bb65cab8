from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from coalescer_fast.runtime.engines import tensorrt
from coalescer_fast.runtime.engines.manifest import ENGINES, Manifest, Schedule
from coalescer_fast.scheduler import CoalescerScheduler

from ...helpers.manifests import make, refused


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
    *[("flags", value) for value in ({"int8": {}}, {"stripWeights": 3}, {"versionCompatible": 1}, {"more": 1})],
    *[("measured", value) for value in ({"pictures": -1}, {"error": {"PSNR": []}}, {"more": 1})],
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


def test_what_could_not_be_read_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="precision is 'fp8'; expected one of fp32, fp16, int8"):
        make(tmp_path / "a", precision="fp8")
    assert not (tmp_path / "a" / "manifest.json").exists()


def test_engines_are_those_that_there_are():
    assert ("onnx", *tensorrt.TITLES) == ENGINES


def test_schedules():
    scheduler = CoalescerScheduler(guidance_scale=1.5)
    assert Schedule.of(scheduler, 1.5) == Schedule((0.5, 1.0), ("raw", "unit"), 1e-6, (1,), 1.5)
    assert Schedule.of(scheduler, 1).guided == ()
    assert str(Schedule.of(scheduler, 1.5)) == "2 steps (0.5 raw, 1 unit) with guidance 1.5 in 1 of them"
    scheduler.set_timesteps(1)
    assert str(Schedule.of(scheduler, 1)) == "1 step (1 unit) with guidance 1"


def test_a_manifest_of_a_size_that_none_has(tmp_path):
    folder = make(tmp_path / "a").folder
    with (folder / "manifest.json").open("r+b") as file:
        file.truncate(1 << 30)
    refused(folder, "manifest.json is damaged", "1,073,741,824 bytes")


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


@pytest.mark.parametrize("path", sorted((Path(__file__).parent / "manifests").iterdir()), ids=lambda path: path.stem)
def test_manifests_of_version_0_1_0(path):
    """What that version wrote is read, and would be written in the same way."""
    text = path.read_text()
    assert Manifest.from_json(text).to_json() == text


def test_fields_of_earlier_manifests_may_be_missing(tmp_path):
    folder = make(tmp_path / "a").folder
    quantization = {"method": "max", "prompts": 64, "kept": "", "source": "1" * 64}  # without "unfit"
    sealed(folder, precision="int8", flags={"int8": quantization})
    found = Manifest.from_json((folder / "manifest.json").read_text())
    assert found.flags.int8 is not None
    assert found.flags.int8.unfit == {}
