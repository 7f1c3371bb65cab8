"""The command: what it refuses to start with, and how it ends."""

from __future__ import annotations

import http.client
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from coalescer_fast.cli import main, parser
from coalescer_fast.serving.command import TOKEN, is_loopback, settings_of
from coalescer_fast.serving.server import OnceAMinute, listen

from ..helpers.processes import python
from ..helpers.serving import DRAW, drawn, pixels, read


def test_parsing_imports_nothing_heavy(tmp_path):
    code = (
        "import sys; from coalescer_fast.cli import parser; parser().parse_args(['serve']); print(sorted(sys.modules))"
    )
    loaded = python(code, tmp_path)
    assert "coalescer_fast.serving.command" in loaded
    for name in ("torch", "fastapi", "uvicorn", "prometheus_client", "numpy"):
        assert f"'{name}'" not in loaded


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        (["--port", "70000"], 2, "'70000' is not a whole number from 0 to 65,535"),
        (["--batch-delay", "nan"], 2, "'nan' is not a number of milliseconds from 0 to 10,000"),
        (["--max-batch", "0"], 2, "'0' is not a whole number from 1 to 1,024"),
        (["--max-queue", "8"], 1, "max_batch is 32 and max_queue 8: these pictures wait together"),
        (["--max-images", "300"], 1, "max_images is 300 and max_queue 256"),
        (["--host", "no.such.host.invalid"], 1, "cannot listen at no.such.host.invalid, port 8000"),
        (["--host", "ü" * 70 + "..x"], 1, "no name of a machine"),
        (["--token-file", "missing"], 1, "missing"),
    ],
)
def test_wrong_options_are_one_sentence(options, status, said, capsys):
    with pytest.raises(SystemExit) if status == 2 else open(os.devnull) as raised:
        assert main(["serve", *options]) == status
    assert status != 2 or raised.value.code == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_a_port_in_use_is_said_before_the_model_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--model", "no such model", "--port", str(port)]) == 1
    said = f"cannot listen at 127.0.0.1, port {port} (address already in use): give another --host or --port"
    assert capsys.readouterr().err == f"coalescer-fast: {said}\n"


@pytest.mark.parametrize("text", ["", "two words", "a\ttab", "ümlaut"])
def test_what_is_no_token(text, tmp_path, monkeypatch, capsys):
    (tmp_path / "token").write_text(f"{text}\n")
    assert main(["serve", "--token-file", str(tmp_path / "token")]) == 1
    assert "holds no token" in capsys.readouterr().err
    monkeypatch.setenv(TOKEN, text)
    assert main(["serve"]) == 1
    assert f"{TOKEN} holds no token: expected printable ASCII" in capsys.readouterr().err


def test_asyncio_says_the_same_once_a_minute(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("coalescer_fast.serving.server.time.monotonic", lambda: now[0])
    passes = OnceAMinute().filter

    def record(text: str) -> logging.LogRecord:
        return logging.LogRecord("asyncio", logging.ERROR, "", 0, text, (), None)

    assert [passes(record("full")) for _ in range(3)] == [True, False, False]
    assert passes(record("other"))
    now[0] = 60.0
    assert passes(record("full"))


@pytest.mark.parametrize(
    ("host", "secret", "hosts"),
    [
        ("127.0.0.1", None, ("localhost", "127.0.0.1", "::1")),
        ("127.0.0.2", None, ("localhost", "127.0.0.1", "::1", "127.0.0.2")),
        ("127.0.0.1", "secret", None),
        ("0.0.0.0", None, None),
    ],
)
def test_names_are_asked_for_on_this_machine_without_a_token(monkeypatch, host, secret, hosts):
    monkeypatch.delenv(TOKEN, raising=False)
    if secret is not None:
        monkeypatch.setenv(TOKEN, secret)
    assert settings_of(parser().parse_args(["serve", "--host", host])).hosts == hosts


def test_addresses_of_this_machine_alone():
    for host, alone in {"127.0.0.1": True, "127.8.8.8": True, "::1": True, "localhost": True, "0.0.0.0": False}.items():
        assert is_loopback(host) == alone
    assert not is_loopback("::")
    assert not is_loopback("example.org")


@pytest.mark.skipif(os.name != "posix", reason="sends SIGTERM")
def test_sigterm_finishes_what_runs_and_refuses_what_is_new(tmp_path, direct):
    command = [sys.executable, "-m", "coalescer_fast", "serve", "--port", "0", "--max-batch", "2"]
    environment = {**os.environ, TOKEN: "secret"}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        found = re.fullmatch(r"emoji-64 at http://127\.0\.0\.1:(\d+) \(.*\)\n", said)
        assert found, process.communicate()
        port = int(found[1])

        def ask(method: str, path: str, body: dict | None = None):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            headers = {"Content-Type": "application/json", "Authorization": "Bearer secret"}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            return read(connection.getresponse())

        body = {"prompt": "octopus", "seed": 1, "n": 8, "num_inference_steps": 4}
        with ThreadPoolExecutor(4) as pool:
            answers = [pool.submit(ask, "POST", DRAW, body) for _ in range(3)]
            while b"coalescer_fast_pictures_waiting 0.0" in ask("GET", "/metrics")[2]:
                assert not all(answer.done() for answer in answers)
            process.send_signal(signal.SIGTERM)
            started = time.monotonic()
            while True:  # until nothing listens
                try:
                    assert ask("GET", "/healthz")[0] in (200, 503)
                except ConnectionError:
                    break
                assert time.monotonic() - started < 20
            assert process.poll() is None, "it has ended before its requests"
            for status, _, answer in (future.result() for future in answers):
                assert status == 200
                assert len(answer["data"]) == 8
        expected = drawn(direct, "octopus", 1, 7, num_inference_steps=4)
        assert (pixels(answer["data"][7]["b64_json"]) == expected).all()
        assert process.wait(120) == 0
        assert process.communicate() == ("", "")
    finally:
        process.kill()
        process.wait()


def test_answers_are_sent_at_once():
    """asyncio switches Nagle's algorithm off where the listening socket names its protocol."""
    with listen("127.0.0.1", 0) as listening:
        assert listening.proto == socket.IPPROTO_TCP
