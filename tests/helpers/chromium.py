"""Drives headless Chromium by its DevTools protocol."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, build_opener

import numpy as np

FLAGS = (
    "--headless=new",
    "--no-sandbox",  # tests may run as root
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-search-engine-choice-screen",
    "--disable-features=OptimizationHints,MediaRouter,Translate",
    # nothing but this machine has a name
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1",
    "--remote-debugging-port=0",
)


def unavailable() -> str | None:
    """Why no browser can be driven here; None where one can."""
    if find() is None:
        return "Chromium is not installed (apt-get install chromium)"
    try:
        import websocket  # noqa: F401
    except ImportError:
        return "the package websocket-client is not installed"
    return None


def find() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page:
    """A tab.

    Attributes:
        requests: addresses of all that the tab has asked for.
        problems: errors of scripts, and messages of the console at level error.
    """

    def __init__(self, socket: Any):
        self._socket, self._number = socket, 0
        self.requests: list[str] = []
        self.problems: list[str] = []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol, and return its result."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": params}))
        while True:
            said = json.loads(self._socket.recv())
            if said.get("id") == self._number:
                assert "error" not in said, (method, said["error"])
                return said["result"]
            self._note(said.get("method"), said.get("params", {}))

    def _note(self, event: str | None, params: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description") or details["text"])
        elif event == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.problems.append(params["entry"]["text"])

    def evaluate(self, expression: str) -> Any:
        """Evaluate JavaScript, wait for its promise, and return its value as JSON would have it."""
        found = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            details = found["exceptionDetails"]
            raise AssertionError(details.get("exception", {}).get("description") or details["text"])
        return found["result"].get("value")

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'", 120)

    def wait(self, condition: str, seconds: float = 30) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not self.evaluate(f"Boolean({condition})"):
            assert time.monotonic() < end, (condition, self.problems)
            time.sleep(0.02)

    def type(self, text: str) -> None:
        """Type a text into what has the focus, a character at a time, as an input method does."""
        for character in text:
            self.call("Input.insertText", text=character)

    def press(self, key: str, code: int, modifiers: int = 0) -> None:
        """Press and release a key."""
        text = {"text": "\r"} if key == "Enter" else {"text": " "} if key == " " else {}
        common = {
            "key": key,
            "code": "Space" if key == " " else key,
            "windowsVirtualKeyCode": code,
            "modifiers": modifiers,
        }
        self.call("Input.dispatchKeyEvent", type="keyDown", **common, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def fill(self, name: str, text: str) -> None:
        """Replace what a field of this id holds, as a user does."""
        self.evaluate(f"document.getElementById('{name}').focus(); document.getElementById('{name}').select()")
        self.press("Delete", 46)
        self.call("Input.insertText", text=text)

    def canvases(self, selector: str) -> list[np.ndarray]:
        """The pixels (H, W, 3) of square canvases."""
        read = "(c) => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"
        found = self.evaluate(f"[...document.querySelectorAll('{selector}')].map({read})")
        return [np.array(data, np.uint8).reshape(round((len(data) / 4) ** 0.5), -1, 4)[..., :3] for data in found]

    def resize(self, width: int, height: int, dark: bool = False, scale: float = 1) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path) -> None:
        """Write the whole page as PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def browser(*flags: str) -> Iterator[Page]:
    """A tab of a fresh browser, which ends with the block."""
    from websocket import create_connection

    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        command = [str(find()), *FLAGS, *flags, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port, end = Path(profile) / "DevToolsActivePort", time.monotonic() + 60
            while not port.is_file() or not port.read_text().strip():
                assert process.poll() is None, f"Chromium ended with status {process.returncode}"
                assert time.monotonic() < end, "Chromium does not start"
                time.sleep(0.05)
            address = f"http://127.0.0.1:{port.read_text().split()[0]}/json/list"
            tabs = json.loads(build_opener(ProxyHandler({})).open(address, timeout=30).read())
            url = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
            socket = create_connection(url, timeout=300, suppress_origin=True, http_no_proxy=["127.0.0.1"])
            try:
                yield Page(socket)
            finally:
                with suppress(Exception):
                    socket.close()
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
