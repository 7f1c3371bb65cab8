"""A server in a thread of the test's process, and requests to it of any bytes."""

from __future__ import annotations

import base64
import http.client
import io
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from coalescer_fast import CoalescerPipeline, PhiloxGenerator
from coalescer_fast.serving.app import PAGE, Service, create_app
from coalescer_fast.serving.server import Server, listen
from coalescer_fast.serving.settings import Settings

DRAW = "/v1/images/generations"


@dataclass
class Running:
    """A server that runs.

    Attributes:
        server: uvicorn's.
        service: what it serves.
        port: of 127.0.0.1.
    """

    server: Server
    service: Service
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self, method: str = "POST", path: str = DRAW, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers and content of an answer, JSON as what it says. A body that is no bytes is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, content, {"Content-Type": "application/json", **(headers or {})})
            return read(connection.getresponse())
        finally:
            connection.close()

    def send(self, data: bytes) -> tuple[int, dict[str, str], Any]:
        """The same for bytes that need not be a request."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
            with suppress(ConnectionError):  # an answer to the first half
                connection.sendall(data)
            response = http.client.HTTPResponse(connection)
            response.begin()
            return read(response)


def read(response: http.client.HTTPResponse) -> tuple[int, dict[str, str], Any]:
    content = response.read()
    headers = {name.lower(): value for name, value in response.getheaders()}
    said = json.loads(content) if headers.get("content-type") == "application/json" else content
    return response.status, headers, said


@contextmanager
def serving(pipe: CoalescerPipeline, page: Path = PAGE, **settings: Any) -> Iterator[Running]:
    """Serve a pipeline as "emoji-64" at a free port of this machine."""
    app = create_app(pipe, "emoji-64", Settings(**settings), page)
    listening, ready = listen("127.0.0.1", 0), threading.Event()
    server = Server(app, [listening], on_ready=ready.set)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not ready.wait(0.1):
            assert thread.is_alive(), "the server has ended"
        yield Running(server, app.state.service, listening.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join()


def pixels(b64_json: str) -> np.ndarray:
    """A picture of an answer, (H, W, 3)."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64_json))))


def drawn(pipe: CoalescerPipeline, prompt: str, seed: int, picture: int = 0, **options: Any) -> np.ndarray:
    """The picture of a direct call, (H, W, 3)."""
    return np.asarray(pipe(prompt, generator=PhiloxGenerator(seed, picture), **options).images[0])
