from __future__ import annotations

import logging

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from coalescer_fast import ops
from coalescer_fast.ops import cuda_library, dispatch, native_library, triton_launch
from coalescer_fast.ops.op import OPS as DECLARED

from ..helpers.examples import NAMES as OPS
from ..helpers.examples import example, several, shortest
from ..helpers.numerics import EMULATED, FLOAT_AT_MOST_32, takes

X = torch.zeros(2, 4, 3, 3)


@pytest.fixture(autouse=True)
def forgetful():
    dispatch.forget()
    yield
    dispatch.forget()


@pytest.fixture
def no_library(monkeypatch):
    monkeypatch.setattr(native_library, "unavailable", lambda: "there is no compiler")


def test_all_public_ops_are_registered():
    assert set(ops.__all__) == {*OPS, "backends"}
    assert {"bias_residual", "coalesce_step", "dual_head", "group_norm_silu"} <= set(OPS)
    for op in OPS:
        assert hasattr(torch.ops.coalescer_fast, op)


@pytest.mark.parametrize("op", OPS)
def test_backends_of_a_call(op):
    on_cpu = ops.backends(op, **shortest(op))
    assert list(on_cpu) == ["reference", "cpu", "triton", "cuda"]
    assert on_cpu["reference"] == on_cpu["cpu"] == (True, "")


def test_backends_without_arguments_says_what_can_run_here_at_all():
    assert ops.backends("group_norm_silu")["cpu"] == (True, "")


def test_backends_takes_keywords_and_names_the_argument_that_is_refused():
    able, reason = ops.backends("group_norm_silu", X, 2, scale=torch.zeros(2, 4, dtype=torch.float64))["cpu"]
    assert not able
    assert reason == "scale has dtype torch.float64; expected torch.float32, torch.float16, torch.bfloat16"


def test_backends_takes_the_first_arguments_alone():
    assert ops.backends("group_norm_silu", X)["cpu"] == (True, "")
    assert ops.backends("group_norm_silu", X.double())["cpu"][1].startswith("x has dtype torch.float64; expected ")


def test_backends_of_an_unknown_op():
    with pytest.raises(ValueError, match=r"op 'relu' is unknown: use .*group_norm_silu"):
        ops.backends("relu")


@pytest.mark.parametrize("op", OPS)
def test_unknown_backend(op):
    with pytest.raises(
        ValueError, match=f"backend 'magic' is unknown to {op}; use one of auto, reference, cpu, triton, cuda"
    ):
        getattr(ops, op)(**shortest(op), backend="magic")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", [b for b in dispatch.BACKENDS if b != "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, *FLOAT_AT_MOST_32], ids=str)
def test_a_dtype_that_a_backend_does_not_take_is_refused_by_name(op, backend, dtype):
    able, reason = ops.backends(op, **shortest(op, dtype=dtype))[backend]
    if dispatch.BACKENDS[backend].device == "cuda" and not torch.cuda.is_available():
        assert able == takes(backend, dtype)  # in the interpreter
    if able:
        return
    assert reason
    with pytest.raises(ValueError, match=f"backend '{backend}' cannot run this {op}: ") as caught:
        getattr(ops, op)(**shortest(op, dtype=dtype), backend=backend)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("op", OPS)
def test_auto_takes_the_native_code_and_says_so_once(op, caplog):
    with caplog.at_level(logging.INFO, "coalescer_fast"):
        for _ in range(3):
            getattr(ops, op)(**shortest(op))
    assert [(r.levelname, r.message) for r in caplog.records] == [("INFO", f"{op} runs on cpu")]


def test_a_fallback_warns_once_with_its_reason(caplog, no_library):
    with caplog.at_level(logging.INFO, "coalescer_fast"):
        for _ in range(3):
            ops.group_norm_silu(X, 2)
    assert [(r.levelname, r.message) for r in caplog.records] == [
        ("WARNING", "group_norm_silu runs on reference; not on cpu: there is no compiler")
    ]


def test_strict_mode_makes_a_fallback_an_error(monkeypatch, no_library):
    monkeypatch.setenv("COALESCER_FAST_STRICT", "1")
    message = (
        "COALESCER_FAST_STRICT=1 forbids group_norm_silu to fall back to reference; not on cpu: there is no compiler"
    )
    with pytest.raises(ValueError, match=message):
        ops.group_norm_silu(X, 2)
    ops.group_norm_silu(X, 2, backend="reference")  # asked for, not fallen back to


def test_strict_mode_lets_the_fastest_run(monkeypatch):
    monkeypatch.setenv("COALESCER_FAST_STRICT", "1")
    ops.group_norm_silu(X, 2)


def test_an_explicit_backend_never_falls_back(no_library):
    with pytest.raises(ValueError, match="backend 'cpu' cannot run this group_norm_silu: there is no compiler"):
        ops.group_norm_silu(X, 2, backend="cpu")


def test_where_a_gradient_is_needed_auto_takes_the_reference_and_others_refuse():
    weight = torch.ones(4, requires_grad=True)
    ops.group_norm_silu(X, 2, weight).sum().backward()
    assert weight.grad is not None
    with pytest.raises(
        ValueError, match=r"backend 'cpu' .* weight needs a gradient, which only reference has; expected .*no_grad"
    ):
        ops.group_norm_silu(X, 2, weight, backend="cpu")
    with torch.no_grad():
        ops.group_norm_silu(X, 2, weight, backend="cpu")


def test_another_device_takes_the_reference():
    assert ops.group_norm_silu(X.to("meta"), 2).is_meta


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("backend", "runtime"), [("triton", triton_launch), ("cuda", cuda_library)])
def test_kernels_for_gpus_want_one_outside_the_tests_stand_ins(op, backend, runtime, monkeypatch):
    monkeypatch.setattr(runtime, "INTERPRETED", False)
    first = DECLARED[op].names[0]
    assert ops.backends(op, **shortest(op))[backend] == (False, f"{first} is on cpu; expected a cuda device")
    if not torch.cuda.is_available():
        monkeypatch.setattr(runtime, "unavailable", getattr(runtime.unavailable, "__wrapped__", runtime.unavailable))
        assert ops.backends(op)[backend] == (False, "there is no CUDA device")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", ["auto", "reference", "cpu", *EMULATED])
def test_opcheck(op, backend):
    torch.library.opcheck(getattr(torch.ops.coalescer_fast, op).default, (), shortest(op) | {"backend": backend})


FORMATS = (torch.contiguous_format, torch.channels_last)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("backend", ["cpu", *EMULATED])
def test_opcheck_with_all_arguments(op, memory_format, backend):
    given = example(op, memory_format)
    torch.library.opcheck(getattr(torch.ops.coalescer_fast, op).default, (), given | {"backend": backend})


AUTO = [
    # GPU, what the CUDA kernels were built for, whether Triton is there, dtype; whose are dual_head and the others
    ("a GPU of the build", 90, (80, 90), True, torch.float16, "triton", "cuda"),
    ("a newer one of its kind", 86, (80, 90), True, torch.float16, "triton", "cuda"),
    ("one of another kind", 110, (80, 90), True, torch.float16, "triton", "triton"),
    ("an older one of its kind", 80, (86,), True, torch.float16, "triton", "triton"),
    ("none of the two", 110, (80, 90), False, torch.float16, "reference", "reference"),
    ("half precision, for tensor cores", 90, (80, 90), True, torch.bfloat16, "triton", "cuda"),
    ("half precision, and no Triton", 90, (80, 90), False, torch.bfloat16, "cuda", "cuda"),
    ("float32", 90, (80, 90), True, torch.float32, "cuda", "cuda"),
    ("a dtype that neither takes", 90, (80, 90), True, torch.float64, "reference", "reference"),
]


@pytest.mark.parametrize(
    ("gpu", "built", "triton", "dtype", "heads", "others"), [case[1:] for case in AUTO], ids=[c[0] for c in AUTO]
)
def test_what_auto_takes_on_a_gpu(monkeypatch, gpu, built, triton, dtype, heads, others):
    monkeypatch.setattr(cuda_library, "unavailable", lambda: "")
    monkeypatch.setattr(cuda_library, "architectures", lambda: built)
    monkeypatch.setattr(cuda_library, "device", lambda place: cuda_library.Device(0, gpu, 132, 227 * 1024))
    monkeypatch.setattr(triton_launch, "unavailable", lambda: "" if triton else "triton cannot be imported")
    monkeypatch.setattr(triton_launch, "INTERPRETED", False)
    monkeypatch.setattr(triton_launch, "_capability", lambda device: divmod(gpu, 10))
    n, c, side = 1, 128, 32
    with FakeTensorMode():
        x, narrow = (torch.empty(n, channels, side, side, dtype=dtype, device="cuda:0") for channels in (c, 4))
        weight, flat = (
            torch.empty(4, c, 3, 3, dtype=dtype, device="cuda:0"),
            torch.empty(n, dtype=dtype, device="cuda:0"),
        )
        assert dispatch._resolve(DECLARED["dual_head"], "auto", (x, weight, flat, flat, flat, None, None)) == heads
        assert dispatch.preferred(DECLARED["dual_head"], x)[0] == heads  # as explain asks
        step = (narrow, narrow, flat, 1.0, "unit", 1e-6)
        for op, args in {"group_norm_silu": (x, 32), "bias_residual": (x,), "coalesce_step": step}.items():
            assert dispatch._resolve(DECLARED[op], "auto", args) == others


def test_a_gpu_that_the_build_does_not_cover_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.setattr(cuda_library, "unavailable", lambda: "")
    monkeypatch.setattr(cuda_library, "architectures", lambda: (80, 90))
    monkeypatch.setattr(cuda_library, "device", lambda place: cuda_library.Device(0, 121, 48, 99 * 1024))
    with FakeTensorMode():
        x = torch.empty(1, 2, 3, device="cuda:0")
    assert dispatch.BACKENDS["cuda"].refusal({"x": x}) == (
        "x is on a GPU of sm_121, and the CUDA kernels were built for sm_80, sm_90: "
        "install coalescer_fast again on this machine"
    )


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("backend", ["auto", "cpu", "reference", *EMULATED])
def test_compiles_into_one_graph(op, memory_format, backend):
    torch._dynamo.reset()
    given, function = example(op, memory_format), getattr(ops, op)
    with torch.no_grad():
        explanation = torch._dynamo.explain(lambda **given: function(**given, backend=backend))(**given)
        assert (explanation.graph_break_count, explanation.graph_count) == (0, 1)
        compiled = torch.compile(
            lambda **given: function(**given, backend=backend), backend="aot_eager", fullgraph=True
        )
        results, expected = compiled(**given), function(**given, backend=backend)
    for result, truth in zip(several(results), several(expected)):
        torch.testing.assert_close(result, truth)
        assert result.stride() == truth.stride()


def test_compiles_with_inductor_and_dynamic_batch():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, w: ops.group_norm_silu(2 * x, 2, w) + 1, fullgraph=True, dynamic=True)
    w = torch.rand(4)
    with torch.no_grad():
        for n in (2, 3, 5):
            x = torch.rand(n, 4, 5, 5).to(memory_format=torch.channels_last)
            torch.testing.assert_close(compiled(x, w), ops.group_norm_silu(2 * x, 2, w) + 1)


def test_compiled_code_that_needs_a_gradient_has_one():
    torch._dynamo.reset()
    weight = torch.rand(4, requires_grad=True)
    torch.compile(lambda w: ops.group_norm_silu(X + 1, 2, w).sum(), backend="aot_eager", fullgraph=True)(
        weight
    ).backward()
    assert weight.grad is not None


class Call(torch.nn.Module):
    """A call of an op, of its tensors."""

    def __init__(self, op: str, others: dict[str, object]):
        super().__init__()
        self.op, self.others = op, others

    def forward(self, **tensors):
        return getattr(ops, self.op)(**tensors, **self.others, backend="cpu")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("strict", [True, False])
def test_exports(op, strict):
    given = example(op, torch.channels_last)
    tensors = {name: a for name, a in given.items() if isinstance(a, torch.Tensor)}
    others = {name: a for name, a in given.items() if name not in tensors}
    with torch.no_grad():
        program = torch.export.export(Call(op, others), (), tensors, strict=strict)
        assert [n for n in program.graph.nodes if n.target is getattr(torch.ops.coalescer_fast, op).default]
        results, expected = program.module()(**tensors), getattr(ops, op)(**given, backend="cpu")
        for result, truth in zip(several(results), several(expected)):
            torch.testing.assert_close(result, truth, rtol=0, atol=0)


def test_tensor_modes_and_subclasses_see_the_op():
    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    class Subclass(torch.Tensor):
        pass

    names: list[str] = []
    with Seen():
        ops.bias_residual(X, backend="cpu")
    assert "coalescer_fast.bias_residual.default" in names
    assert torch.equal(ops.bias_residual(X.as_subclass(Subclass), backend="cpu"), X)
