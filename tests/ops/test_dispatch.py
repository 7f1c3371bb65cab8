from __future__ import annotations

import pytest
import torch

from coalescer_fast import ops
from coalescer_fast.ops import dispatch

OPS = ("bias_residual", "coalesce_step", "dual_head", "group_norm_silu")


@pytest.fixture
def registry(monkeypatch):
    """A registry of one op with two backends, in place of the real one."""
    monkeypatch.setattr(dispatch, "_implementations", {})
    dispatch.register("double", "reference", lambda x: x + x)
    dispatch.register("double", "fast", lambda x: 2 * x)


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_its_reference(op):
    assert ops.backends(op)["reference"] == (True, "")


def test_all_public_ops_are_registered():
    assert set(ops.__all__) == {*OPS, "backends"}


def test_backends_take_the_arguments_of_the_call():
    assert ops.backends("group_norm_silu", torch.zeros(1, 4, 2, 2), 2, skip=None)["reference"] == (True, "")


def test_backends_of_an_unknown_op():
    with pytest.raises(ValueError, match=r"op 'relu' is unknown: use .*group_norm_silu"):
        ops.backends("relu")


@pytest.mark.parametrize("op", OPS)
def test_unknown_backend(op):
    with pytest.raises(ValueError, match=f"backend 'magic' is unknown to {op}: use auto or reference"):
        dispatch.implementation(op, "magic")


def test_auto_prefers_the_backend_that_was_registered_last(registry):
    assert dispatch.implementation("double", "auto") is dispatch.implementation("double", "fast")
    assert dispatch.implementation("double", "reference") is not dispatch.implementation("double", "fast")


def test_explicit_backends_are_listed_in_the_error(registry):
    with pytest.raises(ValueError, match="use auto or reference, fast"):
        dispatch.implementation("double", "slow")


def test_backends_lists_every_backend_in_order_of_registration(registry):
    assert list(dispatch.backends("double")) == ["reference", "fast"]


def test_registering_again_replaces(registry):
    dispatch.register("double", "fast", lambda x: x * 2.0)
    assert list(dispatch.backends("double")) == ["reference", "fast"]
    assert dispatch.implementation("double", "fast")(3) == 6.0
