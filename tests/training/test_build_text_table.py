from __future__ import annotations

import sys

import numpy as np
import pytest

from coalescer_fast.training.build_text_table import build_text_table, project, quantise


def test_quantise_is_within_half_a_step():
    rows = np.random.default_rng(0).normal(size=(50, 6)) * np.array([1e-3, 1, 5, 1, 1, 1e3])
    table, scale = quantise(rows)
    assert (table.dtype, scale.dtype) == (np.int8, np.float32)
    assert np.abs(table).max(0).tolist() == [127] * 6
    assert (np.abs(table * scale - rows) <= 0.5001 * scale).all()


def test_project_keeps_the_principal_axes_and_damps_frequent_tokens():
    rng = np.random.default_rng(0)
    states = rng.normal(size=(1000, 8)) * np.array([9, 5, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3]) + 7
    centred = states - states.mean(0)
    rows = project(states, 2)
    frequency = 1 / (np.arange(1000) + 2.7)
    undamped = rows / (1e-4 / (1e-4 + frequency / frequency.sum()))[:, None]
    assert np.allclose(
        undamped @ undamped.T, centred @ centred.T, rtol=0, atol=1e-3
    )  # the same geometry in two dimensions
    assert np.linalg.norm(undamped[:, 0]) > np.linalg.norm(undamped[:, 1])
    assert np.linalg.norm(rows[0]) < 0.01 * np.linalg.norm(undamped[0])


def test_no_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no vocab\.txt in .*BERT-like"):
        build_text_table(tmp_path, tmp_path / "out.npz")


def test_without_transformers(monkeypatch, tmp_path):
    (tmp_path / "vocab.txt").write_text("[CLS]\n[SEP]\na\n")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install transformers"):
        build_text_table(tmp_path, tmp_path / "out.npz")
