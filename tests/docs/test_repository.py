"""What the documentation names exists: files, modules, commands; and the tools' versions agree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from coalescer_fast import cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def missing(text: str) -> set[str]:
    """Of what a page names in code, what is not there."""
    modules = re.findall(r"python -m ((?:benchmarks|tests|coalescer_fast)[\w.]*)", text)
    files = [module.replace(".", "/") for module in modules]
    absent = {name for name in files if not any((ROOT / (name + end)).exists() for end in (".py", "/__main__.py"))}
    paths = re.findall(r"`((?:csrc|tests|examples|benchmarks|docs|coalescer_fast|export)/[\w./-]+)`", text)
    absent |= {path for path in paths if not re.search("[A-Z]{4}", path) and not (ROOT / path).exists()}  # but NAME.h
    commands = set(re.findall(r"\bcoalescer-fast ([a-z][a-z-]+)\b", text))
    return absent | {f"coalescer-fast {name}" for name in commands - set(COMMANDS)}


def _commands() -> list[str]:
    [subparsers] = (action for action in cli.parser()._actions if isinstance(action.choices, dict))
    return list(subparsers.choices)


COMMANDS = _commands()


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_what_a_page_names_exists(page):
    assert missing(page.read_text("utf-8")) == set()


def test_what_is_missing_is_found():
    assert missing("`csrc/nothing.h`, `python -m benchmarks.nothing`, `coalescer-fast fly`") == {
        "csrc/nothing.h",
        "benchmarks/nothing",
        "coalescer-fast fly",
    }


def test_every_command_is_documented():
    page = (ROOT / "docs" / "reference" / "cli.md").read_text("utf-8")
    assert set(COMMANDS) == set(re.findall(r"^\| `coalescer-fast ([\w-]+)", page, re.MULTILINE))


def test_pages_link_to_files_that_exist():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):  # those in docs/ are mkdocs's to check
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text("utf-8")):
            assert (ROOT / link).exists(), f"{page.name}: {link}"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150


def test_the_readme_installs_the_torch_that_is_tested():
    [version] = re.findall(r"pip install torch==(\S+)", (ROOT / "README.md").read_text("utf-8"))
    assert f"torch=={version}" in (ROOT / "constraints.txt").read_text("utf-8").splitlines()


def test_versions_of_pre_commit_are_those_that_are_tested():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if "==" in line)
    hooks = (ROOT / ".pre-commit-config.yaml").read_text("utf-8")
    for repository, package in (("ruff-pre-commit", "ruff"), ("mirrors-clang-format", "clang-format")):
        assert re.search(rf"{repository}\n    rev: v(\S+)", hooks)[1] == pins[package]
