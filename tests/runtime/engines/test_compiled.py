from __future__ import annotations

import gc
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from coalescer_fast.runtime.engines import compiled


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 3, 1, 1))

    def forward(self, x, *rest):
        return (torch.conv2d(x, self.weight) + rest[0],)


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch):
    """Of torch.compile, only what traces, guards and keeps."""
    seen = []

    def backend(graph, inputs):
        seen.append(weakref.ref(graph))
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    return seen


@torch.no_grad()
def test_any_number_of_sizes_each_compiled_once_and_freed(no_compiler):
    kept = []
    for n in range(1, 13):  # beyond torch's limit for one code
        x, other = torch.randn(n, 3, 2, 2), torch.randn(1)
        call = compiled.prepare(Scale(), (x, other), torch.float32, Path())([other])
        for layout in (x, x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
            torch.testing.assert_close(call(layout)[0], x.sum(1, keepdim=True).expand(n, 4, 2, 2) + other)
        assert len(no_compiler) == n
        kept = [*kept[-1:], call]
    del call
    gc.collect()
    assert sum(graph() is not None for graph in no_compiler) <= 2
