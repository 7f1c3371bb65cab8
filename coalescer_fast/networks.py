"""`accelerate` and its companions for networks of others: modules, and the components of diffusers' pipelines.

The functions here are called by those of the same name in acceleration.py and parity.py, which say what they do.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from .prompts import check_batch_sizes
from .runtime.base import Part
from .runtime.cuda.module import CudaModuleRuntime, device_of
from .runtime.cuda.runtime import graph_bytes
from .runtime.native.module import Arguments, ModuleRuntime, as_arguments, no_programs, runtime_of
from .runtime.native.runtime import VOCABULARY

# Components of diffusers' pipelines that are accelerated.
COMPONENTS = ("unet", "controlnet", "vae")
CALIBRATION = 4  # prompts and steps that ranges of int8 are found with, where nothing else is said
# Networks that are accelerated: modules, and pipelines of them, of which we know only that they are.
NETWORKS = (nn.Module, DiffusionPipeline)
Networks = Any


def parts(x: Networks) -> dict[str, nn.Module]:
    """The modules of x that are accelerated, by name.

    Of an autoencoder these are its encoder and its decoder, which its methods call; of another module itself; of a
    pipeline those of its `COMPONENTS`. Raises ValueError if a pipeline has none of these.
    """
    if isinstance(x, nn.Module):
        name, halves = type(x).__name__, {each: getattr(x, each, None) for each in ("encoder", "decoder")}
        if callable(getattr(x, "decode", None)) and any(isinstance(half, nn.Module) for half in halves.values()):
            return {f"{name}.{each}": half for each, half in halves.items() if isinstance(half, nn.Module)}
        return {name: x}
    found = {}
    for component in COMPONENTS:
        network = x.components.get(component)
        if isinstance(network, nn.Module):
            for name, each in parts(network).items():
                found[component + name.removeprefix(type(network).__name__)] = each
    if not found:
        raise ValueError(f"{type(x).__name__} has neither {' nor '.join(COMPONENTS)}: there is nothing to accelerate")
    return found


def runtimes(x: Networks) -> dict[str, ModuleRuntime]:
    """What runs the accelerated modules of x, by name. Raises ValueError if there are none."""
    found = {name: runtime for name, part in parts(x).items() if (runtime := runtime_of(part)) is not None}
    if not found:
        raise ValueError(f"the {_kind(x)} is not accelerated: call coalescer_fast.accelerate first")
    return found


def _kind(x: Networks) -> str:
    return "module" if isinstance(x, nn.Module) else "pipeline"


def device(x: Networks) -> torch.device:
    """Where the modules of x are that are accelerated.

    Raises:
        ValueError: they are on several devices, or on one where nothing runs them.
    """
    where = {name: device_of(network) for name, network in parts(x).items()}
    name, found = next(iter(where.items()))
    for other, place in where.items():
        if place != found:
            raise ValueError(f"{name} is on {found} and {other} on {place}: move all of them to one device first")
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"{name} is on {found}, and is accelerated on a CPU or a CUDA device: move it there first")
    return found


def accelerate(
    x: Networks,
    dtype: torch.dtype,
    prompts: Sequence[str] | None,
    inputs: Sequence[Any] | None,
    keep_weights: bool,
    cache: str | Path | None,
    winograd_memory: int | None,
    call: Mapping[str, Any],
    auto: bool,
) -> None:
    networks, where = parts(x), device(x)
    if not isinstance(keep_weights, bool):
        raise TypeError(f"keep_weights is {keep_weights!r:.80}; expected True or False")
    if cache is not None and (not isinstance(cache, (str, Path)) or Path(cache).is_file()):
        raise ValueError(f"cache is {cache!r:.80}; expected the name of a folder")
    if call and (dtype != torch.int8 or isinstance(x, nn.Module)):
        only = "only with a pipeline and dtype='int8' it takes others, which it gives to the pipeline's calls"
        raise TypeError(f"accelerate has no argument {next(iter(call))}: leave it out; {only}")
    if isinstance(x, nn.Module):
        if prompts is not None:
            raise ValueError("prompts are for pipelines: give a module inputs=[...]")
        if dtype == torch.int8 and inputs is None:
            raise ValueError("dtype 'int8' of a module needs inputs=[...], the arguments of some calls")
        if dtype != torch.int8 and inputs is not None:
            raise ValueError("inputs are what dtype 'int8' finds its ranges with: leave them out")
    elif inputs is not None:
        raise ValueError("inputs are for modules: give a pipeline prompts=[...]")
    elif dtype != torch.int8 and prompts is not None:
        raise ValueError("prompts are what dtype 'int8' finds its ranges with: leave them out")
    if dtype == torch.int8 and (reason := no_programs(torch.uint8)):
        raise ValueError(f"dtype 'int8' cannot run: {reason}")
    if where.type == "cuda":
        cached, winograd = cache is not None, winograd_memory is not None
        only_on_cpu = {"keep_weights=False": not keep_weights, "cache": cached, "winograd_memory": winograd}
        if unwanted := [name for name, is_given in only_on_cpu.items() if is_given]:
            raise ValueError(f"{unwanted[0]} is for a CPU alone, and the {_kind(x)} is on {where}: leave it out")
    given = calls(inputs or ())
    if inputs is not None and not given:
        raise ValueError("inputs is empty: dtype 'int8' needs the arguments of some calls")
    if list(networks.values()) == [x]:
        _check_calls(x, given)
    for network in networks.values():
        if (before := runtime_of(network)) is not None:
            before.remove()
    if where.type == "cuda":
        share = graph_bytes(where) // len(networks)
        for network in networks.values():
            CudaModuleRuntime(network, dtype, most_bytes=share)
        return
    folder, itself = None if cache is None else str(cache), list(networks.values()) == [x]
    made = [
        ModuleRuntime(network, dtype, given if itself else (), keep_weights, folder, auto, winograd_memory)
        for network in networks.values()
    ]
    if dtype == torch.int8 and not itself:
        try:
            with ExitStack() as stack, torch.no_grad():
                for runtime in made:
                    stack.enter_context(runtime.collecting())
                for args, kwargs in given:
                    x(*args, **kwargs)
                if not given:
                    _draw(x, prompts, call)
        except BaseException:
            for runtime in made:
                runtime.remove()
            raise


def calls(inputs: Any) -> list[Arguments]:
    """The arguments of calls. Raises TypeError for anything but a list of tuples or dicts."""
    if not isinstance(inputs, (list, tuple)) or any(isinstance(each, Tensor) for each in inputs):
        raise TypeError(
            "inputs is no list of calls; expected inputs=[(sample, timestep, ...), ...], or dicts in the list"
        )
    return [as_arguments(each) for each in inputs]


def _check_calls(module: nn.Module, given: Sequence[Arguments]) -> None:
    """Raise ValueError for arguments that the module's forward does not take."""
    signature = inspect.signature(module.forward)
    for number, (args, kwargs) in enumerate(given):
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise ValueError(f"inputs[{number}] is no call of {type(module).__name__}: {error}") from error


def _draw(pipe: Any, prompts: Sequence[str] | None, call: Mapping[str, Any], **others: Any) -> list[Any]:
    """What the pipeline's calls for these prompts return, one a prompt."""
    if "prompt_embeds" in call:
        subjects: list[dict[str, Any]] = [{}]
    else:
        subjects = [{"prompt": prompt} for prompt in prompts or VOCABULARY[:CALIBRATION]]
    settings = {"num_inference_steps": CALIBRATION, **call, **others}
    with torch.no_grad():
        return [pipe(**each, **settings, generator=torch.Generator().manual_seed(i)) for i, each in enumerate(subjects)]


def restore(x: Networks) -> None:
    for runtime in runtimes(x).values():
        runtime.remove()


def refresh(x: Networks) -> None:
    for runtime in runtimes(x).values():
        runtime.forget()
        runtime.refresh()


@torch.no_grad()
def warmup(x: Networks, batch_sizes: Sequence[int], inputs: Sequence[Any] | None, call: Mapping[str, Any]) -> None:
    runtimes(x)
    if isinstance(x, nn.Module):
        if inputs is None:
            raise ValueError(
                "inputs are missing: give the arguments of a call of every size to come, warmup(module, inputs=[...])"
            )
        for args, kwargs in calls(inputs):
            x(*args, **kwargs)
        return
    check_batch_sizes(batch_sizes)
    for n in batch_sizes:
        _draw(x, [""], call, num_images_per_prompt=n)


def explain(x: Networks) -> list[Part]:
    rows = []
    for name, network in parts(x).items():
        runtime = runtime_of(network)
        rows.append(Part(name, "torch", "it is not accelerated") if runtime is None else runtime.part(name))
    others = x.components if isinstance(x, DiffusionPipeline) else dict(x.named_children())
    whole = isinstance(x, nn.Module) and list(parts(x).values()) == [x]
    shown = {row.name.partition(".")[0] for row in rows} | {row.name.rpartition(".")[2] for row in rows}
    for name, other in ({} if whole else others).items():
        if name not in shown and other is not None:
            rows.append(Part(name, "as before", f"a {type(other).__name__}, which is left alone"))
    return rows


# Comparing with the networks as they were.


@contextmanager
def references(x: Networks) -> Iterator[None]:
    """Inside, the accelerated modules run in torch, in float32."""
    with ExitStack() as stack:
        for runtime in runtimes(x).values():
            stack.enter_context(runtime.replaced(_reference(runtime)))
        yield


def _reference(runtime: ModuleRuntime) -> Callable[..., Any]:
    """The module's own forward, of a copy in float32 if it is not."""
    if runtime.freed:
        raise ValueError(
            f"{runtime.name} cannot be compared: its weights were freed, by keep_weights=False; "
            "load it anew, and accelerate it with keep_weights=True"
        )
    if all(p.dtype == torch.float32 for p in runtime.module.parameters()):
        return runtime.own_forward
    twin = copy.deepcopy(runtime.module).eval()
    twin.__dict__.pop("forward", None)
    twin.float()

    def forward(*args: Any, **kwargs: Any) -> Any:
        floats = [leaf.dtype for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and _is_float(leaf)]
        args, kwargs = tree_map_only(Tensor, lambda x: x.float() if _is_float(x) else x, (args, kwargs))
        return tree_map_only(Tensor, lambda y: y.to(floats[0]) if floats else y, twin(*args, **kwargs))

    return forward


def _is_float(x: Tensor) -> bool:
    return x.is_floating_point()


@torch.no_grad()
def outputs(x: nn.Module, arguments: Arguments) -> list[Tensor]:
    """All tensors that the module returns, in float64."""
    args, kwargs = arguments
    return [each.double() for each in tree_leaves(x(*args, **kwargs)) if isinstance(each, Tensor)]


def pictures(pipe: Any, prompts: Sequence[str] | None, call: Mapping[str, Any], n: int) -> Tensor:
    """The pictures that a pipeline's calls draw, (N, C, H, W) in [0, 1]."""
    drawn = _draw(pipe, prompts, {"output_type": "pt", **call}, num_images_per_prompt=n)
    return torch.cat([torch.as_tensor(each.images, dtype=torch.float64) for each in drawn])
