"""400 random calls: every op, dtype and layout, on tensors of every kind, in every mode of autograd and under any
default dtype. Each result is held to the rule of `numerics`, or the call is refused in one sentence, by a backend that
was asked for by
name."""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from coalescer_fast import ops

from ..helpers.numerics import DTYPES, EMULATED, ON_GPU, randn
from ..helpers.rules import bias_residual, coalesce_step, dual_head, group_norm_silu

CALLS, PARTS = 400, 8
# "triton" runs in the interpreter, which takes seconds for what is large
BACKENDS = ("auto", "cpu", "reference", *EMULATED, *([] if "triton" in ON_GPU else ["triton"]))
MODES = (torch.no_grad, torch.enable_grad, torch.inference_mode)


def expanded(x: Tensor) -> Tensor:
    return x[:1].clone().expand_as(x)


def at_an_offset(x: Tensor) -> Tensor:
    flat = torch.full((x.numel() + 3,), torch.nan, dtype=x.dtype)
    flat[3:] = x.flatten()
    return flat[3:].view(x.shape)


def sliced(x: Tensor) -> Tensor:
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), torch.nan, dtype=x.dtype)
    wide[..., 1::2] = x
    return wide[..., 1::2]


def rows_apart(x: Tensor) -> Tensor:
    wide = torch.full((3 * x.shape[0] + 1, *x.shape[1:]), torch.nan, dtype=x.dtype)
    wide[1::3] = x
    return wide[1::3]


def permuted(x: Tensor) -> Tensor:
    backwards = tuple(reversed(range(x.ndim)))
    return x.permute(backwards).contiguous().permute(backwards)


def channels_innermost(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if x.ndim > 2 else x.clone()


def negated(x: Tensor) -> Tensor:
    return torch._neg_view(-x)


def imaginary(x: Tensor) -> Tensor:
    real = x if x.dtype in (torch.float32, torch.float64) else x.float()
    return torch.complex(torch.zeros_like(real), -real).conj().imag if real is x else negated(x)


def of_inference_mode(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


def parameter(x: Tensor) -> Tensor:
    return torch.nn.Parameter(x.clone())


ARRANGEMENTS = (torch.clone, expanded, at_an_offset, sliced, rows_apart, permuted, channels_innermost)
KINDS = (torch.clone, torch.clone, negated, imaginary, of_inference_mode, parameter)


class Draw:
    """What is random about a call, all of it from one seed."""

    def __init__(self, seed: int):
        self.random, self.seed = random.Random(seed), seed
        self.dtype = self.any(DTYPES)
        # of every tensor that may have another
        self.others = self.any([(self.dtype,), (self.dtype,), DTYPES])

    def any(self, options):
        return self.random.choice(list(options))

    def tensor(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        self.seed += 1000
        x = randn(*shape, dtype=dtype or self.any(self.others), seed=self.seed)
        for change in (self.any(ARRANGEMENTS), self.any(KINDS)):
            x = change(x)
        return x

    def maybe(self, *shape: int) -> Tensor | None:
        return self.any([None, self.tensor(*shape)])

    def group_norm_silu(self) -> tuple[tuple, dict]:
        groups = self.any([1, 2, 3, 5])
        channels, n = groups * self.any([1, 2, 3, 10]), self.any([1, 2, 3])
        first = self.random.randint(1, channels)
        space = [self.random.randint(1, 6) for _ in range(self.any([1, 2, 2, 2, 3]))]
        skip = self.tensor(n, channels - first, *space, dtype=self.dtype) if first < channels else None
        args = (
            self.tensor(n, first, *space, dtype=self.dtype),
            groups,
            self.maybe(channels),
            self.maybe(channels),
            self.any([1e-5, 0.1]),
        )
        film = {"scale": self.maybe(n, channels), "shift": self.maybe(n, channels)}
        return args, {**film, "skip": skip, "pre_bias": self.maybe(channels), "activation": self.any(["silu", None])}

    def bias_residual(self) -> tuple[tuple, dict]:
        shape = [self.random.randint(1, 6) for _ in range(self.any([2, 3, 4, 4, 5]))]
        return (
            self.tensor(*shape, dtype=self.dtype),
            self.maybe(shape[1]),
            self.any([None, self.tensor(*shape, dtype=self.dtype)]),
        ), {}

    def dual_head(self) -> tuple[tuple, dict]:
        n, channels, latent, height, width = (self.random.randint(1, 6) for _ in range(5))
        weight = self.tensor(latent, channels, 3, 3)
        row = self.any([(channels,), (1, channels)])
        heads = (weight, self.tensor(latent), self.tensor(*row), self.tensor(1))
        points = {name: self.tensor(n, latent, height, width) for name in ("sample", "anchor")}
        return (self.tensor(n, channels, height, width, dtype=self.dtype), *heads), self.any([{}, points])

    def coalesce_step(self) -> tuple[tuple, dict]:
        n, shape = self.any([1, 2, 3]), [self.random.randint(2, 6) for _ in range(self.any([1, 2, 3, 3]))]
        args = self.tensor(n, *shape, dtype=self.dtype), self.tensor(n, *shape), self.tensor(n)
        return args, {"eta": self.any([0.5, 1, -1.3]), "mode": self.any(["unit", "raw"])}


JUDGES: dict[str, Callable[..., None]] = {
    "group_norm_silu": group_norm_silu.judge,
    "bias_residual": bias_residual.judge,
    "dual_head": dual_head.judge,
    "coalesce_step": coalesce_step.judge,
}


def ordinary(a: object) -> object:
    """The same values in memory of their own, with nothing beside them."""
    return torch.tensor(a.detach().tolist(), dtype=a.dtype).view(a.shape) if isinstance(a, Tensor) else a


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def outcome(seed: int) -> str:
    """Make a call twice and judge it: "", or why a backend that was asked for refuses it."""
    draw = Draw(seed)
    op, backend, mode, default = (
        draw.any(JUDGES),
        draw.any(BACKENDS),
        draw.any(MODES),
        draw.any([torch.float32, *DTYPES]),
    )
    args, kwargs = getattr(draw, op)()
    clean_args, clean_kwargs = tuple(map(ordinary, args)), {name: ordinary(a) for name, a in kwargs.items()}
    for _ in range(2):
        try:
            with mode(), default_dtype(default):
                result = getattr(ops, op)(*args, **kwargs, backend=backend)
        except ValueError as error:
            return f"{op} on {backend}: {error}"
        with torch.no_grad():
            JUDGES[op](result, *clean_args, **clean_kwargs)
        for a, clean in zip((*args, *kwargs.values()), (*clean_args, *clean_kwargs.values())):
            assert not isinstance(a, Tensor) or torch.equal(a, clean), "an input was modified"
    return ""


REFUSED = (
    r"(\w+) on (cpu|triton|cuda): backend '\2' cannot run this \1: "
    r"\w+ (has dtype|needs a gradient)[^\n]*; expected [^\n]*"
)


@pytest.mark.parametrize("part", range(PARTS))
def test_random_calls(part):
    right = 0
    for seed in range(part, CALLS, PARTS):
        try:
            reason = outcome(seed)
        except Exception as error:
            raise AssertionError(f"call {seed} fails") from error
        assert not reason or re.fullmatch(REFUSED, reason), f"call {seed}: {reason}"
        right += not reason
    assert right >= CALLS // PARTS // 2
