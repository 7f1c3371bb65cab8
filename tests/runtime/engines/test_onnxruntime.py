from __future__ import annotations

import logging
import threading
import types
import warnings

import pytest
import torch
from torch import nn

from coalescer_fast.runtime.engines import onnxruntime


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
    return getattr(onnxruntime, request.param)


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


def test_the_exporter_leaves_logging_and_warnings_as_they_were():
    logging.disable(logging.ERROR)
    try:
        with onnxruntime.exporting():
            assert logging.root.manager.disable == logging.ERROR
        assert logging.root.manager.disable == logging.ERROR
    finally:
        logging.disable(logging.NOTSET)
    filters = list(warnings.filters)
    with pytest.raises(KeyError), onnxruntime.exporting():
        raise KeyError
    assert logging.root.manager.disable == logging.NOTSET
    assert list(warnings.filters) == filters


def test_one_thread_exports_at_a_time():
    inside, most = [], []

    def enter():
        with onnxruntime.exporting():
            inside.append(1)
            most.append(len(inside))
            threading.Event().wait(0.01)
            inside.pop()

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 4


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
