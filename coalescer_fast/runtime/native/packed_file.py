"""Packed weights on disk: what one process has packed, the next one maps into its memory.

    file = PackedFile(path)
    packed = file.get(key, source := content_hash(weight))
    if packed is None:
        file.put(key, source, packed := kernel_order(weight, dtype))
    file.flush()

The file has safetensors' format, so that anyone can look into it. Each tensor is an entry of uint8, which begins at a
multiple of `ALIGNMENT` bytes of the file and is filled up to one. What the entries are is in the header's metadata:
for which interface of the kernels and which instruction set they were packed, and for each tensor its dtype, its size,
its hash, and the hash of the weight that it was made of. The metadata begins with a checksum of the header.
"""

from __future__ import annotations

import ctypes
import json
import logging
import mmap
import os
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from ... import files
from ...dtypes import dtype_name
from ...ops import native_library
from ...ops.abi import ABI_VERSION, cf_content_hash_args

ALIGNMENT = 64  # bytes, a cache line
FORMAT = "coalescer_fast packed weights 1"
LONGEST_HEADER = 100_000_000  # bytes, as in safetensors
# How a header begins, its checksum and what follows; the checksum is of a header with `NO_CHECKSUM` in its place.
BEFORE_CHECKSUM, NO_CHECKSUM = b'{"__metadata__":{"checksum":"', b"0" * 16

logger = logging.getLogger(__name__)


def content_hash(tensor: Tensor) -> int:
    """A hash of all that a tensor on the CPU holds, of 64 bits.

    It depends on the bytes of the elements in their order, and not on the number of threads. For a tensor that is not
    contiguous, it depends on the layout, too. Shape and dtype of a contiguous one are not in it.

    It tells changed or damaged data from what they were. It is no cryptographic hash: whoever wants to can make other
    data of the same hash.
    """
    seed = 0
    if not tensor.is_contiguous():
        # All dimensions from the outermost in memory to the innermost: channels_last, for one, is dense in this order.
        order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
        if tensor.permute(order).is_contiguous():
            seed = content_hash(torch.tensor([*order, *tensor.shape], dtype=torch.int64))
        else:
            tensor = tensor.contiguous()
    result = ctypes.c_uint64()
    arguments = cf_content_hash_args.pack(
        data=tensor.data_ptr(),
        bytes=tensor.numel() * tensor.element_size(),
        seed=seed,
        hash=ctypes.addressof(result),
        threads=torch.get_num_threads(),
    )
    native_library.function("cf_cpu_content_hash")(arguments)
    return result.value


class Entry(NamedTuple):
    """A tensor of the file.

    Attributes:
        source: the hash of the weight that it was made of.
        hash: its own.
        dtype: its own.
        begin: its first byte, counted from the file's.
        bytes: without what fills it up.
    """

    source: int
    hash: int
    dtype: torch.dtype
    begin: int
    bytes: int


class PackedFile:
    """Packed weights in a file, which is mapped into memory when it is opened, and read where it is looked at.

    A file that is damaged, or of another version or instruction set, counts as empty; a line in the log says so.
    Nothing can be written to it through the tensors: their memory is private to the process. An open file stays as it
    is in memory whatever is saved at its path meanwhile.

    Attributes:
        path: of the file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._kind = {
            "format": FORMAT,
            "interface": str(ABI_VERSION),
            "vector_width": str(native_library.vector_width()),
            "products": " ".join(map(dtype_name, native_library.products())),
        }
        self._entries: dict[str, Entry] = {}
        # What was got or put, with its source: flat, and of its own dtype.
        self._kept: dict[str, tuple[int, Tensor]] = {}
        self._new = False
        try:
            self._data = _mapped(self.path)
            header, metadata, begin = _header(self._data)
            found = {name: metadata.get(name) for name in self._kind}
            if found == self._kind:
                self._entries = _entries(header, metadata, begin, len(self._data))
            else:
                logger.info("%s is not used: it was made for %s, and this is %s", path, found, self._kind)
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            logger.warning("%s is not used: %s", path, error)

    def get(self, key: str, source: int) -> Tensor | None:
        """The tensor that was put under this key, in one dimension.

        Args:
            key: as it was given to `put`.
            source: `content_hash` of the weight that the tensor has to be made of.

        Returns:
            None if there is none, if it was made of another weight, or if it is damaged.
        """
        if key in self._kept:
            made_of, tensor = self._kept[key]
            return tensor if made_of == source else None
        entry = self._entries.get(key)
        if entry is None or entry.source != source:
            return None
        content = self._data[entry.begin : entry.begin + entry.bytes]
        if content_hash(content) != entry.hash:
            logger.warning("%s is damaged: %s is packed again", self.path, key)
            del self._entries[key]
            return None
        tensor = content.view(entry.dtype)
        self._kept[key] = source, tensor
        return tensor

    def put(self, key: str, source: int, packed: Tensor) -> None:
        """Note a tensor to be written by `flush`. It is kept as it is, and must not change until then.

        Args:
            key: any name but ``__metadata__``.
            source: `content_hash` of the weight that it was made of.
            packed: any dtype; of its shape only the number of elements is kept.

        Raises:
            ValueError: the key is ``__metadata__``.
        """
        if key == "__metadata__":
            raise ValueError("key is '__metadata__', which safetensors has a meaning for; expected another name")
        self._kept[key] = source, packed.detach().reshape(-1)
        self._new = True

    def flush(self) -> None:
        """Write the file, if something was put since it was written last.

        It will hold what was got or put since it was opened; what nobody has asked for is dropped. Until it is whole,
        the old file stays in its place. If it cannot be written, a line in the log says so.
        """
        if not self._new:
            return
        self._new = False
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with files.writing(self.path) as file:
                self._write(file)
        except OSError as error:
            logger.warning("packed weights are not kept on disk: %s", error)

    def _write(self, file: IO[bytes]) -> None:
        header, described, end = {}, {}, 0
        contents = {key: self._kept[key][1].view(torch.uint8) for key in sorted(self._kept)}
        for key, content in contents.items():
            source, tensor = self._kept[key]
            described[key] = {
                "source": f"{source:016x}",
                "hash": f"{content_hash(content):016x}",
                "dtype": dtype_name(tensor.dtype),
                "bytes": len(content),
            }
            begin, end = end, end + _filled(len(content))
            header[key] = {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
        metadata = {"checksum": NO_CHECKSUM.decode(), **self._kind, "tensors": json.dumps(described)}
        text = json.dumps({"__metadata__": metadata, **header}, separators=(",", ":")).encode()
        text = text.ljust(_filled(8 + len(text)) - 8)
        at = len(BEFORE_CHECKSUM)
        file.write(len(text).to_bytes(8, "little"))
        file.write(text[:at] + _checksum(text) + text[at + len(NO_CHECKSUM) :])
        for content in contents.values():
            file.write(content.numpy().data)
            file.write(bytes(_filled(len(content)) - len(content)))


def _filled(size: int) -> int:
    """The next multiple of `ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def _checksum(header: bytes) -> bytes:
    return f"{content_hash(torch.frombuffer(bytearray(header), dtype=torch.uint8)):016x}".encode()


def _mapped(path: Path) -> Tensor:
    """The bytes of a file, in memory that is private to the process. Raises OSError, or ValueError if it is empty."""
    if path.exists() and not path.is_file():
        raise ValueError("it is no file")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise ValueError("it is damaged: it is empty")
        return torch.frombuffer(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY), dtype=torch.uint8)


def _header(data: Tensor) -> tuple[dict[str, Any], dict[str, Any], int]:
    """The header of a file, its metadata, and where the header ends. Raises ValueError if it is damaged."""
    length = int.from_bytes(data[:8].numpy().tobytes(), "little")
    end = 8 + length
    if length > LONGEST_HEADER or end > len(data):
        raise ValueError("it is damaged: its header is cut off")
    text = data[8:end].numpy().tobytes()
    at = len(BEFORE_CHECKSUM)
    checksum, rest = text[at : at + len(NO_CHECKSUM)], text[at + len(NO_CHECKSUM) :]
    if not text.startswith(BEFORE_CHECKSUM) or checksum != _checksum(BEFORE_CHECKSUM + NO_CHECKSUM + rest):
        raise ValueError("it is damaged: its header has another checksum")
    try:
        header = json.loads(text)
        metadata = dict(header.pop("__metadata__"))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"its header is none of ours: {error}") from error
    return header, metadata, end


def _entries(header: dict[str, Any], metadata: dict[str, Any], begin: int, size: int) -> dict[str, Entry]:
    """What a file of this size holds behind its header. Raises ValueError if it is not what the header says."""
    found, end = {}, begin
    try:
        for key, described in json.loads(metadata["tensors"]).items():
            bytes, dtype = described["bytes"], vars(torch)[described["dtype"]]
            if not isinstance(dtype, torch.dtype) or not isinstance(bytes, int) or bytes < 0 or bytes % dtype.itemsize:
                raise ValueError(f"{key} has {bytes} bytes of {dtype}")
            source, own = int(described["source"], 16), int(described["hash"], 16)
            found[key] = Entry(source, own, dtype, end, bytes)
            end += _filled(bytes)
            if header[key]["data_offsets"] != [found[key].begin - begin, end - begin]:
                raise ValueError(f"{key} is elsewhere")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"its header is none of ours: {error!r}") from error
    if end != size:
        raise ValueError(f"it is damaged: it has {size} bytes; expected {end}")
    return found
