from __future__ import annotations

import types

import pytest
import torch
from torch import nn

from coalescer_fast.runtime.engines import onnxruntime, openvino


class Affine(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x, mask, y):
        return (self.layer(x) * 0.5 + torch.where(mask, y, 0.25),)


@pytest.fixture(params=["onnxruntime", "openvino"])
def prepare(request):
    for package in (request.param, "onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"needs the package {package}")
    return {"onnxruntime": onnxruntime, "openvino": openvino}[request.param].prepare


@pytest.mark.parametrize("default", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_default_dtype_decides_nothing(prepare, default, tmp_path):
    torch.manual_seed(0)
    module = Affine().eval().requires_grad_(False)
    (x, y), mask = torch.randn(2, 2, 3), torch.tensor([[True], [False]])
    torch.set_default_dtype(default)
    try:
        call = prepare(module, (x, mask, y), torch.float32, tmp_path)((mask, y))
        found = [call(x.clone()), call(2 * x)]
    finally:
        torch.set_default_dtype(torch.float32)
    for (z,), factor in zip(found, (1, 2)):
        assert z.dtype == torch.float32
        torch.testing.assert_close(z, module(factor * x, mask, y)[0], atol=1e-6, rtol=1e-6)
    assert found[0][0].data_ptr() != found[1][0].data_ptr()


def test_an_input_of_another_dtype_is_refused_and_not_read_beyond_its_end(prepare, tmp_path):
    module = Affine().eval().requires_grad_(False)
    x, y, mask = torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 1, dtype=torch.bool)
    call = prepare(module, (x, mask, y), torch.float32, tmp_path)((mask, y))
    expected = call(x)[0]
    with pytest.raises(RuntimeError, match=r"^(ONNX Runtime|OpenVINO) failed: [^\n]*$"):
        call(x.half())
    assert torch.equal(call(x)[0], expected)


def test_whatever_a_run_raises_is_one_sentence(monkeypatch):
    class Fail(Exception):
        pass

    class Session:
        def get_inputs(self):
            return []

        get_outputs = get_inputs

        def run(self, names, feed):
            raise Fail("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION\nout of memory\n")

    monkeypatch.setattr(onnxruntime, "session", lambda path: Session())
    port = types.SimpleNamespace(name="x")
    manifest = types.SimpleNamespace(engine="onnx", inputs=[port])
    run = onnxruntime.open_artefact(
        types.SimpleNamespace(manifest=manifest, graph="model.onnx", check_ports=lambda *ports: None)
    )
    with pytest.raises(
        RuntimeError, match=r"^ONNX Runtime failed: \[ONNXRuntimeError\] : 6 : RUNTIME_EXCEPTION out of memory$"
    ):
        run((torch.ones(1, dtype=torch.float32),))
