"""Compare exported artefacts with the float32 reference on real prompts."""

from __future__ import annotations

import argparse
import json
from functools import cache
from pathlib import Path

from coalescer_fast.console import natural, open_pipeline, positive
from coalescer_fast.runtime.engines import artefact


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="an artefact, or a folder of several")
    parser.add_argument("--model", help="the model that it was exported from (default: as its manifest says)")
    parser.add_argument(
        "--prompts", type=positive, default=16, metavar="N", help="pictures, of known names (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=natural, default=0, help="of the choice of names and the noise (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(args: argparse.Namespace) -> int:
    artefacts = artefact.find(args.folder)
    from ..measure.accuracy import compare, opened
    from ..quantize.prompts import prompts_for

    # before any model is loaded, so that what cannot run here is said at once
    runs = {kind: opened(found) for kind, found in artefacts.items()}
    load = cache(open_pipeline)
    results = {}
    for kind, found in artefacts.items():
        engine = found.manifest.engine.replace("onnx", "onnxruntime")
        pipe = load(args.model or found.manifest.model)
        found.check_weights(pipe)
        prompts = prompts_for(pipe, found, args.prompts, args.seed)
        results[kind] = compare(found, runs[kind], pipe, prompts, args.seed, runtime=engine)
    if args.json:
        print(json.dumps({kind: result.to_dict() for kind, result in results.items()}, indent=2))
    else:
        print("\n\n".join(map(str, results.values())))
    return 0 if all(result.passed for result in results.values()) else 1
