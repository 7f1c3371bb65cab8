"""The descriptions that a call is given, as texts or as embeddings: checked, and warnings about them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .finite import check_readable
from .models import DescriptionEncoder
from .models.description import Match
from .scheduler import LARGEST

MAX_IMAGES_PER_PROMPT = 2**16  # in a call

logger = logging.getLogger(__name__)


@dataclass
class Embeds:
    """Descriptions as the UNet takes them.

    Attributes:
        vectors: (N, D).
        token_rows: (N, L, D'), for cross-attention.
        mask: (N, L) bool, True where there is a token.
    """

    vectors: torch.Tensor
    token_rows: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.vectors)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Those that there are, in order."""
        return tuple(x for x in (self.vectors, self.token_rows, self.mask) if x is not None)


Descriptions = list[str] | Embeds


@dataclass
class Given:
    """Descriptions as a call is given them, not yet checked: as texts, or as what `Embeds` holds."""

    texts: str | list[str] | None
    vectors: torch.Tensor | None = None
    token_rows: torch.Tensor | None = None
    mask: torch.Tensor | None = None


def repeat(descriptions: Descriptions, times: int) -> Descriptions:
    """Each description so many times, one after the other."""
    if isinstance(descriptions, Embeds):
        return Embeds(*(x.repeat_interleave(times, 0) for x in descriptions.tensors()))
    return [text for text in descriptions for _ in range(times)]


def as_matched(descriptions: Descriptions, matched: Sequence[Match | None] | None) -> Descriptions:
    """The descriptions as they are drawn: what they were taken as, where they were."""
    if isinstance(descriptions, Embeds) or matched is None:
        return descriptions
    return [text if match is None else match.description for text, match in zip(descriptions, matched)]


def check(prompt: Given, negative_prompt: Given, config: Any) -> tuple[Descriptions, Descriptions | None]:
    """Check the descriptions that a call is given, each in one of two ways: as texts or as embeddings.

    Args:
        prompt: the descriptions to draw.
        negative_prompt: those that guidance leads away from.
        config: the UNet's.

    Returns:
        The descriptions of the prompt, and those of the negative prompt if there are any.

    Raises:
        TypeError, ValueError: for anything else.
    """
    wanted = _check_given("prompt", prompt, config)
    if wanted is None:
        raise TypeError("prompt is None; expected a string or a list of strings, or prompt_embeds")
    avoided = _check_given("negative_prompt", negative_prompt, config)
    if avoided is not None and len(avoided) not in (1, len(wanted)):
        expected = f"one, or one for each of the {len(wanted)} prompts"
        raise ValueError(f"negative_prompt has {len(avoided)} descriptions; expected {expected}")
    return wanted, avoided


def _check_given(name: str, given: Given, config: Any) -> Descriptions | None:
    texts, vectors, token_rows, mask = given.texts, given.vectors, given.token_rows, given.mask
    if vectors is None:
        if token_rows is not None or mask is not None:
            raise ValueError(f"{name}_embeds is missing; {name}_token_embeds and {name}_attention_mask go with it")
        return None if texts is None else check_texts(name, texts)
    if texts is not None:
        raise ValueError(f"{name} and {name}_embeds are both given; give one of them")
    _check_embeds(f"{name}_embeds", vectors, (None, config.description_dim))
    if config.cross_attention_dim is None:
        if token_rows is not None or mask is not None:
            raise ValueError(
                f"{name}_token_embeds is given; this network has no cross-attention and takes {name}_embeds alone"
            )
        return Embeds(vectors)
    if token_rows is None:
        raise ValueError(f"{name}_token_embeds is missing; this network attends to token rows, as of encode_prompt")
    _check_embeds(f"{name}_token_embeds", token_rows, (len(vectors), None, config.cross_attention_dim))
    if mask is None:
        mask = torch.ones(token_rows.shape[:2], dtype=torch.bool, device=token_rows.device)
    elif not isinstance(mask, torch.Tensor) or mask.shape != token_rows.shape[:2] or not (mask != 0).any(1).all():
        shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(
            f"{name}_attention_mask is {shape}; expected {tuple(token_rows.shape[:2])} with a token in each row"
        )
    return Embeds(vectors, token_rows, mask != 0)


def check_texts(name: str, given: Any) -> list[str]:
    """Return one text or several as a list.

    Raises:
        TypeError, ValueError: for anything but a string or a list of at least one string.
    """
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{name} is {given!r:.80}; expected a string or a list of strings")
    if not texts:
        raise ValueError(f"{name} is an empty list; give at least one description")
    for text in texts:
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(
                f"{name} is {text!r:.80}, which holds half a character (a surrogate); decode it as UTF-8 or UTF-16"
            )
    return list(texts)


def check_batch_sizes(batch_sizes: Any) -> None:
    """Raise TypeError for anything but a list or tuple of whole numbers."""
    several = isinstance(batch_sizes, (list, tuple, range))
    if not several or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in batch_sizes):
        raise TypeError(f"batch_sizes is {batch_sizes!r:.80}; expected whole numbers from 1 up, as in (1, 4)")


def check_count(num_images_per_prompt: Any) -> None:
    """Raise ValueError for anything but a whole number of pictures that fit into memory."""
    if (
        isinstance(num_images_per_prompt, bool)
        or not isinstance(num_images_per_prompt, int)
        or num_images_per_prompt < 1
    ):
        raise ValueError(f"num_images_per_prompt is {num_images_per_prompt!r}; expected a whole number from 1 up")
    if num_images_per_prompt > MAX_IMAGES_PER_PROMPT:
        raise ValueError(
            f"num_images_per_prompt is more than {MAX_IMAGES_PER_PROMPT:,}, "
            "which are held in memory at once: make several calls"
        )


def _check_embeds(name: str, given: Any, shape: tuple[int | None, ...]) -> None:
    if not isinstance(given, torch.Tensor) or not given.is_floating_point():
        kind = given.dtype if isinstance(given, torch.Tensor) else type(given).__name__
        raise TypeError(f"{name} is {kind}; expected a floating-point tensor")
    if (
        given.ndim != len(shape)
        or not given.numel()
        or any(n not in (None, found) for n, found in zip(shape, given.shape))
    ):
        expected = ", ".join("N" if n is None else str(n) for n in shape)
        raise ValueError(f"{name} has shape {tuple(given.shape)}; expected ({expected})")
    check_readable(name, given)
    if not given.abs().amax() <= LARGEST:
        raise ValueError(f"{name} holds numbers that are not finite or beyond {LARGEST:g}; expected vectors of RMS 1")


def warnings(
    encoder: DescriptionEncoder, wanted: Descriptions, avoided: Descriptions | None, guidance_scale: float
) -> list[str]:
    """List what is odd about a call that can be run, and log each once in a process.

    Args:
        encoder: says which words it knows.
        wanted: of the prompt.
        avoided: of the negative prompt, if there is one.
        guidance_scale: of the call.

    Returns:
        A sentence each.
    """
    found = []
    if avoided is not None and guidance_scale == 1:
        found.append("negative_prompt has no effect with guidance_scale=1: give a larger one")
    for name, descriptions in (("prompt", wanted), ("negative_prompt", avoided)):
        for text in dict.fromkeys(descriptions if isinstance(descriptions, list) else []):
            words = encoder.words(text)
            unknown = [word for word, known in words.items() if not known]
            if text.strip(" ,;\t\r\n") and len(unknown) == len(words):
                found.append(f"no word of {name} {text!r:.80} is known, and what is drawn is anything: use other words")
            elif unknown:
                listed = ", ".join(map(repr, unknown[:10])) + (", ..." if len(unknown) > 10 else "")
                found.append(f"{name} {text!r:.80} has unknown words, which count for nothing: {listed}")
    for message in found:
        warn_once(message)
    return found


@functools.lru_cache(maxsize=1024)
def warn_once(message: str) -> None:
    """Log a warning unless it has been logged in this process."""
    logger.warning(message)
