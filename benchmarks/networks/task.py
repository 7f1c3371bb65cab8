"""What a process of the benchmark is told to do; importing this module loads no torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

DTYPES = ("fp32", "bf16", "int8")
INPUTS = "inputs-{}.npz"  # the tensors of a call by name, one file for each timestep


@dataclass(frozen=True)
class Task:
    """What a process does.

    Attributes:
        stage: "convert", "run" or "peak".
        name: of a conversion or a provider.
        dtype: one of `DTYPES`.
        model: a key of `models.NETWORKS`.
        scale: of the network, see `models.config`.
        size: height and width of the latents.
        batch: number of images.
        threads: on the CPU.
        isa: that the process is capped to, or "".
        folder: holds the inputs; conversions and results go there.
        keep_weights: argument of `coalescer_fast.accelerate`.
        cache: folder of prepared weights and compiled networks, or "".
    """

    stage: str
    name: str
    dtype: str
    model: str
    scale: float
    size: int
    batch: int
    threads: int
    isa: str
    folder: str
    keep_weights: bool = True
    cache: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Task:
        return Task(**json.loads(text))

    def path(self, name: str) -> Path:
        return Path(self.folder, name)

    @property
    def result(self) -> Path:
        """Where the provider's result goes."""
        return self.path(f"result-{self.name}-{self.dtype}.npy")
