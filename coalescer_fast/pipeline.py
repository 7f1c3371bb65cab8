"""Text to picture in two network evaluations."""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME, BaseOutput, is_accelerate_available
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from safetensors import safe_open

from . import sampling
from .models import CoalescerAutoencoder, CoalescerUNet, DescriptionEncoder
from .models.unet import Conditioning
from .nvtx_ranges import span
from .scheduler import CoalescerScheduler

if TYPE_CHECKING:
    from .runtime.base import Runtime

logger = logging.getLogger(__name__)

WEIGHTS = Path(__file__).parent / "weights"
NETWORKS = ("unet", "description_encoder", "vae")
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class TraceStep:
    """One step of a call: sample, R (N, C, H, W) before it; distance (N,); direction_length, |direction| (N,) before any guidance."""

    sample: torch.Tensor
    distance: torch.Tensor
    direction_length: torch.Tensor


@dataclass
class CoalescerPipelineOutput(BaseOutput):
    """images: a list of PIL pictures, or an array or tensor, prompt-major; trace: a `TraceStep` per step, if asked for."""

    images: list[Image.Image] | np.ndarray | torch.Tensor
    trace: list[TraceStep] | None = None


def embedded_models() -> list[str]:
    """Names of the models that the package carries."""
    return sorted(p.parent.name for p in WEIGHTS.glob("*/model_index.json"))


class CoalescerPipeline(DiffusionPipeline):
    r"""Draws pictures of descriptions: random R, a few steps of direction and distance, decode.

    Components: `CoalescerUNet` unet, `CoalescerScheduler` scheduler, `DescriptionEncoder` description_encoder,
    `CoalescerAutoencoder` vae. Everything that depends on the description alone is computed once a call.
    """

    # what `accelerate` has put in the place of the networks, and the arguments that it was called with
    runtime: Runtime | None = None
    recipe: dict[str, Any] | None = None
    model_cpu_offload_seq = "unet->vae"
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012 (diffusers' interface)

    def __init__(
        self, unet: CoalescerUNet, scheduler: CoalescerScheduler, description_encoder: DescriptionEncoder, vae: CoalescerAutoencoder
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, description_encoder=description_encoder, vae=vae)
        self.image_processor = VaeImageProcessor(vae_scale_factor=vae.scale_factor)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> CoalescerPipeline:
        """The pipeline of an embedded name ("emoji-64"), a folder, or a Hub id; safetensors only. Keywords as in diffusers.

        Raises ValueError, in one sentence, for a folder that is damaged or holds something else.
        """
        name = str(pretrained_model_name_or_path)
        if (WEIGHTS / name / "model_index.json").is_file() and name in embedded_models():
            folder = WEIGHTS / name
        else:
            folder = Path(name)
            if folder.is_dir():
                _check_folder(folder)
            elif name.count("/") != 1 or folder.exists() or name.startswith((".", "/", "~")):
                known = ", ".join(embedded_models())
                raise ValueError(f"there is no model {name!r}: give {known}, a folder, or a Hub id such as owner/name")
        kwargs.setdefault("use_safetensors", True)
        kwargs.setdefault("low_cpu_mem_usage", is_accelerate_available())  # which diffusers would warn of at every start
        try:
            pipe = super().from_pretrained(str(folder), **kwargs)
            if folder.is_dir():
                _check_weights(pipe, folder)
            return pipe
        except Exception as error:
            if folder.is_dir():
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise ValueError(f"{name} cannot be loaded as a coalescer pipeline: {reason}") from error
            raise ValueError(f"{name} is neither a local folder nor a reachable Hub model: check the name and the connection") from error

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
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
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> CoalescerPipelineOutput | tuple[Any, ...]:
        r"""Draw ``num_images_per_prompt`` pictures of each prompt.

        Args:
            prompt: one description or a list. One that names no art style ("3d style") gets one of those that exist for what it
                names, chosen by the mean of its R. The empty description draws any picture.
            num_images_per_prompt: pictures a prompt; the result is prompt-major.
            num_inference_steps: network evaluations of the description; 2 is what the model is made for.
            guidance_scale: as in diffusers, 1 is none and 1.5 extrapolates half of the way from the empty description's endpoint;
                None is the model's own. Applies to the steps that the scheduler says (the last one).
            generator: a torch.Generator, or a list of one a picture. A CPU generator draws the same noise for every device.
            latents: R to start from, (pictures, C, h, w), instead of noise.
            height, width: size in pixels; the model's own if None. A model with an anchor has one size.
            output_type: "pil", "np" (N, H, W, 3) in [0, 1], "pt" (N, 3, H, W) in [0, 1], or "latent" (N, C, h, w).
            return_trace: also return R, distance and |direction| of every step.
            callback_on_step_end: called as (pipeline, step, timestep, {"latents": R}); may return {"latents": R} to go on from.

        Raises: TypeError or ValueError, in one sentence, for anything else.
        """
        prompts = self._check_prompts(prompt, num_images_per_prompt)
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}; use one of {', '.join(OUTPUT_TYPES)}")
        if unknown := set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(f"callback_on_step_end_tensor_inputs has {sorted(unknown)}; allowed: {self._callback_tensor_inputs}")
        scale = self.scheduler.config.guidance_scale if guidance_scale is None else guidance_scale
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
            raise ValueError(f"guidance_scale is {guidance_scale!r}; expected a finite number, 1 for none")
        self.scheduler.set_timesteps(num_inference_steps)
        scheduler = copy.copy(self.scheduler)  # of this call alone: another thread's may have other steps
        scheduler.set_timesteps(num_inference_steps)
        networks = self._networks()
        sample = self._initial_sample(len(prompts), height, width, generator, latents)
        with span("encode"):
            texts = self.with_styles(prompts, sample)
        with span("condition"):
            conditioning = networks.condition(texts, sample.device)
            empty = networks.condition([""], sample.device) if scale != 1 else None

        trace: list[TraceStep] = []
        decodes = output_type != "latent"
        # a runtime may do all of it in one go, where nobody looks at the steps
        at_once = None if return_trace or callback_on_step_end is not None else getattr(networks, "generate", None)
        with self.progress_bar(total=num_inference_steps) as bar:

            def on_step(i: int, start: torch.Tensor, direction: torch.Tensor, distance: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
                if return_trace:
                    trace.append(TraceStep(start, distance, direction.float().square().mean((1, 2, 3)).sqrt()))
                if callback_on_step_end is not None:
                    end = (callback_on_step_end(self, i, i, {"latents": end}) or {}).get("latents", end)
                bar.update()
                return end

            if at_once is not None:
                images = at_once(scheduler, sample, conditioning, empty, scale, decodes)
                bar.update(num_inference_steps)
            else:
                images = sampling.sample(networks, scheduler, sample, conditioning, empty, scale, on_step)
        if decodes:
            with span("decode"):
                pictures = networks.decode(images) if at_once is None else images
                images = self.image_processor.postprocess(pictures, output_type=output_type)
        self.maybe_free_model_hooks()
        output = CoalescerPipelineOutput(images, trace if return_trace else None)
        return output if return_dict else output.to_tuple()

    def _check_prompts(self, prompt: str | list[str], num_images_per_prompt: int) -> list[str]:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, (list, tuple)) or not all(isinstance(p, str) for p in prompts):
            raise TypeError(f"prompt is {prompt!r:.80}; expected a string or a list of strings")
        if not prompts:
            raise ValueError("prompt is an empty list; give at least one description")
        if isinstance(num_images_per_prompt, bool) or not isinstance(num_images_per_prompt, int) or num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt is {num_images_per_prompt!r}; expected a whole number from 1 up")
        return [p for p in prompts for _ in range(num_images_per_prompt)]

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
        runtime = self.runtime
        device = self._execution_device if runtime is None else runtime.device
        if latents is None:
            for one in generator if isinstance(generator, list) else [generator]:
                if not isinstance(one, (torch.Generator, type(None))):
                    raise TypeError(f"generator is {generator!r:.80}; expected a torch.Generator or a list of one a picture")
            if isinstance(generator, list) and len(generator) != batch_size:
                raise ValueError(f"generator is a list of {len(generator)}; expected one for each of the {batch_size} pictures")
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if not isinstance(latents, torch.Tensor) or not latents.is_floating_point():
            kind = latents.dtype if isinstance(latents, torch.Tensor) else type(latents).__name__
            raise TypeError(f"latents is {kind}; expected a floating-point tensor")
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents has shape {tuple(latents.shape)}; expected {shape}")
        if not latents.isfinite().all():
            raise ValueError("latents holds numbers that are not finite; expected noise, about N(0, 1)")
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

    def _networks(self) -> CoalescerPipeline | Runtime:
        """What runs a call: the pipeline's own networks, or those of its runtime, with the weights as they are now."""
        runtime = self.runtime  # once, for another thread may restore the pipeline meanwhile
        if runtime is None:
            return self
        here, there = self.unet.null.device, runtime.device  # not self.device, which takes longer than a small network
        if here != there:
            raise ValueError(f"the pipeline was accelerated on {there} and is on {here}: accelerate it again, or restore it")
        runtime.refresh()
        return runtime

    def __getstate__(self) -> dict[str, Any]:
        """All but the runtime, which belongs to this process: a copy makes its own."""
        return {name: value for name, value in self.__dict__.items() if name != "runtime"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.recipe is not None:
            from .acceleration import accelerate

            try:
                accelerate(self, **self.recipe)
            except ValueError as error:
                logger.warning("a copy of an accelerated pipeline draws by the reference here: %s", error)

    @property
    def backend(self) -> str:
        """Of the ops, in the reference networks."""
        return self.unet.backend

    def describe(self, texts: list[str], device: torch.device) -> tuple[torch.Tensor, ...]:
        """What the UNet takes of descriptions: vectors (N, D) and, for cross-attention, token rows (N, L, D) and their mask (N, L)."""
        described = [self.description_encoder(texts)]
        if self.unet.config.cross_attention_dim is not None:
            described += self.description_encoder.token_rows(texts)
        return tuple(x.to(device) for x in described)

    def condition(self, texts: list[str], device: torch.device) -> Conditioning:
        """What the UNet derives from descriptions alone."""
        return self.unet.condition(*self.describe(texts, device))

    def evaluate(self, sample: torch.Tensor, conditioning: Conditioning) -> tuple[torch.Tensor, torch.Tensor]:
        """Direction (N, C, h, w) and distance (N,) at R."""
        return self.unet(sample, conditioning, return_dict=False)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures (N, 3, H, W), float32, about in [-1, 1]."""
        return self.vae.decode(latents.to(self.vae.dtype)).sample.float()


def _check_weights(pipe: CoalescerPipeline, folder: Path) -> None:
    """Raise ValueError if a file lacked a tensor, in whose place diffusers leaves a random one."""
    for component in NETWORKS:
        with safe_open(folder / component / SAFETENSORS_WEIGHTS_NAME, "pt") as file:
            missing = set(getattr(pipe, component).state_dict()) - set(file.keys())
        if missing:
            raise ValueError(f"{component}/{SAFETENSORS_WEIGHTS_NAME} lacks {sorted(missing)[0]}")


def _check_folder(folder: Path) -> None:
    """Raise ValueError if ``folder`` is not a saved coalescer pipeline with all its files."""
    index_path = folder / "model_index.json"
    if not index_path.is_file():
        raise ValueError(f"{folder} is not a saved pipeline: it has no model_index.json")
    try:
        index = json.loads(index_path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{index_path} is damaged: {error}") from error
    kind = index.get("_class_name") if isinstance(index, dict) else None
    if kind != CoalescerPipeline.__name__:
        raise ValueError(f"{folder} holds a {kind}, not a {CoalescerPipeline.__name__}")
    for component in NETWORKS:
        if component not in index:
            raise ValueError(f"{index_path} is damaged: it names no {component}")
        for file in ("config.json", SAFETENSORS_WEIGHTS_NAME):
            if not (folder / component / file).is_file():
                raise ValueError(f"{folder} is incomplete: {component}/{file} is missing")
