"""The command ``coalescer-fast``. Whatever a user can get wrong ends in one sentence on stderr and a non-zero exit status."""

from __future__ import annotations

import argparse
import csv
import json
import logging
import platform
import re
import secrets
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from . import __version__

# Heavy modules (torch, diffusers, ...) are imported by the commands that need them.


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog.partition(' ')[0]}: {message} (see '{self.prog} --help')\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's own) and return its exit status."""
    return execute(parser(), argv)


def execute(top: Parser, argv: Sequence[str] | None) -> int:
    """Run what ``top`` makes of ``argv``: its ``run(args)``."""
    args = top.parse_args(argv)
    try:
        return args.run(args) or 0
    except (ValueError, TypeError, OSError, ImportError) as error:
        if args.debug:
            raise
        message, status = sentence(error), 1
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    print(f"{top.prog}: {message}", file=sys.stderr)
    return status


def sentence(error: Exception) -> str:
    """An exception's message in one line, with a mend where the message is Python's own and has none."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"the package {error.name.partition('.')[0]} is missing: run pip install 'coalescer_fast[all]'"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"cannot use {error.filename} ({error.strerror.lower()}): give another path"
    return " ".join(str(error).split()) or type(error).__name__


def parser() -> Parser:
    top = Parser(prog="coalescer-fast", description="Text-to-image sampling in two network evaluations.")
    top.add_argument("--version", action="version", version=__version__)
    top.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int | None], text: str) -> Parser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(run=run)
        return sub

    def model(sub: Parser, default: str | None = None) -> None:
        said = "%(default)s" if default else "the plain reference"
        sub.add_argument("--model", default="emoji-64", help="an embedded model, a folder or a Hub id (default: %(default)s)")
        sub.add_argument("--backend", default=default, help=f"what runs the networks, as of accelerate (default: {said})")
        sub.add_argument("--dtype", default=default, help=f"what they compute in, as of accelerate (default: {said})")
        sub.add_argument("--artefact", type=Path, metavar="DIR", help="run what coalescer-export wrote into this folder")

    sub = command("sample", sample, "draw pictures of prompts")
    sub.add_argument("prompts", nargs="+", metavar="PROMPT")
    model(sub)
    sub.add_argument("-n", type=positive, default=1, metavar="N", help="pictures a prompt (default: %(default)s)")
    sub.add_argument("--seed", type=natural, help="repeats a drawing (default: a random one, which is said)")
    sub.add_argument("--steps", type=positive, default=2, help="steps, the network evaluations without guidance (default: %(default)s)")
    sub.add_argument("--guidance", type=float, metavar="W", help="guidance scale; 1 is none (default: the model's own)")
    sub.add_argument("-o", "--out", type=Path, metavar="OUT.png", help="picture file (default: named after the first prompt)")

    sub = command("info", info, "say what is installed, on what machine")
    sub.add_argument("--json", action="store_true", help="as JSON")

    sub = command("verify", verify, "compare an accelerated model with its own float32 reference")
    model(sub, "auto")
    sub.add_argument("--prompts", type=positive, default=16, metavar="N", help="pictures, of known names (default: %(default)s)")
    sub.add_argument("--json", action="store_true", help="as JSON")

    sub = command("warmup", warmup, "time the preparation of an accelerated model, and a call after it")
    model(sub, "auto")
    sub.add_argument("--batch-sizes", type=counts, default=(1, 4), metavar="1,4", help="pictures a call, one row each (default: 1,4)")

    sub = command("train", train, "train a model on pictures with descriptions")
    sub.add_argument("kind", choices=["autoencoder", "coalescer"])
    sub.add_argument("--config", required=True, metavar="FILE.toml", help="a TOML file, or the name of one of the package's own")
    sub.add_argument("--data", required=True, help="an .npz file made by build-data, a folder of captioned pictures, or the word digits")
    sub.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of checkpoints and model; a training in it goes on (default: runs/CONFIG)"
    )

    sub = command("evaluate", evaluate, "measure a model on a data set")
    model(sub)
    sub.add_argument("--data", required=True, metavar="FILE.npz", help="a data set made by build-data")
    sub.add_argument("--steps", type=counts, default=(1, 2, 4), metavar="1,2,4", help="step counts, one row each (default: 1,2,4)")
    sub.add_argument("--csv", type=Path, metavar="OUT.csv", help="write the rows to a file, too")

    sub = command("build-data", build_data, "build the emoji data set from npm packages")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR")
    sub.add_argument("--cache", type=Path, metavar="DIR", help="folder of the fetched packages (default: packages in --out)")
    sub.add_argument("--sizes", type=positive, nargs="+", default=[64], metavar="S", help="sides of the pictures in pixels (default: 64)")
    sub.add_argument("--styles", nargs="+", metavar="STYLE", help="art styles (default: all but the share-alike ones)")
    return top


def sample(args: argparse.Namespace) -> None:
    from PIL import Image

    out = args.out or Path((re.sub(r"\W+", "-", args.prompts[0].lower()).strip("-")[:60] or "sample") + ".png")
    if Image.registered_extensions().get(out.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"no picture format goes by the name of {out}: let the output end in .png")
    check_writable(out)
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    started = time.perf_counter()
    import torch

    from .training.pictures import sheet

    pipe = load(args)
    loaded = time.perf_counter()
    pictures = pipe(
        args.prompts,
        num_images_per_prompt=args.n,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        generator=torch.Generator().manual_seed(seed),
    ).images
    drawn = time.perf_counter()
    if len(pictures) == 1:
        picture = pictures[0]
    else:
        columns = min(8, len(pictures) if args.n == 1 or len(args.prompts) == 1 else args.n)
        picture = sheet(pictures, [prompt for prompt in args.prompts for _ in range(args.n)], columns=columns)
    picture.save(out)
    count = f"{len(pictures)} picture{'s' * (len(pictures) > 1)}"
    print(f"{count} in {drawn - loaded:.2f} s, loading {loaded - started:.1f} s, seed {seed}", file=sys.stderr)
    print(out)


def info(args: argparse.Namespace) -> None:
    import torch

    from . import acceleration
    from .ops import backends
    from .ops.dispatch import BACKENDS
    from .pipeline import WEIGHTS, embedded_models

    facts: dict[str, Any] = {"coalescer_fast": __version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    facts |= {name: version(name) for name in ("diffusers", "numpy")}
    facts["cpu"] = cpu_name()
    facts["threads"] = torch.get_num_threads()
    facts["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    states = backends("group_norm_silu")
    facts["backends"] = {name: {"able": able, "reason": reason, "note": BACKENDS[name].note} for name, (able, reason) in states.items()}
    reasons = {name: acceleration.unavailable(name) for name in acceleration.BACKENDS}
    facts["accelerate"] = {name: {"able": not reason, "reason": reason} for name, reason in reasons.items()}
    facts["models"] = {name: sum(file.stat().st_size for file in (WEIGHTS / name).rglob("*")) for name in embedded_models()}
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
    from .runtime.base import precision

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
    print(f"{pipe.runtime.name}, {precision(pipe.runtime)}, {torch.get_num_threads()} threads")
    print(aligned(rows))


def train(args: argparse.Namespace) -> None:
    from .training.config import run

    with logging_to_stderr():
        run(args.kind, args.config, args.data, args.out or Path("runs") / Path(args.config).stem)


def evaluate(args: argparse.Namespace) -> None:
    if args.csv:
        check_writable(args.csv)
    from .training.data import load as load_data

    data = load_data(args.data)
    from .training.evaluation import evaluate as measure

    rows = measure(load(args), data, steps=args.steps)
    print(aligned(rows))
    if args.csv:
        with args.csv.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            table.writeheader()
            table.writerows(rows)


def build_data(args: argparse.Namespace) -> None:
    from .training.build_data import DEFAULT_STYLES, build

    with logging_to_stderr():
        path = build(args.out, args.cache or args.out / "packages", args.sizes, args.styles or DEFAULT_STYLES)
    print(path)


def load(args: argparse.Namespace) -> Any:
    """The pipeline that the options name, accelerated if they name a backend, a dtype or an artefact."""
    from .acceleration import accelerate
    from .pipeline import CoalescerPipeline

    pipe = CoalescerPipeline.from_pretrained(args.model)
    plain = args.backend is None and args.dtype is None and args.artefact is None
    return pipe if plain else accelerate(pipe, args.backend or "auto", args.dtype or "auto", args.artefact)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def natural(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2^63 - 1")
    return int(text)


def counts(text: str) -> tuple[int, ...]:
    return tuple(positive(part.strip()) for part in text.split(","))


def check_writable(path: Path) -> None:
    """Raise an OSError that names the mend unless ``path`` can be written; leaves the file as it is."""
    new = not path.exists()
    try:
        with path.open("ab"):
            pass
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise OSError(f"{path} cannot be written ({reason}): name a file in a folder that exists and is writable") from error
    if new:
        path.unlink()


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


def logging_to_stderr() -> AbstractContextManager[None]:
    """Show the package's INFO messages on stderr, above the progress bars."""
    from tqdm.contrib.logging import logging_redirect_tqdm

    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger(__package__).setLevel(logging.INFO)
    return logging_redirect_tqdm()


if __name__ == "__main__":
    sys.exit(main())
