"""The application: routes, what a request may do, and answers in OpenAI's shape."""

from __future__ import annotations

import asyncio
import base64
import hmac
import io
import json
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .. import __version__, prompts
from ..console import unforeseen
from ..schema import shown
from .batching import Batcher, QueueFull
from .drawing import Drawn, Options, Picture, batch_sizes, draw
from .metrics import Metrics
from .requests import ImageRequest, parse, read_body
from .settings import Refused, Settings

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..pipeline import CoalescerPipeline

PAGE = Path(__file__).parent / "page"
# the files of the page, by path: no other file can be named
FILES = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js", "/drawer.js": "drawer-server.js"}
PROTECTED = ("/v1/", "/metrics")  # paths that need the token, if there is one
POLICY = "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'; base-uri 'none'"
HEADERS = [(b"x-content-type-options", b"nosniff"), (b"content-security-policy", POLICY.encode())]

logger = logging.getLogger(__name__)


class Service:
    """A pipeline that draws for many clients.

    Attributes:
        pipe: the pipeline; the batcher's thread alone calls it.
        model: its name for clients.
        side: of its pictures, in pixels.
        closing: whether new requests are refused.
    """

    def __init__(self, pipe: CoalescerPipeline, model: str, settings: Settings):
        self.pipe, self.model, self.settings = pipe, model, settings
        self.side = pipe.unet.config.sample_size * pipe.vae.scale_factor
        self.created = int(time.time())
        self.closing = False
        sizes = batch_sizes(pipe, settings.max_batch)
        self.batcher: Batcher[Picture, Drawn] = Batcher(
            self._draw, lambda picture: picture.options, sizes, settings.batch_delay, settings.max_queue
        )
        self.metrics = Metrics(sizes, lambda: self.batcher.waiting)
        self._is_open = False

    def open(self) -> None:
        """Start the batcher, and have it prepare all sizes of batches. Raises what drawing raises."""
        if self.batcher.alive:
            return
        self.batcher.start()
        for size in self.batcher.sizes:
            for future in self.batcher.submit([Picture("octopus", 0, i, Options()) for i in range(size)]):
                future.result()
        self._is_open = True

    def _draw(self, pictures: list[Picture]) -> list[Drawn]:
        drawn = draw(self.pipe, pictures)
        if self._is_open:  # not what was drawn to prepare
            self.metrics.batch.observe(len(pictures))
            self.metrics.pictures.inc(len(pictures))
        return drawn

    async def generate(self, request: Request) -> dict[str, Any] | None:
        """Answer a request for pictures; None if the client has gone. Raises Refused for what gets none."""
        try:
            asked = parse(await read_body(request))
        except ClientDisconnect:
            self.metrics.abandoned.inc()
            return None
        asked.check(self.model, self.side, self.settings)
        self.check_open()
        pictures = asked.pictures()
        try:
            futures = self.batcher.submit(pictures)
        except QueueFull as full:
            said = f"{self.settings.max_queue:,} pictures can wait at a time and these do not fit: try again in "
            retry = {"Retry-After": str(full.seconds)}
            raise Refused(429, f"{said}{full.seconds} s", None, "rate_limit_exceeded", retry) from full
        drawing = asyncio.gather(*map(asyncio.wrap_future, futures))
        leaving = asyncio.ensure_future(disconnect(request))
        either: set[asyncio.Future[Any]] = {drawing, leaving}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not drawing.done():
                self.metrics.abandoned.inc()
                return None
            drawn = await drawing
        except (TypeError, ValueError) as error:  # of these arguments, found while drawing
            raise Refused(400, str(error)) from error
        finally:
            leaving.cancel()
            for future in futures:  # which gives the places free
                future.cancel()
            await asyncio.gather(drawing, return_exceptions=True)
        return await asyncio.to_thread(self._answer, asked, pictures, drawn)

    def check_open(self) -> None:
        """Raise Refused if no more requests are taken."""
        if self.closing or not self.batcher.alive:
            said = "this server is being stopped: try again in a moment"
            raise Refused(503, said, headers={"Retry-After": "1", "Connection": "close"})

    def _answer(self, asked: ImageRequest, pictures: Sequence[Picture], drawn: Sequence[Drawn]) -> dict[str, Any]:
        scale = self.pipe.scheduler.config.guidance_scale if asked.guidance_scale is None else asked.guidance_scale
        avoided = None if asked.negative_prompt is None else [asked.negative_prompt]
        data = []
        for picture, one in zip(pictures, drawn, strict=True):
            match = one.match
            said: dict[str, Any] = {
                "b64_json": png(one.image),
                "revised_prompt": one.description,
                "seed": picture.seed,
                "picture": picture.index,
                "quality": one.quality,
                "matched": None if match is None else {"name": match.name, "similarity": match.similarity},
            }
            if asked.steps:
                said["steps"] = [*map(png, one.steps[:-1]), said["b64_json"]]
            data.append(said)
        warnings = prompts.warnings(self.pipe.description_encoder, [asked.prompt], avoided, scale) + asked.ignored()
        return {"created": int(time.time()), "data": data, "warnings": warnings, "model": self.model}

    def models(self) -> list[dict[str, Any]]:
        """The models in OpenAI's shape, with what the page needs to know: sides of a picture, art styles, limits."""
        styles = list(self.pipe.description_encoder.config.styles)
        said = {"id": self.model, "object": "model", "created": self.created, "owned_by": "coalescer_fast"}
        limits = {"max_images": self.settings.max_images, "max_prompt": self.settings.max_prompt}
        return [{**said, "size": self.side, "styles": styles, **limits}]


def create_app(
    pipe: CoalescerPipeline, model: str = "emoji-64", settings: Settings | None = None, page: Path = PAGE
) -> FastAPI:
    """Make the application of a pipeline, for a server of ASGI applications such as uvicorn.

    Args:
        pipe: the pipeline, accelerated or not. From then on the application alone calls it.
        model: its name for clients.
        settings: the limits.
        page: folder of the page's files.

    Returns:
        The application. Its ``state.service`` is the `Service`.
    """
    service = Service(pipe, model, settings or Settings())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(service.open)
        yield
        await asyncio.to_thread(service.batcher.close)

    app = FastAPI(
        title="coalescer_fast",
        version=__version__,
        lifespan=lifespan,
        openapi_url=None,  # requests are read by our own code, which FastAPI cannot describe
        redirect_slashes=False,
    )
    app.state.service = service
    app.add_exception_handler(Refused, refused)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, no_route)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, failed)
    app.add_middleware(Edge, service=service)

    @app.post("/v1/images/generations")
    async def generations(request: Request) -> Response:
        """Draw pictures of a prompt, as OpenAI's images API."""
        answer = await service.generate(request)
        return Response(status_code=499) if answer is None else reply(answer)

    @app.get("/v1/models")
    async def models() -> Response:
        """List the one model that there is."""
        return reply({"object": "list", "data": service.models()})

    @app.get("/v1/models/{name}")
    async def model_of(name: str) -> Response:
        """Describe the model."""
        if name != service.model:
            said = f"there is no model {shown(name)}; this server has {shown(service.model)}"
            raise Refused(404, said, "model", "model_not_found")
        return reply(service.models()[0])

    @app.get("/healthz")
    async def healthz() -> Response:
        """Say whether requests are taken."""
        service.check_open()
        return reply({"status": "ok", "model": service.model, "version": __version__})

    @app.get("/metrics")
    async def metrics() -> Response:
        """Say what was counted, for Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    for path, name in FILES.items():
        file = page / name
        if file.is_file():
            app.add_api_route(path, page_file(file), methods=["GET", "HEAD"], include_in_schema=False)
    return app


def page_file(file: Path) -> Any:
    """A route that sends this file."""

    async def send() -> Response:
        return FileResponse(file)

    return send


async def disconnect(request: Request) -> None:
    """Return when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def png(image: Image) -> str:
    """A picture as PNG in base64."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def reply(content: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """An answer in JSON, in ASCII alone."""
    return Response(json.dumps(content, allow_nan=False), status, headers, "application/json")


async def refused(request: Request, error: Refused) -> Response:
    return reply(error.body(), error.status, error.headers)


async def no_route(request: Request, error: HTTPException) -> Response:
    """Answer a path or a method that there is not."""
    path = shown(request.url.path)
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        said = f"{request.method[:20]} {path} is not served: use {allowed}"
    else:
        said = f"{path} is not served: use POST /v1/images/generations, GET /v1/models, /healthz, /metrics or /"
    return await refused(request, Refused(error.status_code, said, headers=dict(error.headers or {})))


async def failed(request: Request, error: Exception) -> Response:
    """Answer where drawing failed by no fault of the request."""
    return await refused(request, Refused(500, unforeseen(error)))


class Edge:
    """What every request passes first and last: the token, the headers, the counters."""

    def __init__(self, app: ASGIApp, service: Service):
        self.app, self.service = app, service
        token = service.settings.token
        self.expected = None if token is None else token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        metrics, started, status = self.service.metrics, time.perf_counter(), 499

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", []), *HEADERS]}
            await send(message)

        with metrics.in_progress.track_inprogress():
            try:
                if error := self.refusal(scope):
                    await reply(error.body(), error.status, error.headers)(scope, receive, answer)
                else:
                    await self.app(scope, receive, answer)
            finally:
                route = scope.get("route")
                path = getattr(route, "path", "other")
                metrics.requests.labels(path, status).inc()
                metrics.seconds.labels(path).observe(time.perf_counter() - started)

    def refusal(self, scope: Scope) -> Refused | None:
        """Why a request goes no further, if it does not."""
        headers = dict(scope["headers"])
        host, hosts = headers.get(b"host", b"").decode("latin-1"), self.service.settings.hosts
        if hosts is not None and host and host_name(host) not in hosts:
            said = f"this server is called {', '.join(hosts)}, and the request is for {shown(host)}"
            return Refused(421, f"{said}: use one of these names")
        if scope["path"].startswith(PROTECTED) and not self.has_token(headers.get(b"authorization", b"")):
            said = "the bearer token is missing or wrong: send the header Authorization: Bearer TOKEN"
            return Refused(401, said, None, "invalid_api_key", {"WWW-Authenticate": "Bearer"})
        return None

    def has_token(self, given: bytes) -> bool:
        """Whether a header holds the token, or none is needed. Takes the same time for every wrong one."""
        if self.expected is None:
            return True
        scheme, _, token = given.partition(b" ")
        return hmac.compare_digest(token.strip(), self.expected) and scheme.lower() == b"bearer"


def host_name(host: str) -> str:
    """The name or address in a Host header: without the port and the brackets of IPv6."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower().removesuffix(".")
