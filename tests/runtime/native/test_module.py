"""Modules of all kinds through `coalescer_fast.accelerate`, against themselves in PyTorch."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import coalescer_fast as cf
from coalescer_fast.ops import native_library
from coalescer_fast.runtime.native.module import no_programs, runtime_of

from ...helpers.diffusers_networks import randn
from ...helpers.isa import EIGHT_BITS, using
from ...helpers.modules import VIEWS, Function, layers
from ...helpers.networks import seeded

pytestmark = pytest.mark.skipif(
    bool(no_programs(torch.float32)), reason=no_programs(torch.float32) or "programs run here"
)


def conv() -> nn.Conv2d:
    return nn.Conv2d(8, 8, 3, padding=1)


def returned(module: nn.Module, *args: Any, **kwargs: Any) -> list[Tensor]:
    with torch.no_grad():
        found = module(*args, **kwargs)
    return list(found) if isinstance(found, tuple) else [found]


def assert_right(module: nn.Module, *args: Any, refused: str = "") -> None:
    """That the accelerated module gives what it gave before, in two calls, natively or refused by these words."""
    module = seeded(module)
    twin = copy.deepcopy(module)
    cf.accelerate(module, dtype="float32")
    for _ in range(2):
        got, expected = returned(module, *args), returned(twin, *args)
        assert [y.shape for y in got] == [y.shape for y in expected]
        for y, y_ref in zip(got, expected):
            assert float((y - y_ref).norm()) <= 1e-5 * float(y_ref.norm())
    reason = runtime_of(module).refused
    assert reason == "" if not refused else refused in reason


X, V, ROWS = randn(2, 8, 6, 6), randn(2, 4), randn(2, 3, 8)
NOTHING = "there is no step for any of it"


@pytest.mark.parametrize(
    ("module", "given"),
    [
        (nn.Sequential(conv(), nn.Flatten(2), nn.GroupNorm(2, 8)), (X,)),
        (Function(lambda m, x, v: (m.c(x), v[:1], v.t()), c=conv()), (X, V)),
        (nn.Linear(8, 4), (ROWS,)),
        (nn.Linear(8, 4), (randn(2, 2, 3, 4, 8),)),
        (
            Function(
                lambda m, x: m.l(m.n(m.c(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2),
                c=conv(),
                n=nn.LayerNorm(8),
                l=nn.Linear(8, 4),
            ),
            (X,),
        ),
        (Function(lambda m, x: (lambda h: h[..., :4] * F.gelu(h)[..., 4:])(m.l(x)), l=nn.Linear(8, 8)), (ROWS,)),
        (Function(lambda m, x: x[:, :4] * F.silu(m.c(x)).chunk(2, 1)[1], c=conv()), (X,)),
        (Function(lambda m, x: (lambda a, b: a * F.gelu(b))(*m.c(x).chunk(2, 1)), c=conv()), (X,)),
        (Function(lambda m, x: F.silu(m.c(x)).add_(1), c=conv()), (X,)),
        (Function(lambda m, x: (x, m.c(x)), c=conv()), (X,)),
    ],
)
def test_runs_natively(module, given):
    assert_right(module, *given)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("view", VIEWS)
def test_views_of_any_strides(view, name):
    if name != "float32" and (reason := no_programs(getattr(torch, name) if name != "int8" else torch.uint8)):
        pytest.skip(reason)
    function, x = VIEWS[view]
    module = layers(function)
    expected = returned(module, x)
    cf.accelerate(module, dtype=name, **({"inputs": [(x,)]} if name == "int8" else {}))
    for _ in range(2):
        for y, y_ref in zip(returned(module, x), expected, strict=True):
            assert y.shape == y_ref.shape
            assert float((y - y_ref).norm()) <= (1e-5 if name == "float32" else 0.03) * float(y_ref.norm())
    assert runtime_of(module).refused == ""


@pytest.mark.parametrize(
    ("module", "given", "words"),
    [
        (nn.Linear(8, 4), (randn(2, 3, 4, 8),), "it computes with a part of a tensor"),
        (Function(lambda m, x: (lambda y: (y[:, :4].mul_(2), y)[1])(m.c(x)), c=conv()), (X,), "it writes to what is"),
        (
            Function(lambda m, x: (lambda y, z: (y.add_(1), z)[1])(y := m.c(x), y.contiguous()), c=conv()),
            (X,),
            "it writes",
        ),
        (nn.Sequential(nn.ReLU(inplace=True), conv()), (X.clone().abs(),), "it writes to what is also read elsewhere"),
        (nn.Linear(8, 4), (randn(0, 8),), "an empty tensor"),
        (Function(lambda m, x, v: (m.c(x), v.softmax(-1))[1], c=conv()), (X, V), NOTHING),
        (Function(lambda m, x: x @ x.transpose(1, 2)), (randn(2, 5, 16),), NOTHING),
        (Function(lambda m, x: (x @ m.l.weight).cumsum(1), l=nn.Linear(8, 8)), (ROWS,), NOTHING),
        (nn.Softmax(-1), (randn(2, 5, 16),), NOTHING),
        (nn.SiLU(), (randn(2, 3),), NOTHING),
        (nn.Linear(8, 4), (randn(8),), NOTHING),
        (nn.GroupNorm(2, 8), (randn(2, 8, 5),), NOTHING),  # channels are not innermost
    ],
)
def test_runs_in_torch_or_right(module, given, words):
    assert_right(module, *given, refused=words)


def test_what_torch_does_alone_is_no_native_program(monkeypatch):
    module = cf.accelerate(nn.Softmax(-1), dtype="float32")
    returned(module, ROWS)
    assert "native program" not in cf.explain(module)
    monkeypatch.setenv("COALESCER_FAST_STRICT", "1")
    with pytest.raises(ValueError, match=f"^COALESCER_FAST_STRICT=1 forbids Softmax to run in torch; {NOTHING}$"):
        returned(module, ROWS)


def test_explain_counts_what_runs_in_torch_before_a_program():
    def function(m, x, v):
        return m.c(x) + m.l(v.sin().unsqueeze(0).squeeze(0).cos().sin().exp().tanh().abs())[:, :, None, None]

    module = cf.accelerate(seeded(Function(function, c=conv(), l=nn.Linear(4, 8))), dtype="float32")
    returned(module, X, V)
    assert "6 operations in torch before it (sin, cos, exp, tanh, ...)" in cf.explain(module)
    module = cf.accelerate(seeded(conv()), dtype="float32")
    returned(module, X)
    assert "operations in torch" not in cf.explain(module)


def test_a_write_to_an_argument_reaches_the_caller():
    module = seeded(nn.Sequential(nn.ReLU(inplace=True), conv()))
    cf.accelerate(module, dtype="float32")
    x = X.clone()
    returned(module, x)
    assert torch.equal(x, X.relu())


@pytest.mark.parametrize(
    ("function", "given", "words"),
    [
        (lambda m, x: m.c(x) + torch.randn(2, 8, 1, 1), (), "it draws random numbers"),
        (lambda m, x: setattr(m, "n", m.n + 1) or m.c(x) * m.n, (), "its forward sets the attribute n"),
        (lambda m, x, o: m.c(x) * o.k, (type("Options", (), {"k": 2.0})(),), "it is given a Options"),
    ],
)
def test_state_that_no_program_sees_runs_in_torch(function, given, words):
    module = seeded(Function(function, c=conv(), n=1))
    cf.accelerate(module, dtype="float32")
    returned(module, X, *given)
    assert words in runtime_of(module).refused


def test_a_result_that_is_no_tree_of_tensors():
    class Result:
        pass

    def function(m, x):
        result = Result()
        result.y = m.c(x)
        return result

    module = seeded(Function(function, c=conv()))
    cf.accelerate(module, dtype="float32")
    (result,) = returned(module, X)
    assert not result.y.is_meta
    assert runtime_of(module).refused == "it returns a Result"


def test_functional_dropout_of_training_mode_drops_out():
    module = seeded(Function(lambda m, x: F.dropout(m.c(x), 0.5, m.training), c=conv())).train()
    cf.accelerate(module, dtype="float32")
    assert not torch.equal(*(returned(module, X)[0] for _ in range(2)))
    module.eval()
    assert torch.equal(*(returned(module, X)[0] for _ in range(2)))


def test_a_timestep_among_other_arguments_is_a_number():
    def forward(self, x, *rest, timestep=None):
        return self.c(x) * rest[0]

    module = seeded(type("Rest", (Function,), {"forward": forward})(None, c=conv()))
    cf.accelerate(module, dtype="float32")
    assert torch.equal(returned(module, X, 2)[0], 2 * returned(module, X, 1)[0])


def test_freed_weights_are_never_read():
    def made(seed: int) -> nn.Sequential:
        return seeded(nn.Sequential(conv(), conv(), conv()), seed)

    module, other = cf.accelerate(made(0), dtype="float32", keep_weights=False), made(1)
    (first,) = returned(module, X)
    assert returned(module[1], X)[0].isnan().all()
    with pytest.raises(ValueError, match=r"^Sequential cannot be saved: its weights were freed, by keep_weights=False"):
        module.state_dict()
    with pytest.raises(RuntimeError), torch.no_grad():  # several elements at one place in memory
        module[1].weight.mul_(2)
    assert torch.equal(returned(module, X)[0], first)
    with pytest.raises(ValueError, match=r"^Sequential has no memory for these weights: .* with assign=True$"):
        module.load_state_dict(other.state_dict())
    module[1], module[2] = module[2], module[1]
    with pytest.raises(ValueError, match="was freed where it was before"):
        returned(module, X)
    module[1], module[2] = module[2], module[1]
    module.load_state_dict(other.state_dict(), assign=True)
    assert module.state_dict().keys() == other.state_dict().keys()
    torch.testing.assert_close(returned(module, X)[0], returned(other, X)[0], rtol=1e-4, atol=1e-5)


def test_a_module_whose_weights_were_freed_keeps_its_dtype():
    module = cf.accelerate(seeded(nn.Sequential(conv(), conv())), dtype="float32", keep_weights=False)
    (expected,) = returned(module, X)
    module.to(torch.bfloat16)
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"^Sequential cannot be made bfloat16: its weights were freed, by .* anew$"
        ):
            returned(module, X)
    other = seeded(nn.Sequential(conv(), conv())).to(torch.bfloat16)
    module.load_state_dict(other.state_dict(), assign=True)
    torch.testing.assert_close(returned(module, X)[0], expected, rtol=0.05, atol=0.05)


@pytest.fixture(params=EIGHT_BITS)
def eight_bits(request):
    """An instruction set that multiplies 8-bit integers."""
    with using(request.param):
        yield


def test_8_bits(eight_bits):
    first, second = nn.Conv2d(8, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
    module = seeded(nn.Sequential(first, nn.GroupNorm(4, 32), nn.SiLU(), second))
    expected = returned(module, X)[0]
    cf.accelerate(module, dtype="int8", inputs=[(X,)])
    error = float((returned(module, X)[0] - expected).norm() / expected.norm())
    assert 1e-4 < error < 0.02  # of 8 bits, which it has
    assert not runtime_of(module).refused


def test_not_a_number_does_not_vanish_in_8_bits(eight_bits):
    module = seeded(nn.Sequential(conv(), nn.GroupNorm(4, 8), nn.SiLU(), conv()))
    cf.accelerate(module, dtype="int8", inputs=[(X,)])
    x = X.clone()
    x[0, 0, 0, 0] = torch.nan
    assert returned(module, x)[0].isnan().any()
    assert not returned(module, X)[0].isnan().any()


def test_tracing_sees_the_module():
    from torch.fx.experimental.proxy_tensor import make_fx

    module = seeded(nn.Sequential(conv()))
    twin = copy.deepcopy(module)
    cf.accelerate(module, dtype="float32")
    traced = make_fx(module)(X)
    torch.testing.assert_close(traced(2 * X), returned(twin, 2 * X)[0])
    with torch.no_grad():
        exported = torch.export.export(module, (X,), strict=False)
    torch.testing.assert_close(exported.module()(2 * X), returned(twin, 2 * X)[0])


@pytest.mark.skipif(torch.bfloat16 not in native_library.products(), reason="needs bfloat16")
def test_where_torch_has_amx_auto_leaves_it_a_module_of_bfloat16(monkeypatch):
    monkeypatch.setattr(native_library, "amx", lambda: True)
    monkeypatch.setenv("COALESCER_FAST_STRICT", "1")  # a choice, no fallback
    module = seeded(nn.Sequential(conv(), nn.SiLU())).bfloat16()
    x = randn(1, 8, 6, 6).bfloat16()
    (expected,) = returned(module, x)
    cf.accelerate(module)
    assert "the processor has AMX" in cf.explain(module)
    assert torch.equal(returned(module, x)[0], expected)
    assert "the processor has AMX" in runtime_of(module).refused
    assert "the processor has AMX" in cf.explain(copy.deepcopy(module))
    # native where it is asked for, in float32, and of weights that torch would multiply in float32
    for given, arguments in (
        (module, {"backend": "cpu"}),
        (module, {"dtype": "float32"}),
        (seeded(nn.Sequential(conv())), {"dtype": "bfloat16"}),
    ):
        cf.accelerate(given, **arguments)
        returned(given, x)
        assert runtime_of(given).refused == ""
        assert "native program" in cf.explain(given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((1, 2), "inputs[1] is no call of Linear: too many positional arguments"),
        ({"y": 1}, "inputs[1] is no call of Linear: missing a required argument: 'input'"),
    ],
)
def test_inputs_that_are_no_calls(given, words):
    if reason := no_programs(torch.uint8):
        pytest.skip(reason)
    module = nn.Linear(8, 8)
    with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
        cf.accelerate(module, dtype="int8", inputs=[(ROWS,), given])
    assert runtime_of(module) is None
