"""The command ``coalescer-export``.

Each subcommand is a module of `commands` with a function ``add_arguments(parser)`` and a function ``run(args)`` that
returns the exit status. Its name is that of the module, and its help the first line of the module's docstring.
"""

from __future__ import annotations

from collections.abc import Sequence

from coalescer_fast import __version__
from coalescer_fast.console import Parser, add_common_options, execute

from .commands import engine, inspect, onnx, quantize, verify, web

COMMANDS = (onnx, quantize, engine, verify, inspect, web)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's own) and return its exit status."""
    return execute(parser(), argv)


def parser() -> Parser:
    top = Parser(prog="coalescer-export", description="Exports a coalescer, and checks what was exported.")
    top.add_argument("--version", action="version", version=__version__)
    add_common_options(top)
    subparsers = top.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        text = (command.__doc__ or "").partition("\n")[0].rstrip(".")
        sub = subparsers.add_parser(
            command.__name__.rpartition(".")[2], help=text[0].lower() + text[1:], description=f"{text}."
        )
        add_common_options(sub, is_subcommand=True)
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    return top
