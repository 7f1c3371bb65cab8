"""A pipeline becomes a site: its networks as ONNX, its encoder, tables of characters, and the page."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib.metadata import distribution
from importlib.resources import files as resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from safetensors.torch import save

from coalescer_fast import __version__, files
from coalescer_fast.folders import public_name
from coalescer_fast.runtime.engines import onnxruntime
from coalescer_fast.runtime.engines.artefact import Artefact
from coalescer_fast.runtime.engines.hashes import network_sha256
from coalescer_fast.runtime.engines.manifest import Schedule

from ..measure import accuracy
from ..onnx.exporter import export_onnx
from ..quantize.quantizer import quantize_artefact
from . import packing, runtime
from .tables import tables

if TYPE_CHECKING:
    from coalescer_fast.pipeline import CoalescerPipeline

PRECISIONS = ("half", "int8")
BUDGETS = {"half": "fp16", "int8": "int8"}  # the precision whose budget in `accuracy.BUDGETS` holds
STEPS = 2
SMALLEST = 64  # numbers of a weight that is stored in float16
MAX_BATCH = 16  # of the graphs; the page evaluates a description and the empty one at a time
PAGE = ("index.html", "page.css", "page.js")
SOURCES = ("noise.js", "text.js", "sampling.js", "worker.js")
MODEL = ("unet.onnx", "decoder.onnx")
# what the page reads, in the order in which it needs it
READ = (
    "config.json",
    "ort-wasm-simd-threaded.mjs",
    "ort.wasm.min.js",
    "worker.js",
    "tables.json",
    "ort-wasm-simd-threaded.wasm",
    *MODEL,
    "encoder.safetensors",
)
NOTICE = "NOTICE.txt"  # of the package: what the model is derived from
NAMES = (*PAGE, "drawer.js", NOTICE, *READ)
# ONNX Runtime's level: for halves "basic" starts in half the time and is as fast; int8 needs all
OPTIMIZATION = {"half": "basic", "int8": "all"}
RUNTIME_NOTICE = "onnxruntime-web: Copyright (c) Microsoft Corporation, MIT license. The model:\n\n"


def site(
    pipe: CoalescerPipeline,
    *,
    model: str,
    precision: str = "half",
    single_file: bool = False,
    runtime_folder: Path | None = None,
    stage: Callable[[str], object] = lambda text: None,
) -> dict[str, bytes]:
    """Make the files of a site.

    Args:
        pipe: the pipeline, in float32 on a CPU.
        model: its name, as given to ``from_pretrained``.
        precision: "half" stores weights in float16 and computes in float32; "int8" computes convolutions in 8 bits.
        single_file: make one HTML file, which can be opened from a disk, and not a folder for a web server.
        runtime_folder: see `runtime.runtime_files`.
        stage: called with the name of each stage when it begins.

    Returns:
        The content of each file by its name.

    Raises:
        ValueError: for a model that a page cannot draw with.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; use one of {', '.join(PRECISIONS)}")
    if pipe.unet.config.cross_attention_dim is not None:
        raise ValueError(f"{model} attends to the tokens of a description, which the page cannot: take another model")
    stage("runtime")
    found = runtime.runtime_files(runtime_folder)
    found |= graphs(pipe, model, precision, stage)
    stage("encoder")
    encoder = pipe.description_encoder
    found["encoder.safetensors"] = save({name: tensor.contiguous() for name, tensor in encoder.state_dict().items()})
    found["tables.json"] = _json(tables(encoder.tokenizer))
    found["worker.js"] = b"\n".join(_source(name) for name in SOURCES)
    found["config.json"] = _json(
        config(pipe, model, precision, {name: len(found[name]) for name in READ if name in found})
    )
    page = resources("coalescer_fast") / "serving" / "page"
    found |= {name: (page / name).read_bytes() for name in PAGE} | {"drawer.js": _source("drawer.js")}
    found[NOTICE] = (RUNTIME_NOTICE + (distribution("coalescer_fast").read_text("licenses/NOTICE") or "")).encode()
    if single_file:
        stage("pack")
        return {"index.html": one_file(found)}
    return found


def graphs(pipe: CoalescerPipeline, model: str, precision: str, stage: Callable[[str], object]) -> dict[str, bytes]:
    """Export the UNet and the decoder, with weights in float16, and compare them with the float32 reference."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("unet", "decoder"):
            step = partial(_stage, stage, f"{kind} in {precision}")
            path = Path(folder) / kind
            path.mkdir()
            written = export_onnx(pipe, kind, path, model=model, batch=(1, 2, MAX_BATCH), stage=step)
            if precision == "int8":
                path = path.with_name(f"{kind}-int8")
                path.mkdir()
                # by force: whether int8 is faster on this machine says nothing about a browser
                written = quantize_artefact(pipe, written, path, force=True, stage=step)
            content = halved(onnx.load(str(written.graph))).SerializeToString()
            files.write_bytes(written.graph, content)
            step("compare")
            _check(pipe, written, precision)
            found[f"{kind}.onnx"] = content
    return found


def _stage(stage: Callable[[str], object], what: str, text: str) -> None:
    stage(f"{what}: {text}")


def _check(pipe: CoalescerPipeline, written: Artefact, precision: str) -> None:
    """Raise ValueError if a graph is beyond the budget of its precision."""
    manifest = replace(written.manifest, precision=BUDGETS[precision], files={})
    graph = Artefact(written.folder, manifest)
    try:
        accuracy.require(accuracy.compare(graph, onnxruntime.open_artefact(graph), pipe), f"the {manifest.kind}")
    except ValueError as error:
        other = PRECISIONS[precision == "half"]
        raise ValueError(
            f"{error}: the page would draw other pictures in {precision}; try --precision {other}"
        ) from error


def halved(graph: Any) -> Any:
    """Store the weights of a graph in float16; they are cast back when it is loaded."""
    casts = []
    for tensor in graph.graph.initializer:
        values = numpy_helper.to_array(tensor) if tensor.data_type == onnx.TensorProto.FLOAT else None
        if values is None or values.size < SMALLEST or not np.abs(values).max() < np.finfo(np.float16).max:
            continue
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}:half"))
        casts.append(helper.make_node("Cast", [f"{name}:half"], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *graph.graph.node]
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)
    onnx.checker.check_model(graph)
    return graph


def config(pipe: CoalescerPipeline, model: str, precision: str, sizes: Mapping[str, int]) -> dict[str, Any]:
    """What the page has to know of a pipeline."""
    scheduler = copy.copy(pipe.scheduler)
    scheduler.set_timesteps(STEPS)
    unet, encoder = pipe.unet.config, pipe.description_encoder.config
    networks = {"unet": pipe.unet, "description_encoder": pipe.description_encoder, "vae": pipe.vae}
    return {
        "size": unet.sample_size * pipe.vae.scale_factor,
        "shape": [unet.latent_channels, unet.sample_size, unet.sample_size],
        "optimization": OPTIMIZATION[precision],
        "files": dict(sizes),
        "scheduler": {
            "etas": scheduler.etas,
            "modes": scheduler.modes,
            **{name: scheduler.config[name] for name in ("eps", "guidance_scale", "guided_steps", "grading")},
        },
        "model": {name: encoder[name] for name in ("dim", "match_dim", "lexicon_size")}
        | {"styles": list(encoder.styles)},
        "receipt": {
            "model": public_name(model),
            "weights": {name: network_sha256(network, network.config) for name, network in networks.items()},
            "schedule": str(Schedule.of(scheduler, scheduler.config.guidance_scale)),
            "runtime": f"onnxruntime-web {runtime.VERSION}",
            "dtype": precision,
            "coalescer_fast": __version__,
        },
    }


def one_file(found: Mapping[str, bytes]) -> bytes:
    """The page with all that it reads in it."""
    parts = []
    for name in READ:
        planes = name in MODEL
        text, length = packing.pack(found[name], planes)
        marks = f' data-length="{length}"' + (" data-planes" if planes else "")
        parts.append(f'<script type="text/plain" id="file:{name}"{marks}>{text}</script>')
    notice = found[NOTICE].decode().replace("</", "< /")
    parts.append(f'<script type="text/plain" id="notice">\n{notice}</script>')
    for name in ("drawer.js", "page.js"):
        parts.append(f"<script>\n{_inlined(found[name].decode())}</script>")
    page = found["index.html"].decode()
    for name in ("drawer.js", "page.js"):
        page = _replaced(page, f'<script src="{name}" defer></script>\n', "")
    style = f"<style>\n{found['page.css'].decode()}</style>"
    page = _replaced(page, '<link rel="stylesheet" href="page.css">', style)
    return _replaced(page, "</body>", "\n".join(parts) + "\n</body>").encode()


def _inlined(script: str) -> str:
    return script.replace("</script", r"<\/script").replace("<!--", r"<\!--")


def _replaced(page: str, old: str, new: str) -> str:
    if page.count(old) != 1:
        raise ValueError(f"the page has {old!r} {page.count(old)} times; expected once")
    return page.replace(old, new)


def _source(name: str) -> bytes:
    return (resources("coalescer_fast.export.web") / "static" / name).read_bytes()


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
