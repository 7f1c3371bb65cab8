"""Workers on many machines: actors of Ray Data, which does all that is to be done about machines that die."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

from ..console import unforeseen
from .job import Drawn, Event, Job, Made, Ready
from .prompt_file import Prompt
from .settings import Facts

if TYPE_CHECKING:
    from .drawing import Drawer

LOCAL = "local"


class ShardMaker:
    """What an actor runs: rows of pickled tasks to rows of pickled results, what was made or an error's sentence.

    The job comes with each task, not with the actor: Ray warns that it cannot restart one without its arguments.
    """

    def __init__(self) -> None:
        self.drawer: Drawer | None = None  # loaded by the first shard, whose errors are told

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"made": [pickle.dumps(self._make(*pickle.loads(task))) for task in batch["task"]]}

    def _make(self, job: Job, facts: Facts, shard: int, rows: list[Prompt]) -> Made | str:
        """What was made, or what has failed: Ray would repeat an exception with its traceback."""
        from .drawing import Drawer

        try:
            self.drawer = self.drawer or Drawer(job)
            for name, value in self.drawer.facts.items():
                if facts.get(name) != value:
                    raise ValueError(
                        f"a worker has {name} {value} and the run {facts.get(name)}: let all machines of the cluster "
                        "have the same, or choose a backend and a dtype that they all have"
                    )
            return self.drawer.make(shard, rows)
        except Exception as error:
            return unforeseen(error)


def run(
    job: Job, tasks: Sequence[int], rows: Callable[[int], list[Prompt]], workers: int | None, address: str
) -> Generator[Event, None, None]:
    """Make shards on a Ray cluster.

    Args:
        job: what the actors need to know; its folder is one that all machines share.
        tasks: the shards; if there are none, the model is loaded all the same.
        rows: the prompts of a shard.
        workers: how many actors; None for as many as the cluster has cores for.
        address: of the cluster, or `LOCAL`.

    Yields:
        `Ready`, then for each shard `Drawn` and what was made.

    Raises:
        ValueError: for an address where there is no cluster, and what has failed in an actor.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    import ray.data

    _connect(job, workers, address)
    try:
        facts = ray.get(ray.remote(num_cpus=job.threads)(_facts).remote(job))
        if isinstance(facts, str):
            raise ValueError(facts)
        yield Ready(facts)
        if not tasks:
            return
        most = max(int(ray.cluster_resources().get("CPU", 1)) // job.threads, 1)
        items = [{"task": pickle.dumps((job, facts, shard, rows(shard)))} for shard in tasks]
        made = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            ShardMaker,
            batch_size=1,
            batch_format="numpy",
            num_cpus=job.threads,
            compute=ray.data.ActorPoolStrategy(size=min(workers or most, len(tasks))),
        )
        for row in made.iter_rows():
            event = pickle.loads(row["made"])
            if isinstance(event, str):
                raise ValueError(event)
            yield Drawn(event.pictures)
            yield event
    except ray.exceptions.RayError as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"Ray has given up ({said[-1]:.200}): look at its machines, and run it again") from error
    finally:
        ray.shutdown()


def _facts(job: Job) -> Facts | str:
    """What the bytes depend on, or what has failed, in one sentence."""
    from .drawing import Drawer

    try:
        return Drawer(job).facts
    except Exception as error:
        return unforeseen(error)


def _connect(job: Job, workers: int | None, address: str) -> None:
    """Connect to the cluster, or start one on this machine; quietly. Raises ValueError where there is none."""
    import ray
    import ray.data

    here: dict[str, Any] = {"address": address}
    if address == LOCAL:
        here |= {"include_dashboard": False, "num_cpus": None if workers is None else workers * job.threads}
        here["_node_ip_address"] = "127.0.0.1"  # also where this machine's name leads to an address that it has not
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **here)
    except (ConnectionError, ValueError, RuntimeError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"there is no Ray cluster at {address} ({said:.120}): start one, or use local") from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
