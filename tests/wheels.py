"""Checks of wheels that were built for other machines: `python -m tests.wheels dist/*.whl`.

Each holds a library for the processor of its tag. One for Linux shows the functions of csrc/abi.h and nothing else,
needs no C++ library and no newer C library than manylinux2014 has, which auditwheel confirms. Ends with a sentence and
status 1 at the first wheel of which that is not true. Needs auditwheel.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from elftools.elf.elffile import ELFFile

ROOT = Path(__file__).parents[1]
LIBRARY = "coalescer_fast/lib/libcoalescer_fast_cpu.so"
OLDEST = (2, 17)  # version of the C library that manylinux2014 means
PROCESSORS = {"x86_64": "EM_X86_64", "aarch64": "EM_AARCH64"}
ARM64_MACHO = b"\xcf\xfa\xed\xfe\x0c\x00\x00\x01"  # the magic number of 64 bits, and the processor's number


class WrongWheel(Exception):
    """What is wrong with a wheel, in a sentence."""


def declared() -> set[str]:
    """The functions of the CPU library that csrc/abi.h declares."""
    text = (ROOT / "csrc" / "abi.h").read_text("utf-8")
    table = re.search(r"#define CF_OPS\(OP\)(.*?)\n\n", text, re.DOTALL)[1]
    plain = re.findall(r"^CF_API [^;(]*?\b(cf_(?!cuda)\w+)\(", text, re.MULTILINE)
    return {*plain, *(f"cf_cpu_{op}" for op in re.findall(r"OP\((\w+)\)", table))}


def exported(library: Path) -> set[str]:
    """The symbols that a library for Linux shows to others."""
    with library.open("rb") as file:
        symbols = ELFFile(file).get_section_by_name(".dynsym").iter_symbols()
        return {s.name for s in symbols if s["st_shndx"] != "SHN_UNDEF" and s.name}


def needed(library: Path) -> tuple[set[str], set[tuple[int, ...]]]:
    """The libraries that a library for Linux needs, and the versions of the C library."""
    with library.open("rb") as file:
        elf = ELFFile(file)
        tags = elf.get_section_by_name(".dynamic").iter_tags()
        names = {tag.needed for tag in tags if tag.entry.d_tag == "DT_NEEDED"}
        versions = {
            each.name for _, found in elf.get_section_by_name(".gnu.version_r").iter_versions() for each in found
        }
    return names, {tuple(map(int, name.removeprefix("GLIBC_").split("."))) for name in versions}


def check(wheel: Path) -> str:
    """What it is, in a line.

    Raises:
        WrongWheel: it is not what its name says.
    """
    python, abi, platforms = wheel.stem.split("-")[2:]
    if (python, abi) != ("py3", "none"):
        raise WrongWheel(f"it is for {python}-{abi}, not for any Python 3")
    with zipfile.ZipFile(wheel) as file, tempfile.TemporaryDirectory() as folder:
        metadata = next(name for name in file.namelist() if name.endswith(".dist-info/WHEEL"))
        tags = re.findall(r"^Tag: (.*)$", file.read(metadata).decode(), re.MULTILINE)
        if set(tags) != {f"py3-none-{platform}" for platform in platforms.split(".")}:
            raise WrongWheel(f"its name has other tags than its metadata, {', '.join(tags)}")
        if LIBRARY not in file.namelist():
            raise WrongWheel(f"{LIBRARY} is not in it")
        library = Path(file.extract(LIBRARY, folder))
        if platforms.startswith("macosx"):
            if not library.read_bytes().startswith(ARM64_MACHO):
                raise WrongWheel("its library is not one for arm64")
            return "a library for arm64"
        return check_linux(library, platforms) + ", " + audit(wheel)


def check_linux(library: Path, platforms: str) -> str:
    processor = PROCESSORS[re.search("_(x86_64|aarch64)$", platforms)[1]]
    with library.open("rb") as file:
        if (machine := ELFFile(file)["e_machine"]) != processor:
            raise WrongWheel(f"its library is for {machine}, not {processor}")
    if (shown := exported(library)) != declared():
        raise WrongWheel(f"its library has these symbols, or lacks them: {', '.join(sorted(shown ^ declared()))}")
    names, versions = needed(library)
    if others := {name for name in names if not re.match(r"(libc|libm|libpthread|ld-linux-[\w-]+)\.so", name)}:
        raise WrongWheel(f"its library needs {', '.join(sorted(others))}")
    if (newest := max(versions)) > OLDEST:
        raise WrongWheel(f"its library needs the C library {'.'.join(map(str, newest))}")
    return (
        f"{library.stat().st_size / 1e6:.1f} MB of library, {len(shown)} functions, C library {newest[0]}.{newest[1]}"
    )


def audit(wheel: Path) -> str:
    """What auditwheel says, the tag by the oldest system on which the wheel runs."""
    result = subprocess.run(
        [sys.executable, "-m", "auditwheel", "show", str(wheel)], capture_output=True, text=True, check=False
    )
    said = " ".join(result.stdout.split())
    if not (found := re.search(r'consistent with the following platform tag: "(manylinux_2_(\d+)_\w+)"', said)):
        raise WrongWheel(f"auditwheel says: {said or result.stderr.strip()}")
    if int(found[2]) > OLDEST[1]:
        raise WrongWheel(f"auditwheel grants {found[1]} alone")
    return f"auditwheel: {found[1]}"


def main(wheels: list[str]) -> int:
    for wheel in map(Path, wheels):
        try:
            print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, {check(wheel)}")
        except (WrongWheel, OSError) as error:
            print(f"{wheel.name}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
