"""Code and tests as they stand in prose: fenced blocks, bare lines, assertions, `>>>` examples.

Only text is taken apart here, nothing is parsed as Python: that is done inside the sandbox.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

_NEW_LINE = re.compile(r"\r\n|\r|\n")  # what Python's tokenizer takes for one, unlike str.splitlines
_FENCE = re.compile(r"([ \t]*)(`{3,}|~{3,})[ \t]*([^`\s]*)[^`]*")
_PYTHON = {"python", "py", "python3", "py3"}
# how a line of Python starts, as prose hardly does; and how others do
_STATEMENT = re.compile(
    r"(?:async\s+)?(?:def|class)\s+\w+\s*[(:\[]|import\s+\w+\s*(?:[,#]|as\b|$)|from\s+[\w.]+\s+import\b|@\w|print\("
    r"|assert\b"
)
_OTHER_STATEMENT = re.compile(
    r"(?:for|while|if|with|try)\b.*:\s*(?:#|$)|return\b|[\w.]+\(|[\w.\[\]'\", ]+[-+*/%&|^]?=(?!=)"
)
_PROSE = re.compile(
    r"[A-Za-z][\w'\u2019-]*[,:;]?\s+(?!(?:in|is|and|or|not|if|else|for|as|import)\b)[A-Za-z(`*\"]"  # two words
    r"|[A-Z][a-z]*[.:!?]\s*$|[*>|]\s|-\s|\d+[.)]\s|#{1,6}\s*Step\b|\*\*|`"
)
_KEYWORD = re.compile(
    r"(?:async|def|class|import|from|for|while|if|elif|else|with|try|except|finally|return|assert|raise|del|global|nonlocal"
    r"|pass|break|continue|lambda|not|await|yield|match|case)\b"
)
_ASSERTION = re.compile(r"\s*assert\b")
_STEP_HEADER = re.compile(r"[*#\s]*Step\s+\d+\b[*:.)\s]*", flags=re.IGNORECASE)
_END_OF_EXAMPLE = re.compile(r"\s*(?:$|>>>|'''|\"\"\"|```)")
_LONGEST_EXAMPLE = 2000  # characters of a `>>>` example's expected value that are tried as a literal


class Line(NamedTuple):
    """A line of the program and the step it stands in."""

    step: int
    text: str


class _Block(NamedTuple):
    language: str
    lines: list[Line]


def code_lines(steps: Sequence[str]) -> list[Line]:
    """The program of a response: its Python blocks (one may run over several steps), else its bare lines of code."""
    blocks, prose = _blocks(Line(k, text) for k, step in enumerate(steps) for text in _NEW_LINE.split(step))
    if not blocks:
        return _bare(prose)
    return [line for block in blocks if _is_python(block) for line in block.lines]


def _blocks(lines: Iterable[Line]) -> tuple[list[_Block], list[Line]]:
    """Fenced blocks and what stands outside them. One that is never closed ends with the text or the next opening."""
    blocks: list[_Block] = []
    outside: list[Line] = []
    fence, indent = "", 0
    for line in lines:
        mark = _FENCE.fullmatch(line.text)
        if mark and fence and mark[2].startswith(fence) and not mark[3]:
            fence = ""
        elif mark and (not fence or mark[3]):
            fence, indent = mark[2], len(mark[1])
            blocks.append(_Block(mark[3].lower(), []))
        elif fence:
            margin = len(line.text) - len(line.text.lstrip(" \t"))
            blocks[-1].lines.append(Line(line.step, line.text[min(indent, margin) :]))
        else:
            outside.append(line)
    return blocks, outside


def _is_python(block: _Block) -> bool:
    """By its language or, where none is named, by its look. A session with `>>>` shows a program, it is none."""
    texts = [line.text for line in block.lines if line.text.strip()]
    if not texts or texts[0].lstrip().startswith(">>>"):
        return False
    return block.language in _PYTHON or (not block.language and any(_is_code(text) for text in texts))


def _is_code(text: str) -> bool:
    return bool(_STATEMENT.match(text.lstrip()) or _OTHER_STATEMENT.match(text.lstrip()))


def _is_prose(text: str) -> bool:
    return bool(_PROSE.match(text)) and not _KEYWORD.match(text)


def _bare(lines: list[Line]) -> list[Line]:
    """Lines outside blocks without those that are prose; nothing where none is surely code."""
    kept = []
    for step, text in lines:
        header = _STEP_HEADER.match(text)
        body = text[header.end() :] if header else text
        if not _is_prose(body):
            kept.append(Line(step, body))
    return kept if any(_STATEMENT.match(line.text.lstrip()) for line in kept) else []


# ---- tests -------------------------------------------------------------------------------------------------


def stated_tests(text: str) -> list[str]:
    """The tests of a problem, as Python: blocks with assertions, lines that start with `assert`, `>>>` examples."""
    blocks, outside = _blocks(Line(0, line) for line in _NEW_LINE.split(text))
    tests = []
    for block in blocks:
        texts = [line.text for line in block.lines]
        if any(_ASSERTION.match(line) for line in texts) and not any(">>>" in line for line in texts):
            tests.append("\n".join(texts))
    for paragraph in re.split(r"\n\s*\n", "\n".join(line.text for line in outside)):
        tests += _assertions(paragraph.split("\n"))
    return tests + list(_examples(_NEW_LINE.split(text)))


def _assertions(paragraph: list[str]) -> list[str]:
    """All of a paragraph of code with assertions; of one with prose, each assertion until its brackets are closed."""
    if not any(_ASSERTION.match(line) for line in paragraph):
        return []
    if not any(_is_prose(line) for line in paragraph):
        return ["\n".join(paragraph)]
    tests = []
    rest = iter(paragraph)
    for line in rest:
        if _ASSERTION.match(line):
            parts = [line.strip()]
            while _open_brackets("\n".join(parts)) and (more := next(rest, None)) is not None:
                parts.append(more)
            tests.append("\n".join(parts))
    return tests


def _open_brackets(text: str) -> bool:
    text = re.sub(r"'[^'\n]*'|\"[^\"\n]*\"", "", text)
    return sum(text.count(c) for c in "([{") > sum(text.count(c) for c in ")]}")


def _examples(lines: list[str]) -> Iterator[str]:
    """`>>>` examples: what the expression gives or prints is what the next lines say."""
    number = 0
    while number < len(lines):
        match = re.match(r"\s*>>> ?(.*)", lines[number])
        number += 1
        if not match:
            continue
        source = [match[1]]
        while number < len(lines) and (more := re.match(r"\s*\.\.\.(?: (.*)|$)", lines[number])):
            source.append(more[1] or "")
            number += 1
        expected = []
        while number < len(lines) and not _END_OF_EXAMPLE.match(lines[number]):
            expected.append(lines[number].strip())
            number += 1
        yield _as_test("\n".join(source), "\n".join(expected))


def _as_test(source: str, expected: str) -> str:
    """An example as Python that fails where the example does not hold. Literals are compared as values."""
    if not expected:
        return source
    if expected.startswith("Traceback"):
        error = re.match(r"[\w.]*", expected.splitlines()[-1])
        name = error[0].split(".")[-1] if error else ""
        return (
            f"try:\n    (\n{source}\n)\nexcept Exception as error_:\n    assert type(error_).__name__ == {name!r}\n"
            "else:\n    assert False, 'no exception'"
        )
    try:
        ast.literal_eval(expected[:_LONGEST_EXAMPLE])
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return (
            "import contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()) as out_:\n"
            f"    value_ = (\n{source}\n)\n"
            f"assert (out_.getvalue() + ('' if value_ is None else repr(value_))).split() == {expected.split()!r}"
        )
    return f"assert (\n{source}\n) == (\n{expected}\n)"
