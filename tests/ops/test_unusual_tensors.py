"""Every op on tensors that are more than dense memory: negated by a bit, without memory, dual, under a transform of
torch.func, made in inference mode, of another class, and under another default dtype; by the first call and by those
that a launcher
runs."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as fw
from torch import Tensor

from coalescer_fast import ops
from coalescer_fast.ops import dispatch
from coalescer_fast.ops.op import OPS as DECLARED

from ..helpers.examples import NAMES as OPS
from ..helpers.examples import example, several
from ..helpers.numerics import EMULATED, ON_GPU
from ..helpers.processes import python

BACKENDS = [
    pytest.param(name, marks=[pytest.mark.gpu] if name in ON_GPU else [])
    for name in ("reference", "cpu", "triton", *EMULATED)
]
FAST = BACKENDS[1:]


@pytest.fixture(autouse=True)
def forgetful() -> Iterator[None]:
    dispatch.forget()
    yield
    dispatch.forget()


@pytest.fixture
def default_dtype() -> Iterator[Callable[[torch.dtype], None]]:
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


def named(op: str, backend: str = "cpu") -> dict[str, object]:
    """All arguments of a call, by name, where the backend takes them."""
    given = example(op, torch.channels_last)
    return {name: a.cuda() if backend in ON_GPU and isinstance(a, Tensor) else a for name, a in given.items()}


def tensors(op: str) -> list[str]:
    return [name for name, a in named(op).items() if isinstance(a, Tensor)]


def run(op: str, given: dict[str, object], backend: str) -> list[Tensor]:
    return list(several(getattr(ops, op)(**given, backend=backend)))


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, other))


ARGUMENTS = [(op, name) for op in OPS for name in tensors(op)]


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_another_default_dtype_changes_nothing(op, backend, default, default_dtype):
    given = named(op, backend)
    expected = run(op, given, backend)
    dispatch.forget()
    default_dtype(default)
    for grad in (False, False, True):
        with torch.set_grad_enabled(grad):
            assert same(run(op, given, backend), expected)


def test_a_narrower_default_dtype_does_not_make_the_distance_too_small(tmp_path):
    """200,000 distances of 4 bytes, in a process of their own: beyond the end of a buffer, anything may lie."""
    code = """
import torch
from coalescer_fast import ops
args = torch.ones(200_000, 1, 1, 1), torch.ones(1, 1, 3, 3), torch.ones(1), torch.ones(1), torch.ones(1)
expected = ops.dual_head(*args, backend="reference")[1]
torch.set_default_dtype(torch.bfloat16)
with torch.no_grad():
    for _ in range(3):
        assert torch.equal(ops.dual_head(*args, backend="cpu")[1], expected)
print("done")
"""
    assert python(code, tmp_path).strip() == "done"


def negated(x: Tensor) -> Tensor:
    return torch._neg_view(-x)


def imaginary(x: Tensor) -> Tensor:
    return torch.complex(torch.zeros_like(x), -x).conj().imag


@pytest.mark.parametrize("change", [negated, imaginary])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
def test_a_negation_that_torch_leaves_out_is_seen(op, name, backend, change):
    given = named(op, backend)
    odd = {**given, name: change(given[name])}
    assert odd[name].is_neg()
    assert torch.equal(odd[name], given[name])
    for grad in (False, True, False):
        with torch.set_grad_enabled(grad):
            expected = run(op, given, backend)
            for result in (run(op, odd, backend), run(op, given, backend), run(op, odd, backend)):
                for one, other in zip(result, expected):
                    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)  # other strides sum in another order


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
def test_zeros_without_memory_are_zeros(op, name, backend):
    given = named(op, backend)
    zeros = {**given, name: torch.zeros_like(given[name], memory_format=torch.contiguous_format)}
    odd = {**given, name: torch._efficientzerotensor(given[name].shape, dtype=torch.float32, device=given[name].device)}
    with torch.no_grad():
        expected = run(op, zeros, backend)
        for _ in range(2):
            assert same(run(op, odd, backend), expected)
            assert same(run(op, zeros, backend), expected)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
def test_tangents_are_carried_on(op, name, grad):
    given = named(op)
    with torch.set_grad_enabled(grad):
        before = run(op, given, "auto")
        with fw.dual_level():
            dual = {**given, name: fw.make_dual(given[name], torch.ones_like(given[name]))}
            for _ in range(2):
                results = [fw.unpack_dual(y) for y in run(op, dual, "auto")]
                expected = [fw.unpack_dual(y) for y in run(op, dual, "reference")]
                assert any(y.tangent is not None for y in results)
                for one, other in zip(results, expected):
                    assert (one.tangent is None) == (other.tangent is None)
                    assert one.tangent is None or torch.equal(one.tangent, other.tangent)
            run(op, given, "cpu")  # nothing to carry on
        assert same(run(op, given, "auto"), before)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
def test_a_fast_backend_refuses_a_tangent(op, name, backend, grad):
    given = named(op, backend)
    with torch.set_grad_enabled(grad):
        run(op, given, backend)
        with fw.dual_level():
            dual = {**given, name: fw.make_dual(given[name], torch.ones_like(given[name]))}
            words = (
                f"^backend '{backend}' cannot run this {op}: {name} has a forward-mode tangent, "
                "which only reference has; expected .*$"
            )
            with pytest.raises(ValueError, match=words):
                run(op, dual, backend)


def of_argument(op: str, name: str, backend: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A few numbers of the op's results as a function of one of its arguments, and that argument."""
    given = named(op)

    def function(a: Tensor) -> Tensor:
        return torch.cat([y.flatten()[-3:] for y in run(op, {**given, name: a}, backend)]).sin()

    return function, given[name]


def gradient(function: Callable[[Tensor], Tensor], a: Tensor) -> Tensor:
    a = a.clone().requires_grad_()
    return torch.autograd.grad(function(a).sum(), a)[0]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
def test_transforms_of_functions(op, name, grad):
    function, a = of_argument(op, name, "auto")
    expected = gradient(function, a)
    with torch.set_grad_enabled(grad):
        function(a)
        _, tangent = torch.func.jvp(function, (a,), (torch.ones_like(a),))
        torch.testing.assert_close(tangent.sum(), expected.sum(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.func.jacfwd(function)(a).sum(0), expected, rtol=1e-4, atol=1e-4)
        if grad:
            torch.testing.assert_close(torch.func.grad(lambda a: function(a).sum())(a), expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(torch.func.jacrev(function)(a).sum(0), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("in_dim", [0, 1, -1])
@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
def test_vmap(op, name, in_dim):
    function, a = of_argument(op, name, "auto")
    several = torch.stack([a, 2 * a, a - 1], in_dim)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            expected = torch.stack([function(one) for one in several.unbind(in_dim)])
            torch.testing.assert_close(torch.vmap(function, in_dims=in_dim)(several), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_vmap_keeps_the_layout_of_a_sample(op, memory_format):
    first, *_ = DECLARED[op].names
    given = example(op, memory_format)
    x = given.pop(first)
    samples = torch.stack([x, 2 * x])
    expected = [getattr(ops, op)(x, **given, backend="reference") for x in samples]
    result = torch.vmap(lambda x: getattr(ops, op)(x, **given))(samples)
    for i, one in enumerate(expected):
        for y, truth in zip(several(result), several(one)):
            torch.testing.assert_close(y[i], truth, rtol=1e-4, atol=1e-4)
            assert y[i].stride() == truth.stride()


@pytest.mark.parametrize("backend", [b for b in FAST if b.values[0] not in ON_GPU])
@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
def test_a_fast_backend_refuses_transforms(op, name, backend):
    function, a = of_argument(op, name, backend)
    transformed = (
        lambda: torch.vmap(function)(a[None]),
        lambda: torch.func.jvp(function, (a,), (a,)),
        lambda: torch.func.jacfwd(function)(a),
        lambda: torch.func.jacrev(function)(a),
        lambda: torch.func.grad(lambda a: function(a).sum())(a),
    )
    words = (
        f"^backend '{backend}' cannot run this {op}: a transform of torch.func is at work, "
        "which only reference supports; .*$"
    )
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            function(a)
            for call in transformed:
                with pytest.raises(ValueError, match=words):
                    call()
            function(a)


@pytest.mark.parametrize("op", OPS)
def test_a_compiled_gradient_is_not_lost(op):
    torch._dynamo.reset()
    function, a = of_argument(op, DECLARED[op].names[0], "auto")
    compiled = torch.compile(torch.func.grad(lambda a: function(a).sum()), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(a), gradient(function, a), rtol=1e-4, atol=1e-4)
    refused, _ = of_argument(op, DECLARED[op].names[0], "cpu")
    for call in (torch.func.grad(lambda a: refused(a).sum()), functools.partial(gradient, refused)):
        with pytest.raises(ValueError, match=f"backend 'cpu' cannot run this {op}: "):
            torch.compile(call, backend="aot_eager")(a)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("op", OPS)
def test_tensors_of_inference_mode_in_any_order(op, backend, mode):
    given = named(op, backend)
    with torch.inference_mode():
        inside = {name: a.clone() if isinstance(a, Tensor) else a for name, a in given.items()}
        first = run(op, inside, backend)
    expected = [y.clone() for y in first]
    for _ in range(2):
        for arguments in (given, inside):
            with mode():
                assert same(run(op, arguments, backend), expected)
        with torch.inference_mode():
            assert same(run(op, given, backend), expected)
        for name in tensors(op) if backend in ("auto", "cpu", "reference") else ():  # one of them from inside
            with mode():
                assert same(run(op, {**given, name: inside[name]}, backend), expected)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
def test_a_gradient_beside_tensors_of_inference_mode(op, name, backend):
    given = named(op)
    expected = gradient(
        lambda a: torch.cat([y.flatten() for y in run(op, {**given, name: a}, backend)]).sin(), given[name]
    )
    with torch.inference_mode():
        inside = {name: a.clone() if isinstance(a, Tensor) else a for name, a in given.items()}
    for _ in range(2):
        result = gradient(
            lambda a: torch.cat([y.flatten() for y in run(op, {**inside, name: a}, backend)]).sin(), given[name]
        )
        torch.testing.assert_close(result, expected)


class Wrapped(Tensor):
    """A tensor that keeps its values in another one, as quantised and distributed tensors do."""

    seen: list[str] = []  # noqa: RUF012

    @staticmethod
    def __new__(cls, inner: Tensor):
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner: Tensor):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(str(function))
        args, kwargs = torch.utils._pytree.tree_map_only(Wrapped, lambda w: w.inner, (args, kwargs or {}))
        return function(*args, **kwargs)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
def test_a_wrapper_in_any_argument_sees_the_op(op, name, grad):
    given = named(op)
    with torch.set_grad_enabled(grad):
        expected = run(op, given, "cpu")
        for backend in ("cpu", "auto"):
            Wrapped.seen.clear()
            assert same(run(op, {**given, name: Wrapped(given[name])}, backend), expected)
            assert f"coalescer_fast.{op}.default" in Wrapped.seen


def no_tensors() -> list[object]:
    """What is no dense tensor of a floating-point dtype."""
    x = torch.ones(2, 6, 4, 5)
    return [
        *([1.0, 2.0], np.ones((2, 3)), 3, "x"),
        *(x.to(dtype) for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)),
        *(x.to_sparse(), x[0, 0].to_sparse_csr(), *([x.to_mkldnn()] if torch.backends.mkldnn.is_available() else [])),
        *(
            torch.nested.nested_tensor([x[0, 0, 0], x[0, 0, 1]], layout=layout)
            for layout in (torch.strided, torch.jagged)
        ),
        torch.quantize_per_tensor(x[0, 0, 0], 0.1, 0, torch.quint8),
    ]


def refused(call: Callable[[], object], *words: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    message = str(caught.value)
    assert re.match(rf"^{re.escape(words[0])} (is|has) ", message), message
    assert all(word in message for word in words), message
    assert "\n" not in message
    assert "expected" in message or "use one of" in message, message


@pytest.mark.filterwarnings("ignore::UserWarning")  # quantized and nested tensors, and sparse rows, are old or new
@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
def test_what_is_no_dense_floating_tensor_is_refused(op, name, backend):
    given = named(op)
    elsewhere = (
        [] if name == DECLARED[op].names[0] else [given[name].to("meta")]
    )  # where the first is, the others must be
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            run(op, given, backend)  # the second call of a launcher
            for wrong in (*no_tensors(), *elsewhere):
                refused(lambda wrong=wrong: run(op, {**given, name: wrong}, backend), name)


@pytest.mark.parametrize(
    ("op", "name"),
    [
        (op, name)
        for op, names in {"dual_head": 5, "coalesce_step": 3, "bias_residual": 1}.items()
        for name in tensors(op)[:names]
    ],
)
def test_none_in_the_place_of_a_tensor_is_refused(op, name):
    refused(lambda: run(op, {**named(op), name: None}, "auto"), name, "None")


NO_NUMBERS = {
    "a string": "1e-5",
    "None": None,
    "a list": [1.0],
    "a tensor": torch.ones(()),
    "a complex": 1j,
    "nan": float("nan"),
    "inf": 1e999,
}
NO_INTEGERS = {
    "a float": 2.0,
    "a string": "2",
    "None": None,
    "a list": [2],
    "a tensor": torch.tensor(2),
    "a bool": True,
}
NO_CHOICES = {
    "a number": 3,
    "a list": ["silu"],
    "an array": np.ones(2),
    "a tensor": torch.ones(2),
    "a bool": True,
    "another": "relu",
}
SCALARS = [
    *(("group_norm_silu", "num_groups", value) for value in NO_INTEGERS.values()),
    *(
        (op, name, v)
        for op, name in (("group_norm_silu", "eps"), ("coalesce_step", "eps"), ("coalesce_step", "eta"))
        for v in NO_NUMBERS.values()
    ),
    *(
        (op, name, v)
        for op, name in (("group_norm_silu", "activation"), ("coalesce_step", "mode"))
        for v in NO_CHOICES.values()
    ),
    *((op, "backend", v) for op in OPS for v in (*NO_CHOICES.values(), None)),
]


@pytest.mark.parametrize(("op", "name", "value"), SCALARS, ids=str)
def test_scalars_of_another_type_are_refused(op, name, value):
    given = named(op)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            run(
                op, given | ({"num_groups": 1} if op == "group_norm_silu" else {}), "cpu"
            )  # 1 == True, the second call of a launcher
            if name == "backend":
                with pytest.raises(
                    ValueError, match=r"^backend .* is unknown to .*; use one of auto, reference, [^\n]*$"
                ):
                    run(op, given, value)
            else:
                refused(lambda: run(op, {**given, name: value}, "cpu"), name)


def test_numbers_of_other_kinds_are_taken():
    given = named("group_norm_silu")
    with torch.no_grad():
        for backend in ("cpu", "reference"):
            expected = run("group_norm_silu", {**given, "num_groups": 3, "eps": 0.5}, backend)
            odd = {**given, "num_groups": np.int64(3), "eps": np.float32(0.5)}
            assert all(same(run("group_norm_silu", odd, backend), expected) for _ in range(2))
            assert same(
                run("coalesce_step", named("coalesce_step") | {"eta": 1}, backend),
                run("coalesce_step", named("coalesce_step") | {"eta": 1.0}, backend),
            )


def test_backends_of_what_is_no_name():
    with pytest.raises(ValueError, match=r"^op of type list is unknown: use "):
        ops.backends(["group_norm_silu"])
