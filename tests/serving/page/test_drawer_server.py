"""The page with drawer-server.js, in a browser, against a server that answers as OpenAI's does."""

from __future__ import annotations

import base64
import http.server
import io
import json
import threading
import time
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ...helpers import chromium

PAGE = Path(str(files("coalescer_fast") / "serving" / "page"))
NAMES = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js", "/drawer.js": "drawer-server.js"}
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}


def picture(prompt: str, seed: int, index: int) -> np.ndarray:
    """Pixels that tell what was asked for."""
    return np.random.default_rng([len(prompt), seed % 2**32, index]).integers(0, 256, (64, 64, 3), np.uint8)


def encoded(pixels: np.ndarray) -> str:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "png")
    return base64.b64encode(content.getvalue()).decode()


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args) -> None:
        pass

    def answer(self, status: int, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            model = {"id": "emoji-64", "object": "model", "styles": ["3d", "flat"]}
            self.answer(200, "application/json", json.dumps({"data": [model]}).encode())
        else:
            path = PAGE / NAMES[self.path]
            self.answer(200, TYPES[path.suffix], path.read_bytes())

    def do_POST(self) -> None:
        said = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, self.headers.get("Authorization"), said))
        if said["prompt"] == "too much":
            error = {"message": "the queue is full: try again", "type": "rate_limit", "param": None, "code": None}
            self.answer(429, "application/json", json.dumps({"error": error}).encode())
            return
        data = []
        for i in range(said["n"]):
            pixels = picture(said["prompt"], said["seed"], i)
            one = {"b64_json": encoded(pixels), "revised_prompt": said["prompt"] + ", 3d style", "seed": said["seed"]}
            one |= {"picture": i, "quality": 0.5, "matched": {"name": "octopus", "similarity": 0.9}}
            if said["steps"]:
                one["steps"] = [encoded(255 - pixels), encoded(pixels // 2), encoded(pixels)]
            data.append(one)
        answer = {"created": 0, "data": data, "warnings": ["a warning"], "model": "emoji-64"}
        self.answer(200, "application/json", json.dumps(answer).encode())


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_the_page_draws_by_a_server(server):
    if reason := chromium.unavailable():
        pytest.skip(reason)
    with chromium.browser() as page:
        page.open(f"http://127.0.0.1:{server.server_port}/#token=secret")
        page.wait("main?.prompt === 'octopus' && document.getElementById('loading').hidden")
        seed = 2**64 - 1  # more digits than a number of JavaScript has
        page.evaluate(f"document.getElementById('seed').value = '{seed}'; change()")
        page.press("Delete", 46)
        page.type("cat")
        page.wait(
            "main.prompt === 'cat' && main.steps && document.getElementById('announcement').textContent.includes('cat')"
        )
        pixels = picture("cat", seed, 0)
        assert np.array_equal(page.canvases("#picture")[0], pixels)
        for found, wanted in zip(page.canvases("#steps canvas"), (255 - pixels, pixels // 2, pixels), strict=True):
            assert np.array_equal(found, wanted)
        variations = [picture("cat", seed, i) for i in range(8)]
        deadline = time.monotonic() + 20
        while not np.array_equal(page.canvases("#cells canvas"), variations):
            assert time.monotonic() < deadline
            page.evaluate("new Promise((resume) => setTimeout(resume, 100))")
        assert page.evaluate("document.getElementById('facts').innerText").count("octopus (similarity 0.90)") == 1
        assert page.evaluate("document.getElementById('warnings').innerText") == "a warning"
        assert {path for path, _, _ in server.asked} == {"/v1/images/generations"}
        assert {token for _, token, _ in server.asked} == {"Bearer secret"}
        assert {said["seed"] for _, _, said in server.asked} == {0, seed}
        page.evaluate("cells[2].input.click()")
        page.wait("main.picture === 2 && !isDrawing")
        assert np.array_equal(page.canvases("#picture")[0], picture("cat", seed, 2))
        page.evaluate("document.getElementById('prompt').value = 'too much'; change()")
        page.wait("!document.getElementById('error').hidden")
        assert page.evaluate("document.getElementById('error').textContent") == "the queue is full: try again"
        asked = {url.partition("#")[0] for url in page.requests}
        assert {url.split("/")[2] for url in asked if url.startswith("http")} == {f"127.0.0.1:{server.server_port}"}
