"""Bodies of POST /v1/images/generations: read, checked, and turned into pictures to draw."""

from __future__ import annotations

import json
import secrets
import typing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from ..scheduler import check_number
from ..schema import conform, shown
from .drawing import Options, Picture
from .settings import MAX_BODY, MAX_STEPS, READ_SECONDS, Refused, Settings

if TYPE_CHECKING:
    from starlette.requests import Request

# OpenAI's arguments that mean nothing to a coalescer; a warning of the answer says so
WITHOUT_EFFECT = ("background", "moderation", "output_compression", "partial_images", "quality", "style", "user")


@dataclass(frozen=True)
class ImageRequest:
    """The arguments of a request: OpenAI's, and after them ours. None is as if it were left out.

    Attributes:
        prompt: a description; the empty one draws any picture.
        model: the name of the model that is served.
        n: number of pictures.
        size: "64x64", the model's own, or "auto".
        response_format: "b64_json".
        output_format: "png".
        stream: False.
        seed: picture i of the answer is that of ``PhiloxGenerator(seed, picture=i)``; a random one if left out.
        steps: whether to send R, decoded, before and after every step, too.
        negative_prompt: as in a call of `CoalescerPipeline`, like the rest.
        guidance_scale: 1 is none.
        num_inference_steps: network evaluations of the description.
        prompt_matching: whether a known name is drawn in the place of the prompt.
    """

    prompt: str
    model: str | None = None
    n: int | None = None
    size: str | None = None
    response_format: str | None = None
    output_format: str | None = None
    stream: bool | None = None
    background: Any = None
    moderation: Any = None
    output_compression: Any = None
    partial_images: Any = None
    quality: Any = None
    style: Any = None
    user: Any = None
    seed: int | None = None
    steps: bool | None = None
    negative_prompt: str | None = None
    guidance_scale: float | None = None
    num_inference_steps: int | None = None
    prompt_matching: bool | None = None

    def check(self, model: str, side: int, settings: Settings) -> None:
        """Raise Refused for what this server does not draw.

        Args:
            model: its name.
            side: of its pictures, in pixels.
            settings: its limits.
        """
        for name in ("prompt", "negative_prompt"):
            text = getattr(self, name)
            if text is not None and len(text) > settings.max_prompt:
                raise Refused(
                    400, f"{name} has {len(text):,} characters; expected at most {settings.max_prompt:,}", name
                )
        if self.model not in (None, model):
            said = f"model is {shown(self.model)}; this server has {shown(model)}: name that one, or none"
            raise Refused(404, said, "model", "model_not_found")
        whole = {"n": settings.max_images, "num_inference_steps": MAX_STEPS}
        for name, most in whole.items():
            number = getattr(self, name)
            if number is not None and not 1 <= number <= most:
                raise Refused(400, f"{name} is {shown(number)}; expected a whole number from 1 to {most}", name)
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise Refused(400, f"seed is {shown(self.seed)}; expected a whole number from 0 to 2^64 - 1", "seed")
        own = f"{side}x{side}"
        words = {"size": (own, "auto"), "response_format": ("b64_json",), "output_format": ("png",)}
        for name, known in words.items():
            word = getattr(self, name)
            if word is not None and word not in known:
                expected = " or ".join(map(repr, known))
                raise Refused(400, f"{name} is {shown(word)}; expected {expected}, or leave it out", name)
        if self.stream:
            raise Refused(400, "stream is True; expected False, for a picture comes whole", "stream")
        if self.guidance_scale is not None:
            try:
                check_number("guidance_scale", self.guidance_scale)
            except ValueError as error:
                raise Refused(400, str(error), "guidance_scale") from error

    def pictures(self) -> list[Picture]:
        """The pictures that it asks for."""
        options = Options(
            num_inference_steps=self.num_inference_steps or 2,
            guidance_scale=self.guidance_scale,
            negative_prompt=self.negative_prompt,
            prompt_matching=self.prompt_matching is not False,
            steps=bool(self.steps),
        )
        seed = secrets.randbelow(2**32) if self.seed is None else self.seed
        return [Picture(self.prompt, seed, i, options) for i in range(self.n or 1)]

    def ignored(self) -> list[str]:
        """A sentence about each argument without an effect."""
        given = [name for name in WITHOUT_EFFECT if getattr(self, name) not in (None, "auto")]
        return [f"{name} has no effect on this model: leave it out" for name in given]


ARGUMENTS = typing.get_type_hints(ImageRequest)


def parse(body: bytes) -> ImageRequest:
    """Read the body of a request. Raises Refused for anything but a table of known arguments."""
    try:
        given = json.loads(body.decode(), parse_constant=_not_json)
    except UnicodeDecodeError as error:
        raise Refused(400, f"the body is not UTF-8 at byte {error.start:,}: encode it as UTF-8") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise Refused(400, f"the body is not JSON at {where} ({error.msg.lower()}): send a JSON object") from error
    except ValueError as error:  # of ours, and of numbers of thousands of digits
        said = str(error) if isinstance(error, _NotJSON) else "a number has too many digits"
        raise Refused(400, f"the body is not JSON that can be read ({said}): send a JSON object") from error
    except RecursionError as error:
        raise Refused(400, "the body is nested too deeply: send a flat JSON object") from error
    if not isinstance(given, dict):
        raise Refused(400, f'the body is {shown(given)}; expected a JSON object such as {{"prompt": "octopus"}}')
    if "prompt" not in given:
        raise Refused(400, "prompt is missing: say what to draw", "prompt")
    values = {}
    for name, value in given.items():
        if name not in ARGUMENTS:
            param = name[:80] if name.isprintable() else None
            raise Refused(400, f"{shown(name)} is no argument; known are {', '.join(ARGUMENTS)}", param)
        try:
            values[name] = conform(value, ARGUMENTS[name], name)
        except ValueError as error:
            raise Refused(400, str(error), name) from error
    return ImageRequest(**values)


class _NotJSON(ValueError):
    pass


def _not_json(word: str) -> NoReturn:
    raise _NotJSON(f"{word} is no number of JSON")


async def read_body(request: Request) -> bytes:
    """Read the body of a request. Raises Refused for one that is too large, too slow, or not said to be JSON."""
    import asyncio

    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which a page of another site cannot send unasked
        raise Refused(415, "the body is not said to be JSON: send the header Content-Type: application/json")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Refused(415, "the body is compressed: send it as it is, without a header Content-Encoding")
    too_large = Refused(413, f"the body has more than {MAX_BODY:,} bytes: send a shorter one")
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or len(length) > 18 or int(length) > MAX_BODY:
        raise too_large
    body = bytearray()

    async def receive() -> None:
        async for chunk in request.stream():
            body.extend(chunk)
            if len(body) > MAX_BODY:
                raise too_large

    try:
        await asyncio.wait_for(receive(), READ_SECONDS)
    except (TimeoutError, asyncio.TimeoutError):
        said = f"the body has not arrived within {READ_SECONDS:g} s: send it at once"
        raise Refused(408, said, headers={"Connection": "close"}) from None
    return bytes(body)
