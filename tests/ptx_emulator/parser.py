"""PTX text to a list of instructions: as much of the language as LLVM and Triton write."""

from __future__ import annotations

import re
from typing import NamedTuple

from .errors import UnknownInstructionError

_ENTRY = re.compile(r"\.visible \.entry (\w+)\(\n(.*?)\)\s*\n(.*?)^\{\n(.*?)^\}", re.DOTALL | re.MULTILINE)
_PARAMETER = re.compile(r"\.param \.(\w+)\b.*?(\w+)$")
_STATEMENT = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.DOTALL)


class Instruction(NamedTuple):
    """`@!guard name operands`. name: with all its modifiers, split at the dots."""

    name: tuple[str, ...]
    operands: tuple[str, ...]
    guard: str | None
    negated: bool
    text: str


class Program(NamedTuple):
    """parameters: type and name, in order. labels: where in `code` each leads. threads: of a CTA."""

    name: str
    parameters: tuple[tuple[str, str], ...]
    threads: int
    code: tuple[Instruction, ...]
    labels: dict[str, int]


def parse(ptx: str) -> Program:
    entry = _ENTRY.search(ptx)
    if entry is None:
        raise UnknownInstructionError("no kernel in this PTX")
    name, parameters, directives, body = entry.groups()
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in re.sub(r"//.*", "", body).splitlines():
        if label := re.fullmatch(r"\s*(\$\w+):\s*", line):
            labels[label[1]] = len(code)
            continue
        for statement in line.split(";"):
            text = " ".join(statement.split())
            if text and text not in "{}" and not text.startswith("."):
                code.append(_instruction(text))
    threads = re.search(r"\.(?:reqntid|maxntid) (\d+)", directives)
    if threads is None:
        raise UnknownInstructionError(f"{name} does not say how many threads it has")
    return Program(name, _parameters(parameters), int(threads[1]), tuple(code), labels)


def _parameters(text: str) -> tuple[tuple[str, str], ...]:
    found = (_PARAMETER.search(part.strip()) for part in text.split(","))
    return tuple((match[1], match[2]) for match in found if match)


def _instruction(text: str) -> Instruction:
    match = _STATEMENT.match(text)
    if match is None:
        raise UnknownInstructionError(text)
    negated, guard, name, operands = match.groups()
    return Instruction(tuple(name.split(".")), _operands(operands), guard, negated == "!", text)


def _operands(text: str) -> tuple[str, ...]:
    """Split at commas outside of brackets."""
    return tuple(part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text) if part.strip())
