"""coalescer-fast serve under load: pictures a second of one client and of many, every picture checked to the bit.

python -m benchmarks.serving --csv F
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness import results
from benchmarks.harness.arguments import Parser, command, listed, positive
from benchmarks.harness.processes import same_package
from coalescer_fast.bench.environment import environment, timestamp
from coalescer_fast.console import open_pipeline, table

PROMPTS = (
    "octopus",
    "pizza",
    "a little kitten",
    "rocket, noto style",
    "",
    "a red apple",
    "guitar",
    "snow man",
    "海",
    "🎉",
)
OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {  # what cannot be mixed is drawn by calls of its own
    "alike": ({},),
    "mixed": ({}, {}, {}, {}, {}, {}, {"guidance_scale": 1.0}, {"negative_prompt": "red"}),
}
SETTLED = 0.2  # of a run: memory is compared from then on
CPU, MEMORY = "process_cpu_seconds_total", "process_resident_memory_bytes"


@dataclass
class Load:
    """What the clients of a run have seen.

    Attributes:
        seconds: of each request that was answered with a picture.
        statuses: how often each status was answered.
        errors: what failed otherwise.
        wrong: pictures that differ from those of direct calls.
        took: seconds of the run.
        counted: the server's metrics, from time to time.
    """

    seconds: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    wrong: int = 0
    took: float = 0.0
    counted: list[dict[str, float]] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Pictures a second."""
        return len(self.seconds) / self.took

    def grown(self, name: str, since: float = 0.0) -> float:
        """How much a metric has grown, since this part of the run."""
        return self.counted[-1][name] - self.counted[int(since * len(self.counted))][name]


def requests(count: int, options: str) -> list[dict[str, Any]]:
    """So many different requests, of one picture each, with options of this kind."""
    given = OPTIONS[options]
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(count)]
    return [{"prompt": prompt, "seed": i, **given[i % len(given)]} for i, prompt in enumerate(prompts)]


def expected(asked: Sequence[dict[str, Any]]) -> list[bytes]:
    """The pixels that direct calls draw, one request after the other."""
    import coalescer_fast as cf

    pipe = open_pipeline("emoji-64")
    pipe.set_progress_bar_config(disable=True)
    cf.accelerate(pipe)
    found = []
    for request in asked:
        given = {name: value for name, value in request.items() if name != "seed"}
        output: Any = pipe(**given, generator=cf.PhiloxGenerator(request["seed"]))
        found.append(output.images[0].tobytes())
    return found


@contextmanager
def server(*options: str) -> Iterator[int]:
    """Run the command, and stop it by SIGTERM; gives its port. Raises ValueError if it does not start or end well."""
    words = [sys.executable, "-m", "coalescer_fast", "serve", "--port", "0", *options]
    with subprocess.Popen(words, **same_package(), stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            if (address := re.search(r" at http://127\.0\.0\.1:(\d+) ", said)) is None:
                raise ValueError("the server has not started: its own message says why")
            yield int(address[1])
        finally:
            process.send_signal(signal.SIGTERM)
            status = process.wait()
    if status:
        raise ValueError(f"the server has ended with status {status}: its own message says why")


def call(connection: http.client.HTTPConnection, method: str, path: str, body: object = None) -> tuple[int, bytes]:
    headers = {"Content-Type": "application/json"}
    connection.request(method, path, None if body is None else json.dumps(body), headers)
    response = connection.getresponse()
    return response.status, response.read()


def run(port: int, clients: int, seconds: float, asked: Sequence[dict[str, Any]], right: Sequence[bytes]) -> Load:
    """Have clients ask one request after the other, each on a connection of its own."""
    from PIL import Image

    load, lock, end = Load(), threading.Lock(), time.perf_counter() + seconds

    def client(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        i = number * len(asked) // clients
        while time.perf_counter() < end:
            started = time.perf_counter()
            try:
                status, body = call(connection, "POST", "/v1/images/generations", asked[i % len(asked)])
            except (OSError, http.client.HTTPException) as error:
                with lock:
                    load.errors.append(repr(error))
                return
            took = time.perf_counter() - started
            fits = True
            if status == 200:
                picture = base64.b64decode(json.loads(body)["data"][0]["b64_json"])
                fits = Image.open(io.BytesIO(picture)).tobytes() == right[i % len(asked)]
            with lock:
                load.statuses[status] += 1
                load.wrong += not fits
                if status == 200:
                    load.seconds.append(took)
            i += 1

    def watch() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        while time.perf_counter() < end:
            text = call(connection, "GET", "/metrics")[1].decode()
            load.counted.append({name: float(n) for name, n in re.findall(r"^(\w+) (\S+)$", text, re.MULTILINE)})
            time.sleep(seconds / 30)

    jobs: list[tuple[Callable[..., None], tuple[int, ...]]] = [(client, (i,)) for i in range(clients)]
    threads = [threading.Thread(target=job, args=numbers) for job, numbers in [*jobs, (watch, ())]]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    load.took = time.perf_counter() - started
    return load


def rows(args: argparse.Namespace) -> list[results.Row]:
    """Measure: for each kind and delay one client, many, and one again, so that a change of the machine is seen."""
    found: list[results.Row] = []
    common: results.Row = {**environment(), "timestamp": timestamp()}
    for options in args.options:
        asked = requests(args.requests, options)
        right = expected(asked)
        for delay in args.delays:
            with server("--batch-delay", str(delay)) as port:
                run(port, args.clients, args.seconds / 10, asked, right)
                for clients, seconds in ((1, args.seconds / 4), (args.clients, args.seconds), (1, args.seconds / 4)):
                    before = os.getloadavg()[0]
                    load = run(port, clients, seconds, asked, right)
                    kind: results.Row = {"requests": options, "batch_delay_ms": delay, "clients": clients}
                    found.append({**kind, **measured(load), "load_before": before, **common})
    return found


def measured(load: Load) -> results.Row:
    """A run in numbers."""
    times = sorted(load.seconds) or [0.0]
    answered = {200, 429}
    others = sum(count for status, count in load.statuses.items() if status not in answered)
    return {
        "seconds": load.took,
        "pictures": len(load.seconds),
        "pictures_per_s": load.rate,
        "ms_50": 1e3 * statistics.median(times),
        "ms_95": 1e3 * times[int(0.95 * (len(times) - 1))],
        "answered_429": load.statuses[429],
        "other_errors": len(load.errors) + others,
        "wrong_pictures": load.wrong,
        "batch": load.grown("coalescer_fast_pictures_total") / (load.grown("coalescer_fast_batch_pictures_count") or 1),
        "server_cpu_ms": 1e3 * load.grown(CPU) / (load.grown("coalescer_fast_pictures_total") or 1),
        "memory_mb": load.counted[-1][MEMORY] / 1e6,
        "memory_growth_mb": load.grown(MEMORY, SETTLED) / 1e6,
    }


def summary(found: Sequence[results.Row]) -> str:
    """The rows as a table, and how much many clients gain over one."""
    names = list(found[0])[:16]
    lines = [names, *([str(results.text(row)[name]) for name in names] for row in found)]
    said = [table(lines, "<>")]
    for one, many, again in zip(found[::3], found[1::3], found[2::3]):
        alone = (float(one["pictures_per_s"]) + float(again["pictures_per_s"])) / 2
        gain = float(many["pictures_per_s"]) / alone if alone else 0.0
        which = f"{many['requests']}, batch delay {many['batch_delay_ms']} ms"
        said.append(f"{which}: {gain:.2f} times the pictures of one client")
    return "\n".join(said)


def failures(found: Sequence[results.Row]) -> int:
    """Wrong pictures, and errors but 429."""
    return sum(int(row["other_errors"]) + int(row["wrong_pictures"]) for row in found)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="benchmarks.serving", description="coalescer-fast serve under load.")
    parser.add_argument("--clients", type=positive, default=64, metavar="N", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=60.0, metavar="S", help="of a run (default: %(default)g)")
    parser.add_argument(
        "--options",
        type=listed(*OPTIONS),
        default=["alike"],
        metavar="alike,mixed",
        help="of the requests (default: alike)",
    )
    parser.add_argument("--delays", type=float, nargs="+", default=[5.0], metavar="MS", help="default: 5")
    text = "different requests, whose pictures are drawn directly first (default: %(default)s)"
    parser.add_argument("--requests", type=positive, default=240, metavar="N", help=text)
    parser.add_argument("--csv", type=Path, metavar="F.csv", help="write the results to a file")
    args = parser.parse_args(argv)

    def work() -> int:
        found = rows(args)
        print(summary(found))
        if args.csv:
            results.write(args.csv, found)
        return 1 if failures(found) else 0

    return command("benchmarks.serving", work)
