"""What command lines share: the parser, types of arguments, errors in one sentence, tables.

Only the standard library is imported at the top.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from .pipeline import CoalescerPipeline

MAX_IMAGES = 1024  # pictures of one prompt in a call; the prompts of a call together may have four times as many
MAX_STEPS = 1000
NO_MEMORY = "there is not enough memory for this: ask for fewer or smaller pictures at a time"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one sentence, with exit status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog.partition(' ')[0]}: {message} (see '{self.prog} --help')\n")


def add_common_options(parser: argparse.ArgumentParser, is_subcommand: bool = False) -> None:
    """Add ``--quiet`` and ``--debug``, which may stand before the subcommand or after it.

    Args:
        parser: gains the options.
        is_subcommand: whether it belongs to a parser that has them, with their defaults, already.
    """
    default: Any = argparse.SUPPRESS if is_subcommand else False
    parser.add_argument(
        "--quiet", action="store_true", default=default, help="no progress bars and no messages but warnings and errors"
    )
    parser.add_argument("--debug", action="store_true", default=default, help="show the traceback of an error")


def execute(top: Parser, argv: Sequence[str] | None) -> int:
    """Parse a command line and call the ``run(args)`` that the parser has set.

    What fails is printed to stderr as one sentence, with ``--debug`` as a traceback.

    Args:
        top: the parser of the whole command line.
        argv: the command line, or None for that of the process.

    Returns:
        The exit status.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path, or a prompt, of any bytes
    debug = False
    try:
        try:
            args = top.parse_args(argv)
            debug = args.debug
            return args.run(args) or 0
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        # what is left in the buffer has nowhere to go, and Python would report it once more at exit
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        message, status = (
            "the output was closed before all of it was written: read it to its end, or write it to a file",
            141,
        )
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    except Exception as error:
        if debug:
            raise
        message, status = unforeseen(error), 1
    with suppress(OSError):
        print(f"{top.prog}: {message}", file=sys.stderr)
    return status


def sentence(error: BaseException) -> str:
    """An exception's message in one line.

    Messages of Python and of other libraries name no fix, so the usual ones get one here.
    """
    said = " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError) and error.name:
        return missing(error.name.partition(".")[0])
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"cannot use {error.filename} ({error.strerror.lower()}): give another path"
    if isinstance(error, MemoryError) or "out of memory" in said or "can't allocate memory" in said:
        return NO_MEMORY
    if isinstance(error, RecursionError):
        return "what was read is nested too deeply: give another file"
    return said or type(error).__name__


def missing(package: str) -> str:
    """Say that a package is not there, and the extra that brings it: the first that names it."""
    from importlib import metadata

    extra = "all"
    with suppress(metadata.PackageNotFoundError):  # a checkout that is not installed
        for line in metadata.requires("coalescer_fast") or ():
            name, _, marker = line.partition(";")
            found = re.search(r"extra == .(\w+)", marker)
            if found and re.split(r"[^\w.-]", name.replace("-", "_"), maxsplit=1)[0] == package:
                extra = found[1]
                break
    return f"the package {package} is missing: run pip install 'coalescer_fast[{extra}]'"


def unforeseen(error: Exception) -> str:
    """`sentence`, which for an exception that no check raises also asks for a report."""
    said, name = sentence(error), type(error).__name__
    foreseen = type(error) in (ValueError, TypeError) or isinstance(
        error, (OSError, ImportError, MemoryError, RecursionError)
    )
    if foreseen or said == NO_MEMORY:
        return said
    what = name if said == name else f"{name}: {said[:300]}"
    return f"{what} (add --debug for the traceback, and report it unless the command was wrong)"


def up_to(most: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number from 1 to ``most``."""

    def number(text: str) -> int:
        if not text.isdecimal() or len(text) > 18 or not 1 <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r:.40} is not a whole number from 1 to {most:,}")
        return int(text)

    return number


positive = up_to(1_000_000)


def natural(text: str) -> int:
    """The type of an argument that is a whole number from 0."""
    if not text.isdecimal() or len(text) > 19 or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r:.40} is not a whole number from 0 to 2^63 - 1")
    return int(text)


def counts(text: str) -> tuple[int, ...]:
    """The type of an argument that is a list of numbers, separated by commas."""
    return tuple(map(up_to(MAX_IMAGES), map(str.strip, text.split(","))))


def prompt(text: str) -> str:
    """The type of an argument that is a text and can be encoded as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!a:.80} holds bytes that are no text in UTF-8: type it again") from None
    return text


def table(lines: Sequence[Sequence[str]], alignment: str = "") -> str:
    """Lines of cells as text, the columns two spaces apart.

    Args:
        lines: all of one length.
        alignment: "<" or ">" for each column; the last one stands for those after it, and "" aligns all to the left.

    Returns:
        A line a row, without spaces at its end.
    """
    widths = [max(map(len, column)) for column in zip(*lines)]
    sides = alignment.ljust(len(widths), alignment[-1:] or "<")
    rows = ((f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths)) for line in lines)
    return "\n".join("  ".join(row).rstrip() for row in rows)


def transposed_table(rows: Sequence[dict[str, Any]]) -> str:
    """A table with a line for each key and a column for each row, numbers to four digits and to the right."""

    def cell(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    names = dict.fromkeys(name for row in rows for name in row)
    return table([[name, *(cell(row.get(name, "")) for row in rows)] for name in names], "<>")


def logging_to_stderr(quiet: bool = False) -> AbstractContextManager[object]:
    """Show the package's INFO messages on stderr, above the progress bars."""
    if quiet:
        return nullcontext()
    from tqdm.contrib.logging import logging_redirect_tqdm

    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger(__package__).setLevel(logging.INFO)
    context: AbstractContextManager[object] = logging_redirect_tqdm()
    return context


def open_pipeline(model: str) -> CoalescerPipeline:
    """Load a pipeline without diffusers' progress bar of its components, which are there in a moment."""
    from diffusers.utils import logging as diffusers_logging

    from .pipeline import CoalescerPipeline

    shown = diffusers_logging.is_progress_bar_enabled()
    diffusers_logging.disable_progress_bar()
    try:
        return CoalescerPipeline.from_pretrained(model)
    finally:
        if shown:
            diffusers_logging.enable_progress_bar()
