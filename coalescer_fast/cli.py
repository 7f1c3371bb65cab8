"""The command ``coalescer-fast``.

Whatever a user can get wrong ends in one sentence on stderr and a non-zero exit status.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import re
import secrets
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__, files
from .bench import command as bench
from .bulk.command import SUMMARY as GENERATE
from .bulk.command import add_arguments as add_generate
from .bulk.command import run as generate
from .collect_env import cpu_name
from .console import (
    MAX_IMAGES,
    MAX_STEPS,
    Parser,
    add_common_options,
    counts,
    execute,
    logging_to_stderr,
    natural,
    open_pipeline,
    positive,
    prompt,
    table,
    transposed_table,
    up_to,
)
from .files import check_writable
from .serving import command as serving

if TYPE_CHECKING:
    from .pipeline import CoalescerPipeline

# Heavy modules (torch, diffusers) are imported by the commands that need them, so these names repeat those of
# acceleration.RUNTIMES and dtypes.DTYPES.
RUNTIMES = ("auto", "cpu", "cuda", "compile", "onnxruntime", "openvino", "tensorrt")
DTYPES = ("auto", "float32", "float16", "bfloat16", "int8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's own) and return its exit status."""
    return execute(parser(), argv)


def parser() -> Parser:
    """Build the parser; it sets ``run``, the function of the command."""
    top = Parser(prog="coalescer-fast", description="Text-to-image sampling in two network evaluations.")
    top.add_argument("--version", action="version", version=__version__)
    add_common_options(top)
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int | None], text: str) -> Parser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        add_common_options(sub, is_subcommand=True)
        sub.set_defaults(run=run)
        return sub

    def model(sub: Parser, default: str | None = None) -> None:
        said = "%(default)s" if default else "the plain reference"
        sub.add_argument(
            "--model", default="emoji-64", help="an embedded model, a folder or a Hub id (default: %(default)s)"
        )
        sub.add_argument(
            "--backend", choices=RUNTIMES, default=default, help=f"what runs the networks (default: {said})"
        )
        sub.add_argument("--dtype", choices=DTYPES, default=default, help=f"what they compute in (default: {said})")
        sub.add_argument(
            "--artefact", type=Path, metavar="DIR", help="run what coalescer-export wrote into this folder"
        )

    sub = command("sample", sample, "draw pictures of prompts")
    sub.add_argument("prompts", nargs="+", type=prompt, metavar="PROMPT")
    model(sub)
    text = (
        f"pictures a prompt, at most {MAX_IMAGES:,}, for they are drawn together and held in memory "
        "(default: %(default)s)"
    )
    sub.add_argument("-n", type=up_to(MAX_IMAGES), default=1, metavar="N", help=text)
    sub.add_argument("--seed", type=natural, help="repeats a drawing (default: a random one, which is said)")
    text = (
        "how a seed is turned into noise: torch's generator, or philox, by which a page of coalescer-export web and "
        "coalescer-fast serve draw the same picture (default: %(default)s)"
    )
    sub.add_argument("--noise", choices=["torch", "philox"], default="torch", help=text)
    text = (
        f"steps, the network evaluations without guidance, at most {MAX_STEPS:,}, for the model is made for 2 "
        "(default: %(default)s); auto lets each picture take as many as it needs"
    )
    sub.add_argument("--steps", type=step_count, default=2, metavar="N", help=text)
    text = "draw so many for each picture and keep the best, by what the network says (default: %(default)s)"
    sub.add_argument("--best-of", type=up_to(MAX_IMAGES), default=1, metavar="K", help=text)
    sub.add_argument("--guidance", type=float, metavar="W", help="guidance scale; 1 is none (default: the model's own)")
    sub.add_argument(
        "--negative", type=prompt, metavar="PROMPT", help="what guidance leads away from (default: any picture)"
    )
    sub.add_argument(
        "--prompt-matching",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="draw the known name that says what a prompt says (default: yes)",
    )
    sub.add_argument(
        "-o", "--out", type=Path, metavar="OUT.png", help="picture file (default: named after the first prompt)"
    )
    text = "also write hashes of weights, noise and pictures, by which two machines can tell whether they drew the same"
    sub.add_argument("--receipt", type=Path, metavar="FILE.json", help=text)

    add_generate(command("generate", generate, GENERATE), model)

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

    sub = command("bench", bench.run, "measure what this machine gains over plain PyTorch and other engines")
    bench.add_arguments(sub)
    sub = command("serve", serve, "answer requests for pictures by HTTP, as OpenAI's images API, and a page")
    model(sub, "auto")
    serving.add_options(sub)

    sub = command("train", train, "train a model on pictures with descriptions")
    sub.add_argument("kind", choices=["autoencoder", "coalescer"])
    sub.add_argument(
        "--config", required=True, metavar="FILE.toml", help="a TOML file, or the name of one of the package's own"
    )
    sub.add_argument(
        "--data",
        required=True,
        help="an .npz file made by build-data, a folder of captioned pictures, or the word digits or fashion",
    )
    text = "side in pixels that the pictures of a folder are brought to, that of the configuration's networks"
    sub.add_argument("--size", type=positive, metavar="S", help=f"{text} (default: 64)")
    sub.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of checkpoints and model; a training in it goes on (default: runs/CONFIG)",
    )
    sub.add_argument(
        "--init", metavar="PIPELINE", help="a diffusers pipeline whose UNet a coalescer is made of (a folder or Hub id)"
    )
    sub.add_argument(
        "--teacher",
        metavar="PIPELINE",
        help="a diffusers pipeline, or a training of flow matching, that draws the close pictures of a coalescer",
    )
    text = "settings that differ from the file's, as in --set seed=1 schedule.steps=512"
    sub.add_argument("--set", nargs="+", default=(), metavar="KEY=VALUE", dest="changes", help=text)
    text = "go on with a training whose configuration or data are others than before"
    sub.add_argument("--allow-changes", action="store_true", help=text)

    sub = command("evaluate", evaluate, "measure a model on a data set")
    model(sub)
    sub.add_argument("--data", required=True, metavar="FILE.npz", help="a data set made by build-data")
    sub.add_argument(
        "--steps", type=counts, default=(1, 2, 4), metavar="1,2,4", help="step counts, one row each (default: 1,2,4)"
    )
    text = 'free wordings that are asked for, too: a JSON file {"little kitten": ["cat", "cat face"], ...}'
    sub.add_argument("--wordings", type=Path, metavar="FILE.json", help=text + " with the names that are right")
    sub.add_argument("--csv", type=Path, metavar="OUT.csv", help="write the rows to a file, too")

    sub = command("build-data", build_data, "build a data set of emoji or of clip art")
    sub.add_argument(
        "--set",
        choices=["emoji", "openclipart"],
        default="emoji",
        help="emoji from npm packages, or openclipart from a Debian package (default: %(default)s)",
    )
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
    sub.add_argument(
        "--styles", nargs="+", metavar="STYLE", help="art styles of emoji (default: all but the share-alike ones)"
    )
    sub.add_argument(
        "--source", type=Path, metavar="DIR", help="folder of openclipart's SVG files (default: fetch the package)"
    )
    return top


def sample(args: argparse.Namespace) -> None:
    count = len(args.prompts) * args.n
    if (drawn_at_once := count * args.best_of) > 4 * MAX_IMAGES:
        too_many = f"{drawn_at_once:,} pictures are more than the {4 * MAX_IMAGES:,} that are drawn at once"
        raise ValueError(f"{too_many}: ask for fewer prompts or -n{', or a smaller --best-of' * (args.best_of > 1)}")
    if args.receipt is not None and (args.best_of > 1 or args.steps == "auto"):
        raise ValueError("--receipt is for pictures of one drawing and a number of steps: leave out --best-of and auto")
    from PIL import Image

    out = args.out or Path((re.sub(r"\W+", "-", args.prompts[0].lower()).strip("-")[:60] or "sample") + ".png")
    if Image.registered_extensions().get(out.suffix.lower()) not in Image.SAVE:
        if out.is_dir():
            raise ValueError(f"{out} is a folder: name a file in it, such as {out / 'picture.png'}")
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

    from .noise import PhiloxGenerator
    from .training.pictures import sheet

    pipe = load(args)
    loaded = time.perf_counter()
    generator = PhiloxGenerator(seed) if args.noise == "philox" else torch.Generator().manual_seed(seed)
    noise = pipe.initial_noise(drawn_at_once, generator)
    output: Any = pipe(
        args.prompts,
        num_images_per_prompt=args.n,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        latents=noise,
        negative_prompt=args.negative,
        best_of=args.best_of,
        prompt_matching=args.prompt_matching,
    )
    drawn = time.perf_counter()
    pictures = output.images
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
        for match in output.matched or []:
            if match is not None and match.description != match.prompt:
                print(f"{match.prompt!r} is drawn as {match.name!r} ({match.similarity:.2f})", file=sys.stderr)
        grades = [f"{quality:.2f}" for quality in output.quality or []]
        if len(grades) > 1:  # a line for each prompt
            lines = [(text, " ".join(grades[i * args.n : (i + 1) * args.n])) for i, text in enumerate(args.prompts)]
            print(table([("prompt", "quality"), *lines]), file=sys.stderr)
        drew = f"{count} picture{'s' * (count > 1)} in {drawn - loaded:.2f} s"
        graded = f", quality {grades[0]}" if len(grades) == 1 else ""
        print(f"{drew}{graded}, loading {loaded - started:.1f} s, seed {seed}", file=sys.stderr)
    print(out)


def step_count(text: str) -> int | str:
    """The type of ``--steps``."""
    return text if text == "auto" else up_to(MAX_STEPS)(text)


def info(args: argparse.Namespace) -> None:
    import torch

    from . import acceleration
    from .folders import WEIGHTS, embedded_models
    from .ops import backends

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
    facts["backends"] = {name: {"able": able, "reason": reason} for name, (able, reason) in states.items()}
    reasons = {name: acceleration.unavailable(name) for name in acceleration.RUNTIMES}
    facts["accelerate"] = {name: {"able": not reason, "reason": reason} for name, reason in reasons.items()}
    facts["models"] = {
        name: sum(file.stat().st_size for file in (WEIGHTS / name).rglob("*")) for name in embedded_models()
    }
    if args.json:
        print(json.dumps(facts, indent=2))
        return
    facts["models"] = ", ".join(f"{name} ({size / 1e6:.1f} MB)" for name, size in facts["models"].items())
    for name, state in facts.pop("backends").items():
        facts[f"backend {name}"] = f"{'can run' if state['able'] else 'cannot run: ' + state['reason']}"
    for name, state in facts.pop("accelerate").items():
        facts[f"accelerate {name}"] = state["reason"] or "can run"
    print(table([(name, str(value or "none")) for name, value in facts.items()]))


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
    print(transposed_table(rows))


def serve(args: argparse.Namespace) -> None:
    serving.serve(args, load)


def train(args: argparse.Namespace) -> None:
    from .training.config import run

    with logging_to_stderr(args.quiet):
        out = args.out or Path("runs") / Path(args.config).stem
        options: Any = {"allow_changes": args.allow_changes, "progress": not args.quiet}
        options |= {"size": args.size, "init": args.init, "teacher": args.teacher, "changes": args.changes}
        run(args.kind, args.config, args.data, out, **options)


def evaluate(args: argparse.Namespace) -> None:
    if args.csv:
        check_writable(args.csv)
    from .training.data import load as load_data

    data = load_data(args.data)
    from .training.evaluation import evaluate as measure

    wordings = None
    if args.wordings is not None:
        from .training.evaluation import read_wordings

        wordings = read_wordings(args.wordings)
    rows = measure(load(args), data, steps=args.steps, progress=not args.quiet, wordings=wordings)
    print(transposed_table(rows))
    if args.csv:
        files.write_csv(args.csv, rows, list(rows[0]))


def build_data(args: argparse.Namespace) -> None:
    emoji = args.set == "emoji"
    unused = "source" if emoji else "styles"
    if getattr(args, unused) is not None:
        raise ValueError(f"--{unused} has no meaning with --set {args.set}: leave it out")
    from .training import build_openclipart
    from .training.build_data import DEFAULT_STYLES, build

    with logging_to_stderr(args.quiet):
        cache, progress = args.cache or args.out / "packages", not args.quiet
        if emoji:
            path = build(args.out, cache, args.sizes, args.styles or DEFAULT_STYLES, progress=progress)
        else:
            path = build_openclipart.build(args.out, cache, args.sizes, args.source, progress=progress)
    print(path)


def load(args: argparse.Namespace) -> CoalescerPipeline:
    """The pipeline that the options name, accelerated if they name a backend, a dtype or an artefact."""
    from .acceleration import accelerate

    pipe = open_pipeline(args.model)
    pipe.set_progress_bar_config(disable=args.quiet, delay=1.0)  # none for what takes less than a second
    plain = args.backend is None and args.dtype is None and args.artefact is None
    return pipe if plain else accelerate(pipe, args.backend or "auto", args.dtype or "auto", args.artefact)


if __name__ == "__main__":
    sys.exit(main())
