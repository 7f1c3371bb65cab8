from __future__ import annotations

import json

import numpy as np
import pytest

from coalescer_fast.bulk import prompt_file
from coalescer_fast.bulk.prompt_file import STRIDE, hashed, noise_number, read

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

TEXTS = ["octopus", 'ein Café, "blau"', "🦊 fox", "a, b", " red  car "]
IDS = ["b", "a", "ü/.\\", "7", "x" * 300]


def written(folder, suffix, texts=TEXTS, ids=IDS):
    """A file of prompts; a .txt file has no ids."""
    path = folder / f"prompts{suffix}"
    rows = [{"id": i, "prompt": text, "more": 1} for i, text in zip(ids, texts)]
    if suffix == ".txt":
        path.write_text("\n".join(texts), "utf-8")
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    elif suffix == ".csv":
        quoted = ['"' + text.replace('"', '""') + '"' for text in texts]
        path.write_text("prompt,id\r\n" + "".join(f'{t},"{i}"\r\n' for t, i in zip(quoted, ids)), "utf-8", newline="")
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", prompt_file.SUFFIXES)
def test_all_formats_say_the_same(tmp_path, suffix):
    found = read(written(tmp_path, suffix))
    rows = found.rows(0, 100)
    assert [row.text for row in rows] == TEXTS
    assert [row.row for row in rows] == list(range(5))
    if suffix == ".txt":
        assert [row.id for row in rows] == list("01234")
        assert [row.number for row in rows] == list(range(5))
    else:
        assert [row.id for row in rows] == IDS
        assert [row.number for row in rows] == [hashed(prompt_id) for prompt_id in IDS]
    assert found.rows(3, 5) == rows[3:]


def test_a_mark_of_the_byte_order_and_line_ends_of_windows_are_no_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffcat\r\ndog\r\n".encode())
    assert read(path).texts == ["cat", "dog"]


def test_lines_end_at_newlines_alone(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("cat\x0bdog\u2028owl\nfox", "utf-8")
    assert read(path).texts == ["cat\x0bdog\u2028owl", "fox"]


def test_a_field_of_csv_may_have_several_lines(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('prompt\n"cat\nand dog"\n\n', "utf-8")
    with pytest.raises(ValueError, match="line 4 is empty"):
        read(path)
    path.write_text('prompt\n"cat\nand dog"\nowl\n', "utf-8")
    assert read(path).texts == ["cat\nand dog", "owl"]


def test_columns_are_named(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("id,text,number\na,cat,1\na,dog,2\n", "utf-8")
    found = read(path, "text", "number")
    assert (found.texts, found.ids) == (["cat", "dog"], ["1", "2"])


def test_whole_numbers_are_ids(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": ["cat", "dog"], "id": [5, 2**63 - 1]}), path)
    assert read(path).ids == ["5", str(2**63 - 1)]


WRONG = [
    ("a.txt", b"", "holds no prompts"),
    ("a.txt", b"cat\n\ndog\n", "line 2 is empty"),
    ("a.txt", b"cat\n \t \n", "line 2 is empty"),
    ("a.txt", b"cat\nd\xffg\n", "line 2 is not UTF-8"),
    ("a.txt", "cat\n".encode("utf-16"), "line 1 is not UTF-8"),
    ("a.md", b"cat\n", "let its name end in"),
    ("a.jsonl", b"", "holds no prompts"),
    ("a.jsonl", b'{"prompt": "cat"}\n\n', "line 2 is empty"),
    ("a.jsonl", b'{"prompt": "cat"}\n{"prompt": "dog"\n', "line 2 is no JSON"),
    ("a.jsonl", b"[" * 100_000, "line 1 is no JSON"),
    ("a.jsonl", b'{"prompt": "cat", "id": ' + b"9" * 5000 + b"}", "line 1 is no JSON .a number has too many digits"),
    ("a.jsonl", b'"cat"\n', "line 1 holds '\"cat\"'"),
    ("a.jsonl", b'{"text": "cat"}\n', "line 1 has no key 'prompt'"),
    ("a.jsonl", b'{"prompt": 5}\n', "line 1 has 5 as its prompt"),
    ("a.jsonl", b'{"prompt": ""}\n', "line 1 is empty"),
    ("a.jsonl", b'{"prompt": "\\ud83e"}\n', "line 1 holds half a character"),
    ("a.jsonl", b'{"prompt": "cat", "id": 1.5}\n', "line 1 has the id 1.5"),
    ("a.jsonl", b'{"prompt": "cat", "id": true}\n', "line 1 has the id True"),
    ("a.jsonl", b'{"prompt": "cat", "id": 1}\n{"prompt": "dog"}\n', "line 2 has no id"),
    ("a.jsonl", b'{"prompt": "cat", "id": 1}\n{"prompt": "dog", "id": "1"}\n', "line 2 has the id '1' of .*line 1"),
    ("a.csv", b"", "holds no prompts"),
    ("a.csv", b"prompt\n", "holds no prompts"),
    ("a.csv", b"text\ncat\n", "has no column 'prompt', but 'text'"),
    ("a.csv", b"prompt,prompt\ncat,dog\n", "several columns 'prompt'"),
    ("a.csv", b"prompt,id,id\ncat,a,b\n", "several columns 'id'"),
    ("a.csv", b" prompt\ncat\n", "but ' prompt'"),
    ("a.csv", b"prompt,id\ncat\n", "line 2 has 1 fields and the header 2"),
    ("a.csv", b'prompt\n"cat\n', "line 2 is no CSV"),
    ("a.csv", b"prompt,id\ncat,a\n\n", "line 3 is empty"),
    ("a.csv", b"prompt,id\ncat,\n", "line 2 has the id ''"),
    ("a.csv", b"prompt,id\ncat,a\ndog,a\n", "line 3 has the id 'a' of .*line 2"),
    ("a.parquet", b"", "cannot be read as Parquet"),
    ("a.parquet", b"PAR1" + bytes(100), "cannot be read as Parquet"),
]


@pytest.mark.parametrize(("name", "content", "said"), WRONG, ids=[f"{row[0]}-{row[2]:.30}" for row in WRONG])
def test_what_is_wrong_with_a_file_is_one_sentence(tmp_path, name, content, said):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=said) as error:
        read(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300 + len(str(path))


@pytest.mark.parametrize("values", [["cat", None], [1, 2], [b"cat", b"dog"]], ids=["null", "numbers", "bytes"])
def test_rows_of_parquet_that_are_no_prompts(tmp_path, values):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": values}), path)
    with pytest.raises(ValueError, match=r"row [01] has .* as its prompt"):
        read(path)


def test_parquet_that_python_cannot_hold(tmp_path):
    path = tmp_path / "a.parquet"
    no_text = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")])
    late = pa.array([2**30], pa.date32())
    for columns in ({"prompt": no_text}, {"prompt": ["cat"], "id": late}):
        pq.write_table(pa.table(columns), path)
        with pytest.raises(ValueError, match="cannot be read as Parquet"):
            read(path)
    pq.write_table(pa.table([["cat"], ["a"], ["b"]], names=["prompt", "id", "id"]), path)
    with pytest.raises(ValueError, match="several columns 'id'"):
        read(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        read(tmp_path / "a.txt")
    (tmp_path / "b.txt").mkdir()
    with pytest.raises(ValueError, match="cannot be read"):
        read(tmp_path / "b.txt")


def test_text_has_no_columns(tmp_path):
    with pytest.raises(ValueError, match="has no columns"):
        read(written(tmp_path, ".txt"), id_column="id")
    with pytest.raises(ValueError, match="has no columns: leave out the prompt column"):
        read(written(tmp_path, ".txt"), prompt_column="text")


# noise


def test_no_two_pictures_of_rows_share_their_noise():
    rows = [0, 1, 2, 1000, 10**9, STRIDE - 1]
    numbers = [noise_number(row, picture) for row in rows for picture in range(prompt_file.MOST_PICTURES)]
    assert len(set(numbers)) == len(numbers)
    assert max(numbers) < 2**64
    assert [noise_number(row, 0) for row in rows] == rows  # PhiloxGenerator(seed, picture=row)


def test_the_hash_of_an_id_is_that_of_other_programs():
    """BLAKE2b-64 of the UTF-8 bytes, the lowest first: `b2sum -l 64`."""
    assert hashed("a").to_bytes(8, "little").hex() == "40f89e395b66422f"


def test_ids_whose_pictures_would_share_their_noise_are_refused(tmp_path, monkeypatch):
    numbers = {"a": 5, "b": (5 + 3 * STRIDE) % 2**64, "c": 2**64 - STRIDE, "d": 6}
    monkeypatch.setattr(prompt_file, "hashed", lambda prompt_id: numbers[prompt_id])
    path = written(tmp_path, ".jsonl", ["one", "two", "three", "four"], list("abcd"))
    assert read(path, pictures=3).ids == list("abcd")  # b's picture 0 is a's picture 3
    with pytest.raises(ValueError, match=r"line 1 and .*line 2 would get the same noise.*'b'"):
        read(path, pictures=4)
    numbers["a"] = 0  # c's picture 1, beyond 2^64
    with pytest.raises(ValueError, match=r"would get the same noise"):
        read(path, pictures=2)


def test_the_check_of_noise_counts_as_noise_number_does():
    """Both wrap around at 2^64."""
    numbers = np.array([2**64 - STRIDE, 2**63], np.uint64)
    for picture in (0, 1, 7):
        step = np.uint64(picture) * np.uint64(STRIDE)
        assert [int(n) for n in numbers + step] == [noise_number(int(n), picture) for n in numbers]
