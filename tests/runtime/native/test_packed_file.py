from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from coalescer_fast.ops import native_library
from coalescer_fast.runtime.native import packed_file
from coalescer_fast.runtime.native.pack import kernel_order
from coalescer_fast.runtime.native.packed_file import ALIGNMENT, PackedFile, content_hash

from ...helpers.isa import available

pytestmark = pytest.mark.skipif(
    bool(native_library.unavailable()), reason=native_library.unavailable() or "the library is there"
)

KEYS = ["down.0.conv1.weight/(5, 7, 3, 3)/float32", 'ünet "b"\n', "c", ""]
TENSORS = {
    KEYS[0]: torch.arange(1000, dtype=torch.float32),
    KEYS[1]: torch.arange(77, dtype=torch.bfloat16),
    KEYS[2]: torch.arange(-100, 101, dtype=torch.int8),
    KEYS[3]: torch.empty(0, dtype=torch.float32),
}


def saved(path: Path, tensors: dict[str, torch.Tensor] = TENSORS) -> Path:
    """A file of the tensors, whose sources are 1, 2, ..."""
    file = PackedFile(path)
    for source, (key, tensor) in enumerate(tensors.items(), 1):
        file.put(key, source, tensor)
    file.flush()
    return path


def got(file: PackedFile) -> dict[str, torch.Tensor]:
    found = {key: file.get(key, source) for source, key in enumerate(TENSORS, 1)}
    return {key: tensor for key, tensor in found.items() if tensor is not None}


def assert_equal(a: torch.Tensor | None, b: torch.Tensor) -> None:
    assert a is not None
    assert a.dtype == b.dtype
    assert torch.equal(a, b)


def header(path: Path) -> dict:
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def test_what_is_saved_is_found_again(tmp_path, caplog):
    path = saved(tmp_path / "folder" / "weights.safetensors")
    found = got(PackedFile(path))
    assert found.keys() == TENSORS.keys()
    for key, tensor in TENSORS.items():
        assert_equal(found[key], tensor)
    assert not caplog.records
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_before_it_is_saved(tmp_path):
    file = PackedFile(tmp_path / "a")
    assert file.get("key", 1) is None
    file.put("key", 1, torch.arange(6.0).view(2, 3))
    assert_equal(file.get("key", 1), torch.arange(6.0))
    assert file.get("key", 2) is None
    assert not (tmp_path / "a").exists()


def test_only_of_the_same_weight(tmp_path):
    file = PackedFile(saved(tmp_path / "a"))
    assert file.get(KEYS[0], 2) is None
    assert file.get("other", 1) is None
    assert_equal(file.get(KEYS[0], 1), TENSORS[KEYS[0]])
    assert file.get(KEYS[0], 2) is None
    file.put(KEYS[0], 2, torch.ones(3))
    assert file.get(KEYS[0], 1) is None
    assert_equal(file.get(KEYS[0], 2), torch.ones(3))


def test_a_file_holds_what_was_asked_for(tmp_path):
    file = PackedFile(saved(tmp_path / "a"))
    file.get(KEYS[0], 1)
    file.get(KEYS[1], 99)
    file.put("new", 9, torch.ones(4))
    file.flush()
    assert header(tmp_path / "a").keys() == {"__metadata__", KEYS[0], "new"}
    again = PackedFile(tmp_path / "a")
    assert_equal(again.get(KEYS[0], 1), TENSORS[KEYS[0]])
    assert_equal(again.get("new", 9), torch.ones(4))


def test_nothing_is_written_for_nothing_new(tmp_path):
    path = saved(tmp_path / "a")
    before = path.stat()
    file = PackedFile(path)
    got(file)
    file.flush()
    assert path.stat().st_ino == before.st_ino
    file.put("new", 9, torch.ones(4))
    file.flush()
    between = path.stat()
    assert between.st_ino != before.st_ino
    file.flush()
    assert path.stat().st_ino == between.st_ino


def test_equal_contents_are_equal_files(tmp_path):
    saved(tmp_path / "a")
    file = PackedFile(tmp_path / "b")
    for source, (key, tensor) in reversed([*enumerate(TENSORS.items(), 1)]):
        file.put(key, source, tensor)
    file.flush()
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_format_is_safetensors(tmp_path):
    path = saved(tmp_path / "a.safetensors")
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == TENSORS.keys()
        for key, tensor in TENSORS.items():
            stored = file.get_tensor(key)
            assert stored.dtype == torch.uint8
            content = tensor.view(torch.uint8)
            assert torch.equal(stored[: len(content)], content)
            assert len(stored) % ALIGNMENT == 0
            assert not stored[len(content) :].any()
        metadata = file.metadata()
    assert metadata["interface"] == str(native_library.ABI_VERSION)
    assert metadata["vector_width"] == str(native_library.vector_width())
    assert json.loads(metadata["tensors"])[KEYS[1]]["dtype"] == "bfloat16"


def test_tensors_are_aligned(tmp_path):
    path = saved(tmp_path / "a")
    length = int.from_bytes(path.read_bytes()[:8], "little")
    assert (8 + length) % ALIGNMENT == 0
    begins = [entry["data_offsets"][0] for key, entry in header(path).items() if key != "__metadata__"]
    assert len(begins) == len(TENSORS)
    assert not any(begin % ALIGNMENT for begin in begins)
    assert not any(tensor.data_ptr() % ALIGNMENT for tensor in got(PackedFile(path)).values() if tensor.numel())


def test_the_file_cannot_be_written_to_through_its_tensors(tmp_path):
    path = saved(tmp_path / "a")
    before = path.read_bytes()
    first, second = PackedFile(path), PackedFile(path)
    first.get(KEYS[0], 1).fill_(7)
    assert_equal(second.get(KEYS[0], 1), TENSORS[KEYS[0]])
    assert path.read_bytes() == before


def test_tensors_outlive_the_file(tmp_path):
    path = saved(tmp_path / "a")
    tensor = PackedFile(path).get(KEYS[0], 1)
    saved(path, {KEYS[0]: torch.zeros(5)})
    assert_equal(tensor, TENSORS[KEYS[0]])
    path.unlink()
    assert_equal(tensor, TENSORS[KEYS[0]])


def test_tensors_of_any_kind_are_put(tmp_path):
    with torch.inference_mode():
        inference = torch.ones(3)
    given = {
        "inference": inference,
        "strided": torch.arange(12.0).view(3, 4).t(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "scalar": torch.tensor(3.5),
        "float64": torch.ones(3, dtype=torch.float64),
        "int64": torch.arange(3),
    }
    file = PackedFile(saved(tmp_path / "a", given))
    for source, (key, tensor) in enumerate(given.items(), 1):
        assert_equal(file.get(key, source), tensor.detach().reshape(-1))


def test_a_key_that_safetensors_has_a_meaning_for(tmp_path):
    with pytest.raises(ValueError, match="key is '__metadata__'"):
        PackedFile(tmp_path / "a").put("__metadata__", 1, torch.ones(3))


def test_a_changed_byte_of_the_header(tmp_path, caplog):
    path = saved(tmp_path / "a")
    content = path.read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    for place in range(length):
        for flip in (0x01, 0x20):
            caplog.clear()
            changed = bytearray(content)
            changed[place] ^= flip
            path.write_bytes(changed)
            assert not got(PackedFile(path)), place
            assert len(caplog.records) == 1


def test_a_changed_byte_of_the_data(tmp_path, caplog):
    path = saved(tmp_path / "a")
    content = path.read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    places = {key: entry["data_offsets"][0] for key, entry in header(path).items() if key != "__metadata__"}
    for place in range(length, len(content), 13):
        changed = bytearray(content)
        changed[place] ^= 0x10
        path.write_bytes(changed)
        at = place - length
        hit = {key for key, tensor in TENSORS.items() if 0 <= at - places[key] < tensor.numel() * tensor.element_size()}
        caplog.clear()
        file = PackedFile(path)
        found = got(file)
        assert found.keys() == TENSORS.keys() - hit
        assert len(caplog.records) == len(hit)
        for key, tensor in found.items():
            assert_equal(tensor, TENSORS[key])


def test_what_was_damaged_is_made_anew(tmp_path):
    path = saved(tmp_path / "a")
    content = bytearray(path.read_bytes())
    content[8 + int.from_bytes(content[:8], "little") + header(path)[KEYS[0]]["data_offsets"][0]] ^= 1
    path.write_bytes(content)
    file = PackedFile(path)
    assert got(file).keys() == TENSORS.keys() - {KEYS[0]}
    file.put(KEYS[0], 1, TENSORS[KEYS[0]])
    file.flush()
    assert got(PackedFile(path)).keys() == TENSORS.keys()


def test_a_file_that_is_cut_off(tmp_path, caplog):
    path = saved(tmp_path / "a")
    content = path.read_bytes()
    header_end = 8 + int.from_bytes(content[:8], "little")
    for size in [*range(header_end + 70), *range(header_end + 70, len(content), 31), len(content) - 1]:
        caplog.clear()
        path.write_bytes(content[:size])
        assert not got(PackedFile(path))
        assert len(caplog.records) == 1
    caplog.clear()
    path.write_bytes(content + b"\0")
    assert not got(PackedFile(path))
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    "content",
    [
        b"hello",
        b"\xff" * 100,
        bytes(100),
        (2).to_bytes(8, "little") + b"{}",
        (1 << 40).to_bytes(8, "little") + bytes(100),
    ],
)
def test_a_file_of_something_else(tmp_path, caplog, content):
    path = tmp_path / "a"
    path.write_bytes(content)
    assert not got(PackedFile(path))
    assert len(caplog.records) == 1
    assert saved(path)
    assert got(PackedFile(path)).keys() == TENSORS.keys()


def resealed(path: Path, change) -> None:
    """Change the header's JSON, and give it the right checksum again."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    changed = json.loads(content[8:end])
    changed["__metadata__"]["checksum"] = "0" * 16
    changed = change(changed) or changed
    text = changed if isinstance(changed, bytes) else json.dumps(changed, separators=(",", ":")).encode()
    text = text.ljust(-(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT - 8)
    at = len(packed_file.BEFORE_CHECKSUM)
    text = text[:at] + packed_file._checksum(text) + text[at + 16 :]
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def described(change):
    """A change of what the metadata says of the tensors."""

    def of_header(header: dict) -> None:
        tensors = json.loads(header["__metadata__"]["tensors"])
        header["__metadata__"]["tensors"] = json.dumps(change(tensors) or tensors)

    return of_header


WRONG = {
    "no metadata of tensors": lambda h: h["__metadata__"].pop("tensors") and None,
    "tensors that are no JSON": lambda h: h["__metadata__"].update(tensors="{"),
    "tensors that are a list": described(lambda t: [1]),
    "tensors nested deeply": lambda h: h["__metadata__"].update(tensors="[" * 100_000),
    "a tensor without an entry": lambda h: h.pop(KEYS[0]) and None,
    "an entry that is a number": lambda h: h.update({KEYS[0]: 3}),
    "offsets beyond the file": lambda h: h[KEYS[0]].update(data_offsets=[0, 1 << 40]),
    "offsets that are no numbers": lambda h: h[KEYS[0]].update(data_offsets=["a", "b"]),
    "a negative size": described(lambda t: t[KEYS[0]].update(bytes=-4)),
    "a size that is no whole number": described(lambda t: t[KEYS[0]].update(bytes=4000.0)),
    "half an element": described(lambda t: t[KEYS[0]].update(bytes=3998)),
    "no dtype": described(lambda t: t[KEYS[0]].update(dtype="float31")),
    "a dtype that is a function": described(lambda t: t[KEYS[0]].update(dtype="load")),
    "a dtype that is a module": described(lambda t: t[KEYS[0]].update(dtype="_inductor")),
    "a dtype that is a list": described(lambda t: t[KEYS[0]].update(dtype=[])),
    "a hash that is none": described(lambda t: t[KEYS[0]].update(hash="x")),
    "a source that is a number": described(lambda t: t[KEYS[0]].update(source=1)),
    "text behind the header": lambda h: json.dumps(h, separators=(",", ":")).encode() + b"x",
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_a_header_that_somebody_made(tmp_path, caplog, change):
    """With the right checksum."""
    path = saved(tmp_path / "a")
    resealed(path, lambda h: None)
    assert got(PackedFile(path)).keys() == TENSORS.keys()
    resealed(path, change)
    assert not got(PackedFile(path))
    assert len(caplog.records) == 1
    assert caplog.records[0].levelno == logging.WARNING


@pytest.mark.parametrize("name", ["format", "interface", "vector_width", "products"])
def test_a_file_of_another_version_or_instruction_set(tmp_path, caplog, name):
    path = saved(tmp_path / "a")
    resealed(path, lambda h: h["__metadata__"].update({name: "3"}))
    with caplog.at_level(logging.INFO):
        assert not got(PackedFile(path))
    assert len(caplog.records) == 1
    assert "was made for" in caplog.text


@pytest.mark.skipif(len(available()) < 2, reason="the processor has one instruction set")
def test_the_instruction_set_in_use_counts(tmp_path):
    path, best = saved(tmp_path / "a"), native_library.isa()
    try:
        native_library.set_isa("portable")
        assert not got(PackedFile(path))
    finally:
        native_library.set_isa(best)
    assert got(PackedFile(path))


def test_a_folder_is_no_file(tmp_path, caplog):
    file = PackedFile(tmp_path)
    file.put("a", 1, torch.ones(3))
    file.flush()
    assert len(caplog.records) == 2
    assert not any(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(tmp_path, caplog):
    (tmp_path / "file").write_text("x")
    file = PackedFile(tmp_path / "file" / "a")
    caplog.clear()
    file.put("a", 1, torch.ones(3))
    file.flush()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert_equal(file.get("a", 1), torch.ones(3))


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    # elsewhere than in the checkout, so that the package is the one that is installed
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=os.sep)


def output(process: subprocess.Popen[str]) -> str:
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    return out


FULL = """
import logging, resource, sys, torch
from coalescer_fast.runtime.native.packed_file import PackedFile
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
file = PackedFile(sys.argv[1])
file.put("large", 1, torch.ones(1 << 20))
file.flush()
"""


def test_a_full_disk_is_a_warning(tmp_path):
    path = saved(tmp_path / "a")
    before = path.read_bytes()
    lines = output(python(FULL, path)).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("WARNING packed weights are not kept on disk: ")
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["a"]


WRITER = """
import logging, sys, torch
from coalescer_fast.runtime.native.packed_file import PackedFile
logging.basicConfig(stream=sys.stdout)
number = int(sys.argv[2])
for _ in range(60):
    file = PackedFile(sys.argv[1])
    for key in range(6):
        if (found := file.get(str(key), key)) is not None:
            assert found.dtype == torch.float32 and torch.equal(found, torch.full((9000 + key,), float(key))), key
    file.put(str(number), number, torch.full((9000 + number,), float(number)))
    file.flush()
"""


def test_processes_that_write_at_once(tmp_path):
    path = tmp_path / "a"
    processes = [python(WRITER, path, number) for number in range(3)]
    assert [output(process) for process in processes] == ["", "", ""]
    assert [each.name for each in tmp_path.iterdir()] == ["a"]
    file = PackedFile(path)
    found = [key for key in range(6) if file.get(str(key), key) is not None]
    assert found
    assert set(found) <= {0, 1, 2}


RESIDENT = """
import sys, torch
from coalescer_fast.runtime.native.packed_file import PackedFile
def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) >> 10 for line in status if line.startswith(sys.argv[2]))
PackedFile("none")
before = resident()
file = PackedFile(sys.argv[1])
opened = resident()
found = file.get("large", 1)
print(opened - before, resident() - before, found.numel())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_opening_a_file_takes_no_memory(tmp_path):
    """And its tensors take none of the process's own."""
    path = saved(tmp_path / "a", {"large": torch.ones(64 << 20, dtype=torch.uint8)})
    opened, read, size = map(int, output(python(RESIDENT, path, "VmRSS")).split())
    assert size == 64 << 20
    assert opened < 8
    assert read >= 56  # the pages of the file that were hashed, which the system can take back
    _, own, _ = map(int, output(python(RESIDENT, path, "RssAnon")).split())
    assert own < 8


SAVING = """
import resource, sys, torch
from coalescer_fast.runtime.native.packed_file import PackedFile
file = PackedFile(sys.argv[1])
for key in range(8):
    file.put(str(key), key, torch.full((16 << 20,), key, dtype=torch.uint8))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
file.flush()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_saving_takes_no_second_copy(tmp_path):
    assert int(output(python(SAVING, tmp_path / "a"))) < 16
    assert os.path.getsize(tmp_path / "a") > 128 << 20


def test_packed_weights_come_back(tmp_path):
    """As the runtime uses it."""
    weight = torch.randn(70, 30, 3, 3, generator=torch.Generator().manual_seed(0))
    source, packed = content_hash(weight), kernel_order(weight, torch.bfloat16)
    saved(tmp_path / "a", {"w": packed})
    file = PackedFile(tmp_path / "a")
    file.put("w", source, packed)
    file.flush()
    assert_equal(PackedFile(tmp_path / "a").get("w", source), packed)
    weight[3, 4, 1, 1] += 1
    assert PackedFile(tmp_path / "a").get("w", content_hash(weight)) is None


@pytest.mark.parametrize("size", [0, 1, 7, 8, 31, 32, 33, 1 << 20, (1 << 20) + 1, (5 << 20) + 77])
def test_the_hash_does_not_depend_on_threads(size):
    data = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
    before, hashes = torch.get_num_threads(), set()
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        hashes.add(content_hash(data))
    torch.set_num_threads(before)
    assert len(hashes) == 1
    assert 0 <= hashes.pop() < 1 << 64


def test_the_hash_is_of_every_byte():
    data = torch.randint(0, 256, (2085,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    seen = {content_hash(data)}
    for place in range(len(data)):
        for bit in (1, 128):
            data[place] ^= bit
            seen.add(content_hash(data))
            data[place] ^= bit
    seen.update(content_hash(data[:size]) for size in range(len(data)))
    zeros = torch.zeros(2085, dtype=torch.uint8)
    seen.update(content_hash(zeros[:size]) for size in range(1, len(data)))
    assert len(seen) == 1 + 2 * 2085 + 2085 + 2084


def test_the_hash_is_that_of_the_elements():
    x = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    same = [x, x.clone(), torch.cat([x, x])[6:], torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)]
    assert len({content_hash(each) for each in same}) == 1
    wide = torch.zeros(6, 5, 3, 4)
    wide[..., :3] = x
    assert content_hash(wide[..., :3]) == content_hash(x)
    assert content_hash(x[:, :, ::2]) == content_hash(x[:, :, ::2].clone())
    assert content_hash(x[:1].expand(4, 5, 3, 3)) == content_hash(x[:1].repeat(4, 1, 1, 1))


def test_the_hash_of_a_layout():
    """Equal bytes that are other elements have another hash."""
    memory = torch.arange(24.0)
    views = [
        memory.view(2, 3, 4),
        memory.view(3, 2, 4).permute(1, 0, 2),
        memory.view(4, 3, 2).permute(2, 1, 0),
        memory.view(2, 4, 3).permute(0, 2, 1),
        memory.view(4, 2, 3).permute(1, 2, 0),
        memory.view(4, 6).t(),
        memory.view(6, 4).t(),
    ]
    assert len({content_hash(view) for view in views}) == len(views)
    x = torch.randn(6, 5, 3, 3)
    innermost = x.contiguous(memory_format=torch.channels_last)
    assert content_hash(innermost) == content_hash(innermost.clone(memory_format=torch.preserve_format))
