"""The page of a real server, in a browser: what is typed is drawn as by a direct call, to the bit."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ...helpers import chromium
from ...helpers.serving import drawn, serving

PROMPTS = (
    "octopus",
    "",
    "🐙 in a 🎩",
    "crème brûlée",
    "Café au lait, 3d style",
    "İstanbul",
    "한국어",
    "zzqx frobnicate",
)


@pytest.mark.skipif(chromium.unavailable() is not None, reason=str(chromium.unavailable()))
def test_the_canvas_holds_what_python_draws(running, direct):
    with chromium.browser() as page:
        page.open(running.url)
        page.wait("!document.getElementById('save').disabled", 60)
        for seed, text in enumerate(PROMPTS):
            page.fill("seed", str(2**53 + seed))
            page.fill("prompt", text)
            page.wait(f"main.prompt === {json.dumps(text)} && main.seed === '{2**53 + seed}' && !isDrawing", 60)
            [found] = page.canvases("#picture")
            assert np.array_equal(found, drawn(direct, text, 2**53 + seed)), text
        asked = {url for url in page.requests if not url.startswith(("blob:", "data:"))}
        assert all(url.startswith(running.url) for url in asked), asked
        assert not page.problems


@pytest.mark.skipif(chromium.unavailable() is not None, reason=str(chromium.unavailable()))
def test_the_page_keeps_to_the_limits_and_the_token_of_a_server(direct):
    token = "ab+cd/ef==&g"
    with serving(direct, max_batch=4, max_images=4, max_prompt=10, token=token) as running, chromium.browser() as page:
        page.open(f"{running.url}/#token={token}")
        page.wait("!document.getElementById('save').disabled", 60)
        page.wait("document.getElementById('announcement').textContent !== ''", 60)
        assert page.evaluate("document.getElementById('error').hidden")
        assert page.evaluate("[cells.length, document.getElementById('prompt').maxLength]") == [4, 10]
