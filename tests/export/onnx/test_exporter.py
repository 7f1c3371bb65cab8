from __future__ import annotations

import pytest
import torch

import coalescer_fast as cf
from coalescer_fast.runtime.engines import artefact

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason=f"needs the package {package}")
from coalescer_fast.export.measure import accuracy  # noqa: E402
from coalescer_fast.export.onnx import exporter  # noqa: E402
from coalescer_fast.runtime.engines.onnxruntime import open_artefact  # noqa: E402

from ...helpers.pipelines import small_pipeline  # noqa: E402


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return -10 * (a - b).square().mean((1, 2, 3)).log10()


@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_same_pictures_at_every_batch(small, exported, exported_half, n):
    def draw(**call):
        return small("octopus", n, generator=torch.Generator().manual_seed(n), output_type="pt", **call).images

    for folder, guidance in ((exported, None), (exported_half, 2.0)):
        expected = draw(guidance_scale=guidance)
        cf.accelerate(small, "onnxruntime", artefact=folder)
        try:
            found = draw(guidance_scale=guidance)
        finally:
            cf.restore(small)
        if folder == exported:
            assert (found - expected).abs().max() <= 1e-3
        assert psnr(found, expected).min() >= 45


def test_cross_attention_takes_token_rows(tmp_path):
    pipe = small_pipeline(cross_attention_dim=128)
    found = exporter.export_onnx(pipe, "unet", tmp_path, model="some", batch=(1, 1, 3))
    assert [port.name for port in found.manifest.inputs] == ["sample", "description", "token_rows", "token_mask"]
    assert [port.dtype for port in found.manifest.inputs] == ["float32", "float32", "float32", "bool"]
    cf.accelerate(pipe, "onnxruntime", artefact=tmp_path)
    assert cf.verify(pipe, ["octopus", "a red apple"]).passed


def as_views(pipe):
    """All weights as views of one vector, as `vector_to_parameters` leaves them."""
    for network in (pipe.unet, pipe.vae.decoder):
        torch.nn.utils.vector_to_parameters(
            torch.nn.utils.parameters_to_vector(network.parameters()).detach(), network.parameters()
        )


def permuted(pipe):
    for network in (pipe.unet, pipe.vae.decoder):
        for weight in network.parameters():
            if weight.ndim == 4:
                weight.data = weight.data.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)


def expanded_and_negated(pipe):
    pipe.unet.mid[0].norm1.weight.data = torch.full((1,), 1.3).expand(pipe.unet.mid[0].norm1.weight.shape)
    pipe.unet.conv_in.weight.data = torch._neg_view(pipe.unet.conv_in.weight.data)
    pipe.vae.decoder.layers[0].bias.data = torch._neg_view(pipe.vae.decoder.layers[0].bias.data)


def tied(pipe):
    pipe.unet.mid[0].conv1.weight = pipe.unet.mid[1].conv1.weight
    pipe.unet.mid[0].norm2 = pipe.unet.mid[1].norm2


@pytest.mark.parametrize("change", [as_views, permuted, expanded_and_negated, tied])
def test_weights_in_any_memory(tmp_path, change):
    """What is exported is compared with the reference; and the same bits are the same graph."""
    pipe = small_pipeline()
    change(pipe)
    for kind in ("unet", "decoder"):
        (tmp_path / kind).mkdir()
        found = exporter.export_onnx(pipe, kind, tmp_path / kind, model="some", batch=(1, 1, 2))
        assert found.manifest.measured.error["largest error"] < 1e-5
    cf.accelerate(pipe, "onnxruntime", artefact=tmp_path)
    assert cf.verify(pipe, ["octopus"]).passed


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_another_default_dtype_autocast_and_inference_mode(tmp_path, default):
    def export(folder, pipe):
        folder.mkdir()
        found = exporter.export_onnx(pipe, "unet", folder, model="some", batch=(1, 1, 2))
        return found.manifest.files["model.onnx"].sha256, found.manifest.inputs

    pipe = small_pipeline(cross_attention_dim=128)
    expected = export(tmp_path / "plain", pipe)
    torch.set_default_dtype(default)
    try:
        with torch.autocast("cpu"), torch.inference_mode():
            assert export(tmp_path / "other", pipe) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_pipeline_made_in_inference_mode(tmp_path):
    with torch.inference_mode():
        pipe = small_pipeline()
    exporter.export_onnx(pipe, "decoder", tmp_path, model="some", batch=(1, 1, 2))
    cf.accelerate(pipe, "onnxruntime", artefact=tmp_path)
    assert cf.verify(pipe, ["octopus"]).passed


def test_results_that_are_not_finite_are_named(tmp_path):
    pipe = small_pipeline()
    with torch.no_grad():
        pipe.unet.direction_head.bias.fill_(3e38)  # finite, but not its sum with what the convolution gives
        pipe.unet.direction_head.weight.fill_(1e38)
    with pytest.raises(ValueError, match=r"(direction, |^R of ).*not finite") as caught:
        exporter.export_onnx(pipe, "unet", tmp_path, model="some", batch=(1, 1, 2))
    assert "\n" not in str(caught.value)


def test_beyond_float16_the_output_is_named(tmp_path):
    pipe = small_pipeline()
    with torch.no_grad():
        weight = pipe.vae.decoder.layers[0].weight
        weight.mul_(6e4 / weight.abs().max())
    with pytest.raises(
        ValueError,
        match=r"^the decoder in float16 is not the model's: picture, largest absolute value is (inf|nan), which is not",
    ):
        exporter.export_onnx(
            pipe, "decoder", tmp_path, model="some", precision="fp16", target="tensorrt", batch=(1, 1, 2)
        )


def test_beyond_the_budget_nothing_is_written(small, tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy, "LARGEST_ERROR", 0.0)
    with pytest.raises(ValueError, match=r"the exported decoder is not the model's: largest error is .*, the limit 0"):
        exporter.export_onnx(small, "decoder", tmp_path, model="some")
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize("batch", [(0, 1, 2), (2, 1, 4), (1, 8, 4)])
def test_batches_in_disorder(small, tmp_path, batch):
    with pytest.raises(ValueError, match="expected 1 <= least <= best <= most"):
        exporter.export_onnx(small, "decoder", tmp_path, model="some", batch=batch)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "target"), [("fp32", "cpu"), ("fp16", "tensorrt")])
def test_the_embedded_model(embedded, precision, target):
    pipe = cf.CoalescerPipeline.from_pretrained("emoji-64")
    folder = embedded(precision, target)
    for found in artefact.find(folder).values():
        result = accuracy.compare(found, open_artefact(found), pipe, 64, seed=1)
        assert result.passed, str(result)
        # float16 is measured where it is rounded to
        assert found.manifest.measured.runtime.startswith("torch" if precision == "fp16" else "onnxruntime")
    cf.accelerate(pipe, "onnxruntime", artefact=folder)
    assert cf.verify(pipe).passed
