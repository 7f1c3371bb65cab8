"""The service by HTTP: OpenAI's own client, pictures to the bit, and what is refused."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import coalescer_fast as cf
from coalescer_fast.serving import server as server_module
from coalescer_fast.serving.app import FILES, PAGE

from ..helpers.pipelines import tiny_pipeline
from ..helpers.serving import DRAW, drawn, pixels, serving

openai = pytest.importorskip("openai")
TOKEN = "a-token_of/32+characters=========="


def client(running, api_key="any"):
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key=api_key, max_retries=0)


def until(condition) -> None:
    for _ in range(200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it has not come true within 10 s")


class Gate:
    """Holds a server's drawing up."""

    def __init__(self, service, monkeypatch):
        self.open, self.begun, self.drawn = threading.Event(), threading.Event(), []
        draw = service.batcher.run

        def wait(pictures):
            self.begun.set()
            assert self.open.wait(30)
            self.drawn += pictures
            return draw(pictures)

        monkeypatch.setattr(service.batcher, "run", wait)


@pytest.fixture
def tiny():
    with serving(tiny_pipeline(), max_batch=2, max_queue=4, max_images=4) as found:
        yield found


@pytest.fixture
def gate(tiny, monkeypatch):
    found = Gate(tiny.service, monkeypatch)
    yield found
    found.open.set()


def test_openai_client_gets_pictures(running, direct):
    answer = client(running).images.generate(prompt="a little kitten", n=3, size="64x64", extra_body={"seed": 5})
    assert abs(answer.created - time.time()) < 60
    for i, image in enumerate(answer.data):
        np.testing.assert_array_equal(pixels(image.b64_json), drawn(direct, "a little kitten", 5, i))
        assert (image.seed, image.picture, image.matched["name"]) == (5, i, "cat")
        assert image.revised_prompt.startswith("cat, ")
        assert image.revised_prompt.endswith(" style")
        assert 0 < image.quality < 1
    assert len(answer.data) == 3
    assert answer.model == "emoji-64"
    assert answer.warnings == []


def test_a_request_says_its_seed_and_gets_its_warnings(running, direct):
    answer = client(running).images.generate(prompt="zxqv", quality="hd", extra_body={"prompt_matching": False})
    [image] = answer.data
    np.testing.assert_array_equal(pixels(image.b64_json), drawn(direct, "zxqv", image.seed, prompt_matching=False))
    assert image.matched is None
    assert len(answer.warnings) == 2
    assert "quality has no effect" in answer.warnings[1]


def test_steps_are_decoded(running, direct):
    status, _, answer = running.ask(body={"prompt": "owl", "seed": 2, "n": 2, "steps": True})
    assert status == 200
    for i, image in enumerate(answer["data"]):
        noise, after_one, after_two = map(pixels, image["steps"])
        np.testing.assert_array_equal(after_two, drawn(direct, "owl", 2, i))
        start, middle = direct("owl", generator=cf.PhiloxGenerator(2, i), return_trace=True).trace
        for found, step in ((noise, start), (after_one, middle)):
            [expected] = direct.image_processor.postprocess(direct.runtime.decode(step.sample), output_type="pil")
            np.testing.assert_array_equal(found, np.asarray(expected))


def test_openai_client_lists_models(running):
    models = client(running).models
    [model] = models.list()
    assert (model.id, model.owned_by, model.size) == ("emoji-64", "coalescer_fast", 64)
    assert "noto" in model.styles
    assert models.retrieve("emoji-64") == model
    with pytest.raises(openai.NotFoundError, match=r"no model 'gpt'; this server has 'emoji-64'"):
        models.retrieve("gpt")


@pytest.mark.parametrize(
    ("kind", "given", "said"),
    [
        ("BadRequestError", {"n": 99}, "n is 99; expected a whole number from 1 to 16"),
        ("BadRequestError", {"size": "1024x1024"}, "size is '1024x1024'; expected '64x64' or 'auto'"),
        ("BadRequestError", {"response_format": "url"}, "expected 'b64_json', or leave it out"),
        ("NotFoundError", {"model": "dall-e-3"}, "model is 'dall-e-3'; this server has 'emoji-64'"),
        ("APIStatusError", {"user": "x" * 70_000}, "the body has more than 65,536 bytes: send a shorter one"),
    ],
)
def test_openai_exceptions_carry_our_sentences(running, kind, given, said):
    with pytest.raises(getattr(openai, kind)) as raised:
        client(running).images.generate(**{"prompt": "cat", **given})
    assert said in raised.value.message
    assert raised.value.type == "invalid_request_error"


def test_together_and_to_the_bit(running, direct):
    """Requests of different options at the same time: each has the picture of a direct call, and many share a batch."""
    options = [{}, {}, {"guidance_scale": 1}, {"num_inference_steps": 3}, {"negative_prompt": "red"}]
    words = ["octopus", "a red apple", "pizza", "", "海", "snow man 🎉"]
    asked = [(words[i % 6], i, options[i % 5]) for i in range(60)]
    before = running.ask("GET", "/metrics")[2].decode()

    def ask(prompt, seed, given):
        return running.ask(body={"prompt": prompt, "seed": seed, **given})

    with ThreadPoolExecutor(30) as pool:
        answers = list(pool.map(lambda each: ask(*each), asked))
    for (prompt, seed, given), (status, _, answer) in zip(asked, answers):
        assert status == 200
        np.testing.assert_array_equal(pixels(answer["data"][0]["b64_json"]), drawn(direct, prompt, seed, **given))
    after = running.ask("GET", "/metrics")[2].decode()
    pictures, number = (
        count(after, name) - count(before, name)
        for name in ("coalescer_fast_pictures_total", "coalescer_fast_batch_pictures_count")
    )
    assert pictures == 60
    assert number <= 40


def count(metrics: str, name: str) -> float:
    [line] = [line for line in metrics.splitlines() if line.startswith(f"{name} ")]
    return float(line.split()[1])


def test_a_full_queue_is_429_with_retry_after(tiny, gate):
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(tiny.ask, body={"prompt": "cat"})
        assert gate.begun.wait(10)
        waiting = pool.submit(tiny.ask, body={"prompt": "cat", "n": 4})
        until(lambda: tiny.service.batcher.waiting == 4)
        with pytest.raises(openai.RateLimitError) as raised:
            client(tiny).images.generate(prompt="cat")
        assert "4 pictures can wait at a time and these do not fit: try again in 1 s" in raised.value.message
        assert raised.value.response.headers["retry-after"] == "1"
        assert raised.value.code == "rate_limit_exceeded"
        gate.open.set()
        assert [first.result()[0], waiting.result()[0]] == [200, 200]


def test_a_client_that_goes_away_frees_its_place(tiny, gate):
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(tiny.ask, body={"prompt": "cat", "seed": 1})
        assert gate.begun.wait(10)
        body = b'{"prompt": "dog", "n": 4}'
        head = (
            f"POST {DRAW} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", tiny.port)) as connection:
            connection.sendall(head.encode() + body)
            until(lambda: tiny.service.batcher.waiting == 4)
        until(lambda: tiny.service.batcher.waiting == 0)
        gate.open.set()
        assert held.result()[0] == 200
    assert {picture.prompt for picture in gate.drawn} == {"cat"}
    metrics = tiny.ask("GET", "/metrics")[2].decode()
    assert count(metrics, "coalescer_fast_abandoned_total") == 1


def test_only_the_picture_that_fails_is_refused(tiny, gate, monkeypatch):
    """A picture that is not finite is its request's own fault, whoever shares the batch."""
    pipe = tiny.service.pipe
    call = type(pipe).__call__

    def refuse_dogs(self, prompts, **options):
        if "dog" in prompts:
            raise ValueError("the picture of prompt 'dog' is not finite: lower guidance_scale")
        return call(self, prompts, **options)

    monkeypatch.setattr(type(pipe), "__call__", refuse_dogs)
    with ThreadPoolExecutor(3) as pool:
        held = pool.submit(tiny.ask, body={"prompt": "red"})
        assert gate.begun.wait(10)
        both = [pool.submit(tiny.ask, body={"prompt": prompt}) for prompt in ("dog", "cat")]
        until(lambda: tiny.service.batcher.waiting == 2)
        gate.open.set()
        (bad, _, error), (good, _, _) = (future.result() for future in both)
        assert held.result()[0] == 200
    assert (bad, good) == (400, 200)
    assert "lower guidance_scale" in error["error"]["message"]


def test_a_fault_of_ours_is_500_and_the_next_request_is_served(tiny, monkeypatch, caplog):
    def broken(self, *args, **options):
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(type(tiny.service.pipe), "__call__", broken)
        status, _, answer = tiny.ask(body={"prompt": "cat"})
    assert status == 500
    assert answer["error"]["type"] == "server_error"
    assert "RuntimeError: broken" in answer["error"]["message"]
    until(lambda: 'raise RuntimeError("broken")' in caplog.text)  # the traceback
    assert tiny.ask(body={"prompt": "cat"})[0] == 200


def test_a_token_is_asked_for():
    with serving(tiny_pipeline(), max_batch=1, token=TOKEN) as running:
        assert client(running, TOKEN).images.generate(prompt="cat", size="16x16").data
        for wrong in ("wrong", TOKEN + "=", TOKEN[:-1]):
            with pytest.raises(openai.AuthenticationError, match="bearer token is missing or wrong") as raised:
                client(running, wrong).images.generate(prompt="cat")
            assert raised.value.code == "invalid_api_key"
        for path in ("/v1/models", "/v1/anything", "/metrics"):
            status, headers, _ = running.ask("GET", path)
            assert (status, headers["www-authenticate"]) == (401, "Bearer")
            for wrong in (f"Basic {TOKEN}", TOKEN, "Bearer", ""):
                assert running.ask("GET", path, headers={"Authorization": wrong})[0] == 401
        assert running.ask("GET", "/v1/models", headers={"Authorization": f"bearer {TOKEN}"})[0] == 200
        assert running.ask("GET", "/healthz")[0] == 200
        assert TOKEN not in repr(running.service.settings)


def test_other_names_of_the_machine_are_refused():
    with serving(tiny_pipeline(), max_batch=1, hosts=("localhost", "127.0.0.1", "::1")) as running:
        for host in ("localhost", "LocalHost:8000", "127.0.0.1:1", "[::1]:8000", "localhost."):
            assert running.ask("GET", "/v1/models", headers={"Host": host})[0] == 200, host
        for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "[::2]", "127.0.0.1.evil"):
            for method, path in (("GET", "/v1/models"), ("GET", "/"), ("POST", DRAW)):
                status, _, answer = running.ask(method, path, headers={"Host": host})
                assert status == 421, host
                assert "use one of these names" in answer["error"]["message"]


def test_what_prepares_the_server_is_not_counted():
    with serving(tiny_pipeline(), max_batch=2) as running:
        counted = running.ask("GET", "/metrics")[2].decode()
        assert "coalescer_fast_pictures_total 0.0" in counted
        assert running.ask(body={"prompt": "cat"})[0] == 200
        assert "coalescer_fast_pictures_total 1.0" in running.ask("GET", "/metrics")[2].decode()


def test_the_limits_are_told(running):
    [model] = running.ask("GET", "/v1/models")[2]["data"]
    limits = running.service.settings
    assert (model["max_images"], model["max_prompt"]) == (limits.max_images, limits.max_prompt)


def test_files_of_the_page_and_no_others(tmp_path):
    for name in FILES.values():
        (tmp_path / name).write_text(f"this is {name}")
    (tmp_path / "secret").write_text("secret")
    with serving(tiny_pipeline(), tmp_path, max_batch=1) as running:
        for path, name in FILES.items():
            status, headers, content = running.ask("GET", path)
            assert (status, content.decode()) == (200, f"this is {name}")
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["content-type"].split(";")[0].endswith(name.rpartition(".")[2].replace("js", "javascript"))
            assert "default-src 'self'" in headers["content-security-policy"]
            assert running.ask("HEAD", path)[0] == 200
        for path in (
            "/secret",
            "/index.html",
            "/./secret",
            "/../secret",
            "/%2e%2e/secret",
            "/..%2fsecret",
            "/%2fetc/passwd",
            "//etc/passwd",
            "/page.css/../secret",
            "/page.css%00",
            f"/{tmp_path}/secret",
            "/page.js/",
            "/drawer-server.js",
        ):
            status, _, answer = running.ask("GET", path)
            assert status == 404, path
            assert "is not served" in answer["error"]["message"]


@pytest.mark.skipif(not PAGE.is_dir(), reason="the page is not in this checkout")
def test_the_page_is_these_files():
    assert sorted(path.name for path in PAGE.iterdir()) == sorted(FILES.values())


def test_methods_are_named(running):
    status, headers, answer = running.ask("GET", DRAW)
    assert (status, headers["allow"]) == (405, "POST")
    assert answer["error"]["message"] == f"GET '{DRAW}' is not served: use POST"


def test_health(running):
    assert running.ask("GET", "/healthz")[2]["model"] == "emoji-64"
    running.service.closing = True
    try:
        for method, path, body in (("GET", "/healthz", None), ("POST", DRAW, {"prompt": "cat"})):
            status, headers, answer = running.ask(method, path, body)
            assert (status, headers["retry-after"]) == (503, "1")
            assert "is being stopped" in answer["error"]["message"]
    finally:
        running.service.closing = False


def test_requests_that_do_not_arrive_are_given_up(tiny, monkeypatch):
    for module in ("coalescer_fast.serving.requests", "coalescer_fast.serving.server"):
        monkeypatch.setattr(f"{module}.READ_SECONDS", 0.2)
    head = f"POST {DRAW} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n"
    for data, said in ((head, "no request has arrived"), (head + "\r\n{", "the body has not arrived")):
        status, _, answer = tiny.send(data.encode())
        assert status == 408
        assert said in answer["error"]["message"]
    # what follows a request that is refused by its head is read for as long, not for ever
    with socket.create_connection(("127.0.0.1", tiny.port), timeout=10) as connection:
        connection.sendall(head.replace("100", "99999999").encode() + b"\r\n")
        assert b"413" in connection.recv(1000)
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            send_slowly(connection)
    until(lambda: not tiny.server.server_state.connections)


def send_slowly(connection) -> None:
    for _ in range(100):
        connection.sendall(b"x" * 1000)
        time.sleep(0.05)


def test_answers_are_json_of_ascii(running):
    status, _, answer = running.ask(body={"prompt": "海"})
    assert status == 200
    assert json.dumps(answer).isascii()


def test_nothing_is_logged_of_prompts(running, caplog):
    caplog.set_level(logging.INFO)
    server_module.quieten(access_log=False)
    running.ask(body={"prompt": "zxqvw"})
    assert "zxqvw" not in caplog.text
