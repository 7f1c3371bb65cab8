"""What a body may hold: every refusal is a sentence that names the argument and what was expected."""

from __future__ import annotations

import json

import pytest

from coalescer_fast.serving.drawing import Options, Picture
from coalescer_fast.serving.requests import parse
from coalescer_fast.serving.settings import Refused, Settings


def read(body):
    found = parse(body if isinstance(body, bytes) else json.dumps(body).encode())
    found.check("emoji-64", 64, Settings())
    return found


def test_pictures_of_a_request():
    whole = {
        "prompt": "cat",
        "n": 2,
        "seed": 2**64 - 1,
        "size": "64x64",
        "model": "emoji-64",
        "response_format": "b64_json",
        "steps": True,
        "negative_prompt": "dog",
        "guidance_scale": 2,
        "num_inference_steps": 4,
        "prompt_matching": False,
    }
    options = Options(4, 2.0, "dog", False, True)
    assert read(whole).pictures() == [Picture("cat", 2**64 - 1, i, options) for i in range(2)]


def test_the_least_request_has_a_seed_of_its_own():
    first, second = (read({"prompt": ""}).pictures() for _ in range(2))
    assert [picture.options for picture in first] == [Options()]
    assert first[0].seed != second[0].seed


def test_null_is_as_if_it_were_left_out():
    assert read({"prompt": "cat", "n": None, "seed": 1, "stream": None}) == read({"prompt": "cat", "seed": 1})


def test_arguments_of_openai_without_an_effect_are_named():
    assert read({"prompt": "cat", "quality": "hd", "style": None, "background": "auto"}).ignored() == [
        "quality has no effect on this model: leave it out"
    ]


@pytest.mark.parametrize(
    ("body", "status", "param", "said"),
    [
        (b"", 400, None, "the body is not JSON at line 1, column 1 (expecting value): send a JSON object"),
        (b"[1]", 400, None, 'the body is [1]; expected a JSON object such as {"prompt": "octopus"}'),
        (b"[" * 60_000, 400, None, "the body is nested too deeply: send a flat JSON object"),
        (b'{"prompt": "\xff"}', 400, None, "the body is not UTF-8 at byte 12: encode it as UTF-8"),
        (b'{"prompt": NaN}', 400, None, "NaN is no number of JSON"),
        (b'{"prompt": "cat", "seed": ' + b"9" * 5000 + b"}", 400, None, "not JSON that can be read"),
        ({"n": 1}, 400, "prompt", "prompt is missing: say what to draw"),
        ({"prompt": 3}, 400, "prompt", "prompt is 3; expected text"),
        ({"prompt": None}, 400, "prompt", "prompt is None; expected text"),
        ({"prompt": "\ud800"}, 400, "prompt", "expected text without halves of characters"),
        ({"prompt": "x" * 1001}, 400, "prompt", "prompt has 1,001 characters; expected at most 1,000"),
        ({"prompt": "", "negative_prompt": "x" * 1001}, 400, "negative_prompt", "expected at most 1,000"),
        ({"prompt": "", "seeds": 3}, 400, "seeds", "'seeds' is no argument; known are prompt, model, n,"),
        ({"prompt": "", "\ud800": 3}, 400, None, r"'\ud800' is no argument"),
        ({"prompt": "", "n": 0}, 400, "n", "n is 0; expected a whole number from 1 to 16"),
        ({"prompt": "", "n": 17}, 400, "n", "n is 17; expected a whole number from 1 to 16"),
        ({"prompt": "", "n": True}, 400, "n", "n is True; expected a whole number"),
        ({"prompt": "", "n": 1.5}, 400, "n", "n is 1.5; expected a whole number"),
        ({"prompt": "", "num_inference_steps": 17}, 400, "num_inference_steps", "a whole number from 1 to 16"),
        ({"prompt": "", "num_inference_steps": "auto"}, 400, "num_inference_steps", "is 'auto'; expected a whole"),
        ({"prompt": "", "seed": -1}, 400, "seed", "seed is -1; expected a whole number from 0 to 2^64 - 1"),
        ({"prompt": "", "seed": 2**64}, 400, "seed", "expected a whole number from 0 to 2^64 - 1"),
        ({"prompt": "", "size": "1024x1024"}, 400, "size", "size is '1024x1024'; expected '64x64' or 'auto'"),
        ({"prompt": "", "response_format": "url"}, 400, "response_format", "'url'; expected 'b64_json'"),
        ({"prompt": "", "output_format": "webp"}, 400, "output_format", "'webp'; expected 'png', or leave it out"),
        ({"prompt": "", "stream": True}, 400, "stream", "stream is True; expected False"),
        ({"prompt": "", "guidance_scale": 1e9}, 400, "guidance_scale", "guidance_scale is 1000000000.0"),
        ({"prompt": "", "model": "/etc/passwd"}, 404, "model", "model is '/etc/passwd'; this server has 'emoji-64'"),
    ],
)
def test_what_is_refused(body, status, param, said):
    with pytest.raises(Refused) as raised:
        read(body)
    assert said in str(raised.value)
    assert (raised.value.status, raised.value.param) == (status, param)
    json.dumps(raised.value.body(), ensure_ascii=False).encode()
