"""The pages: every block of Python and every command in them runs, and every name in the reference explains itself."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if "results" not in page.parts)
BLOCK = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
RESPONSES = [
    {"problem": "What is 2 * 3 + 4?", "response": "Step 1: 2 * 3 = 6\nStep 2: 6 + 4 = 11", "answer": "10"},
    {"problem": "What is 2 * 3 + 4?", "response": "Step 1: 2 * 3 = 6\nStep 2: 6 + 4 = 10", "answer": "10"},
]


def blocks(page: Path, language: str) -> list[str]:
    return [text for name, text in BLOCK.findall(page.read_text()) if name == language]


def name(page: Path) -> str:
    return str(page.relative_to(DOCS))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name)
def test_the_python_of_a_page_runs(page: Path) -> None:
    """One after the other, as a reader would type them."""
    namespace: dict[str, Any] = {}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.skipif(sys.platform != "linux", reason="the shell of the pages is Linux's")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "sh")], ids=name)
def test_the_commands_of_a_page_run(page: Path, tmp_path: Path) -> None:
    (tmp_path / "responses.jsonl").write_text("".join(json.dumps(line) + "\n" for line in RESPONSES))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for block in blocks(page, "sh"):
        command = ["bash", "-euc", block]
        done = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_block_says_what_it_is() -> None:
    known = {"python", "sh", "text", "{toctree}", "{eval-rst}", "{include}"}
    assert {language for page in PAGES for language, _ in BLOCK.findall(page.read_text())} <= known


def documented() -> list[Any]:
    """The objects that the reference names, members included."""
    found = []
    for text in blocks(DOCS / "reference.md", "{eval-rst}"):
        parts = text.split("::", 1)[1].split()
        path, members = parts[0], " ".join(parts[2:]).split(", ") if len(parts) > 1 else []
        try:
            thing: Any = import_module(path)
        except ModuleNotFoundError:
            module, _, last = path.rpartition(".")
            thing = getattr(import_module(module), last)
        found += [thing, *(getattr(thing, member) for member in members)]
    return found


def test_every_name_of_the_reference_explains_itself() -> None:
    things = documented()
    assert len(things) > 40
    # a dataclass without a docstring gets its signature for one
    assert [t for t in things if len((t.__doc__ or "").removeprefix(getattr(t, "__name__", "") + "(")) < 30] == []
