"""Distillation of a sentence transformer into a static token table, one row for each WordPiece token.

    h_t = unit(mean of the transformer's last states over [CLS] t [SEP])
    row_t = (h_t - mean h) A · a / (a + p_t),   p_t ∝ 1 / (t + 2.7),   a = 1e-4

A are the first principal axes of h (384 -> dim), p is Zipf's estimate of a token's frequency (WordPiece vocabularies
are sorted by it), and a / (a + p) the smooth inverse frequency (Arora et al., ICLR 2017). The embedded model's table
was made from all-MiniLM-L6-v2 (Apache-2.0).
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from .. import files

logger = logging.getLogger(__name__)


def build_text_table(model_dir: Path, out: Path, dim: int = 128) -> Path:
    """Distil a BERT-like model into a table.

    Args:
        model_dir: folder of the model, with vocab.txt, config.json and weights.
        out: the .npz file that is written. It holds ``table`` int8 (V, dim), ``scale`` float32 (dim,) and ``vocab``,
            the tokens joined by newlines as UTF-8 bytes; a token's vector is table · scale.
        dim: of the vectors.

    Returns:
        ``out``.

    Raises:
        ImportError: without the package transformers.
        OSError: if the folder has no such model.
    """
    vocabulary = Path(model_dir) / "vocab.txt"
    if not vocabulary.exists():
        raise FileNotFoundError(
            f"there is no vocab.txt in {model_dir}: give the folder of a BERT-like model, such as all-MiniLM-L6-v2"
        )
    tokens = vocabulary.read_text("utf-8").splitlines()
    table, scale = quantise(project(token_states(Path(model_dir), tokens), dim))
    with files.writing(out) as file:
        np.savez_compressed(
            file, table=table, scale=scale, vocab=np.frombuffer("\n".join(tokens).encode("utf-8"), np.uint8)
        )
    logger.info("%s: %d tokens of %d dimensions", out, *table.shape)
    return Path(out)


@torch.inference_mode()
def token_states(model_dir: Path, tokens: list[str], batch_size: int = 512) -> np.ndarray:
    """h of the formula above, float32 (V, hidden)."""
    try:
        from transformers import AutoModel
    except ImportError as error:
        raise ImportError(
            "distilling a text table needs the package transformers: run 'pip install transformers'"
        ) from error
    model = AutoModel.from_pretrained(model_dir).eval()
    cls, sep = tokens.index("[CLS]"), tokens.index("[SEP]")
    parts = []
    for ids in tqdm(torch.arange(len(tokens), dtype=torch.int64).split(batch_size), desc="text table"):
        sentence = torch.stack([torch.full_like(ids, cls), ids, torch.full_like(ids, sep)], dim=1)
        states = model(input_ids=sentence, attention_mask=torch.ones_like(sentence)).last_hidden_state.mean(1)
        parts.append(F.normalize(states, dim=1))
    return torch.cat(parts).numpy()


def project(states: np.ndarray, dim: int, a: float = 1e-4) -> np.ndarray:
    """The rows (V, dim) of the formula above, from h (V, hidden) in order of falling frequency."""
    centred = states - states.mean(0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    frequency = 1.0 / (np.arange(len(states)) + 2.7)
    frequency /= frequency.sum()
    return (centred @ axes[:dim].T) * (a / (a + frequency))[:, None]


def quantise(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 (V, dim) and float32 (dim,) whose product is the rows, to half a step of 1/127 of a column's maximum."""
    scale = np.abs(rows).max(0) / 127.0
    return np.round(rows / scale).astype(np.int8), scale.astype(np.float32)
