"""The promises of docs/promises.md and the tests that hold them.

python -m tests.promises
"""

from __future__ import annotations

import ast
import re
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "promises.md"
TEST = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")


def promises() -> list[tuple[str, list[tuple[str, str]]]]:
    """Each promise and its tests, (file, function): the rows of the page's tables that have two columns."""
    rows = []
    for line in PAGE.read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("|") and len(cells) == 2 and not set(cells[0]) <= {"-", " ", "|"} and cells[0] != "Promise":
            rows.append((cells[0], TEST.findall(cells[1])))
    return rows


@cache
def functions(file: str) -> frozenset[str]:
    path = ROOT / file
    if not path.is_file():
        return frozenset()
    return frozenset(
        node.name for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.FunctionDef)
    )


def broken() -> list[str]:
    """What is wrong with the page, a sentence each: a promise without a test, or a test that does not exist."""
    said = []
    for promise, tests in promises():
        said += [] if tests else [f"no test is named for: {promise}"]
        said += [f"{file} has no {name}, named for: {promise}" for file, name in tests if name not in functions(file)]
    return said


if __name__ == "__main__":
    found, wrong = promises(), broken()
    print("\n".join([*wrong, f"{len(found)} promises, held by {len({t for _, tests in found for t in tests})} tests"]))
    sys.exit(bool(wrong))
