"""The plan of the house: which room may use which, from the bottom up, and no two files that need each other.

Read from the source alone: imports inside functions and for type checkers count as all others do.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"prefixloss": ROOT / "prefixloss", "prefixloss._kernels": ROOT / "csrc_triton"}

# a room is a file or a folder with all in it that has no line of its own; each may use what stands beside it
_TABLES = "maths.corrections maths.kl maths.objectives maths.reductions maths.trial"
_TOKENS = f"check config inputs {_TABLES}"
_FORMULAS = f"{_TOKENS} maths maths.derivatives maths.divergence"
_LOSS = f"{_FORMULAS} backends backends.torch backends.triton door loss distill parallel advantages prefixloss"
ROOMS = {
    "_version": "",
    "_kernels": "",
    "check": "",
    "io": "check",
    "maths.derivatives": "",
    "maths.corrections": "",
    "maths.kl": "",
    "maths.reductions": "",
    "maths.objectives": "maths.derivatives",
    "maths.trial": "check maths.derivatives maths.objectives",
    "config": f"check {_TABLES}",
    "steps": "check",
    "maths.divergence": "",
    "inputs": "check config maths.divergence",
    "advantages": "check inputs",
    "parallel": _TOKENS,
    "maths": f"{_TOKENS} maths.derivatives",
    "backends": _FORMULAS,
    "backends.torch": f"{_FORMULAS} backends",
    "backends.triton": f"{_FORMULAS} backends _kernels",
    "door": f"{_FORMULAS} backends backends.torch backends.triton _kernels",
    "loss": f"{_FORMULAS} backends door",
    "distill": f"{_TOKENS} backends backends.torch door",
    "teacher": "check io",
    "prefixloss": "_version advantages config inputs loss distill",
    "detect.base": "check",
    "detect.cost": "check",
    "detect.maths": "check detect.base",
    "detect.puzzles": "check detect.base",
    "detect.code": "check detect.base",
    "detect.models": "check io steps detect.base detect.cost detect.maths",
    "detect": "check io steps detect.base detect.cost detect.maths detect.puzzles detect.code detect.models",
    "show": "check io steps detect",
    "integrations.models": "check",
    "integrations": f"{_LOSS} steps detect detect.base integrations.models",
    "rl": "check io steps show maths.divergence advantages prefixloss teacher detect detect.maths detect.models "
    "integrations.models",
    "cli": "io steps maths.divergence show detect rl _bench",
    "__main__": "cli",
}


def files() -> dict[str, Path]:
    found = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(p for p in parts if p != "__init__")))] = path
    return found


FILES = files()


def imported(path: Path, package: str = "prefixloss") -> set[str]:
    """The package's modules that a file asks for, wherever in it. package: where its relative imports start."""
    asked: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            asked |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= 1, path
            source = ".".join(filter(None, (package if node.level else "", node.module)))
            # a module of a package by name, or what its own file has
            asked |= {name if name in FILES else source for name in (f"{source}.{alias.name}" for alias in node.names)}
    return {name for name in asked if name.split(".")[0] == "prefixloss"}


ARROWS = {
    name: imported(path, name if path.stem == "__init__" else name.rpartition(".")[0]) - {name}
    for name, path in FILES.items()
}


def room_of(module: str) -> str:
    inside = module.removeprefix("prefixloss.")
    while inside not in ROOMS and "." in inside:
        inside = inside.rpartition(".")[0]
    return inside


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """Some modules of which each asks for the next and the last for the first; none if there is no such circle."""
    done: set[str] = set()

    def found(name: str, path: list[str]) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return []
        ways = (found(other, [*path, name]) for other in sorted(arrows.get(name, ())))
        way = next(filter(None, ways), [])
        done.add(name)
        return way

    return next(filter(None, (found(name, []) for name in sorted(arrows))), [])


def test_rooms_use_only_rooms_below_them() -> None:
    order = list(ROOMS)
    for room, uses in ROOMS.items():
        assert all(order.index(other) < order.index(room) for other in uses.split() if other != "_bench"), room
    wrong = [
        f"{name} -> {other}"
        for name, others in ARROWS.items()
        for other in others
        if room_of(other) != room_of(name) and room_of(other) not in ROOMS[room_of(name)].split()
    ]
    assert sorted(wrong) == []


def test_every_file_has_a_room_and_every_room_a_file() -> None:
    assert {room_of(name) for name in FILES} == set(ROOMS)


def test_no_files_need_each_other() -> None:
    assert circle(ARROWS) == []


@pytest.mark.parametrize(
    ("arrows", "expected"),
    [
        ({"a": {"b"}, "b": set()}, []),
        ({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}, []),
        ({"a": {"b"}, "b": {"c"}, "c": {"b"}}, ["b", "c"]),
    ],
)
def test_a_circle_is_found(arrows: dict[str, set[str]], expected: list[str]) -> None:
    assert circle(arrows) == expected


def test_imports_inside_functions_and_for_type_checkers_count(tmp_path: Path) -> None:
    path = tmp_path / "some.py"
    path.write_text(
        "from prefixloss.maths import softmax\nimport torch\nif TYPE_CHECKING:\n    from prefixloss.config import KL\n"
        "def f():\n    import prefixloss.check\n"
    )
    assert imported(path) == {"prefixloss.maths.softmax", "prefixloss.config", "prefixloss.check"}
