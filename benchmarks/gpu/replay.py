"""Calls that were wrong on a GPU, on a CPU: CUDA kernels in the emulation of tests/csrc, Triton's in its interpreter.

    python -m benchmarks.gpu.replay DIR/failures.pt

Exit status: 0 if all are right here, 1 if one is wrong here, too.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ..harness.arguments import Parser, command
from . import emulated
from .calls import Trial, untestable


def main(argv: Sequence[str] | None = None) -> int:
    top = Parser(prog="python -m benchmarks.gpu.replay", description=__doc__.partition("\n")[0])
    top.add_argument("file", type=Path, metavar="F.pt", help="that benchmarks.gpu.calls --failures has written")
    args = top.parse_args(argv)
    return command(top.prog, lambda: run(args.file))


@torch.inference_mode()
def run(path: Path) -> int:
    kept = torch.load(path, weights_only=True)  # before what may start Python again
    emulated.use()
    status = 0
    for each in kept:
        trial = Trial(each["backend"], each["number"], each["dtype"], each["layout"])
        if refusal := untestable(trial.backend, trial.dtype):
            here = f"cannot run here: {refusal}"
        else:
            trial.run(trial.inputs() if each["inputs"] is None else each["inputs"])
            here = f"here: {trial.wrong}" if trial.wrong else "right here"
            status |= bool(trial.wrong)
        print(f"{trial}\n  on the GPU: {each['wrong']}\n  {here}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
