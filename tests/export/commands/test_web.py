from __future__ import annotations

import pytest

from coalescer_fast.export.web import site

from ...helpers.pipelines import small_pipeline


def test_a_folder_with_something_else_stays(run, tmp_path):
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "index.html").write_text("mine")
    status, _, said = run("web", "-o", "web")
    assert (status, said.count("\n")) == (1, 0)
    assert "web exists: name another folder, or add --force" in said
    (tmp_path / "web" / "notes.txt").write_text("mine")
    status, _, said = run("web", "-o", "web", "--force")
    assert status == 1
    assert "web holds notes.txt, which is no file of a site" in said
    (tmp_path / "file").write_text("mine")
    assert "file is no folder" in run("web", "-o", "file")[2]
    assert {path.name for path in (tmp_path / "web").iterdir()} == {"index.html", "notes.txt"}


def test_without_the_runtime_nothing_is_written(run, tmp_path):
    status, _, said = run("web", "-o", "web", "--runtime", "nowhere")
    assert status == 1
    assert "nowhere has no ort.wasm.min.js: give the folder dist of onnxruntime-web" in said
    assert not (tmp_path / "web").exists()


def test_a_model_that_attends_to_tokens_is_refused():
    with pytest.raises(ValueError, match="mine attends to the tokens of a description"):
        site.site(small_pipeline(cross_attention_dim=128), model="mine")
