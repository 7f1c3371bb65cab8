from __future__ import annotations

from coalescer_fast.export.engine.layers import FusedLayer, counts, layers_of_log, read_layers, write_layers

LINEAR = "Format: (Linear) Row major linear format"
CONV = FusedLayer(
    "conv1_myl0_14",
    "correlation",
    inputs=("Int8",),
    constants=("Int8", "Float"),
    outputs=("Half",),
    of=("a.b:1", "c/2"),
)
NOTHING = FusedLayer("s", "shape_call", inputs=(), constants=(), outputs=(), of=())


def test_layers_of_the_log():
    def tensor(name: str, dtype: str, form: str = LINEAR) -> str:
        where = "Dimensions: [-1,2], Strides: [2,1], StrideOrder: [1,0]"
        return f"{{ Name: {name}, {where}, Datatype: {dtype}, {form} }}"

    text = (
        "Layers:\n"
        "Name: conv1_myl0_14, LayerType: correlation, "
        f"Inputs: [ {tensor('x', 'Int8', 'Format: (NHWC) Channel major format')}], "
        f"Constants: [ {tensor('w', 'Int8')}, {tensor('b', 'Float')}], Outputs: [ {tensor('y', 'Half')}], "
        "TacticName: , StreamId: 0, Metadata: [ONNX Layer: a.b:1]\x1e[ONNX Layer: c/2]\n"
        "Name: s, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], "
        "TacticName: , StreamId: 0, Metadata: \n"
    )
    assert layers_of_log(text) == [CONV, NOTHING]
    assert counts([CONV, CONV, NOTHING]) == [
        ("correlation", "2: Int8 to Half 2"),
        ("shape_call", "1: nothing to nothing 1"),
    ]


def test_what_is_written_is_read(tmp_path):
    inspected = FusedLayer("conv", "CaskConvolution", inputs=("Half",), outputs=("Float",), of=("conv", "add"))
    write_layers(tmp_path, [CONV, NOTHING, inspected])
    assert read_layers(tmp_path) == (CONV, NOTHING, inspected)
