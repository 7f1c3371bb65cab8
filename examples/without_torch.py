"""Draw pictures from an exported model with onnxruntime, tokenizers and numpy alone: no torch, no coalescer_fast.

Export once, where the package is installed, then copy the folder and this file anywhere:

    coalescer-export onnx --what generator -o exported
    python without_torch.py exported "octopus in a top hat" -n 4 --seed 3 -o octopus.png

Noise is that of coalescer_fast.PhiloxGenerator(seed): picture i of a seed is the same picture in both.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import struct
import sys
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import BertWordPieceTokenizer

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MODIFIERS = {code: None for code in (0xFE0E, 0xFE0F, *range(0x1F3FB, 0x1F400))}  # variants and skin tones of emoji
REGIONAL = range(0x1F1E6, 0x1F200)  # halves of flags


class Prompts:
    """What prompts mean, by the tables in prompts.npz: emoji, known names, styles, and vectors of tokens."""

    def __init__(self, path: Path):
        with np.load(path) as found:
            self.tables = dict(found)
        tokens = self.lines("vocab")
        self.tokenizer = BertWordPieceTokenizer({token: i for i, token in enumerate(tokens)}, lowercase=True)
        self.special = {self.tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
        self.emoji = dict(line.split("\t") for line in self.lines("emoji"))
        self.longest = max(map(len, self.emoji))
        self.names, self.styles = self.lines("names"), self.lines("styles")
        self.rows = {plain(name): row for row, name in reversed([*enumerate(self.names)])}
        self.matches = "match_table" in self.tables  # else prompts are drawn as they stand
        prefix = "match_" if self.matches else ""
        self.match_table, self.match_scale = self.tables[f"{prefix}table"], self.tables[f"{prefix}scale"]
        known = self.tables["match_names"].astype(np.float32) if self.matches else [self.sum(x) for x in self.names]
        self.vectors = np.stack([unit(vector) for vector in known]) if self.names else np.zeros((0, 1), np.float32)

    def lines(self, table: str) -> list[str]:
        text = bytes(self.tables[table]).decode()
        return text.split("\n") if text else []

    def spell(self, text: str) -> str:
        """Emoji as their names: the longest one known at each place."""
        if text.isascii():
            return text
        text, out, i = text.translate(MODIFIERS), "", 0
        while i < len(text):
            known = next((text[i : i + n] for n in range(self.longest, 0, -1) if text[i : i + n] in self.emoji), None)
            if known is not None:
                out += f" {self.emoji[known]} "
            elif unicodedata.category(text[i]) == "So" and ord(text[i]) not in REGIONAL:
                out += f" {unicodedata.name(text[i], text[i]).lower()} "
            else:
                out += text[i]
            i += len(known or text[i])
        return out

    def ids(self, text: str) -> list[int]:
        spelled = re.sub("[,;]", " ", self.spell(text))
        return [i for i in self.tokenizer.encode(spelled, add_special_tokens=False).ids if i not in self.special]

    def sum(self, text: str) -> np.ndarray:
        """The sum of the rows of a text's tokens, in the table for matching."""
        return (self.match_table[self.ids(text)].astype(np.float32) * self.match_scale).sum(0)

    def split(self, text: str) -> tuple[str, list[str]]:
        """A text without its art styles, and these."""
        if not self.styles:
            return text, []
        phrase = re.compile(rf"\b({'|'.join(map(re.escape, self.styles))}) style\b", re.IGNORECASE)
        return phrase.sub("", text), [word.lower() for word in phrase.findall(text)]

    def name_of(self, text: str) -> int | None:
        """The row of the known name that says what a text says, whatever the style."""
        subject = self.split(text)[0]
        said = plain(self.spell(subject))
        if said in self.rows:
            return self.rows[said]
        for form in forms(said) if "lexicon_keys" in self.tables else ():
            digest = hashlib.blake2b(form.encode(), digest_size=8).digest()
            key, keys = int.from_bytes(digest, "little", signed=True), self.tables["lexicon_keys"]
            place = int(np.searchsorted(keys, key))
            if place < len(keys) and keys[place] == key:
                low, high, _ = self.tables["lexicon_values"][place].tolist()
                return low + 256 * high
        if not self.ids(subject) or not self.names:
            return None
        return int((self.vectors * unit(self.sum(subject))).sum(1).argmax())

    def as_drawn(self, text: str, noise: np.ndarray) -> str:
        """The known name that a prompt means, and one of the styles that exist for it, chosen by the noise."""
        row = self.name_of(text)
        subject, styles = self.split(text)
        known = plain(self.spell(subject)) in self.rows
        if self.matches and row is not None and not known:
            text = ", ".join([self.names[row], *(f"{word} style" for word in styles)])
        if not styles and self.styles and self.ids(text):
            row = self.name_of(text)
            exist = [True] * len(self.styles) if row is None else self.tables["name_styles"][row]
            able = [word for word, exists in zip(self.styles, exist) if exists] or self.styles
            mean = noise.astype(np.float64).mean() * math.sqrt(noise.size)  # normal, so that u is uniform
            u = min(0.5 * math.erfc(-mean / math.sqrt(2)), 1 - 1e-9)
            text = f"{text}, {able[int(u * len(able))]} style"
        return text

    def inputs(self, texts: list[str], ports: list[dict]) -> dict[str, np.ndarray]:
        """What a graph takes of texts beside the noise."""
        rows = [self.tables["table"][self.ids(text)].astype(np.float32) * self.tables["scale"] for text in texts]
        sums = np.stack([row.sum(0) for row in rows])
        found = {"description": sums / np.maximum(np.sqrt(np.square(sums).mean(1, keepdims=True)), np.float32(1e-6))}
        for port in ports:
            if port["name"] == "token_rows":  # of a model with cross-attention
                length = port["shape"][1]
                cut = [row[:length] for row in rows]
                found["token_rows"] = np.stack([np.pad(row, ((0, length - len(row)), (0, 0))) for row in cut])
                found["token_mask"] = np.arange(length) < np.array([[max(1, len(row))] for row in cut])
        return found


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.maximum(np.sqrt(np.square(vector).sum()), np.float32(1e-12))


def plain(text: str) -> str:
    return " ".join(text.lower().split()).strip(" ,;.!?")


ARTICLE = (
    "^(a|an|the|some|one|my|ein|eine|einen|der|die|das|un|une|le|la|les|el|los|las|una|il|lo|um|uma|o|een|het|de) "
)


def forms(said: str) -> list[str]:
    """A text, and what is left of it without an article and without an ending of the plural."""
    bare = re.sub(ARTICLE, "", said)
    texts = dict.fromkeys((said, bare))
    return [form for text in texts for form in (text, *(text[: -len(e)] for e in ("s", "es") if text.endswith(e)))]


def noise(seed: int, picture: int, count: int) -> np.ndarray:
    """Normal numbers by Philox4x32-10 and Box-Muller: those of coalescer_fast.PhiloxGenerator(seed, picture)."""
    words, mask = -(-count // 4), np.uint64(2**32 - 1)
    a, b = np.arange(words, dtype=np.uint64), np.zeros(words, np.uint64)
    c, d = (np.full(words, word, np.uint64) for word in (picture % 2**32, picture >> 32))
    left, right = seed % 2**32, seed >> 32
    for _ in range(10):
        first, second = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, c = (second >> np.uint64(32)) ^ b ^ np.uint64(left), (first >> np.uint64(32)) ^ d ^ np.uint64(right)
        b, d = second & mask, first & mask
        left, right = (left + 0x9E3779B9) % 2**32, (right + 0xBB67AE85) % 2**32
    v = (np.stack([a, b, c, d]) + 0.5) / 2.0**32
    radius, angle = np.sqrt(-2 * np.log(v[0::2])), 2 * np.pi * v[1::2]
    z = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return z.reshape(4, -1).T.reshape(-1)[:count].astype(np.float32)


def png(pixels: np.ndarray) -> bytes:
    """A PNG file of pixels (H, W, 3), uint8."""
    height, width, _ = pixels.shape

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    lines = np.pad(pixels.reshape(height, -1), ((0, 0), (1, 0)))  # a filter byte, 0, before each line
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(lines.tobytes())), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def draw(folder: Path, prompt: str, pictures: int = 1, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    """Pictures (N, H, W, 3), uint8, and what was drawn."""
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    if manifest["kind"] != "generator":
        raise SystemExit(f"{folder} is a {manifest['kind']}: export with --what generator")
    least, _, most = manifest["batch"]
    if not least <= pictures <= most:
        raise SystemExit(f"-n is {pictures}, and {folder} draws {least} to {most} at a time: give another")
    prompts, ports = Prompts(folder / "prompts.npz"), manifest["inputs"]
    shape = ports[0]["shape"][1:]
    r = np.stack([noise(seed, i, math.prod(shape)).reshape(shape) for i in range(pictures)])
    texts = [prompts.as_drawn(prompt, each) for each in r]
    session = onnxruntime.InferenceSession(folder / manifest["graph"], providers=["CPUExecutionProvider"])
    (drawn,) = session.run(None, {"noise": r, **prompts.inputs(texts, ports)})  # [N, 3, H, W] in [0, 1]
    return (255 * drawn).round().astype(np.uint8).transpose(0, 2, 3, 1), texts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="what coalescer-export onnx --what generator wrote")
    parser.add_argument("prompt")
    parser.add_argument("-n", type=int, default=1, help="pictures, side by side (default: 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--out", type=Path, default=Path("picture.png"))
    args = parser.parse_args()
    if not (args.folder / "prompts.npz").is_file():
        sys.exit(f"{args.folder} has no prompts.npz: name a folder of coalescer-export onnx --what generator")
    images, drawn_texts = draw(args.folder, args.prompt, args.n, args.seed)
    args.out.write_bytes(png(np.concatenate(list(images), axis=1)))
    print(f"{args.out}: {'; '.join(dict.fromkeys(drawn_texts))}")
