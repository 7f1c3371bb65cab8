from __future__ import annotations

import pytest
import torch
from torch import nn

from coalescer_fast.models import CoalescerUNet
from coalescer_fast.runtime.native.record import MetaCopy, Recording, record_module
from coalescer_fast.runtime.native.steps import Attention, Convolution, GroupNormSiLU, Pointwise
from coalescer_fast.runtime.native.value import Unsupported


class Function(nn.Module):
    """A convolution, and what a test does with it."""

    def __init__(self, function, **kwargs):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, **{"padding": 1, **kwargs})
        self.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def recorded(network: nn.Module) -> Recording:
    x = torch.ones(2, 4, 6, 6)
    return record_module(MetaCopy(network), lambda twin, recorder: [twin(recorder.input(x, image=True))])


@pytest.mark.parametrize(
    ("function", "kwargs", "words"),
    [
        (lambda m, x: nn.functional.conv2d(x, x[:, :, :3, :3]), {}, "a weight is computed, not given"),
        (lambda m, x: m.conv(x).erfinv(), {}, "there is no step for aten.erfinv.default"),
        (lambda m, x: m.conv(x).exp_(), {}, "there is no step for aten.exp_.default"),
        (lambda m, x: m.conv(x) + x[:, :1], {}, "it broadcasts (2, 1, 6, 6) to (2, 4, 6, 6)"),
        (lambda m, x: m.conv(x) + x.transpose(2, 3), {}, "it computes with a part of a tensor, of shape (2, 4, 6, 6)"),
        (lambda m, x: m.conv(x).half(), {}, "it computes in torch.float16"),
        (lambda m, x: x.abs() + x, {}, "there is no step for aten.abs"),
        (lambda m, x: m.conv(x.reshape(2, 4, 36, 1)).reshape(2, 4, 6, 6), {}, "it reshapes an image to (2, 4, 36, 1)"),
        (lambda m, x: torch._foreach_mul_([h := m.conv(x)], 2.0) or h, {}, "there is no step for aten._foreach_mul_"),
        (lambda m, x: m.conv(x) - m.conv(x + 1), {}, "it subtracts tensors"),
        (lambda m, x: m.conv(x + torch.ones(2, 4, 6, 6, device="meta")), {}, "it computes with a part of a tensor"),
        (lambda m, x: nn.functional.conv2d(x, m.conv.weight * 2), {}, "a weight is computed, not given"),
        (
            lambda m, x: torch.where((x == 1).all(1, keepdim=True), x, m.conv(x)),
            {},
            "it chooses by something other than rows of zeros",
        ),
        (lambda m, x: m.conv(x) / x, {}, "it divides by a tensor"),
        (
            lambda m, x: m.conv(torch.from_numpy(x.numpy())),
            {},
            "it cannot be followed (can't convert meta device type tensor to numpy",
        ),
        (lambda m, x: m.conv(x), {"padding": 0}, "it has a convolution (3, 3) with stride [1, 1], padding [0, 0]"),
        (lambda m, x: m.conv(x), {"groups": 2}, "it has a convolution (3, 3)"),
        (lambda m, x: m.conv(x), {"dilation": 2, "padding": 2}, "it has a convolution (3, 3)"),
        (lambda m, x: torch.cat([x, x], 2), {}, "it concatenates tensors of 4 dimensions along dimension 2"),
        (lambda m, x: nn.functional.pad(x, (1, 1, 1, 1)), {}, "it pads by [1, 1, 1, 1] with 0"),
        (lambda m, x: m.conv(nn.functional.pad(x, (0, 1, 0, 1))), {}, "there is no step for a padding that no 3x3"),
    ],
)
def test_what_has_no_step_is_refused(function, kwargs, words):
    with pytest.raises(Unsupported) as caught:
        recorded(Function(function, **kwargs))
    assert str(caught.value).startswith(words)


def test_what_is_read_again_later_joins_nothing():
    def function(module, x):
        h = module.conv(x)
        y = h + x  # would join the convolution
        return module.conv(h) + y

    first, total, second = recorded(Function(function)).steps
    assert isinstance(first, Convolution)
    assert isinstance(total, Pointwise)
    assert isinstance(second, Convolution)
    assert (first.residual, total.x, total.residual, second.residual) == (None, first.y, first.x, total.y)


def test_a_convolution_waits_for_the_row_that_is_added_to_it():
    def function(module, x):
        h = module.conv(x)
        row = module.conv(x[:, :, :1, :1].contiguous())
        return h + row

    with pytest.raises(Unsupported, match="it computes with a part of a tensor"):
        recorded(Function(function))

    class Timed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 4)

        def forward(self, x, t):
            h = self.conv(x)
            return h + self.linear(t)[:, :, None, None]

    def run(twin, recorder):
        return [twin(recorder.given(torch.ones(2, 4, 6, 6)), recorder.given(torch.ones(2, 4)))]

    linear, conv = record_module(MetaCopy(Timed()), run).steps
    assert conv.row is linear.y
    assert conv.wants_float32(linear.y)


def test_vectors_are_computed_with_before_the_program():
    class Timed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x, t):
            t = t[:, None].float() * torch.arange(4, device=t.device)[None]
            unused = t.exp()
            return x + self.linear(t.sin())[:, :, None, None], unused[:0].sum() is None

    def run(twin, recorder):
        return [twin(recorder.given(torch.ones(2, 4, 6, 6)), recorder.given(torch.ones(2, dtype=torch.int64)))[0]]

    recording = record_module(MetaCopy(Timed()), run)
    ops = [str(call.function) for call in recording.prologue.calls]
    assert "aten.sin.default" in ops
    assert "aten.exp.default" not in ops
    x, t = torch.randn(2, 4, 6, 6), torch.tensor([3, 5])
    given, row = recording.prologue([x, t])
    assert given is x
    torch.testing.assert_close(row, (t[:, None] * torch.arange(4.0)).sin())


def test_outputs_may_be_read():
    recording = recorded(Function(lambda m, x: [h := m.conv(x), m.conv(h)][0]))
    assert [type(step) for step in recording.steps] == [Convolution]  # what nobody needs is no step


def test_joins():
    def function(module, x):
        return (module.conv(module.conv(x).relu()) + x).relu()

    first, second = recorded(Function(function)).steps
    assert isinstance(first, Convolution)
    assert isinstance(second, Convolution)
    assert first.relu
    assert second.relu
    assert first.residual is None
    assert (second.x, second.residual) == (first.y, first.x)


def test_a_value_added_to_itself_is_twice_it():
    first, second = recorded(Function(lambda m, x: (h := m.conv(x)) + h)).steps
    assert isinstance(first, Convolution)
    assert isinstance(second, Pointwise)
    assert second.x_scale == 2
    assert first.residual is second.residual is None


def test_a_network_is_recorded_without_data_and_left_as_it_is():
    network = CoalescerUNet(
        block_out_channels=(8, 8), norm_num_groups=2, embedding_dim=8, description_dim=8, num_attention_heads=2
    )
    before = {name: (p.data_ptr(), p._version, p.requires_grad) for name, p in network.named_parameters()}
    film = network.condition(torch.ones(1, 8)).film

    def run(twin, recorder):
        assert all(p.is_meta for p in twin.parameters())
        twin.set_backend("auto")
        given = [(recorder.input(a), recorder.input(b)) for a, b in film]
        from coalescer_fast.models.unet import Conditioning

        return twin(
            recorder.input(torch.ones(1, 16, 8, 8), image=True), Conditioning(given, None, []), return_dict=False
        )

    recording = record_module(MetaCopy(network), run)
    kinds = [type(step) for step in recording.steps]
    assert kinds.count(GroupNormSiLU) == sum(isinstance(m, nn.GroupNorm) for m in network.modules())
    assert kinds.count(Attention) == sum(type(m).__name__ == "SelfAttention" for m in network.modules())
    assert [tuple(result.shape) for _, result in recording.outputs] == [(1, 16, 8, 8), (1,)]
    assert before == {name: (p.data_ptr(), p._version, p.requires_grad) for name, p in network.named_parameters()}
    assert network.backend == "reference"
