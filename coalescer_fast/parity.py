"""Compare an accelerated pipeline with its own float32 reference, `verify`, and with another machine, `receipt`."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import networks, ops
from .acceleration import check_pipeline, is_of_others
from .console import table
from .dtypes import dtype_name
from .ops import native_library
from .prompts import check_count, check_texts
from .runtime.eager import EagerRuntime
from .runtime.engines.hashes import network_sha256
from .runtime.engines.manifest import Schedule

if TYPE_CHECKING:
    from PIL.Image import Image

    from .models.unet import CoalescerUNet
    from .pipeline import CoalescerPipeline
    from .runtime.base import Runtime

NUM_PROMPTS = 16
BATCH_SIZE = 4  # pictures drawn at a time
SPATIAL = 16  # largest height and width of an op's test call


@dataclass(frozen=True)
class Budget:
    """What a pipeline may differ by.

    Attributes:
        psnr_median: in dB, over the pictures.
        psnr_minimum: in dB, over the pictures.
        direction_cosine: the smallest over the pictures of a step.
        distance_error: the largest relative error over the pictures of a step.
        output_error: of a module, the largest relative L2 error of an output.
    """

    psnr_median: float = 35.0
    psnr_minimum: float = 25.0
    direction_cosine: float = 0.999
    distance_error: float = 0.01
    output_error: float = 0.03

    @classmethod
    def of(cls, dtype: torch.dtype) -> Budget:
        """The default for networks that run in ``dtype``.

        Of pictures only the median is stricter in float32: a convolution in TF32 rounds as float16 does.
        """
        if dtype == torch.int8:
            return cls(output_error=0.1)
        return cls(psnr_median=60.0, output_error=1e-4) if dtype == torch.float32 else cls()


@dataclass(frozen=True)
class Row:
    """One figure and its limit.

    Attributes:
        what: its name.
        value: as measured.
        limit: None where it only has to be finite.
        comparison: how the value has to compare with the limit, ">=" or "<=".
        ok: whether it does.
        unit: printed after value and limit.
    """

    what: str
    value: float
    limit: float | None
    comparison: str
    ok: bool
    unit: str = ""


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
        runtime: name of what was compared with the float32 reference.
        dtype: what it multiplies in, see `Runtime.precision`.
        pictures: how many were compared, or how many calls of a module.
        rows: the figures.
        receipt: of the accelerated pictures, see `receipt`, if there is one.
        unit: what ``pictures`` counts.
    """

    runtime: str
    dtype: str
    pictures: int
    rows: tuple[Row, ...]
    receipt: Mapping[str, Any] | None = None
    unit: str = "picture"

    @property
    def passed(self) -> bool:
        """Whether all figures are within their limits."""
        return bool(self.rows) and all(row.ok for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity and no NaN: such a value is the string "inf" or "nan"."""
        rows = [
            {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(row).items()}
            for row in self.rows
        ]
        found = {"runtime": self.runtime, "dtype": self.dtype, "pictures": self.pictures, "passed": self.passed}
        return {**found, "rows": rows, **({} if self.receipt is None else {"receipt": dict(self.receipt)})}

    def __str__(self) -> str:
        cells = [("what", "value", "limit", "")]
        for row in self.rows:
            limit = "finite" if row.limit is None else f"{row.comparison} {number(row.limit)}{row.unit}"
            cells.append((row.what, number(row.value) + row.unit, limit, "PASS" if row.ok else "FAIL"))
        lines = [table(cells, "<>><")]
        count = f"{sum(row.ok for row in self.rows)} of {len(self.rows)}"
        pictures = f"{self.pictures} {self.unit}{'s' * (self.pictures != 1)}"
        subject = f"{self.runtime} in {self.dtype} against the float32 reference, {pictures}"
        if self.receipt is not None:
            where = self.receipt["instruction_set"] or "no native kernels"
            lines.append(f"pixels: SHA-256 {self.receipt['pixels'][:16]}..., {where}")
        return "\n".join([*lines, f"{'PASS' if self.passed else 'FAIL'}: {count} figures hold, {subject}"])


def number(value: float) -> str:
    """Three digits, and five of what is close to 1."""
    return f"{value:.5f}" if 0.99 <= value < 1 else f"{value:.3g}"


def at_least(what: str, value: float, limit: float, unit: str = "") -> Row:
    """A figure that must not be below the limit."""
    return Row(what, value, limit, ">=", value >= limit, unit)


def at_most(what: str, value: float, limit: float, unit: str = "") -> Row:
    """A figure that must not be above the limit."""
    return Row(what, value, limit, "<=", value <= limit, unit)


def finite(what: str, value: float) -> Row:
    """A figure without a limit."""
    return Row(what, value, None, "", math.isfinite(value))


@torch.no_grad()
def verify(
    pipe: Any,
    prompts: Any = None,
    *,
    num_images: int = 1,
    seed: int = 0,
    budget: Budget | Mapping[str, float] | None = None,
    **call: Any,
) -> Verification:
    r"""Compare an accelerated pipeline or module with its own float32 reference.

    Of a module, each output: ``|y - y_ref|_2 / |y_ref|_2``, the largest over all calls. Of a diffusers pipeline, the
    pictures of its calls with the same seeds, as below. Of a CoalescerPipeline, on the same noise, ops, steps and
    pictures:

    - every fused op on the backend and in the dtype that the runtime runs it in:
      ``max |y - y64| <= 2 max |y_plain - y64| + ulp``, with y64 in float64, y_plain plain torch in the same dtype, and
      one ulp of the largest number that goes in or comes out;
    - every step's evaluation at the R where the reference is then: ``|d - d_ref|_2 / |d_ref|_2``, the smallest cosine
      of d and d_ref, the largest ``|l / l_ref - 1|`` of the distance l; and after the step
      ``|R - R_ref|_2 / |R_ref|_2``, where each has come by its own steps from the noise;
    - the pictures of two ordinary calls: PSNR ``-10 log10 mean (x - x_ref)^2``, x in [0, 1].

    Args:
        pipe: a pipeline or module after `accelerate`. It is left as it is. Of a module that is not in float32 there is
            a copy in float32 while this runs.
        prompts: of a module the arguments of some calls, each a tuple or a dict. Of a diffusers pipeline descriptions;
            there is a default. Of a CoalescerPipeline descriptions, or how many names to draw from those that the model
            was trained on (all, if it has fewer); 16 if None.
        num_images: pictures a prompt.
        seed: of the noise and of the choice of names.
        budget: limits. A mapping replaces some of the default, `Budget.of` the runtime's dtype.
        **call: of a diffusers pipeline, what else its calls are given, such as num_inference_steps (4 without).

    Returns:
        The figures, and whether they are within their limits; printed, a table. A figure that is NaN fails.

    Raises:
        ValueError: for a pipeline that is not accelerated, and for arguments other than these.
    """
    if is_of_others(pipe):
        return _verify_networks(pipe, prompts, num_images, budget, call)
    if call:
        raise ValueError(f"{', '.join(call)} are for diffusers pipelines; expected none of a CoalescerPipeline")
    runtime = pipe.runtime
    if isinstance(runtime, EagerRuntime):
        raise ValueError(
            "the pipeline is not accelerated, so there is nothing to compare: "
            "call coalescer_fast.accelerate(pipe) first"
        )
    if pipe.unet.dtype != torch.float32 or pipe.vae.dtype != torch.float32:
        raise ValueError(
            f"the pipeline's own networks are {pipe.unet.dtype}; load it in torch.float32 to have a reference"
        )
    limits = _limits(budget, torch.int8 if runtime.precision == "int8" else runtime.dtype)
    generator = torch.Generator().manual_seed(seed)
    check_count(num_images)
    texts = [text for text in descriptions(pipe, prompts, generator) for _ in range(num_images)]
    noise = pipe.initial_noise(len(texts), generator)
    rows = [_op_row(*call) for call in _op_calls(pipe, runtime)]

    batches = []
    size = BATCH_SIZE if runtime.max_batch is None else min(BATCH_SIZE, runtime.max_batch)
    starts = range(0, len(texts), size)
    fast, reference = _counting(pipe), _counting(pipe)
    fast.runtime = runtime
    with pipe.progress_bar(total=len(starts)) as bar:
        for start in starts:
            part = slice(start, start + size)
            batches.append(_compare(fast, reference, texts[part], noise[part]))
            bar.update()
    # of each step: (figures of its pictures), joined over the batches
    for i, step in enumerate(zip(*(steps for steps, _, _ in batches))):
        direction, cosine, distance, latents = (torch.cat(figures) for figures in zip(*step))
        rows += [
            finite(f"step {i + 1}: direction, relative L2 error", _pooled(direction)),
            at_least(f"step {i + 1}: direction, cosine", float(cosine.min()), limits.direction_cosine),
            at_most(f"step {i + 1}: distance, relative error", float(distance.max()), limits.distance_error),
            finite(f"step {i + 1}: latents, relative L2 error", _pooled(latents)),
        ]
    psnr = torch.cat([each for _, each, _ in batches])
    rows += [
        at_least("pictures: PSNR, median", float(psnr.median()), limits.psnr_median, " dB"),
        at_least("pictures: PSNR, minimum", float(psnr.min()), limits.psnr_minimum, " dB"),
    ]
    pictures = torch.cat([each for _, _, each in batches])
    return Verification(runtime.name, runtime.precision, len(texts), tuple(rows), receipt(pipe, texts, noise, pictures))


def _verify_networks(
    x: Any, given: Any, num_images: int, budget: Budget | Mapping[str, float] | None, call: Mapping[str, Any]
) -> Verification:
    """`verify` of a module or a diffusers pipeline."""
    runtime = next(iter(networks.runtimes(x).values()))
    limits = _limits(budget, torch.int8 if runtime.quantised else runtime.dtype)
    if isinstance(x, nn.Module):
        if not given or isinstance(given, (str, int)):
            raise ValueError(
                "inputs are missing: give the arguments of some calls of the module, verify(module, [...])"
            )
        arguments = [networks.as_arguments(each) for each in given]
        results = [networks.outputs(x, each) for each in arguments]
        refused = runtime.refused
        with networks.references(x):
            expected = [networks.outputs(x, each) for each in arguments]
        rows = [
            at_most(
                f"output {i + 1}: relative L2 error",
                max(float((y - y_ref).norm() / y_ref.norm().clamp_min(1e-30)) for y, y_ref in zip(*pairs)),
                limits.output_error,
            )
            for i, pairs in enumerate(zip(zip(*results), zip(*expected)))
        ]
        count = len(arguments)
    else:
        if "prompt" in call:
            raise TypeError("prompts are the second argument: expected verify(pipe, [...])")
        texts = None if given is None else check_texts("prompts", given)
        drawn = networks.pictures(x, texts, call, num_images)
        refused = next((each.refused for each in networks.runtimes(x).values() if each.refused), "")
        with networks.references(x):
            expected_pictures = networks.pictures(x, texts, call, num_images)
        psnr = -10 * (drawn - expected_pictures).square().mean((1, 2, 3)).log10()
        rows = [
            at_least("pictures: PSNR, median", float(psnr.median()), limits.psnr_median, " dB"),
            at_least("pictures: PSNR, minimum", float(psnr.min()), limits.psnr_minimum, " dB"),
        ]
        count = len(drawn)
    unit = "call" if isinstance(x, nn.Module) else "picture"
    return Verification("torch" if refused else runtime.device.type, runtime.precision, count, tuple(rows), unit=unit)


def receipt(
    pipe: CoalescerPipeline,
    prompts: Sequence[str],
    latents: Tensor,
    images: Tensor | Sequence[Image],
    num_inference_steps: int = 2,
    guidance_scale: float | None = None,
    negative_prompt: str | Sequence[str] | None = None,
) -> dict[str, Any]:
    """Hash all that decides the bits of pictures, and the pictures.

    Two machines with the same receipt have drawn the same. Where two receipts differ, the first field that differs says
    why. With backend "cpu", the fields before ``pixels`` decide it.

    Args:
        pipe: what drew them.
        prompts: one a picture.
        latents: the noise that the call was given, (N, C, h, w).
        images: what it returned: (N, 3, H, W) in [0, 1], or PIL pictures.
        num_inference_steps: of the call.
        guidance_scale: of the call.
        negative_prompt: of the call.

    Returns:
        A dictionary for JSON. SHA-256 of ``weights`` (by network, with its configuration), ``noise`` (float32), and
        ``pixels`` (8-bit RGB, row by row, all pictures in turn; also one by one in ``pictures``); ``prompts``,
        ``negative_prompt``, ``schedule``, ``runtime``, ``dtype``, ``instruction_set`` (None where no native kernel
        runs) as they are.
    """
    check_pipeline(pipe)
    if isinstance(images, Tensor):  # rounded as PIL pictures are
        images = images.detach().cpu().mul(255).round().to(torch.uint8).permute(0, 2, 3, 1)
        pictures = [each.numpy().tobytes() for each in images.contiguous()]
    else:
        pictures = [picture.convert("RGB").tobytes() for picture in images]
    runtime, scheduler = pipe.runtime, copy.copy(pipe.scheduler)
    scheduler.set_timesteps(num_inference_steps)
    scale = scheduler.config.guidance_scale if guidance_scale is None else guidance_scale
    networks = {"unet": pipe.unet, "description_encoder": pipe.description_encoder, "vae": pipe.vae}
    return {
        "weights": {name: network_sha256(network, network.config) for name, network in networks.items()},
        "prompts": list(prompts),
        "negative_prompt": negative_prompt,
        "noise": hashlib.sha256(latents.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()).hexdigest(),
        "schedule": str(Schedule.of(scheduler, scale)),
        "runtime": runtime.name,
        "dtype": runtime.precision,
        "instruction_set": None
        if isinstance(runtime, EagerRuntime) or native_library.unavailable()
        else native_library.isa(),
        "pixels": hashlib.sha256(b"".join(pictures)).hexdigest(),
        "pictures": [hashlib.sha256(each).hexdigest() for each in pictures],
    }


def _limits(budget: Budget | Mapping[str, float] | None, dtype: torch.dtype) -> Budget:
    if budget is None or isinstance(budget, Budget):
        return budget or Budget.of(dtype)
    names = [field.name for field in fields(Budget)]
    if (
        not isinstance(budget, Mapping)
        or set(budget) - set(names)
        or not all(isinstance(v, (int, float)) for v in budget.values())
    ):
        raise ValueError(f"budget is {budget!r:.80}; expected numbers for some of {', '.join(names)}")
    return replace(Budget.of(dtype), **budget)


def descriptions(
    pipe: CoalescerPipeline, prompts: int | str | Sequence[str] | None, generator: torch.Generator
) -> list[str]:
    """The prompts themselves, or so many names that the model was trained on, without repeats."""
    if isinstance(prompts, bool) or not isinstance(prompts, int | None):
        return check_texts("prompts", prompts)
    wanted = NUM_PROMPTS if prompts is None else prompts
    if wanted < 1:
        raise ValueError(f"prompts is {prompts}; expected descriptions, or a number of them from 1 up")
    names = pipe.description_encoder.known_names
    if not names:
        raise ValueError("the model's description encoder knows no names to draw: give prompts")
    return [names[i] for i in torch.randperm(len(names), generator=generator)[:wanted].tolist()]


def _counting(pipe: CoalescerPipeline) -> CoalescerPipeline:
    """A twin that shows no progress bars, and returns pictures that are not finite, so that they are counted."""
    twin = pipe.twin()
    twin.set_progress_bar_config(disable=True)
    twin._checks_finite = False
    return twin


def _compare(
    fast: CoalescerPipeline, reference: CoalescerPipeline, texts: list[str], noise: Tensor
) -> tuple[list[tuple[Tensor, Tensor, Tensor, Tensor]], Tensor, Tensor]:
    """Compare two pipelines on one batch.

    Returns:
        Of every step: squared relative L2 error of the direction, cosine, relative error of the distance, squared
        relative L2 error of the latents, each (N,); the pictures' PSNR (N,), all float64 on the CPU; and the pictures.
    """
    plain_ops = partial(_plain_ops, reference.unet)
    with plain_ops():
        expected_path, expected = _walk(reference, texts, noise), _draw(reference, texts, noise)
    # the pictures come from a call without a callback: what users make
    path, drawn = _walk(fast, texts, noise), _draw(fast, texts, noise)

    styled = reference.with_styles(texts, noise)
    conditioning = fast.runtime.condition(styled, noise.device)
    with plain_ops():
        expected_conditioning = reference.runtime.condition(styled, noise.device)
    steps = []
    for start, expected_end, end in zip([noise, *expected_path], expected_path, path):
        with plain_ops():
            expected_direction, expected_distance = map(
                _exact, reference.runtime.evaluate(start, expected_conditioning)
            )
        direction, distance = map(_exact, fast.runtime.evaluate(start, conditioning))
        off = _relative(direction, expected_direction)
        cosine = (direction * expected_direction).sum(1) / (direction.norm(dim=1) * expected_direction.norm(dim=1))
        # an untrained network's direction may be 0
        cosine = torch.where(off == 0, 1.0, cosine)
        steps.append(
            (off, cosine, (distance / expected_distance - 1).abs(), _relative(_exact(end), _exact(expected_end)))
        )
    psnr = -10 * (_exact(drawn) - _exact(expected)).square().mean(1).log10()
    return steps, psnr, drawn


def _walk(pipe: CoalescerPipeline, texts: list[str], noise: Tensor) -> list[Tensor]:
    """R after each step of a call."""
    path: list[Tensor] = []

    def note(pipe: CoalescerPipeline, i: int, t: int, tensors: dict[str, Any]) -> dict[str, Any]:
        path.append(tensors["latents"].clone())
        return {}

    pipe(texts, latents=noise, output_type="latent", callback_on_step_end=note)
    return path


def _draw(pipe: CoalescerPipeline, texts: list[str], noise: Tensor) -> Tensor:
    output: Any = pipe(texts, latents=noise, output_type="pt")
    pictures: Tensor = output.images
    return pictures


@contextmanager
def _plain_ops(unet: CoalescerUNet) -> Iterator[None]:
    """Inside, the network runs its ops by plain torch."""
    backend = unet.backend
    unet.set_backend("reference")
    try:
        yield
    finally:
        unet.set_backend(backend)


def _exact(x: Tensor) -> Tensor:
    """A copy in float64 on the CPU, of (N, ...) as (N, M)."""
    x = x.detach().to("cpu", torch.float64, copy=True)
    return x.flatten(1) if x.ndim > 1 else x


def _relative(x: Tensor, expected: Tensor) -> Tensor:
    """|x - expected|^2 / |expected|^2 (N,); 0 where they are equal."""
    off = (x - expected).square().sum(1)
    return torch.where(off == 0, 0.0, off / expected.square().sum(1))


def _pooled(squares: Tensor) -> float:
    return float(squares.mean().sqrt())


# op, what is special about the call, backend, dtype of the computation, arguments, keywords
OpCall = tuple[str, str, str, torch.dtype, tuple[Any, ...], dict[str, Any]]


def _op_backends(runtime: Runtime) -> list[tuple[str, str]]:
    """(op, backend) for every fused op and backend that the runtime runs it on; none for other kernels."""
    return sorted({(part.name, part.backend) for part in runtime.explain() if part.backend is not None})


def _op_calls(pipe: CoalescerPipeline, runtime: Runtime) -> Iterator[OpCall]:
    """Small seeded calls of ops, with the network's own channels and groups, as it and the sampling loop call them."""
    config, dtype, wide = pipe.unet.config, runtime.dtype, torch.float32
    channels, latent, side = config.block_out_channels[0], config.latent_channels, min(config.sample_size, SPATIAL)
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int, like: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(pipe._execution_device, like)

    x, skip = (randn(2, channels, side, side).contiguous(memory_format=torch.channels_last) for _ in range(2))
    vectors = [randn(channels) for _ in range(3)]
    norm = (config.norm_num_groups, vectors[0], vectors[1])
    film = {"scale": randn(2, channels), "shift": randn(2, channels)}
    doubled = (config.norm_num_groups, randn(2 * channels), randn(2 * channels))
    heads = (randn(latent, channels, 3, 3) / (9 * channels) ** 0.5, randn(latent), randn(1, channels), randn(1))
    sample, anchor, direction = (randn(2, latent, side, side, like=wide) for _ in range(3))
    residual = {"sample": sample, "anchor": anchor} if config.anchor is not None else {}
    direction = direction if residual else direction.to(dtype)
    distance = randn(2, like=wide).abs()
    calls: dict[str, list[tuple[str, torch.dtype, tuple[Any, ...], dict[str, Any]]]] = {
        "group_norm_silu": [
            ("of a concatenation", dtype, (x, *doubled), {"skip": skip}),
            ("conditioned", dtype, (x, *norm), {**film, "pre_bias": vectors[2]}),
            ("without SiLU", dtype, (x, *norm), {"activation": None}),
        ],
        "bias_residual": [("", dtype, (x, vectors[0], skip), {})],
        "dual_head": [("", dtype, (x, *heads), residual)],
        "coalesce_step": [(mode, wide, (sample, direction, distance), {"mode": mode}) for mode in ("raw", "unit")],
    }
    for op, backend in _op_backends(runtime):
        for what, computed, args, kwargs in calls[op]:
            yield op, what, backend, computed, args, kwargs


def _op_row(op: str, what: str, backend: str, dtype: torch.dtype, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Row:
    """The largest error of an op's results as a multiple of what the rule allows each."""
    function = getattr(ops, op)  # by the name that `explain` and the table give it

    def results(backend: str, wide: bool = False) -> list[Tensor]:
        def cast(x: Any) -> Any:
            return x.to("cpu", torch.float64) if wide and isinstance(x, Tensor) else x

        y = function(*map(cast, args), **{name: cast(x) for name, x in kwargs.items()}, backend=backend)
        return [each.detach().cpu().double() for each in (y if isinstance(y, tuple) else (y,))]

    inputs = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    shares = []
    for y, plain, exact in zip(results(backend), results("reference"), results("reference", wide=True)):
        largest = max(float(exact.abs().max()), *(float(x.abs().max()) for x in inputs))
        # a distance, (N,), is float32 at least
        eps = torch.finfo(dtype if y.ndim > 1 else torch.promote_types(dtype, torch.float32)).eps
        allowed = 2 * float((plain - exact).abs().max()) + eps * largest
        shares.append(float((y - exact).abs().max()) / allowed)
    # max() would pass over a NaN that comes second
    share = next((each for each in shares if math.isnan(each)), max(shares))
    name = f"{op}, {what}" if what else op
    return at_most(f"{name}; {backend}, {dtype_name(dtype)}: error / allowed error", share, 1.0)
