"""Our Q/DQ placement against onnxruntime.quantization, on the embedded model's UNet and on weights that are small.

Both quantize the same layers of the same graph, calibrated on the same inputs, and are measured on the same prompts.

    coalescer-export onnx --what unet -o unet
    python -m tests.export.quantize.against_onnxruntime unet --method percentile
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static

import coalescer_fast as cf
from coalescer_fast.export.measure import accuracy
from coalescer_fast.export.measure.reference import graph_inputs
from coalescer_fast.export.quantize import qdq, quantizer
from coalescer_fast.export.quantize.prompts import held_out
from coalescer_fast.export.quantize.scales import quantize_weight
from coalescer_fast.export.quantize.source import Source
from coalescer_fast.parity import descriptions
from coalescer_fast.runtime.base import quiet_torch
from coalescer_fast.runtime.engines import artefact, onnxruntime
from coalescer_fast.runtime.engines.artefact import Artefact

METHODS = {
    "max": CalibrationMethod.MinMax,
    "percentile": CalibrationMethod.Percentile,
    "entropy": CalibrationMethod.Entropy,
}


class Reader(CalibrationDataReader):
    def __init__(self, feeds: Iterable[Mapping[str, Any]]):
        self.feeds = iter(feeds)

    def get_next(self) -> Mapping[str, Any] | None:
        return next(self.feeds, None)


@quiet_torch()
def compare_unets(folder: Path, method: str, prompts: int, out: Path) -> None:
    """Print the figures of both, and the CPU time of both and of the float graph."""
    torch.set_num_threads(1)
    pipe = cf.CoalescerPipeline.from_pretrained("emoji-64")
    pipe.set_progress_bar_config(disable=True)
    found = artefact.read(folder)
    m, source = found.manifest, Source.of(found)
    names = descriptions(pipe, prompts, torch.Generator().manual_seed(0))
    inputs = graph_inputs(pipe, m, names, 0)
    known = quantizer.calibrate(pipe, source, method, 99.999, prompts, 0, lambda text: None)
    (out / "ours").mkdir()
    qdq.save(source.quantized(source.layers, known), out / "ours" / m.graph)
    (out / "theirs").mkdir()
    ports = [port.name for port in m.inputs]
    quantize_static(
        source.model,  # with biases in the convolutions
        out / "theirs" / m.graph,
        Reader({name: x.numpy() for name, x in zip(ports, each)} for each in inputs),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        nodes_to_quantize=[layer.name for layer in source.layers],
        calibrate_method=METHODS[method],
        extra_options={"CalibPercentile": 99.999},
    )
    runs = {"float": onnxruntime.open_artefact(found)}
    for name in ("ours", "theirs"):
        one = Artefact(out / name, replace(m, precision="int8"))
        runs[name] = onnxruntime.open_artefact(one)
        left = qdq.float_layers(one.graph, source.layers)
        print(f"{name}: {len(source.layers) - len(left)} of {len(source.layers)} layers in integers")
        print(accuracy.compare(one, runs[name], pipe, held_out(pipe, names, 64, 1), 1))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(60):
        for name, run in runs.items():
            start = time.process_time()
            run(inputs[0])
            times[name].append(time.process_time() - start)
    medians = {name: f"{statistics.median(each) * 1e3:.1f} ms" for name, each in times.items()}
    print(f"CPU time of {len(inputs[0][0])} pictures, one thread, median of 60 in turn: {medians}")


def compare_small_weights(out: Path) -> None:
    """Print the largest errors of weights in float16, as multiples of their scales."""
    generator = np.random.default_rng(0)
    weight = (1e-5 * generator.standard_normal((4, 4, 3, 3))).astype(np.float16)
    ports = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT16, [1, 4, 8, 8]) for name in ("x", "y")]
    node = helper.make_node("Conv", ["x", "w"], ["y"], "conv", pads=[1] * 4)
    graph = helper.make_graph([node], "g", ports[:1], ports[1:], [numpy_helper.from_array(weight, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    x = generator.standard_normal((1, 4, 8, 8)).astype(np.float16)
    types = {"activation_type": QuantType.QInt8, "weight_type": QuantType.QInt8}
    options = {"ActivationSymmetric": True, "OpTypesToExcludeOutputQuantization": ["Conv"]}
    quantize_static(model, out / "w.onnx", Reader([{"x": x}]), per_channel=True, extra_options=options, **types)
    stored = {each.name: numpy_helper.to_array(each) for each in onnx.load(out / "w.onnx").graph.initializer}
    theirs = stored["w_quantized"], stored["w_scale"]
    for name, (integers, scales) in (("ours", quantize_weight(weight, weight.dtype)), ("theirs", theirs)):
        wide = scales.astype(np.float64).reshape(-1, 1, 1, 1)
        steps = np.abs(integers * wide - weight) / wide
        print(f"{name}: weights of 1e-5 in float16 are off by at most {steps.max():.2f} steps")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the UNet, of coalescer-export onnx --what unet")
    parser.add_argument("--method", choices=METHODS, default="percentile")
    parser.add_argument("--prompts", type=int, default=64)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as scratch:
        compare_small_weights(Path(scratch))
        compare_unets(args.folder, args.method, args.prompts, Path(scratch))
