"""Write a page in which a browser draws while one types.

A folder for any web server, or with --single-file one HTML file that opens from a disk. Once the page is there, it asks
for nothing beyond its folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from coalescer_fast import files
from coalescer_fast.console import open_pipeline

from . import stage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default="emoji-64", help="an embedded model, a folder or a Hub id (default: %(default)s)"
    )
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="folder of the site")
    parser.add_argument("--single-file", action="store_true", help="write DIR/index.html alone, with all in it")
    parser.add_argument(
        "--precision",
        choices=["half", "int8"],
        default="half",
        help="half: weights in 16 bits, the pictures of Python; int8: faster, other pixels (default: %(default)s)",
    )
    parser.add_argument(
        "--runtime",
        type=Path,
        metavar="DIR",
        help="folder with the files of onnxruntime-web (default: fetched once from the npm registry, and checked)",
    )
    parser.add_argument("--force", action="store_true", help="replace a site that is there")


def run(args: argparse.Namespace) -> int:
    check_free(args.out, args.force)
    from tqdm import tqdm

    from ..web.site import site

    with tqdm(disable=args.quiet or None, delay=1.0) as bar:
        found = site(
            open_pipeline(args.model),
            model=args.model,
            precision=args.precision,
            single_file=args.single_file,
            runtime_folder=args.runtime,
            stage=stage(bar, "web"),
        )
    check_free(args.out, args.force)  # again, for this took a while
    with files.writing_folder(args.out) as folder:
        for name, content in found.items():
            files.write_bytes(folder / name, content)
    print(args.out / "index.html")
    return 0


def check_free(folder: Path, force: bool) -> None:
    """Raise ValueError unless a folder does not exist, is empty, or may be replaced and holds a site alone."""
    from ..web.site import NAMES

    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is no folder: name another one")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if names and not force:
        raise ValueError(f"{folder} exists: name another folder, or add --force to replace the site in it")
    if foreign := sorted(names - set(NAMES)):
        raise ValueError(f"{folder} holds {foreign[0]}, which is no file of a site: name another folder")
