"""A thousand requests that are wrong in some way: each is answered 4xx, and none is alive afterwards."""

from __future__ import annotations

import http.client
import json
import logging
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..helpers.serving import DRAW

COUNT = 1000
ARGUMENTS = {  # values of wrong types, or out of bounds
    "prompt": [None, 0, 1.5, True, [], {}, ["cat"], "x" * 1001, "\ud83c"],
    "n": [0, -1, 17, 1.0, "1", True, [], {}, 10**40],
    "seed": [-1, 2**64, 0.5, "7", False, [], {}, -(10**40)],
    "size": ["64", "64×64", "1024x1024", "", 64, [64, 64], "../../etc/passwd"],
    "model": ["dall-e-3", "", "/etc/passwd", "../emoji-64", 0, [], {}],
    "response_format": ["url", "file:///etc/passwd", "", 1, True, []],
    "output_format": ["jpeg", "", 1, []],
    "stream": [True, "yes", 1, []],
    "steps": ["yes", 1, 2.5, [], {}],
    "negative_prompt": [0, [], {}, "x" * 1001, "\udfff"],
    "guidance_scale": ["1.5", True, 1e300, -1e300, [], {}],
    "num_inference_steps": [0, -2, 17, 2.0, "auto", True, 10**30],
    "prompt_matching": ["no", 0, 1, []],
    "latents": [[0] * 100, None],
    "__proto__": [{}, 1],
    "": [1],
    "\ud800": [1],
}
WORDS = ("NaN", "Infinity", "-Infinity", "1e999", "01", "+1", ".5", "0x10", "'1'", "undefined", "9" * 5000, "tru", "")


def request(body: bytes, method: str = "POST", path: str = DRAW, head: bytes = b"", kind: str = "application/json"):
    start = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
    return start.encode() + head + b"\r\n" + body


def wrong_argument(draw: random.Random) -> bytes:
    name = draw.choice(list(ARGUMENTS))
    body = {"prompt": "cat", name: draw.choice(ARGUMENTS[name])}
    return request(json.dumps(body).encode())


def several_wrong_arguments(draw: random.Random) -> bytes:
    names = draw.sample(list(ARGUMENTS), draw.randint(2, 6))
    return request(json.dumps({name: draw.choice(ARGUMENTS[name]) for name in names}).encode())


def no_json_number(draw: random.Random) -> bytes:
    name = draw.choice(["n", "seed", "guidance_scale", "num_inference_steps", "quality"])
    word = draw.choice(WORDS) if name != "quality" else draw.choice([w for w in WORDS if w != "1e999"])
    return request(f'{{"prompt": "cat", "{name}": {word}}}'.encode())


def no_object(draw: random.Random) -> bytes:
    values: list[Any] = [None, 1, "cat", [], [{"prompt": "cat"}], {}, {"n": 1}, True]
    return request(json.dumps(draw.choice(values)).encode())


def cut_off(draw: random.Random) -> bytes:
    whole = json.dumps({"prompt": "a cat 🎉", "n": 2, "size": "64x64"}, ensure_ascii=draw.random() < 0.5).encode()
    return request(whole[: draw.randrange(len(whole))])


def deep(draw: random.Random) -> bytes:
    levels = draw.randint(1000, 10_000)
    opening, closing = draw.choice([(b"[", b"]"), (b'{"a":', b"}"), (b'{"prompt":[', b"]}")])
    inner = draw.choice([b"", b"1", closing * levels])
    whole = opening * levels + inner
    return request(whole[:60_000] if draw.random() < 0.5 else b'{"prompt": "cat", "style": ' + whole[:60_000] + b"}")


def bad_utf8(draw: random.Random) -> bytes:
    bad = draw.choice([b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\xe2\x82", "é".encode("latin-1")])
    utf16 = '{"prompt": "cat"}'.encode("utf-16")
    return request(draw.choice([b'{"prompt": "' + bad + b'"}', utf16, draw.randbytes(draw.randint(1, 300)) + b"\xff"]))


def huge(draw: random.Random) -> bytes:
    size = draw.choice([65_537, 100_000, 1_000_000])
    if draw.random() < 0.5:
        return request(b'{"prompt": "' + b"x" * size + b'"}')
    chunk = b"8000\r\n" + b" " * 0x8000 + b"\r\n"
    head = f"POST {DRAW} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head.encode() + chunk * (size // 0x8000 + 1) + b"0\r\n\r\n"


def method(draw: random.Random) -> bytes:
    name = draw.choice(["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "PROPFIND", "post", "X" * 5000])
    return request(b'{"prompt": "cat"}', name)


def path(draw: random.Random) -> bytes:
    paths = ["/v1", "/v1/images", f"{DRAW}/", DRAW.upper(), "/v1/images/edits", "/v1/models/..", "/..", "//", "*", "/%"]
    paths += ["/%00", "/%ff%fe", "/static/../../etc/passwd", "/page/%2e%2e/settings.py", f"/{'a/' * 5000}", "/docs"]
    paths += ["/v1/models/" + "x" * 9000, "/v1/images/variations", "/v1/chat/completions", "/" + "%41" * 3000]
    return request(b'{"prompt": "cat"}', draw.choice(["GET", "POST"]), draw.choice(paths))


def header(draw: random.Random) -> bytes:
    heads = [b"no colon\r\n", b"Name : x\r\n", b": x\r\n", b"X: a\x00b\r\n", b"X: \xff\r\x01\r\n", b"(X): 1\r\n"]
    heads += [b"Content-Length: 5\r\n", b"Content-Length: -1\r\n", b"Host: y\r\n", b"Content-Encoding: gzip\r\n"]
    heads += [b"Transfer-Encoding: gzip\r\n", b"X: " + b"y" * 600_000 + b"\r\n", b"X: 1\r\n" * 100_000]
    heads += [b" folded\r\n" if draw.random() < 0.5 else b"Content-Length: 1e3\r\n"]
    return request(b'{"prompt": "cat"}', head=draw.choice(heads))


def content_type(draw: random.Random) -> bytes:
    kinds = ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", "json"]
    return request(b'{"prompt": "cat"}', kind=draw.choice([*kinds, "application/jsonl", "application/json+x"]))


def no_http(draw: random.Random) -> bytes:
    lines = [
        b"GET /\r\n\r\n",
        b"\r\n\r\n\r\nhello\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\r\n\r\n",
    ]
    lines += [
        b"POST  HTTP/1.1\r\n\r\n",
        b"POST / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x00" * 100 + b"\r\n\r\n",
    ]
    lines += [f"POST {DRAW} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n".encode()]
    lines += [b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n", draw.randbytes(200).replace(b"\n", b"") + b"\r\n\r\n"]
    return draw.choice(lines)


def unfinished(draw: random.Random) -> bytes:
    whole = request(b'{"prompt": "cat"}')
    return whole[: draw.randint(1, len(whole) - 1)]


KINDS: list[Callable[[random.Random], bytes]] = [
    wrong_argument,
    several_wrong_arguments,
    no_json_number,
    no_object,
    cut_off,
    deep,
    bad_utf8,
    huge,
    method,
    path,
    header,
    content_type,
    no_http,
]


def requests() -> Iterator[tuple[str, bytes]]:
    draw = random.Random(0)
    for i in range(COUNT):
        kind = unfinished if i % 50 == 0 else KINDS[i % len(KINDS)]
        yield kind.__name__, kind(draw)


def test_malformed_requests(running, monkeypatch, caplog):
    for module in ("requests", "server"):
        monkeypatch.setattr(f"coalescer_fast.serving.{module}.READ_SECONDS", 0.5)
    caplog.set_level(logging.WARNING)

    def answer(each: tuple[str, bytes]) -> tuple[str, bytes, int, Any]:
        try:
            status, _, said = running.send(each[1])
        except (OSError, http.client.HTTPException) as error:
            status, said = 0, repr(error)
        return *each, status, said

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(answer, requests()))
    assert len(answers) == COUNT
    for kind, data, status, said in answers:
        assert 400 <= status < 500, (kind, data[:300], status, said)
        if not data.startswith(b"HEAD"):
            assert len(said["error"]["message"]) < 400, (kind, data[:300])
            assert said["error"]["type"] == "invalid_request_error"
    for _ in range(50):
        if not running.server.server_state.connections:
            break
        time.sleep(0.1)
    assert not running.server.server_state.connections
    assert not running.server.server_state.tasks
    assert running.service.batcher.waiting == 0
    assert running.service.metrics.registry.get_sample_value("coalescer_fast_requests_in_progress") == 0
    faults = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert not faults, faults[0]
    assert running.ask(body={"prompt": "cat"})[0] == 200
