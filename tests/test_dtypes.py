"""Every tensor that the package makes names its dtype: `torch.set_default_dtype` changes nothing."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(path for folder in ("coalescer_fast", "export") for path in (ROOT / folder).rglob("*.py"))

# Functions of torch whose dtype is the default one, or guessed from the values, unless it is given. Those that take the
# dtype of a tensor (zeros_like, Tensor.new_empty, from_numpy) or an integer one (randint, randperm) are not among them.
FACTORIES = {
    *("empty", "empty_permuted", "empty_strided", "zeros", "ones", "full", "eye", "rand", "randn", "normal"),
    *("arange", "range", "linspace", "logspace", "tensor", "as_tensor", "asarray", "scalar_tensor"),
    *("bartlett_window", "blackman_window", "hamming_window", "hann_window", "kaiser_window"),
    *("Tensor", "sparse_coo_tensor", "sparse_csr_tensor"),
}


def without_dtype(source: str) -> Iterator[str]:
    """The calls of `FACTORIES` without a dtype, and the imports by which a call would not be seen."""
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
        ):
            made = node.func.value.id == "torch" and node.func.attr in FACTORIES
            if made and not any(keyword.arg == "dtype" for keyword in node.keywords):
                yield ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and node.module == "torch":
            # Tensor is a type here, and a factory only where it is called, as in torch.Tensor(...)
            if {alias.name for alias in node.names} & (FACTORIES - {"Tensor"}):
                yield ast.unparse(node)
        elif isinstance(node, ast.Import):
            if any(alias.name == "torch" and alias.asname for alias in node.names):
                yield ast.unparse(node)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Tensor":
            yield ast.unparse(node)


def test_every_tensor_is_made_with_a_dtype():
    assert len(MODULES) > 50
    found = [
        f"{path.relative_to(ROOT).as_posix()}: {call}"
        for path in MODULES
        for call in without_dtype(path.read_text("utf-8"))
    ]
    assert found == [], "give these calls a dtype"


@pytest.mark.parametrize(
    ("line", "seen"),
    [
        ("torch.zeros(3)", True),
        ("torch.tensor([1])", True),
        ("torch.full((2,), 0.5, device=x.device)", True),
        ("torch.empty(n, **options)", True),
        ("torch.Tensor([1, 2])", True),
        ("Tensor(3)", True),
        ("from torch import zeros", True),
        ("import torch as t", True),
        ("torch.zeros(3, dtype=torch.float32)", False),
        ("torch.arange(n, device=d, dtype=x.dtype)", False),
        ("torch.zeros_like(x)", False),
        ("x.new_empty(3)", False),
        ("torch.randperm(n)", False),
        ("np.zeros(3)", False),
        ("from torch import Tensor, nn", False),
    ],
)
def test_what_the_search_finds(line, seen):
    assert bool(list(without_dtype(line))) == seen
