"""Files as text in a page: 13 bits of their gzip in two characters, 1.23 bytes a byte where base64 takes 1.33."""

from __future__ import annotations

import gzip

import numpy as np

ALPHABET = "".join(map(chr, range(35, 127))).replace("<", "")  # without what ends a string or an element


def pack(content: bytes, planes: bool = False) -> tuple[str, int]:
    """Pack a file for unpack of drawer.js.

    Args:
        content: of the file.
        planes: put the even bytes before the odd ones, for which gzip makes a file of 16-bit floats smaller.

    Returns:
        The text, and the number of bytes that it is of.
    """
    packed = gzip.compress(content[0::2] + content[1::2] if planes else content, 9, mtime=0)
    bits = np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little")
    groups = np.pad(bits, (0, -len(bits) % 13)).reshape(-1, 13)
    values = groups.astype(np.uint16) @ (1 << np.arange(13, dtype=np.uint16))
    digits = np.stack([values % len(ALPHABET), values // len(ALPHABET)], 1).ravel()
    return np.frombuffer(ALPHABET.encode(), np.uint8)[digits].tobytes().decode(), len(packed)
