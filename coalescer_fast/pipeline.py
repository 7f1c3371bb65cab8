"""Text to picture in two network evaluations."""

from __future__ import annotations

import copy
import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput, is_accelerate_available
from PIL import Image
from torch.torch_version import TorchVersion

from . import folders, grading, prompts, sampling
from .finite import check_finite, check_readable, first_not_finite, is_finite, nan_where_not_finite
from .models import CoalescerAutoencoder, CoalescerUNet, DescriptionEncoder
from .models.description import Match
from .models.unet import Conditioning
from .nvtx_ranges import span
from .prompts import Descriptions, Embeds, Given
from .runtime.eager import EagerRuntime
from .sampling import Call
from .scheduler import LARGEST, CoalescerScheduler, check_number

if TYPE_CHECKING:
    from .runtime.base import Runtime

logger = logging.getLogger(__name__)

# what diffusers calls the dtype of weights: "dtype" since it has a message about the old name
DTYPE = "dtype" if find_spec("diffusers.utils.deprecation_utils") is not None else "torch_dtype"
SAFE_DIFFUSERS = "0.38"  # which runs no code of a folder unless it is told to (GHSA-4prv-5hj7-c2xr)
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# An attribute that each component has and others of its kind have not. Wrappers of torch.compile and peft pass it on,
# so that a wrapped component is recognised as well.
HALLMARKS = {
    "unet": "set_backend",
    "scheduler": "is_guided",
    "description_encoder": "with_styles",
    "vae": "scale_factor",
}


@dataclass
class TraceStep:
    """One step of a call.

    Attributes:
        sample: R (N, C, h, w) before the step.
        distance: (N,).
        direction_length: |direction| (N,), before any guidance.
    """

    sample: torch.Tensor
    distance: torch.Tensor
    direction_length: torch.Tensor


@dataclass
class CoalescerPipelineOutput(BaseOutput):
    """What a call returns.

    Attributes:
        images: a list of PIL pictures, or an array or tensor, prompt-major.
        trace: a `TraceStep` for each step, if asked for.
        warnings: about words that are not known and arguments without an effect, a sentence each.
        matched: of each prompt, what it was taken as, or None for a prompt that is drawn as it stands; None without
            `prompt_matching`.
        quality: for each picture, an estimate of the chance that it shows what was asked, from what the network says
            on the way to it, see `coalescer_fast.grading`. None for a model without a grading, for ``prompt_embeds``,
            and where an exported generator runs the whole call.
        num_evaluations: for each picture, evaluations of the network, those of guidance and of the pictures that
            ``best_of`` dropped included; None where the runtime does not say.
        descriptions: for each picture, what was drawn: what its prompt was taken as, with an art style. None for
            ``prompt_embeds``.
    """

    images: list[Image.Image] | np.ndarray | torch.Tensor
    trace: list[TraceStep] | None = None
    warnings: list[str] = field(default_factory=list)
    matched: list[Match | None] | None = None
    quality: list[float] | None = None
    num_evaluations: list[int] | None = None
    descriptions: list[str] | None = None


class CoalescerPipeline(DiffusionPipeline):
    r"""Draws pictures of descriptions: random R, a few steps of direction and distance, decode.

    Everything that depends on the description alone is computed once a call.

    During a call and after it, ``guidance_scale``, ``num_timesteps``, ``do_classifier_free_guidance`` and ``interrupt``
    are those of the call of the same thread. A callback may set ``_guidance_scale``, of the steps to come, and
    ``_interrupt``, which ends its call with the R that it has; set outside of calls, ``_interrupt`` ends all that are
    running.

    Args:
        unet: the dual-head network.
        scheduler: its steps and its guidance.
        description_encoder: turns texts into vectors.
        vae: decodes latents.

    Attributes:
        runtime: runs the networks, an `EagerRuntime` unless `accelerate` has put another in its place.
        recipe: the arguments that `accelerate` was called with, for copies of the pipeline; None if it was not.
    """

    runtime: Runtime
    recipe: dict[str, Any] | None = None
    model_cpu_offload_seq = "unet->vae"
    # without parameters, so that diffusers would find no device of it
    _exclude_from_cpu_offload = ["description_encoder"]  # noqa: RUF012 (diffusers' interface)
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012 (diffusers' interface)
    _last_call: Call | None = None
    _checks_finite = True  # whether a call refuses to return what is not finite; `verify` wants to count it

    def __init__(
        self,
        unet: CoalescerUNet,
        scheduler: CoalescerScheduler,
        description_encoder: DescriptionEncoder,
        vae: CoalescerAutoencoder,
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, description_encoder=description_encoder, vae=vae)
        self._check_components()
        self.image_processor = VaeImageProcessor(vae_scale_factor=vae.scale_factor)
        self._running: dict[int, Call] = {}  # by thread
        self.runtime = EagerRuntime(self)

    def _check_components(self) -> None:
        """Raise TypeError or ValueError for something that is no component, and for components that do not fit."""
        for name, hallmark in HALLMARKS.items():
            part, kind = getattr(self, name), folders.COMPONENTS[name].__name__
            if part is None:
                raise ValueError(f"{name} is None; a pipeline needs a {kind}")
            if not hasattr(part, hallmark):
                raise TypeError(f"{name} is a {type(part).__name__}; expected a {kind}")
        unet, encoder, vae = self.unet.config, self.description_encoder.config, self.vae.config
        if vae.latent_channels != unet.latent_channels:
            channels = f"vae has {vae.latent_channels} latent channels and unet {unet.latent_channels}"
            raise ValueError(f"{channels}; give two that fit each other")
        for name in ("description_dim", "cross_attention_dim"):
            if unet[name] not in (encoder.dim, None):
                sizes = f"description_encoder has dim {encoder.dim} and unet {name} {unet[name]}"
                raise ValueError(f"{sizes}; give two that fit each other")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> CoalescerPipeline:
        """Load a pipeline from safetensors.

        No code of the folder is run, and no class imported that it names, see `folders.check`. Where the folder has
        ``checksums.json``, which `save_pretrained` writes, the files that are read are those that were saved.

        Args:
            pretrained_model_name_or_path: an embedded model ("emoji-64"), a folder, or a Hub id.
            **kwargs: as in diffusers. Components that are given need not be in the folder.

        Returns:
            The pipeline, in float32 unless ``dtype`` says otherwise.

        Raises:
            ValueError: for a folder that is damaged or holds something else, and with a diffusers before 0.38, which
                may run code of a folder.
        """
        name = str(pretrained_model_name_or_path)
        if TorchVersion(diffusers.__version__) < SAFE_DIFFUSERS:
            raise ValueError(
                f"diffusers {diffusers.__version__} may run code of a folder: loading a pipeline needs "
                f"{SAFE_DIFFUSERS} or newer; run pip install -U diffusers"
            )
        given = [part for part in folders.COMPONENTS if part in kwargs]
        if absent := [part for part in given if kwargs[part] is None]:
            kind = folders.COMPONENTS[absent[0]].__name__
            raise ValueError(f"{absent[0]} is None; leave it out for that of {name}, or give a {kind}")
        if kwargs.setdefault("use_safetensors", True) is not True:
            raise ValueError("use_safetensors can only be True: other files of weights may run code and are not loaded")
        if not {"dtype", "torch_dtype"} & kwargs.keys():
            kwargs[DTYPE] = torch.float32  # not torch's default dtype, whatever that is
        # diffusers' default is True, and without the package accelerate it would warn at every start
        kwargs.setdefault("low_cpu_mem_usage", is_accelerate_available())
        folder = folders.locate(name)
        if folder is None:
            try:
                folder = Path(cls.download(name, **kwargs))
            except Exception as error:
                said = f"{name} is neither a local folder nor a reachable Hub model: check the name and the connection"
                raise ValueError(said) from error
        if folder.parent != folders.WEIGHTS:
            folders.check(folder, cls, given, kwargs.get("variant"))
        try:
            pipe = super().from_pretrained(str(folder), **kwargs)
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{name} cannot be loaded as a coalescer pipeline: {reason}") from error
        for part in folders.NETWORKS:
            if part not in given:
                check_finite(getattr(pipe, part), f"{name}: {part}")
        pipe.register_to_config(_name_or_path=name)
        return pipe

    @classmethod
    def _dict_from_json_file(cls, json_file: str | Path) -> Any:
        """The class is this one, whatever code lies beside the index that names it."""
        found = super()._dict_from_json_file(json_file)
        if isinstance(found, dict) and isinstance(found.get("_class_name"), list):
            found["_class_name"] = cls.__name__
        return found

    def save_pretrained(
        self, save_directory: str | Path, safe_serialization: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """Save as diffusers does, safetensors only, with two files more.

        They are ``checksums.json``, of all files, and ``pipeline.py``, by which
        ``DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`` finds this class.

        Raises:
            OSError: where nothing can be written.
        """
        if safe_serialization is not True:
            raise ValueError("safe_serialization can only be True: other files of weights would not be loaded")
        try:
            super().save_pretrained(str(save_directory), safe_serialization, *args, **kwargs)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            fix = "save into a folder that can, what is there now may be incomplete"
            raise OSError(f"{save_directory} cannot be written ({reason}): {fix}") from error

    def to_json_file(self, json_file_path: str | Path) -> None:
        """Write the index of a folder, the last of diffusers' files, and what goes beside it."""
        super().to_json_file(json_file_path)
        folders.complete(Path(json_file_path).parent, type(self))

    def to(self, *args: Any, **kwargs: Any) -> CoalescerPipeline:
        """Move or cast, as in diffusers; every floating-point dtype computes on every device."""
        kwargs.setdefault("silence_dtype_warnings", True)
        with _without_empty_lists():
            return super().to(*args, **kwargs)

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Offload as in diffusers, from a GPU; on a CPU there is nothing to offload from."""
        if device is not None and torch.device(device).type == "cpu":
            raise ValueError("device is cpu, where all weights are already: enable_sequential_cpu_offload is for a GPU")
        super().enable_sequential_cpu_offload(gpu_id, device)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | str = 2,
        guidance_scale: float | None = None,
        generator: sampling.Generators = None,
        latents: torch.Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        return_trace: bool = False,
        callback_on_step_end: Callable[[Any, int, int, dict[str, Any]], dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_token_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_token_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        prompt_matching: bool = True,
        best_of: int = 1,
    ) -> CoalescerPipelineOutput | tuple[Any, ...]:
        r"""Draw ``num_images_per_prompt`` pictures of each prompt.

        Args:
            prompt: one description or a list. One that names no art style ("3d style") gets one of those that exist for
                what it names, chosen by the mean of its R. The empty description draws any picture. Emoji are read as
                their names.
            num_images_per_prompt: pictures a prompt; the result is prompt-major.
            num_inference_steps: network evaluations of the description; 2 is what the model is made for. With "auto"
                each picture takes steps until the distance says that it has arrived, see `CoalescerScheduler`.
            guidance_scale: as in diffusers, 1 is none and 1.5 extrapolates half of the way from the empty description's
                endpoint; None is the model's own. Applies to the steps that the scheduler says (the last one).
            generator: a torch.Generator or a `PhiloxGenerator`, or a list of one a picture. One on the CPU, and a
                `PhiloxGenerator`, draws the same noise for every device.
            latents: R to start from, (pictures, C, h, w), instead of noise; best_of times as many with best_of.
            height: of the pictures, in pixels; the model's own if None. A model with an anchor has one size.
            width: of the pictures, as height.
            output_type: "pil", "np" (N, H, W, 3) in [0, 1], "pt" (N, 3, H, W) in [0, 1], or "latent" (N, C, h, w).
            return_dict: whether to return a `CoalescerPipelineOutput` and not a tuple.
            return_trace: also return R, distance and |direction| of every step.
            callback_on_step_end: called as (pipeline, step, timestep, {"latents": R}); may return {"latents": R} to go
                on from, of the same shape and device. A function, or diffusers' PipelineCallback or
                MultiPipelineCallbacks.
            callback_on_step_end_tensor_inputs: what it is given, of "latents" (as None says).
            negative_prompt: one description or one a prompt, whose endpoint guidance leads away from in the place of
                the empty one's: ``x = x_d + w (x_d - x_negative)``, w = guidance_scale - 1. As it stands, without an
                art style.
            prompt_embeds: in the place of prompt, description vectors (prompts, D) of RMS 1, or 0 for the empty
                description, as of `encode_prompt`. Their style is their own.
            prompt_token_embeds: with prompt_embeds, for a network with cross-attention, token rows (prompts, L, D').
            prompt_attention_mask: of prompt_token_embeds, (prompts, L), non-zero where there is a token; None is
                everywhere.
            negative_prompt_embeds: in the place of negative_prompt, as prompt_embeds.
            negative_prompt_token_embeds: as prompt_token_embeds.
            negative_prompt_attention_mask: as prompt_attention_mask.
            prompt_matching: draw, in the place of a prompt, the known name that says what it says
                (`DescriptionEncoder.match`); ``matched`` of the result tells which. A model whose encoder was not
                trained for that draws the prompt as it stands.
            best_of: draw so many for each picture and keep the one that the network says is best, by
                `grading.among_seeds`. Callbacks and the trace see all of them.

        Returns:
            The pictures, with what the prompts were taken as, and with warnings about words that are not known; with
            ``return_dict=False`` a tuple of the images and, if asked for, the trace.

        Raises:
            TypeError, ValueError: for anything else, and for a picture or R that is not finite.
        """
        self._check_components()
        wanted, avoided = prompts.check(
            Given(prompt, prompt_embeds, prompt_token_embeds, prompt_attention_mask),
            Given(
                negative_prompt,
                negative_prompt_embeds,
                negative_prompt_token_embeds,
                negative_prompt_attention_mask,
            ),
            self.unet.config,
        )
        prompts.check_count(num_images_per_prompt)
        self._check_best_of(best_of, num_images_per_prompt)
        each = num_images_per_prompt * best_of  # samples a prompt
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}; use one of {', '.join(OUTPUT_TYPES)}")
        inputs = self._callback_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)
        scale = self.scheduler.config.guidance_scale if guidance_scale is None else guidance_scale
        check_number("guidance_scale", scale)
        self.scheduler.set_timesteps(num_inference_steps)
        if self.scheduler.is_auto and (return_trace or callback_on_step_end is not None):
            what = "return_trace" if return_trace else "callback_on_step_end"
            raise ValueError(
                f"{what} is for a number of steps, the same for all pictures; num_inference_steps is 'auto'"
            )
        scheduler = copy.copy(self.scheduler)  # of this call alone: another thread's may have other steps
        scheduler.set_timesteps(num_inference_steps)
        runtime = self.runtime  # once, for another thread may restore the pipeline meanwhile
        runtime.refresh()
        warnings = prompts.warnings(self.description_encoder, wanted, avoided, scale)
        shape = self._latent_shape(len(wanted) * each, height, width)
        if isinstance(generator, list):
            generator = [one for one in generator for _ in range(best_of)]
        sample = sampling.initial_sample(shape, runtime.device, generator, latents)
        with span("encode"):
            matched = self._match(wanted) if prompt_matching else None
            described = prompts.repeat(prompts.as_matched(wanted, matched), each)
            if not isinstance(described, Embeds):
                described = self.with_styles(described, sample)
        with span("condition"):
            conditioning = runtime.condition(described, sample.device)
            empty = None
            if scale != 1 or callback_on_step_end is not None:  # which may change the scale
                away: Descriptions = [""] if avoided is None else avoided
                empty = runtime.condition(away if len(away) == 1 else prompts.repeat(away, each), sample.device)

        trace: list[TraceStep] = []
        decodes = output_type != "latent"

        def check(found: torch.Tensor, step: int | None = None) -> None:
            if not self._checks_finite or is_finite(found):
                return
            if step is None and not scheduler.is_auto:
                step = sampling.first_bad_step(runtime, scheduler, sample, conditioning, empty, scale)
            row = (first_not_finite(found) or 0) * len(wanted) // len(found)
            of = f"prompt_embeds[{row}]" if isinstance(wanted, Embeds) else f"prompt {wanted[row]!r:.80}"
            what = "the picture" if step is None else "R"
            when = "" if step is None else f" after step {step + 1} of {num_inference_steps}"
            raise ValueError(
                f"{what} of {of}{when} is not finite: lower guidance_scale, check the weights, or compute in float32"
            )

        def on_step(
            i: int, start: torch.Tensor, direction: torch.Tensor, distance: torch.Tensor, end: torch.Tensor
        ) -> torch.Tensor:
            if return_trace:
                trace.append(TraceStep(start, distance, grading.direction_length(direction)))
            if callback_on_step_end is not None:
                check(end, i)
                given = callback_on_step_end(self, i, i, {name: end for name in inputs})
                end = _replaced(given, end, LARGEST if self._checks_finite else None)
            return end

        watch = on_step if return_trace or callback_on_step_end is not None else None
        with self.progress_bar(total=scheduler.num_inference_steps) as bar:
            call = Call(scale, scheduler.num_inference_steps, progress=bar.update)
            with self._calling(call):
                whole = decodes and best_of == 1
                images = runtime.generate(scheduler, sample, conditioning, empty, scale, whole, watch, call)
            check(images)
        grades = self._grades(call, prompts.repeat(wanted, each))
        texts = None if isinstance(described, Embeds) else described
        if best_of > 1:
            # nothing says which where a callback has ended the call before its first step
            signal = grading.among_seeds(call.heads) or [0.0] * len(sample)
            best = [max(range(i, i + best_of), key=signal.__getitem__) for i in range(0, len(sample), best_of)]
            images, grades = images[best], [grades[i] for i in best if grades]
            texts = texts and [texts[i] for i in best]
            if decodes:
                with span("decode"):
                    images = nan_where_not_finite(runtime.decode(images), images)
                check(images)
        if decodes:
            images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images, trace) if return_trace else (images,)
        quality = None
        if call.heads and grades and not isinstance(wanted, Embeds):
            quality = [
                grading.probability(odds) if self.description_encoder.words(text) else 1.0  # any picture shows ""
                for text, odds in zip((text for text in wanted for _ in range(num_images_per_prompt)), grades)
            ]
        evaluations = _evaluations(call, len(sample), best_of)
        trace_given = trace if return_trace else None
        return CoalescerPipelineOutput(images, trace_given, warnings, matched, quality, evaluations, texts)

    def _match(self, descriptions: Descriptions) -> list[Match | None] | None:
        """What each description is taken as; None for embeddings and where the encoder was not trained for it."""
        encoder = self.description_encoder
        if isinstance(descriptions, Embeds) or not encoder.config.match_dim:
            return None
        return [encoder.match(text) for text in descriptions]

    def _check_best_of(self, best_of: Any, num_images_per_prompt: int) -> None:
        if isinstance(best_of, bool) or not isinstance(best_of, int) or best_of < 1:
            raise ValueError(f"best_of is {best_of!r}; expected a whole number from 1 up")
        if best_of * num_images_per_prompt > prompts.MAX_IMAGES_PER_PROMPT and best_of > 1:
            raise ValueError(
                f"best_of is {best_of}, and so many times num_images_per_prompt are more than "
                f"{prompts.MAX_IMAGES_PER_PROMPT:,}: make several calls"
            )

    def _grades(self, call: Call, described: Descriptions) -> list[float]:
        """The log-odds that each sample shows what was asked, by the heads alone for embeddings; [] if nothing says."""
        numbers = self.scheduler.config.grading
        if numbers is None or not call.heads:
            return []
        if isinstance(described, Embeds):
            return grading.log_odds(numbers, call.heads, [grading.NO_WORDS] * len(described))
        return grading.log_odds(numbers, call.heads, grading.of_words(self.description_encoder, described))

    @contextmanager
    def _calling(self, call: Call) -> Iterator[None]:
        """Inside, this thread's call is this one; afterwards it is the last one."""
        thread = threading.get_ident()
        outer = self._running.get(thread)
        self._running[thread] = call
        try:
            yield
        finally:
            if outer is None:
                del self._running[thread]
            else:
                self._running[thread] = outer
            self._last_call = call

    @property
    def _call(self) -> Call:
        found = self._running.get(threading.get_ident()) or self._last_call
        return Call(self.scheduler.config.guidance_scale, 0) if found is None else found

    @property
    def guidance_scale(self) -> float:
        """Of the call that is running in this thread, or of the last one; before any, the model's own."""
        return self._call.guidance_scale

    @property
    def _guidance_scale(self) -> float:
        return self._call.guidance_scale

    @_guidance_scale.setter
    def _guidance_scale(self, value: float) -> None:
        check_number("guidance_scale", value)
        self._call.guidance_scale = value

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the steps that the scheduler guides are guided."""
        return self._call.guidance_scale != 1

    @property
    def num_timesteps(self) -> int:
        """Steps of the call."""
        return self._call.num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the call was asked to end early."""
        return self._call.interrupt

    @property
    def _interrupt(self) -> bool:
        return self._call.interrupt

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        mine = self._running.get(threading.get_ident())
        for call in [mine] if mine is not None else list(self._running.values()):
            call.interrupt = value

    def _callback_inputs(self, callback: Any, inputs: Sequence[str] | None) -> Sequence[str]:
        if callback is not None and not callable(callback):
            raise TypeError(f"callback_on_step_end is a {type(callback).__name__}; expected a function")
        if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
            inputs = callback.tensor_inputs
        if inputs is None:
            return self._callback_tensor_inputs
        if isinstance(inputs, str) or not isinstance(inputs, Sequence):
            expected = f"a list out of {self._callback_tensor_inputs}"
            raise TypeError(f"callback_on_step_end_tensor_inputs is {inputs!r}; expected {expected}")
        if unknown := sorted({str(name) for name in inputs} - set(self._callback_tensor_inputs)):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs has {unknown}; allowed: {self._callback_tensor_inputs}"
            )
        return inputs

    def initial_noise(
        self,
        batch_size: int,
        generator: sampling.Generators = None,
        height: int | None = None,
        width: int | None = None,
    ) -> torch.Tensor:
        """Draw the noise that a call with this generator begins with.

        Args:
            batch_size: pictures of the call.
            generator: as in a call.
            height: as in a call.
            width: as in a call.

        Returns:
            R (batch_size, C, h, w), float32, which may be given to a call as ``latents``.
        """
        return sampling.initial_sample(self._latent_shape(batch_size, height, width), self.runtime.device, generator)

    def _latent_shape(self, batch_size: int, height: int | None, width: int | None) -> tuple[int, ...]:
        config, factor = self.unet.config, self.vae.scale_factor
        native = config.sample_size * factor
        sides = []
        for name, pixels in (("height", height), ("width", width)):
            pixels = native if pixels is None else pixels
            multiple = factor * self.unet.downsampling
            if isinstance(pixels, bool) or not isinstance(pixels, int) or pixels < 1 or pixels % multiple:
                raise ValueError(f"{name} is {pixels!r}; expected a positive multiple of {multiple}")
            if config.anchor is not None and pixels != native:
                raise ValueError(f"{name} is {pixels}; this model has an anchor and draws {native} pixels only")
            sides.append(pixels // factor)
        return (batch_size, config.latent_channels, *sides)

    def with_styles(self, prompts: list[str], sample: torch.Tensor) -> list[str]:
        """Add an art style to each prompt that names none, one of those that exist for what it names.

        The choice is ``Phi(sqrt(C h w) mean(R))``, uniform on (0, 1) for a normal R: it depends neither on a sample's
        neighbours nor on the device or backend.

        Args:
            prompts: N texts.
            sample: R (N, C, h, w).

        Returns:
            The texts as they are encoded.
        """
        rows = sample.detach().cpu().double().flatten(1).numpy()
        # row by row: torch's mean depends, in its last bit, on the number of rows and of threads
        means = torch.tensor([row.mean() for row in rows], dtype=torch.float64) * math.sqrt(sample[0].numel())
        return self.description_encoder.with_styles(prompts, torch.special.ndtr(means).clamp(0, 1 - 1e-9).tolist())

    def as_drawn(self, texts: list[str], sample: torch.Tensor) -> list[str]:
        """Turn prompts into the descriptions that a call draws: what they are taken as, with an art style.

        Args:
            texts: N prompts.
            sample: R (N, C, h, w).
        """
        read = prompts.as_matched(texts, self._match(texts))
        assert not isinstance(read, Embeds)
        return self.with_styles(read, sample)

    def __getstate__(self) -> dict[str, Any]:
        # a copy has a runtime and calls of its own
        return {
            name: value for name, value in self.__dict__.items() if name not in ("runtime", "_running", "_last_call")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._running = {}
        self.runtime = EagerRuntime(self)
        if self.recipe is not None:
            from .acceleration import accelerate

            try:
                accelerate(self, **self.recipe)
            except ValueError as error:
                logger.warning("a copy of an accelerated pipeline draws by the reference here: %s", error)

    def twin(self) -> CoalescerPipeline:
        """Make another pipeline of the same components and settings, which is not accelerated."""
        other = object.__new__(type(self))
        other.__setstate__({**self.__getstate__(), "recipe": None})
        return other

    @property
    def is_offloaded(self) -> bool:
        """Whether the UNet's weights are moved to where they run when it is called, as by enable_model_cpu_offload."""
        return self._offload_hook is not None

    @property
    def _offload_hook(self) -> Any:
        return getattr(self.unet, "_hf_hook", None)  # of the package accelerate, on a network or a wrapper of one

    def encode_prompt(
        self,
        prompt: str | list[str],
        device: torch.device | str | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        prompt_matching: bool = True,
    ) -> tuple[torch.Tensor | None, ...]:
        """Encode descriptions as the embeddings that a call takes. No art style is added to a prompt that names none.

        Args:
            prompt: one description or a list.
            device: of the result; that of the networks if None.
            num_images_per_prompt: so many rows a prompt.
            do_classifier_free_guidance: whether the negative prompt is encoded.
            negative_prompt: one description or one a prompt; the empty description if None.
            prompt_matching: as in a call.

        Returns:
            prompt_embeds and negative_prompt_embeds, (pictures, D) float32, the second None without guidance. For a
            network with cross-attention prompt_embeds, prompt_token_embeds (pictures, L, D') and prompt_attention_mask
            (pictures, L), and the same of the negative prompt.
        """
        texts = prompts.check_texts("prompt", prompt)
        wanted, avoided = prompts.check(Given(texts), Given(negative_prompt), self.unet.config)
        prompts.check_count(num_images_per_prompt)
        wanted = prompts.as_matched(wanted, self._match(wanted) if prompt_matching else None)
        where = torch.device(self._execution_device if device is None else device)
        away: Descriptions = [""] if avoided is None else avoided
        each = wanted, prompts.repeat(away, len(wanted) // len(away))
        found = [self.describe(prompts.repeat(some, num_images_per_prompt), where) for some in each]
        return (*found[0], *(found[1] if do_classifier_free_guidance else [None] * len(found[1])))

    def describe(self, texts: Descriptions, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Compute what the UNet takes of N descriptions.

        Returns:
            Vectors (N, D) and, for cross-attention, token rows (N, L, D') and their mask (N, L).
        """
        if isinstance(texts, Embeds):
            return tuple(x.to(device, torch.float32 if x.is_floating_point() else x.dtype) for x in texts.tensors())
        described = [self.description_encoder(texts)]
        if self.unet.config.cross_attention_dim is not None:
            described += self.description_encoder.token_rows(texts)
        return tuple(x.to(device) for x in described)

    def condition(self, texts: Descriptions, device: torch.device) -> Conditioning:
        """Compute what the UNet derives from descriptions alone."""
        described = self.describe(texts, device)
        if self._offload_hook is not None:  # by itself it moves the network when it is called
            self._offload_hook.pre_forward(self.unet)
        return self.unet.condition(*described)

    def evaluate(self, sample: torch.Tensor, conditioning: Conditioning) -> tuple[torch.Tensor, torch.Tensor]:
        """Evaluate direction (N, C, h, w) and distance (N,) at R = ``sample`` (N, C, h, w)."""
        return self.unet(sample, conditioning, return_dict=False)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode latents (N, C, h, w) to pictures (N, 3, H, W), float32, about in [-1, 1]."""
        return self.vae.decode(latents.to(self.vae.dtype)).sample.float()


def _evaluations(call: Call, samples: int, best_of: int) -> list[int] | None:
    """Evaluations of each picture, whose samples follow each other."""
    if isinstance(call.evaluations, torch.Tensor):
        return call.evaluations.view(-1, best_of).sum(1).tolist()
    return [call.evaluations * best_of] * (samples // best_of) if call.evaluations else None


def _replaced(given: Any, latents: torch.Tensor, largest: float | None) -> torch.Tensor:
    """The latents that a callback has returned to go on from, float32; those that it was given if it returned none."""
    name = "callback_on_step_end"
    if given is not None and not isinstance(given, dict):
        raise TypeError(f"{name} returned a {type(given).__name__}; expected a dict with latents, or None")
    new = (given or {}).get("latents", latents)
    if not isinstance(new, torch.Tensor) or not new.is_floating_point():
        kind = new.dtype if isinstance(new, torch.Tensor) else type(new).__name__
        raise TypeError(f"{name} returned latents of {kind}; expected a floating-point tensor")
    if new.shape != latents.shape or new.device != latents.device:
        expected = f"{tuple(latents.shape)} on {latents.device}"
        raise ValueError(f"{name} returned latents of shape {tuple(new.shape)} on {new.device}; expected {expected}")
    check_readable(f"{name} returned latents, which", new)
    if largest is not None and not new.abs().amax() <= largest:
        raise ValueError(f"{name} returned latents with numbers that are not finite or beyond {largest:g}")
    return new.to(torch.float32)


@contextmanager
def _without_empty_lists() -> Iterator[None]:
    """Silence diffusers' warning, at every change of dtype, that an empty list of modules is kept in float32."""
    said = logging.getLogger("diffusers.models.modeling_utils")

    def names_one(record: logging.LogRecord) -> bool:
        return "should be kept in float32: []" not in record.getMessage()

    said.addFilter(names_one)
    try:
        yield
    finally:
        said.removeFilter(names_one)
