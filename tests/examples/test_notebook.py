"""The notebook of examples/ runs, and holds the pictures and the words that a run gives."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

NOTEBOOK = Path(__file__).parents[2] / "examples" / "tour.ipynb"
LARGEST = 200_000  # bytes


def pictures(cells) -> list[np.ndarray]:
    found = [
        output["data"]["image/png"]
        for cell in cells
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", {})
    ]
    arrays = []
    for text in found:
        with Image.open(io.BytesIO(base64.b64decode(text))) as picture:
            arrays.append(np.asarray(picture.convert("RGB")).astype(np.int16))
    return arrays


def test_the_notebook_is_small_and_has_its_outputs():
    assert NOTEBOOK.stat().st_size < LARGEST
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    assert [picture.shape for picture in pictures(cells)] == [(64, 384, 3), (64, 192, 3), (64, 192, 3), (64, 128, 3)]
    assert not [cell for cell in cells if cell["cell_type"] == "code" and not cell["outputs"]][1:]  # but for the first
    # warnings of the machine that it ran on, with its paths
    assert not [output for cell in cells for output in cell.get("outputs", ()) if output.get("name") == "stderr"]


def test_the_notebook_runs_and_draws_what_it_shows(tmp_path):
    nbformat = pytest.importorskip("nbformat", reason="needs the package nbformat: pip install nbclient ipykernel")
    nbclient = pytest.importorskip("nbclient", reason="needs the package nbclient: pip install nbclient ipykernel")
    pytest.importorskip("ipykernel", reason="needs the package ipykernel: pip install ipykernel")
    notebook = nbformat.read(NOTEBOOK, 4)
    shown = pictures(notebook.cells)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    drawn = pictures(notebook.cells)
    assert len(drawn) == len(shown)
    for mine, theirs in zip(drawn, shown):
        assert mine.shape == theirs.shape
        # float32 in another order, and in the last of them half of the row in bfloat16, where the processor has it
        assert np.abs(mine - theirs).mean() < 2
    assert not list(tmp_path.iterdir())
