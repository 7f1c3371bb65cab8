"""Small helpers on pictures: reading, tensors, contact sheets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont


def on_white(picture: Image.Image, size: int) -> np.ndarray:
    """uint8 (size, size, 3): the picture centred on a white square and reduced with an area filter."""
    picture = picture.convert("RGBA")
    side = max(picture.size)
    canvas = Image.new("RGBA", (side, side), (255, 255, 255, 255))
    canvas.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    rgb = canvas.convert("RGB")
    if side != size:
        rgb = rgb.resize((size, size), Image.Resampling.BOX if side % size == 0 else Image.Resampling.LANCZOS)
    return np.asarray(rgb, dtype=np.uint8)


def open_on_white(path: Path, size: int) -> np.ndarray:
    with Image.open(path) as picture:
        return on_white(picture, size)


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 (N, H, W, 3) -> float32 (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def to_uint8(pictures: torch.Tensor) -> np.ndarray:
    """(N, 3, H, W) in [-1, 1] -> uint8 (N, H, W, 3)."""
    return pictures.float().clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def sheet(
    pictures: Sequence[Image.Image], labels: Sequence[str] = (), columns: int = 8, scale: float = 1.5, pad: int = 4
) -> Image.Image:
    """A contact sheet of equally large pictures, each with its label (up to three lines) below."""
    width, height = (round(side * scale) for side in pictures[0].size)
    font = ImageFont.load_default(size=10)
    text_height = 38 if labels else 0
    rows = -(-len(pictures) // columns)
    out = Image.new("RGB", (columns * (width + pad) + pad, rows * (height + pad + text_height) + pad), (255, 255, 255))
    draw = ImageDraw.Draw(out)
    for i, picture in enumerate(pictures):
        x = pad + (i % columns) * (width + pad)
        y = pad + (i // columns) * (height + pad + text_height)
        out.paste(picture.resize((width, height), Image.Resampling.BICUBIC), (x, y))
        if labels:
            draw.text((x, y + height + 1), _wrap(labels[i], width, font), fill=(40, 40, 40), font=font, spacing=1)
    return out


def _wrap(text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, lines: int = 3) -> str:
    out: list[str] = []
    for word in text.split():
        if out and font.getlength(f"{out[-1]} {word}") <= width:
            out[-1] += f" {word}"
        else:
            out.append(word)
    return "\n".join(out[:lines])
