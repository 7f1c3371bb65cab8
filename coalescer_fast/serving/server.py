"""uvicorn as we run it: its signals, and connections on which no whole request arrives."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from .settings import GRACE_SECONDS, KEEP_ALIVE_SECONDS, LINGER_SECONDS, READ_SECONDS, Refused


class Protocol(H11Protocol):
    """uvicorn's, with errors in OpenAI's shape, and an end to requests that do not arrive.

    uvicorn itself would wait without end for the rest of a head, and read what follows a refused head without end.
    """

    _deadline: asyncio.TimerHandle | None = None
    _refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        if self._refused:  # nobody reads it
            return
        super().data_received(data)
        if self._refused:
            return
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            self._wait()
        else:
            self._arrived()

    def connection_lost(self, exc: Exception | None) -> None:
        self._arrived()
        super().connection_lost(exc)

    def _wait(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(READ_SECONDS + 1, self._give_up)  # the application is first

    def _arrived(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        self._deadline = None
        if not self.transport.is_closing():
            self._refuse(Refused(408, f"no request has arrived within {READ_SECONDS:g} s: send it at once"))

    def send_400_response(self, msg: str) -> None:
        self._refuse(Refused(400, "this is not a request of HTTP/1.1: send a valid one of at most 64 kB of headers"))

    def _refuse(self, error: Refused) -> None:
        body = json.dumps(error.body()).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # no answer has begun
            reason = STATUS_PHRASES[error.status]
            for event in (
                h11.Response(status_code=error.status, headers=headers, reason=reason),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None and not self.cycle.response_complete:  # the application has nobody to answer
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._refused = True
        self._arrived()
        with suppress(OSError):  # the client has gone
            self.transport.write_eof()
        # The rest is read for a moment: a connection that is closed before that is reset, and the answer lost.
        self._deadline = self.loop.call_later(LINGER_SECONDS, self.transport.close)


class Server(uvicorn.Server):
    """uvicorn's server; SIGTERM and SIGINT end it as if it had nothing more to do.

    Args:
        app: of `create_app`.
        sockets: that listen.
        access_log: whether requests are logged.
        on_ready: called once requests are answered.
    """

    def __init__(
        self,
        app: FastAPI,
        sockets: list[socket.socket],
        access_log: bool = False,
        on_ready: Callable[[], object] = lambda: None,
    ):
        config = uvicorn.Config(
            app,
            http=Protocol,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=access_log,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=GRACE_SECONDS,
        )
        super().__init__(config)
        self.service, self.listening, self.on_ready = app.state.service, sockets, on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.service.closing = True
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn raises the signal again once it has finished, which would look like a failure
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: dict[signal.Signals, Any] = {
            each: signal.signal(each, self.handle_exit) for each in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal comes."""
        super().run(sockets or self.listening)


def listen(host: str, port: int) -> socket.socket:
    """Open a socket that listens. Raises OSError with a sentence."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Its protocol is named: of other sockets, asyncio does not send small packets at once, which costs 40 ms an answer.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(2048)
        return listening
    except (OSError, TypeError) as error:  # TypeError: a name that cannot be encoded
        listening.close()
        reason = "no name of a machine"
        if isinstance(error, OSError):
            of_host = isinstance(error, socket.gaierror)
            reason = str(error.strerror if of_host else os.strerror(error.errno or 0)).lower()
        raise OSError(f"cannot listen at {host}, port {port} ({reason}): give another --host or --port") from error


def quieten(access_log: bool) -> None:
    """Keep out of the log what any client can cause, and what prompts say."""
    logging.basicConfig(format="%(asctime)s %(message)s")
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    logging.getLogger("uvicorn.access").setLevel(logging.INFO if access_log else logging.ERROR)
    logging.getLogger("coalescer_fast.prompts").setLevel(logging.ERROR)
    logging.getLogger("asyncio").addFilter(OnceAMinute())


class OnceAMinute(logging.Filter):
    """Passes a message of asyncio once a minute: where connections have no end it logs thousands of equal ones."""

    def __init__(self) -> None:
        super().__init__()
        self.passed: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        message, now = record.getMessage(), time.monotonic()
        passes = now - self.passed.get(message, -math.inf) >= 60
        if passes:
            self.passed = {text: then for text, then in self.passed.items() if now - then < 60} | {message: now}
        return passes
