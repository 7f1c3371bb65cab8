"""The command ``coalescer-fast``. Whatever a user can get wrong ends in one sentence on stderr and a non-zero exit status."""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import platform
import re
import secrets
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from . import __version__, files
from .files import check_writable

# Heavy modules (torch, diffusers, ...) are imported by the commands that need them; these names are those of `acceleration`.
BACKENDS = ("auto", "cpu", "cuda", "compile", "onnxruntime", "openvino", "tensorrt")
DTYPES = ("auto", "float32", "float16", "bfloat16", "int8")
MOST_PICTURES = 1024  # a prompt, and in all four times as many
MOST_STEPS = 1000
NO_MEMORY = "there is not enough memory for this: ask for fewer or smaller pictures at a time"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog.partition(' ')[0]}: {message} (see '{self.prog} --help')\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's own) and return its exit status."""
    return execute(parser(), argv)


def execute(top: Parser, argv: Sequence[str] | None) -> int:
    """Run what ``top`` makes of ``argv``: its ``run(args)``. Whatever fails is said in one sentence, with ``--debug`` by its traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
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
        # what is left in the buffer has nowhere to go, and Python would say so once more at its end
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
    """An exception's message in one line, with the fix where the message is Python's own, or another library's, and has none."""
    said = " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"the package {error.name.partition('.')[0]} is missing: run pip install 'coalescer_fast[all]'"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"cannot use {error.filename} ({error.strerror.lower()}): give another path"
    if isinstance(error, MemoryError) or "out of memory" in said or "can't allocate memory" in said:
        return NO_MEMORY
    if isinstance(error, RecursionError):
        return "what was read is nested too deeply: give another file"
    return said or type(error).__name__


def unforeseen(error: Exception) -> str:
    """`sentence` of what is no mistake of a user's that was thought of."""
    said, name = sentence(error), type(error).__name__
    foreseen = type(error) in (ValueError, TypeError) or isinstance(
        error, (OSError, ImportError, MemoryError, RecursionError)
    )
    if foreseen or said == NO_MEMORY:
        return said
    what = name if said == name else f"{name}: {said[:300]}"
    return f"{what} (add --debug for the traceback, and report it unless the command was wrong)"


def parser() -> Parser:
    top = Parser(prog="coalescer-fast", description="Text-to-image sampling in two network evaluations.")
    top.add_argument("--version", action="version", version=__version__)
    add_common(top)
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int | None], text: str) -> Parser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        add_common(sub, above=True)
        sub.set_defaults(run=run)
        return sub

    def model(sub: Parser, default: str | None = None) -> None:
        said = "%(default)s" if default else "the plain reference"
        sub.add_argument(
            "--model", default="emoji-64", help="an embedded model, a folder or a Hub id (default: %(default)s)"
        )
        sub.add_argument(
            "--backend", choices=BACKENDS, default=default, help=f"what runs the networks (default: {said})"
        )
        sub.add_argument("--dtype", choices=DTYPES, default=default, help=f"what they compute in (default: {said})")
        sub.add_argument(
            "--artefact", type=Path, metavar="DIR", help="run what coalescer-export wrote into this folder"
        )

    sub = command("sample", sample, "draw pictures of prompts")
    sub.add_argument("prompts", nargs="+", type=prompt, metavar="PROMPT")
    model(sub)
    text = f"pictures a prompt, at most {MOST_PICTURES:,}, for they are drawn together and held in memory (default: %(default)s)"
    sub.add_argument("-n", type=up_to(MOST_PICTURES), default=1, metavar="N", help=text)
    sub.add_argument("--seed", type=natural, help="repeats a drawing (default: a random one, which is said)")
    text = f"steps, the network evaluations without guidance, at most {MOST_STEPS:,}, for the model is made for 2 (default: %(default)s)"
    sub.add_argument("--steps", type=up_to(MOST_STEPS), default=2, metavar="N", help=text)
    sub.add_argument("--guidance", type=float, metavar="W", help="guidance scale; 1 is none (default: the model's own)")
    sub.add_argument(
        "--negative", type=prompt, metavar="PROMPT", help="what guidance leads away from (default: any picture)"
    )
    sub.add_argument(
        "-o", "--out", type=Path, metavar="OUT.png", help="picture file (default: named after the first prompt)"
    )
    text = "also write hashes of weights, noise and pictures, by which two machines can tell whether they drew the same"
    sub.add_argument("--receipt", type=Path, metavar="FILE.json", help=text)

    sub = command("info", info, "say what is installed, on what machine")
    sub.add_argument("--json", action="store_true", help="as JSON")

    sub = command("verify", verify, "compare an accelerated model with its own float32 reference")
    model(sub, "auto")
    sub.add_argument(
        "--prompts", type=positive, default=16, metavar="N", help="pictures, of known names (default: %(default)s)"
    )
    sub.add_argument("--json", action="store_true", help="as JSON")

    sub = command("warmup", warmup, "time the preparation of an accelerated model, and a call after it")
    model(sub, "auto")
    sub.add_argument(
        "--batch-sizes", type=counts, default=(1, 4), metavar="1,4", help="pictures a call, one row each (default: 1,4)"
    )

    sub = command("train", train, "train a model on pictures with descriptions")
    sub.add_argument("kind", choices=["autoencoder", "coalescer"])
    sub.add_argument(
        "--config", required=True, metavar="FILE.toml", help="a TOML file, or the name of one of the package's own"
    )
    sub.add_argument(
        "--data",
        required=True,
        help="an .npz file made by build-data, a folder of captioned pictures, or the word digits",
    )
    sub.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of checkpoints and model; a training in it goes on (default: runs/CONFIG)",
    )
    text = "go on with a training whose configuration or data are others than before"
    sub.add_argument("--allow-changes", action="store_true", help=text)

    sub = command("evaluate", evaluate, "measure a model on a data set")
    model(sub)
    sub.add_argument("--data", required=True, metavar="FILE.npz", help="a data set made by build-data")
    sub.add_argument(
        "--steps", type=counts, default=(1, 2, 4), metavar="1,2,4", help="step counts, one row each (default: 1,2,4)"
    )
    sub.add_argument("--csv", type=Path, metavar="OUT.csv", help="write the rows to a file, too")

    sub = command("build-data", build_data, "build the emoji data set from npm packages")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR")
    sub.add_argument(
        "--cache", type=Path, metavar="DIR", help="folder of the fetched packages (default: packages in --out)"
    )
    sub.add_argument(
        "--sizes",
        type=positive,
        nargs="+",
        default=[64],
        metavar="S",
        help="sides of the pictures in pixels (default: 64)",
    )
    sub.add_argument("--styles", nargs="+", metavar="STYLE", help="art styles (default: all but the share-alike ones)")
    return top


def add_common(parser: argparse.ArgumentParser, above: bool = False) -> None:
    """The options that stand before the command or behind it; ``above``: another parser has them, too, and their defaults."""
    default: Any = argparse.SUPPRESS if above else False
    parser.add_argument(
        "--quiet", action="store_true", default=default, help="no progress bars and no messages but warnings and errors"
    )
    parser.add_argument("--debug", action="store_true", default=default, help="show the traceback of an error")


def sample(args: argparse.Namespace) -> None:
    if (count := len(args.prompts) * args.n) > 4 * MOST_PICTURES:
        raise ValueError(
            f"{count:,} pictures are more than the {4 * MOST_PICTURES:,} that are drawn at once: ask for fewer prompts or -n"
        )
    from PIL import Image

    out = args.out or Path((re.sub(r"\W+", "-", args.prompts[0].lower()).strip("-")[:60] or "sample") + ".png")
    if Image.registered_extensions().get(out.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"no picture format goes by the name of {out}: let the output end in .png")
    file = io.BytesIO()
    try:
        Image.new("RGB", (1, 1)).save(file, Image.registered_extensions()[out.suffix.lower()])
    except Exception as error:  # of every format its own
        raise ValueError(
            f"{out} is of a format without colours, or that Pillow cannot write: let the output end in .png"
        ) from error
    if args.receipt is not None and args.receipt.absolute() == out.absolute():
        raise ValueError(f"--receipt is {args.receipt}, the picture's file: give it another name")
    for path in (out, *([] if args.receipt is None else [args.receipt])):
        check_writable(path)
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    started = time.perf_counter()
    import torch

    from .training.pictures import sheet

    pipe = load(args)
    loaded = time.perf_counter()
    noise = pipe.initial_noise(count, torch.Generator().manual_seed(seed))
    pictures = pipe(
        args.prompts,
        num_images_per_prompt=args.n,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        latents=noise,
        negative_prompt=args.negative,
    ).images
    drawn = time.perf_counter()
    prompts = [text for text in args.prompts for _ in range(args.n)]
    if len(pictures) == 1:
        picture = pictures[0]
    else:
        columns = min(8, len(pictures) if args.n == 1 or len(args.prompts) == 1 else args.n)
        picture = sheet(pictures, prompts, columns=columns)
    files.write_picture(out, picture)
    if args.receipt is not None:
        from .parity import receipt

        found = receipt(pipe, prompts, noise, pictures, args.steps, args.guidance, args.negative)
        files.write_text(args.receipt, json.dumps(found, indent=2) + "\n")
    if not args.quiet:
        how_many = f"{count} picture{'s' * (count > 1)}"
        print(f"{how_many} in {drawn - loaded:.2f} s, loading {loaded - started:.1f} s, seed {seed}", file=sys.stderr)
    print(out)


def info(args: argparse.Namespace) -> None:
    import torch

    from . import acceleration
    from .ops import backends
    from .ops.dispatch import BACKENDS
    from .pipeline import WEIGHTS, embedded_models

    facts: dict[str, Any] = {
        "coalescer_fast": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
    facts |= {name: version(name) for name in ("diffusers", "numpy")}
    facts["cpu"] = cpu_name()
    facts["threads"] = torch.get_num_threads()
    facts["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    states = backends("group_norm_silu")
    facts["backends"] = {
        name: {"able": able, "reason": reason, "note": BACKENDS[name].note} for name, (able, reason) in states.items()
    }
    reasons = {name: acceleration.unavailable(name) for name in acceleration.BACKENDS}
    facts["accelerate"] = {name: {"able": not reason, "reason": reason} for name, reason in reasons.items()}
    facts["models"] = {
        name: sum(file.stat().st_size for file in (WEIGHTS / name).rglob("*")) for name in embedded_models()
    }
    if args.json:
        print(json.dumps(facts, indent=2))
        return
    facts["models"] = ", ".join(f"{name} ({size / 1e6:.1f} MB)" for name, size in facts["models"].items())
    for name, state in facts.pop("backends").items():
        note = f" ({state['note']})" if state["note"] else ""
        facts[f"backend {name}"] = f"{'can run' if state['able'] else 'cannot run: ' + state['reason']}{note}"
    for name, state in facts.pop("accelerate").items():
        facts[f"accelerate {name}"] = state["reason"] or "can run"
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:{width}s}  {value or 'none'}")


def verify(args: argparse.Namespace) -> int:
    from .parity import verify as compare

    pipe = load(args)
    result = compare(pipe, args.prompts)
    print(json.dumps(result.to_dict(), indent=2) if args.json else result)
    return 0 if result.passed else 1


def warmup(args: argparse.Namespace) -> None:
    import torch

    from .acceleration import warmup as prepare

    pipe = load(args)
    pipe.set_progress_bar_config(disable=True)

    def seconds(function: Callable[..., object], *args: Any) -> float:
        start = time.perf_counter()
        function(*args)
        return time.perf_counter() - start

    def call(n: int) -> None:
        pipe("octopus", num_images_per_prompt=n, generator=torch.Generator().manual_seed(0), output_type="pt")

    rows = []
    for n in args.batch_sizes:
        row = {"pictures": n, "warm-up, s": seconds(prepare, pipe, (n,))}
        rows.append({**row, "call, s": statistics.median(seconds(call, n) for _ in range(5))})
    print(f"{pipe.runtime.name}, {pipe.runtime.precision}, {torch.get_num_threads()} threads")
    print(aligned(rows))


def train(args: argparse.Namespace) -> None:
    from .training.config import run

    with logging_to_stderr(args.quiet):
        out = args.out or Path("runs") / Path(args.config).stem
        run(args.kind, args.config, args.data, out, allow_changes=args.allow_changes, progress=not args.quiet)


def evaluate(args: argparse.Namespace) -> None:
    if args.csv:
        check_writable(args.csv)
    from .training.data import load as load_data

    data = load_data(args.data)
    from .training.evaluation import evaluate as measure

    rows = measure(load(args), data, steps=args.steps, progress=not args.quiet)
    print(aligned(rows))
    if args.csv:
        files.write_csv(args.csv, rows, list(rows[0]))


def build_data(args: argparse.Namespace) -> None:
    from .training.build_data import DEFAULT_STYLES, build

    with logging_to_stderr(args.quiet):
        cache = args.cache or args.out / "packages"
        path = build(args.out, cache, args.sizes, args.styles or DEFAULT_STYLES, progress=not args.quiet)
    print(path)


def load(args: argparse.Namespace) -> Any:
    """The pipeline that the options name, accelerated if they name a backend, a dtype or an artefact."""
    from .acceleration import accelerate

    pipe = open_pipeline(args.model)
    pipe.set_progress_bar_config(disable=args.quiet, delay=1.0)  # none for what takes less than a second
    plain = args.backend is None and args.dtype is None and args.artefact is None
    return pipe if plain else accelerate(pipe, args.backend or "auto", args.dtype or "auto", args.artefact)


def open_pipeline(model: str) -> Any:
    """The pipeline of a name, without the bar of diffusers for its parts, which are there in a moment."""
    from diffusers.utils import logging as theirs

    from .pipeline import CoalescerPipeline

    shown = theirs.is_progress_bar_enabled()
    theirs.disable_progress_bar()
    try:
        return CoalescerPipeline.from_pretrained(model)
    finally:
        if shown:
            theirs.enable_progress_bar()


def up_to(most: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number from 1 to ``most``."""

    def number(text: str) -> int:
        if not text.isdecimal() or len(text) > 18 or not 1 <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r:.40} is not a whole number from 1 to {most:,}")
        return int(text)

    return number


positive = up_to(1_000_000)


def natural(text: str) -> int:
    if not text.isdecimal() or len(text) > 19 or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r:.40} is not a whole number from 0 to 2^63 - 1")
    return int(text)


def counts(text: str) -> tuple[int, ...]:
    return tuple(map(up_to(MOST_PICTURES), map(str.strip, text.split(","))))


def prompt(text: str) -> str:
    """Raise ArgumentTypeError for what is no text: bytes of another encoding, half of a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!a:.80} holds bytes that are no text in UTF-8: type it again") from None
    return text


def aligned(rows: Sequence[dict[str, Any]]) -> str:
    """A plain table, a line a figure and a column a row, numbers to four digits and to the right."""

    def cell(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    names = dict.fromkeys(name for row in rows for name in row)
    lines = [[name, *(cell(row.get(name, "")) for row in rows)] for name in names]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def logging_to_stderr(quiet: bool = False) -> AbstractContextManager[None]:
    """Show the package's INFO messages on stderr, above the progress bars."""
    if quiet:
        return nullcontext()
    from tqdm.contrib.logging import logging_redirect_tqdm

    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger(__package__).setLevel(logging.INFO)
    return logging_redirect_tqdm()


if __name__ == "__main__":
    sys.exit(main())
