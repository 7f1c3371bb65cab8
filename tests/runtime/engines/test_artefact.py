from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import coalescer_fast as cf
from coalescer_fast.runtime.engines import artefact, writing
from coalescer_fast.runtime.engines.hashes import network_hashes
from coalescer_fast.runtime.engines.manifest import Manifest

from ...helpers.manifests import COMMAND, make, manifest, refused


def test_what_is_written_is_read(tmp_path):
    written = make(tmp_path / "a")
    found = artefact.read(tmp_path / "a")
    assert found == written
    assert found.manifest == replace(manifest(), files=found.manifest.files)
    assert list(found.manifest.files) == ["model.onnx", "model.onnx.data"]
    assert found.graph == tmp_path / "a" / "model.onnx"
    assert Manifest.from_json(found.manifest.to_json()) == found.manifest
    assert found.fix == f"build it again with: coalescer-export {' '.join(COMMAND)} -o {tmp_path / 'a'} --force"


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
    writing.write(folder, manifest())
    refused(folder, "model.onnx reads 'model.onnx.data', for which its manifest does not vouch")
    (folder / "model.onnx.data").write_bytes(bytes(8))
    writing.write(folder, manifest())
    artefact.read(folder)


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
    found = make(tmp_path / "a", weights=network_hashes(pipe, "generator"))
    assert sorted(found.manifest.weights) == ["decoder", "unet"]
    assert network_hashes(cf.CoalescerPipeline.from_pretrained("emoji-64"), "unet") == {
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
