from __future__ import annotations

import pytest
import torch

import coalescer_fast as cf
from coalescer_fast.runtime import artefact

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason=f"needs the package {package}")
from coalescer_fast.export import exporting, figures  # noqa: E402
from coalescer_fast.runtime.onnx_file import open_artefact  # noqa: E402

from .conftest import build  # noqa: E402


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
    pipe = build(cross_attention_dim=128)
    found = exporting.export_onnx(pipe, "unet", tmp_path, model="some", batch=(1, 1, 3))
    assert [port.name for port in found.manifest.inputs] == ["sample", "description", "token_rows", "token_mask"]
    assert [port.dtype for port in found.manifest.inputs] == ["float32", "float32", "float32", "bool"]
    cf.accelerate(pipe, "onnxruntime", artefact=tmp_path)
    assert cf.verify(pipe, ["octopus", "a red apple"]).passed


def test_beyond_the_budget_nothing_is_written(small, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "LARGEST_ERROR", 0.0)
    with pytest.raises(ValueError, match=r"the exported decoder is not the model's: largest error is .*, the limit 0"):
        exporting.export_onnx(small, "decoder", tmp_path, model="some")
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize("batch", [(0, 1, 2), (2, 1, 4), (1, 8, 4)])
def test_batches_in_disorder(small, tmp_path, batch):
    with pytest.raises(ValueError, match="expected 1 <= least <= best <= most"):
        exporting.export_onnx(small, "decoder", tmp_path, model="some", batch=batch)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "target"), [("fp32", "cpu"), ("fp16", "tensorrt")])
def test_the_embedded_model(embedded, precision, target):
    pipe = cf.CoalescerPipeline.from_pretrained("emoji-64")
    folder = embedded(precision, target)
    for found in artefact.find(folder).values():
        result = figures.compare(found, open_artefact(found), pipe, 64, seed=1)
        assert result.passed, str(result)
        # float16 is measured where it is rounded to
        assert found.manifest.measured["runtime"].startswith("torch" if precision == "fp16" else "onnxruntime")
    cf.accelerate(pipe, "onnxruntime", artefact=folder)
    assert cf.verify(pipe).passed
