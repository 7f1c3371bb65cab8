"""What Python packs, drawer.js unpacks."""

from __future__ import annotations

import gzip
import random

import pytest

from coalescer_fast.export.web.packing import ALPHABET, pack

from ...helpers.pages import open_scripts


@pytest.mark.parametrize("planes", [False, True])
@pytest.mark.parametrize("size", [0, 1, 2, 3, 1000, 99_999])
def test_a_packed_file_is_the_same_afterwards(page, tmp_path, size, planes):
    content = random.Random(size).randbytes(size)
    text, length = pack(content, planes)
    assert set(text) <= set(ALPHABET)
    assert "<" not in text
    flag = str(planes).lower()
    open_scripts(page, tmp_path, ("drawer.js",), packed=text)
    found = page.evaluate(
        f"unpack({{text: packed, length: {length}, planes: {flag}}}).then((buffer) => [...new Uint8Array(buffer)])"
    )
    assert bytes(found) == content


def test_it_is_denser_than_base64():
    content = random.Random(0).randbytes(100_000)
    assert len(pack(content)[0]) < 1.24 * len(gzip.compress(content, 9))
