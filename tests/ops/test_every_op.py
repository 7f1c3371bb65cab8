"""What holds for every op that is declared: nothing here names one, but the schemas that users may rely on."""

from __future__ import annotations

import importlib
import inspect
import pickle
import sys
import traceback

import pytest
import torch

from coalescer_fast import ops
from coalescer_fast.ops import dispatch
from coalescer_fast.ops.op import OPS, NoMemory

from ..helpers.examples import NAMES, example, several, shortest
from ..helpers.numerics import DTYPES, LAYOUTS, able, arrange, assert_accurate, call, exact, takes

# (op, backend) of what runs on CPU tensors here
PAIRS = [(op, backend) for op in NAMES for backend in able(op)]

SCHEMAS = {
    "bias_residual": "(Tensor x, Tensor? bias=None, Tensor? residual=None, *, str backend='auto') -> Tensor",
    "coalesce_step": (
        "(Tensor sample, Tensor direction, Tensor distance, *, float eta=1.0, str mode='unit', float eps=1e-06, "
        "str backend='auto') -> Tensor"
    ),
    "dual_head": (
        "(Tensor h, Tensor direction_weight, Tensor direction_bias, Tensor distance_weight, Tensor distance_bias, *, "
        "Tensor? sample=None, Tensor? anchor=None, str backend='auto') -> (Tensor, Tensor)"
    ),
    "group_norm_silu": (
        "(Tensor x, int num_groups, Tensor? weight=None, Tensor? bias=None, float eps=1e-05, *, Tensor? scale=None, "
        "Tensor? shift=None, Tensor? skip=None, Tensor? pre_bias=None, str? activation='silu', str backend='auto') "
        "-> Tensor"
    ),
}


@pytest.fixture(autouse=True)
def forgetful():
    dispatch.forget()
    yield
    dispatch.forget()


@pytest.mark.parametrize("op", SCHEMAS)
def test_schemas_stay(op):
    assert OPS[op].overload._schema == torch._C.parse_schema(f"coalescer_fast::{op}{SCHEMAS[op]}")


@pytest.mark.parametrize("op", NAMES)
def test_the_public_function_is_as_it_was_written(op):
    function = getattr(ops, op)
    written = inspect.unwrap(function)
    assert written is not function
    assert inspect.signature(function) == inspect.signature(written)
    assert (function.__name__, function.__doc__, function.__module__) == (op, written.__doc__, written.__module__)
    assert list(inspect.signature(function).parameters) == [*OPS[op].names, "backend"]
    assert pickle.loads(pickle.dumps(function)) is function


@pytest.mark.parametrize("op", NAMES)
def test_importing_an_ops_modules_leaves_the_function_in_its_place(op):
    folder = f"coalescer_fast.ops.kernels.{op}"
    for name in (folder, *(f"{folder}{each}" for each in OPS[op].implementations.values() if isinstance(each, str))):
        importlib.import_module(name)
    assert callable(getattr(ops, op))
    assert getattr(ops, op) is getattr(sys.modules[folder], op)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(f"coalescer_fast.ops.{op}")


@pytest.mark.parametrize("op", NAMES)
def test_a_backend_without_a_kernel_says_so(op, monkeypatch):
    implementations = {"reference": OPS[op].implementations["reference"]}
    monkeypatch.setattr(OPS[op], "implementations", implementations)
    assert ops.backends(op, **shortest(op))["cpu"] == (False, f"{op} has no kernel for it")
    with pytest.raises(ValueError, match=f"^backend 'cpu' cannot run this {op}: {op} has no kernel for it$"):
        getattr(ops, op)(**shortest(op), backend="cpu")
    monkeypatch.setenv("COALESCER_FAST_STRICT", "1")  # nothing is passed over
    getattr(ops, op)(**shortest(op))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "backend"), PAIRS)
def test_errors_are_those_of_plain_torch(op, backend, dtype, layout):
    """The reference in float64 is the truth here, the reference in the dtype plain torch."""
    if not takes(backend, dtype):
        pytest.skip(f"{backend} does not take {dtype}")
    given = {
        name: arrange(a, layout) if isinstance(a, torch.Tensor) and a.ndim == 4 else a
        for name, a in example(op, dtype=dtype).items()
    }
    wide = {name: a.double() if isinstance(a, torch.Tensor) else a for name, a in given.items()}
    truths, plain = call(op, "reference", **wide), call(op, "reference", **given)
    for n, (result, one, truth) in enumerate(zip(*map(several, (call(op, backend, **given), plain, truths)))):
        assert result.dtype == one.dtype
        size = 4 * float(truth.abs().max())  # intermediate results may be larger
        assert_accurate(f"result {n}", result, one, exact(truth), one.dtype, size)


@pytest.mark.parametrize("op", NAMES)
def test_empty_batches(op):
    given = {name: a[:0] if isinstance(a, torch.Tensor) and len(a) == 2 else a for name, a in example(op).items()}
    expected = several(getattr(ops, op)(**given, backend="reference"))
    for backend in able(op):
        for result, truth in zip(several(getattr(ops, op)(**given, backend=backend)), expected):
            assert (result.shape, result.dtype) == (truth.shape, truth.dtype)


@pytest.mark.parametrize("op", NAMES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_meta_tensors_have_the_results_layout(op, memory_format):
    given = example(op, memory_format)
    meta = {name: a.to("meta") if isinstance(a, torch.Tensor) else a for name, a in given.items()}
    overload = getattr(torch.ops.coalescer_fast, op)
    for backend in able(op):
        for result, truth in zip(several(overload(**meta)), several(getattr(ops, op)(**given, backend=backend))):
            assert (result.shape, result.dtype, result.stride()) == (truth.shape, truth.dtype, truth.stride())


@pytest.mark.parametrize("error", [KeyError, TypeError, RuntimeError])
@pytest.mark.parametrize("op", NAMES)
def test_an_error_in_a_launch_is_raised_and_the_op_is_not_run_again(op, error):
    """A KeyError or TypeError of the look-up sends a call through the checks; one of the launch must not."""
    given, function, calls = example(op), getattr(ops, op), []
    with torch.no_grad():
        function(**given, backend="cpu" if "cpu" in able(op) else "reference")
        (key,) = OPS[op].launchers

        def failing(*args):
            calls.append(args)
            raise error("planted")

        OPS[op].launchers[key] = failing
        with pytest.raises(error, match="planted") as caught:
            function(**given, backend=key[0])
        assert len(calls) == 1
        assert OPS[op].launchers[key] is failing
        # the generated code can be read in the traceback
        frames = traceback.extract_tb(caught.value.__traceback__)
        assert any(frame.filename == f"<fast path of {op}>" and "launch(" in frame.line for frame in frames)


@pytest.mark.parametrize("op", NAMES)
def test_a_launch_without_memory_goes_through_the_checks(op):
    given, function = example(op), getattr(ops, op)
    with torch.no_grad():
        expected = several(function(**given))
        (key,) = OPS[op].launchers

        def failing(*args):
            raise NoMemory("planted")

        OPS[op].launchers[key] = failing
        for result, truth in zip(several(function(**given)), expected):
            assert torch.equal(result, truth)


@pytest.mark.parametrize("op", NAMES)
def test_one_launcher_serves_calls_that_are_alike(op):
    with torch.no_grad():
        for memory_format in (torch.contiguous_format, torch.channels_last):
            for _ in range(3):
                getattr(ops, op)(**example(op, memory_format))
    assert len(OPS[op].launchers) == 2


@pytest.mark.parametrize("op", [op for op in NAMES if "cpu" in OPS[op].implementations])
def test_a_launcher_keeps_no_tensor(op):
    import weakref

    with torch.no_grad():
        given = example(op, torch.channels_last)
        getattr(ops, op)(**given, backend="cpu")
        tensors = [weakref.ref(a) for a in given.values() if isinstance(a, torch.Tensor)]
        del given
    assert [tensor() for tensor in tensors] == [None] * len(tensors)


@pytest.mark.parametrize("op", NAMES)
def test_numbers_without_a_hash_are_taken(op):
    class Unhashable(float):
        __hash__ = None

    given = {name: Unhashable(a) if isinstance(a, float) else a for name, a in example(op).items()}
    for backend in able(op):
        getattr(ops, op)(**given, backend=backend)
