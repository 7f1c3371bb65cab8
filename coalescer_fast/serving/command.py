"""The command ``coalescer-fast serve``. Heavy modules are imported when it runs."""

from __future__ import annotations

import argparse
import ipaddress
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..console import MAX_IMAGES, Parser, positive, up_to
from .settings import Settings

if TYPE_CHECKING:
    from ..pipeline import CoalescerPipeline

TOKEN = "COALESCER_FAST_TOKEN"
DEFAULTS = Settings()


def add_options(sub: Parser) -> None:
    """Add the options of ``serve`` that are not those of the model."""
    sub.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default: %(default)s, for this machine alone)"
    )
    sub.add_argument("--port", type=port, default=8000, metavar="N", help="0 takes a free one (default: %(default)s)")
    text = "longest time that a picture waits for others to be drawn with (default: %(default)s)"
    sub.add_argument("--batch-delay", type=milliseconds, default=1000 * DEFAULTS.batch_delay, metavar="MS", help=text)
    for name, default, text in (
        ("--max-batch", DEFAULTS.max_batch, "most pictures that are drawn together"),
        ("--max-queue", DEFAULTS.max_queue, "most pictures that wait, beyond which requests are answered 429"),
        ("--max-images", DEFAULTS.max_images, "most pictures of a request"),
        ("--max-prompt", DEFAULTS.max_prompt, "most characters of a prompt"),
    ):
        kind = up_to(MAX_IMAGES) if name == "--max-batch" else positive
        sub.add_argument(name, type=kind, default=default, metavar="N", help=f"{text} (default: %(default)s)")
    text = f"a file with the bearer token that clients have to send (default: the variable {TOKEN}, or none)"
    sub.add_argument("--token-file", type=Path, metavar="FILE", help=text)
    sub.add_argument("--access-log", action="store_true", help="log every request on stderr")


def serve(args: argparse.Namespace, load: Callable[[argparse.Namespace], CoalescerPipeline]) -> None:
    """Serve until a signal comes.

    Args:
        args: the command line.
        load: opens the pipeline that it names.
    """
    settings = settings_of(args)
    from .server import Server, listen, quieten

    listening = listen(args.host, args.port)  # before the model is loaded: a port in use is said at once
    if settings.token is None and settings.hosts is None:
        reached = args.host or "this machine"
        said = f"anybody who reaches {reached} can draw: set {TOKEN} or --token-file to ask for a token"
        print(said, file=sys.stderr)
    from .app import create_app

    quieten(args.access_log)
    pipe = load(args)
    pipe.set_progress_bar_config(disable=True)
    model = Path(args.model).name  # of a folder its last part alone
    host, number = listening.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{number}"

    def ready() -> None:
        print(f"{model} at {address} ({pipe.runtime.name}, {pipe.runtime.precision})", flush=True)

    app = create_app(pipe, model, settings)
    app.state.service.open()  # what cannot be drawn is said in one sentence
    Server(app, [listening], args.access_log, ready).run()


def settings_of(args: argparse.Namespace) -> Settings:
    """What the command line allows. Without a token, a server of this machine alone has its names alone.

    A page of another site may come to call a name of its own that leads here.
    """
    limits = {name: getattr(args, name) for name in ("max_batch", "max_queue", "max_images", "max_prompt")}
    secret, hosts = token(args), None
    if secret is None and is_loopback(args.host):
        hosts = tuple(dict.fromkeys(("localhost", "127.0.0.1", "::1", args.host)))
    return Settings(args.batch_delay / 1000, **limits, hosts=hosts, token=secret)


def token(args: argparse.Namespace) -> str | None:
    """The bearer token: of the file, or of the environment. Raises ValueError for one that no header can hold."""
    given, where = os.environ.get(TOKEN), TOKEN
    if args.token_file is not None:
        given, where = args.token_file.read_text("utf-8", "replace").strip(), str(args.token_file)
    if given is None:
        return None
    if not given.isascii() or not given.isprintable() or " " in given or not given:
        raise ValueError(f"{where} holds no token: expected printable ASCII characters without spaces, at least one")
    return given


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine reaches this address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def port(text: str) -> int:
    """The type of ``--port``."""
    if not text.isdecimal() or len(text) > 5 or int(text) > 65_535:
        raise argparse.ArgumentTypeError(f"{text!r:.40} is not a whole number from 0 to 65,535")
    return int(text)


def milliseconds(text: str) -> float:
    """The type of ``--batch-delay``."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 10_000:  # also where it is NaN
        raise argparse.ArgumentTypeError(f"{text!r:.40} is not a number of milliseconds from 0 to 10,000")
    return number
