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

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput, is_accelerate_available
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from . import folders, prompts, sampling
from .finite import check_finite, check_readable, first_not_finite, is_finite
from .models import CoalescerAutoencoder, CoalescerUNet, DescriptionEncoder
from .models.unet import Conditioning
from .nvtx_ranges import span
from .prompts import Descriptions, Embeds
from .runtime.eager import EagerRuntime
from .sampling import Call
from .scheduler import LARGEST, CoalescerScheduler, check_number

if TYPE_CHECKING:
    from .runtime.base import Runtime

logger = logging.getLogger(__name__)

# what diffusers calls the dtype of weights: "dtype" since it has a message about the old name
DTYPE = "dtype" if find_spec("diffusers.utils.deprecation_utils") is not None else "torch_dtype"
WEIGHTS = Path(__file__).parent / "weights"
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# of each component, something that it has and others of its kind have not; wrappers (torch.compile's, peft's) have it as well
HALLMARKS = {
    "unet": "set_backend",
    "scheduler": "is_guided",
    "description_encoder": "with_styles",
    "vae": "scale_factor",
}


@dataclass
class TraceStep:
    """One step of a call: sample, R (N, C, H, W) before it; distance (N,); direction_length, |direction| (N,) before any guidance."""

    sample: torch.Tensor
    distance: torch.Tensor
    direction_length: torch.Tensor


@dataclass
class CoalescerPipelineOutput(BaseOutput):
    """images: a list of PIL pictures, or an array or tensor, prompt-major; trace: a `TraceStep` per step, if asked for;
    warnings: of words that are not known and of arguments without an effect, each a sentence."""

    images: list[Image.Image] | np.ndarray | torch.Tensor
    trace: list[TraceStep] | None = None
    warnings: list[str] = field(default_factory=list)


def embedded_models() -> list[str]:
    """Names of the models that the package carries."""
    return sorted(p.parent.name for p in WEIGHTS.glob("*/model_index.json"))


class CoalescerPipeline(DiffusionPipeline):
    r"""Draws pictures of descriptions: random R, a few steps of direction and distance, decode.

    Components: `CoalescerUNet` unet, `CoalescerScheduler` scheduler, `DescriptionEncoder` description_encoder,
    `CoalescerAutoencoder` vae. Everything that depends on the description alone is computed once a call.

    During a call and after it, ``guidance_scale``, ``num_timesteps``, ``do_classifier_free_guidance`` and ``interrupt``
    are those of the call of the same thread. A callback may set ``_guidance_scale``, of the steps to come, and
    ``_interrupt``, which ends its call with the R that it has; set outside of calls, ``_interrupt`` ends all that are
    running.
    """

    runtime: Runtime  # runs the networks: an `EagerRuntime`, or what `accelerate` has put in its place
    recipe: dict[str, Any] | None = None  # the arguments that `accelerate` was called with
    model_cpu_offload_seq = "unet->vae"
    _exclude_from_cpu_offload = ["description_encoder"]  # noqa: RUF012 (diffusers' interface); it has no parameters to be found by
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012 (diffusers' interface)
    _last_call: Call | None = None
    _checks_finite = True  # whether a call refuses to return what is not; `verify` counts it

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
        """Raise TypeError or ValueError for components that are none or do not fit each other."""
        for name, hallmark in HALLMARKS.items():
            part, kind = getattr(self, name), folders.COMPONENTS[name].__name__
            if part is None:
                raise ValueError(f"{name} is None; a pipeline needs a {kind}")
            if not hasattr(part, hallmark):
                raise TypeError(f"{name} is a {type(part).__name__}; expected a {kind}")
        unet, encoder, vae = self.unet.config, self.description_encoder.config, self.vae.config
        if vae.latent_channels != unet.latent_channels:
            raise ValueError(
                f"vae has {vae.latent_channels} latent channels and unet {unet.latent_channels}; give two that fit each other"
            )
        for name in ("description_dim", "cross_attention_dim"):
            if unet[name] not in (encoder.dim, None):
                raise ValueError(
                    f"description_encoder has dim {encoder.dim} and unet {name} {unet[name]}; give two that fit each other"
                )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> CoalescerPipeline:
        """The pipeline of an embedded name ("emoji-64"), a folder, or a Hub id; safetensors only. Keywords as in
        diffusers.

        No code of the folder is run, and no class imported that it names, see `folders.check`. Components that are
        given as keywords need not be there. Where the folder has ``checksums.json``, which `save_pretrained` writes,
        the files that are read are those that were saved.

        Raises ValueError, in one sentence, for a folder that is damaged or holds something else.
        """
        name = str(pretrained_model_name_or_path)
        given = [part for part in folders.COMPONENTS if part in kwargs]
        if absent := [part for part in given if kwargs[part] is None]:
            raise ValueError(
                f"{absent[0]} is None; leave it out for that of {name}, or give a {folders.COMPONENTS[absent[0]].__name__}"
            )
        if kwargs.setdefault("use_safetensors", True) is not True:
            raise ValueError("use_safetensors can only be True: other files of weights may run code and are not loaded")
        if not {"dtype", "torch_dtype"} & kwargs.keys():
            kwargs[DTYPE] = torch.float32  # not torch's default dtype, whatever that is
        kwargs.setdefault(
            "low_cpu_mem_usage", is_accelerate_available()
        )  # which diffusers would warn of at every start
        folder = _local(name)
        if folder is None:
            try:
                folder = Path(cls.download(name, **kwargs))
            except Exception as error:
                said = f"{name} is neither a local folder nor a reachable Hub model: check the name and the connection"
                raise ValueError(said) from error
        if folder.parent != WEIGHTS:
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
        """As in diffusers, safetensors only, with ``checksums.json``, of all files, and ``pipeline.py``, by which
        ``DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`` finds this class."""
        if safe_serialization is not True:
            raise ValueError("safe_serialization can only be True: other files of weights would not be loaded")
        try:
            super().save_pretrained(str(save_directory), safe_serialization, *args, **kwargs)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            said = f"{save_directory} cannot be written ({reason}): save into a folder that can, what is there now may be incomplete"
            raise OSError(said) from error

    def to_json_file(self, json_file_path: str | Path) -> None:
        """Write the index of a folder, the last of diffusers' files, and what goes beside it."""
        super().to_json_file(json_file_path)
        folders.complete(Path(json_file_path).parent, type(self))

    def to(self, *args: Any, **kwargs: Any) -> CoalescerPipeline:
        """As in diffusers; every floating-point dtype computes on every device."""
        kwargs.setdefault("silence_dtype_warnings", True)
        with _without_empty_lists():
            return super().to(*args, **kwargs)

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """As in diffusers; for a GPU, on a CPU there is nothing to offload to."""
        if device is not None and torch.device(device).type == "cpu":
            raise ValueError("device is cpu, where all weights are already: enable_sequential_cpu_offload is for a GPU")
        super().enable_sequential_cpu_offload(gpu_id, device)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 2,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
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
    ) -> CoalescerPipelineOutput | tuple[Any, ...]:
        r"""Draw ``num_images_per_prompt`` pictures of each prompt.

        Args:
            prompt: one description or a list. One that names no art style ("3d style") gets one of those that exist for
                what it names, chosen by the mean of its R. The empty description draws any picture. Emoji are read as
                their names.
            num_images_per_prompt: pictures a prompt; the result is prompt-major.
            num_inference_steps: network evaluations of the description; 2 is what the model is made for.
            guidance_scale: as in diffusers, 1 is none and 1.5 extrapolates half of the way from the empty description's
                endpoint; None is the model's own. Applies to the steps that the scheduler says (the last one).
            generator: a torch.Generator, or a list of one a picture. A CPU generator draws the same noise for every
                device.
            latents: R to start from, (pictures, C, h, w), instead of noise.
            height, width: size in pixels; the model's own if None. A model with an anchor has one size.
            output_type: "pil", "np" (N, H, W, 3) in [0, 1], "pt" (N, 3, H, W) in [0, 1], or "latent" (N, C, h, w).
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
            prompt_token_embeds, prompt_attention_mask: with prompt_embeds, for a network with cross-attention, token
                rows (prompts, L, D') and the mask (prompts, L), non-zero where there is a token (everywhere if None).
            negative_prompt_embeds, negative_prompt_token_embeds, negative_prompt_attention_mask: the same of
                negative_prompt.

        Returns: a `CoalescerPipelineOutput`, whose warnings say which words are not known, or with
            ``return_dict=False`` a tuple of the images and, if asked for, the trace.

        Raises: TypeError or ValueError, in one sentence, for anything else, and for a picture or R that is not finite.
        """
        self._check_components()
        wanted = prompts.given(
            "prompt", self.unet.config, prompt, prompt_embeds, prompt_token_embeds, prompt_attention_mask
        )
        if wanted is None:
            raise TypeError("prompt is None; expected a string or a list of strings, or prompt_embeds")
        prompts.check_count(num_images_per_prompt)
        avoided = prompts.given(
            "negative_prompt",
            self.unet.config,
            negative_prompt,
            negative_prompt_embeds,
            negative_prompt_token_embeds,
            negative_prompt_attention_mask,
        )
        if avoided is not None and len(avoided) not in (1, len(wanted)):
            raise ValueError(
                f"negative_prompt has {len(avoided)} descriptions; expected one, or one for each of the {len(wanted)} prompts"
            )
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}; use one of {', '.join(OUTPUT_TYPES)}")
        inputs = self._callback_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)
        scale = self.scheduler.config.guidance_scale if guidance_scale is None else guidance_scale
        check_number("guidance_scale", scale)
        self.scheduler.set_timesteps(num_inference_steps)
        scheduler = copy.copy(self.scheduler)  # of this call alone: another thread's may have other steps
        scheduler.set_timesteps(num_inference_steps)
        runtime = self.runtime  # once, for another thread may restore the pipeline meanwhile
        runtime.refresh()
        warnings = prompts.warnings(self.description_encoder, wanted, avoided, scale)
        pictures = len(wanted) * num_images_per_prompt
        sample = self._initial_sample(pictures, height, width, generator, latents)
        with span("encode"):
            described = prompts.repeat(wanted, num_images_per_prompt)
            if not isinstance(described, Embeds):
                described = self.with_styles(described, sample)
        with span("condition"):
            conditioning = runtime.condition(described, sample.device)
            empty = None
            if scale != 1 or callback_on_step_end is not None:  # which may change the scale
                away: Descriptions = [""] if avoided is None else avoided
                empty = runtime.condition(
                    away if len(away) == 1 else prompts.repeat(away, num_images_per_prompt), sample.device
                )

        trace: list[TraceStep] = []
        decodes = output_type != "latent"
        watched = return_trace or callback_on_step_end is not None
        with self.progress_bar(total=num_inference_steps) as bar:
            call = Call(scale, num_inference_steps, progress=bar.update)

            def on_step(
                i: int, start: torch.Tensor, direction: torch.Tensor, distance: torch.Tensor, end: torch.Tensor
            ) -> torch.Tensor:
                if return_trace:
                    trace.append(TraceStep(start, distance, direction.float().square().mean((1, 2, 3)).sqrt()))
                if callback_on_step_end is not None:
                    check(end, i)
                    given = callback_on_step_end(self, i, i, {name: end for name in inputs})
                    end = _replaced(given, end, LARGEST if self._checks_finite else None)
                return end

            def check(found: torch.Tensor, step: int | None = None) -> None:
                if not self._checks_finite or is_finite(found):
                    return
                if step is None:
                    step = sampling.first_bad_step(runtime, scheduler, sample, conditioning, empty, scale)
                row = (first_not_finite(found) or 0) // num_images_per_prompt
                of = f"prompt_embeds[{row}]" if isinstance(wanted, Embeds) else f"prompt {wanted[row]!r:.80}"
                what = (
                    f"the picture of {of}"
                    if step is None
                    else f"R of {of} after step {step + 1} of {num_inference_steps}"
                )
                raise ValueError(
                    f"{what} is not finite: lower guidance_scale, check the weights, or compute in float32"
                )

            with self._calling(call):
                images = runtime.generate(
                    scheduler,
                    sample,
                    conditioning,
                    empty,
                    scale,
                    decodes,
                    on_step if watched else None,
                    call,
                )
            check(images)
        if decodes:
            images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images, trace) if return_trace else (images,)
        return CoalescerPipelineOutput(images, trace if return_trace else None, warnings)

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
            raise TypeError(
                f"callback_on_step_end_tensor_inputs is {inputs!r}; expected a list out of {self._callback_tensor_inputs}"
            )
        if unknown := sorted({str(name) for name in inputs} - set(self._callback_tensor_inputs)):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs has {unknown}; allowed: {self._callback_tensor_inputs}"
            )
        return inputs

    def initial_noise(
        self,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> torch.Tensor:
        """The R (batch_size, C, h, w), float32, that a call with this generator begins with; to be given as ``latents``."""
        return self._initial_sample(batch_size, height, width, generator, None)

    def _initial_sample(
        self,
        batch_size: int,
        height: int | None,
        width: int | None,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
    ) -> torch.Tensor:
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
        shape = (batch_size, config.latent_channels, *sides)
        device = self.runtime.device
        if latents is None:
            for one in generator if isinstance(generator, list) else [generator]:
                if not isinstance(one, torch.Generator) and (one is not None or isinstance(generator, list)):
                    raise TypeError(
                        f"generator is {generator!r:.80}; expected a torch.Generator or a list of one a picture"
                    )
                if one is not None and one.device.type == "meta":
                    raise ValueError("generator is on device meta, which draws nothing; expected one on the CPU")
            if isinstance(generator, list) and len(generator) != batch_size:
                raise ValueError(
                    f"generator is a list of {len(generator)}; expected one for each of the {batch_size} pictures"
                )
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if not isinstance(latents, torch.Tensor) or not latents.is_floating_point():
            kind = latents.dtype if isinstance(latents, torch.Tensor) else type(latents).__name__
            raise TypeError(f"latents is {kind}; expected a floating-point tensor")
        check_readable("latents", latents)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents has shape {tuple(latents.shape)}; expected {shape}")
        if not latents.abs().amax() <= LARGEST:  # not a number is neither more nor less
            raise ValueError(
                f"latents holds numbers that are not finite or beyond {LARGEST:g}; expected noise, about N(0, 1)"
            )
        return latents.to(device, torch.float32)

    def with_styles(self, prompts: list[str], sample: torch.Tensor) -> list[str]:
        """Each prompt as it is encoded: with one of the existing styles if it names none, chosen by its R (N, C, h, w) alone.

        The choice is ``Phi(sqrt(C h w) mean(R))``, uniform on (0, 1) for a normal R: it depends neither on a sample's neighbours nor
        on the device or backend.
        """
        rows = sample.detach().cpu().double().flatten(1).numpy()
        # row by row: torch's mean depends, in its last bit, on the number of rows and of threads
        means = torch.tensor([row.mean() for row in rows], dtype=torch.float64) * math.sqrt(sample[0].numel())
        return self.description_encoder.with_styles(prompts, torch.special.ndtr(means).clamp(0, 1 - 1e-9).tolist())

    def __getstate__(self) -> dict[str, Any]:
        """All but the runtime, which belongs to this process, and the calls that are running: a copy has its own."""
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
    ) -> tuple[torch.Tensor | None, ...]:
        """Descriptions as ``prompt_embeds`` and ``negative_prompt_embeds`` of a call, float32, one a picture.

        Each is (pictures, D). A network with cross-attention also takes token rows and masks; the tuple then is
        prompt_embeds, prompt_token_embeds, prompt_attention_mask and the same of the negative prompt. Without
        ``do_classifier_free_guidance`` what is negative is None. No art style is added to a prompt that names none.
        """
        texts = prompts.check_texts("prompt", prompt)
        avoided = [""] if negative_prompt is None else prompts.check_texts("negative_prompt", negative_prompt)
        if len(avoided) not in (1, len(texts)):
            raise ValueError(
                f"negative_prompt has {len(avoided)} descriptions; expected one, or one for each of the {len(texts)} prompts"
            )
        prompts.check_count(num_images_per_prompt)
        where = torch.device(self._execution_device if device is None else device)
        each = texts, avoided * (len(texts) // len(avoided))
        found = [self.describe(prompts.repeat(some, num_images_per_prompt), where) for some in each]
        return (*found[0], *(found[1] if do_classifier_free_guidance else [None] * len(found[1])))

    def describe(self, texts: Descriptions, device: torch.device) -> tuple[torch.Tensor, ...]:
        """What the UNet takes of descriptions: vectors (N, D) and, for cross-attention, token rows (N, L, D) and their mask (N, L)."""
        if isinstance(texts, Embeds):
            return tuple(x.to(device, torch.float32 if x.is_floating_point() else x.dtype) for x in texts.tensors())
        described = [self.description_encoder(texts)]
        if self.unet.config.cross_attention_dim is not None:
            described += self.description_encoder.token_rows(texts)
        return tuple(x.to(device) for x in described)

    def condition(self, texts: Descriptions, device: torch.device) -> Conditioning:
        """What the UNet derives from descriptions alone."""
        described = self.describe(texts, device)
        if self._offload_hook is not None:  # by itself it moves the network when it is called
            self._offload_hook.pre_forward(self.unet)
        return self.unet.condition(*described)

    def evaluate(self, sample: torch.Tensor, conditioning: Conditioning) -> tuple[torch.Tensor, torch.Tensor]:
        """Direction (N, C, h, w) and distance (N,) at R."""
        return self.unet(sample, conditioning, return_dict=False)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures (N, 3, H, W), float32, about in [-1, 1]."""
        return self.vae.decode(latents.to(self.vae.dtype)).sample.float()


def _replaced(given: Any, latents: torch.Tensor, largest: float | None) -> torch.Tensor:
    """The latents that a callback gives back to go on from, float32; those that it was given if it gives none."""
    name = "callback_on_step_end"
    if given is not None and not isinstance(given, dict):
        raise TypeError(f"{name} returned a {type(given).__name__}; expected a dict with latents, or None")
    new = (given or {}).get("latents", latents)
    if not isinstance(new, torch.Tensor) or not new.is_floating_point():
        kind = new.dtype if isinstance(new, torch.Tensor) else type(new).__name__
        raise TypeError(f"{name} returned latents of {kind}; expected a floating-point tensor")
    if new.shape != latents.shape or new.device != latents.device:
        raise ValueError(
            f"{name} returned latents of shape {tuple(new.shape)} on {new.device}; expected {tuple(latents.shape)} on {latents.device}"
        )
    check_readable(f"{name} returned latents, which", new)
    if largest is not None and not new.abs().amax() <= largest:
        raise ValueError(f"{name} returned latents with numbers that are not finite or beyond {largest:g}")
    return new.to(torch.float32)


def _local(name: str) -> Path | None:
    """The folder that is meant, or None for a Hub id. Raises ValueError for a name that can be neither."""
    if name in embedded_models():
        return WEIGHTS / name
    folder = Path(name)
    try:
        if folder.is_dir():
            return folder
    except OSError as error:  # a name that is too long
        raise ValueError(f"there is no model {name!r:.80}: {(error.strerror or str(error)).lower()}") from error
    if name.count("/") != 1 or folder.exists() or name.startswith((".", "/", "~")):
        known = ", ".join(embedded_models())
        raise ValueError(f"there is no model {name!r}: give {known}, a folder, or a Hub id such as owner/name")
    return None


@contextmanager
def _without_empty_lists() -> Iterator[None]:
    """diffusers warns at every change of dtype of modules to be kept in float32, also where it has none to list."""
    said = logging.getLogger("diffusers.models.modeling_utils")

    def names_one(record: logging.LogRecord) -> bool:
        return "should be kept in float32: []" not in record.getMessage()

    said.addFilter(names_one)
    try:
        yield
    finally:
        said.removeFilter(names_one)
