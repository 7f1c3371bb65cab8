"""Small artefacts with stand-ins for their graphs."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from coalescer_fast.runtime.engines import artefact, writing
from coalescer_fast.runtime.engines.artefact import Artefact
from coalescer_fast.runtime.engines.manifest import Manifest, Measured, Port, Schedule

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
        measured=Measured(error={"largest error": 1e-6}),
        packages={"torch": "2.13.0"},
    )
    return replace(made, **changes)


def make(folder, kind: str = "generator", **changes) -> Artefact:
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(b"a graph, or so they say")
    (folder / "model.onnx.data").write_bytes(b"weights")
    return writing.write(folder, manifest(kind, **changes))


def refused(folder, *words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(str(folder))) as caught:
        artefact.read(folder)
    message = str(caught.value)
    assert "\n" not in message
    for word in (*words, "coalescer-export"):
        assert word in message
