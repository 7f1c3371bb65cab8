"""Pictures of requests, drawn together by one call of a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..models.description import Match
from ..noise import PhiloxGenerator
from ..sampling import Generator

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..pipeline import CoalescerPipeline


@dataclass(frozen=True)
class Options:
    """What the pictures of one call share, as in a call of `CoalescerPipeline`.

    Attributes:
        num_inference_steps: of the sampler.
        guidance_scale: None for the model's own.
        negative_prompt: what guidance leads away from, or None.
        prompt_matching: whether known names are drawn in the place of prompts.
        steps: whether R is decoded before and after every step.
    """

    num_inference_steps: int = 2
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    prompt_matching: bool = True
    steps: bool = False


@dataclass(frozen=True)
class Picture:
    """A picture to draw: the one of ``PhiloxGenerator(seed, picture=index)``.

    Attributes:
        prompt: what it shows.
        seed: of the noise.
        index: which picture of the seed.
        options: of the call.
    """

    prompt: str
    seed: int
    index: int
    options: Options


@dataclass(frozen=True)
class Drawn:
    """A picture that has been drawn.

    Attributes:
        image: the picture.
        description: what was drawn, with its art style.
        quality: see `CoalescerPipelineOutput`.
        match: what the prompt was taken as, or None.
        steps: with ``Options.steps``, R decoded before and after every step; the last one is ``image``.
    """

    image: Image
    description: str
    quality: float | None
    match: Match | None
    steps: tuple[Image, ...] = ()


def draw(pipe: CoalescerPipeline, pictures: Sequence[Picture]) -> list[Drawn]:
    """Draw pictures of the same options in one call.

    Raises:
        TypeError, ValueError: as a call of the pipeline.
    """
    options = pictures[0].options
    prompts = [picture.prompt for picture in pictures]
    generators: list[Generator] = [PhiloxGenerator(each.seed, each.index) for each in pictures]
    output: Any = pipe(
        prompts,
        num_inference_steps=options.num_inference_steps,
        guidance_scale=options.guidance_scale,
        generator=generators,
        negative_prompt=options.negative_prompt,
        prompt_matching=options.prompt_matching,
        return_trace=options.steps,
    )
    before = [decoded(pipe, step.sample) for step in output.trace or []]
    return [
        Drawn(
            image=output.images[i],
            description=output.descriptions[i],
            quality=None if output.quality is None else output.quality[i],
            match=None if output.matched is None else output.matched[i],
            steps=(*(images[i] for images in before), output.images[i]) if options.steps else (),
        )
        for i in range(len(pictures))
    ]


@torch.no_grad()
def decoded(pipe: CoalescerPipeline, sample: torch.Tensor) -> list[Image]:
    """Decode R (N, C, h, w) to N pictures."""
    images: list[Image] = pipe.image_processor.postprocess(pipe.runtime.decode(sample), output_type="pil")
    return images


def batch_sizes(pipe: CoalescerPipeline, most: int) -> list[int]:
    """The powers of two up to ``most``, and ``most`` itself, as far as the pipeline's runtime takes them."""
    most = min(most, pipe.runtime.max_batch or most)
    return sorted({2**i for i in range(most.bit_length())} | {most})
