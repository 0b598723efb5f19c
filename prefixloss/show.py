"""Annotated responses for a reader: the good prefix, what was trimmed from it, the first wrong step and why.

In the terminal with rich, or as one HTML page that needs nothing else.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

from prefixloss.detect.records import FormatError, json_lines
from prefixloss.io.visible import visible

Part = Literal["good", "trimmed", "wrong", "after", "unknown"]

_LABELS: dict[Part, str] = {
    "good": "good prefix",
    "trimmed": "trimmed from it",
    "wrong": "first wrong step",
    "after": "what follows",
    "unknown": "nothing could be said",
}
_WORD = re.compile(r"\s*\S+\s*|\s+")


class Piece(NamedTuple):
    """A token, or a word where there are no tokens. step: the step it starts in, from 0."""

    text: str
    part: Part
    step: int
    advantage: float | None


@dataclass(frozen=True)
class Shown:
    """One line of the file. first_error: from 0, None for none. prefix_tokens: of the good prefix, after trimming."""

    problem: str
    steps: list[str]
    first_error: int | None
    reason: str = ""
    confidence: float | None = None
    tokens: list[str] | None = None
    advantages: list[float] | None = None
    prefix_tokens: int | None = None

    @classmethod
    def of(cls, line: dict[str, Any]) -> Shown:
        """Keys: problem and steps; perhaps first_error, reason, confidence, tokens (texts that join to the response),
        advantages (a number a token) and prefix_tokens. FormatError names the key."""
        values = {key: _checked(line, key) for key in _KEYS}
        shown = cls(**{key: value for key, value in values.items() if value is not None or key == "first_error"})
        if shown.first_error is not None and not 0 <= shown.first_error < len(shown.steps):
            raise FormatError(f"first_error is {shown.first_error}, of {len(shown.steps)} steps")
        if shown.tokens is None and (shown.advantages is not None or shown.prefix_tokens is not None):
            raise FormatError("advantages and prefix_tokens need the key 'tokens'")
        if shown.tokens is not None:
            if "".join(shown.tokens) != "".join(shown.steps):
                raise FormatError("the tokens do not join to the steps' text")
            if shown.advantages is not None and len(shown.advantages) != len(shown.tokens):
                raise FormatError(f"{len(shown.advantages)} advantages for {len(shown.tokens)} tokens")
            if shown.prefix_tokens is not None and not 0 <= shown.prefix_tokens <= len(shown.tokens):
                raise FormatError(f"prefix_tokens is {shown.prefix_tokens}, of {len(shown.tokens)} tokens")
        return shown

    @property
    def verdict(self) -> str:
        if self.first_error is None:
            return "nothing could be said" if self.confidence == 0 else "no error found"
        return f"step {self.first_error + 1} is the first wrong one"

    def pieces(self) -> Iterator[Piece]:
        """They join to the response. A token that straddles two steps belongs to the later one."""
        texts = self.tokens if self.tokens is not None else [w for step in self.steps for w in _WORD.findall(step)]
        ends = list(accumulate(len(text) for text in texts))
        bounds = list(accumulate(len(step) for step in self.steps))
        step = 0
        for number, (text, end) in enumerate(zip(texts, ends, strict=True)):
            while step < len(bounds) - 1 and end > bounds[step]:
                step += 1
            advantage = self.advantages[number] if self.advantages is not None else None
            yield Piece(text, self._part(number, step), step, advantage)

    def _part(self, number: int, step: int) -> Part:
        if self.first_error is None:
            return "unknown" if self.confidence == 0 else "good"
        if step >= self.first_error:
            return "wrong" if step == self.first_error else "after"
        return "trimmed" if self.prefix_tokens is not None and number >= self.prefix_tokens else "good"


_KEYS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "problem": (str, "a text"),
    "steps": (list, "a list of texts"),
    "first_error": (int, "a whole number or null"),
    "reason": (str, "a text"),
    "confidence": ((int, float), "a number"),
    "tokens": (list, "a list of texts"),
    "advantages": (list, "a list of numbers"),
    "prefix_tokens": (int, "a whole number"),
}


_MEMBERS: dict[str, type | tuple[type, ...]] = {"a list of texts": str, "a list of numbers": (int, float)}


def _is(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    """Of a number: it can be shown. 10**400 is a number in JSON, and none that can be."""
    try:
        return not isinstance(value, (int, float)) or math.isfinite(value)
    except OverflowError:
        return False


def _checked(line: dict[str, Any], key: str) -> Any:
    kind, wants = _KEYS[key]
    value = line.get(key)
    if value is None and key not in ("problem", "steps"):
        return None
    members = _MEMBERS.get(wants)
    right = _is(value, kind) and (members is None or all(_is(member, members) for member in value or ()))
    if not right or not all(map(_is_finite, value if isinstance(value, list) else [value])):
        raise FormatError(f"the key {key!r} has to be {wants}")
    return value


def read_shown(path: Path) -> list[Shown]:
    """FormatError names the file, the line and the key."""
    records = []
    for number, line in json_lines(path):
        try:
            records.append(Shown.of(line))
        except FormatError as error:
            raise FormatError(f"{path}, line {number}: {error}") from None
    if not records:
        raise FormatError(f"{path}: no lines")
    return records


def _hover(piece: Piece) -> str:
    step = f"step {piece.step + 1}"
    return step if piece.advantage is None else f"{step}, advantage {piece.advantage:+.4g}"


# ---- terminal

_STYLES: dict[Part, str] = {
    "good": "green",
    "trimmed": "bright_black",
    "wrong": "bold red",
    "after": "dim red",
    "unknown": "default",
}


def to_terminal(records: Sequence[Shown], console: Any) -> None:
    """console: rich's. With advantages, each step is followed by the range of its tokens' ones."""
    from rich.text import Text  # noqa: PLC0415 (an extra)

    console.print(Text("  ").join(Text(label, _STYLES[part]) for part, label in _LABELS.items()))
    for number, record in enumerate(records, 1):
        console.print()
        console.print(Text(f"{number}. {record.verdict}", "bold"))
        console.print(Text(visible(record.problem).strip(), "italic"))
        text = Text()
        for step, of_step in groupby(record.pieces(), key=lambda piece: piece.step):
            pieces = list(of_step)
            for piece in pieces:
                text.append(visible(piece.text), _STYLES[piece.part])
            values = [piece.advantage for piece in pieces if piece.advantage is not None]
            if values:
                text.rstrip()
                low, high = f"{min(values):+.3g}", f"{max(values):+.3g}"
                text.append(f"  [{low}]" if low == high else f"  [{low} to {high}]", "cyan")
                text.append("\n" if step < len(record.steps) - 1 else "")
        console.print(text)
        if record.first_error is not None and record.reason:
            console.print(Text(visible(f"why: {record.reason}"), "red"))


# ---- one page

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b1f24; --soft: #59636e; --line: #d1d9e0;
  --good: #116329; --good-bg: #dafbe1; --trimmed: #59636e; --trimmed-bg: #eaeef2; --wrong: #82071e; --wrong-bg: #ffcecb;
  --after: #a40e26; --after-bg: #fff0ef; }
@media (prefers-color-scheme: dark) { :root { --page: #0d1117; --ink: #e6edf3; --soft: #9198a1; --line: #3d444d;
  --good: #7ee787; --good-bg: #12261e; --trimmed: #9198a1; --trimmed-bg: #262c36; --wrong: #ffb1af; --wrong-bg: #67060c;
  --after: #ff9492; --after-bg: #25171c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem 1rem 4rem; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 .6rem; }
.legend, .why, summary .verdict { color: var(--soft); }
.legend span { margin-right: .8rem; }
details { border: 1px solid var(--line); border-radius: .5rem; margin: 1rem 0; padding: 0 1rem; }
summary { cursor: pointer; padding: .7rem 0; font-weight: 600; }
summary .verdict { font-weight: 400; }
.problem { white-space: pre-wrap; overflow-wrap: anywhere; border-left: 3px solid var(--line); margin: 0 0 .8rem;
  padding-left: .8rem; color: var(--soft); }
.response { white-space: pre-wrap; overflow-wrap: anywhere; font: 14px/1.7 ui-monospace, monospace; margin: 0 0 .8rem; }
.response span:hover { outline: 1px solid currentColor; }
.good { color: var(--good); background: var(--good-bg); }
.trimmed { color: var(--trimmed); background: var(--trimmed-bg); }
.wrong { color: var(--wrong); background: var(--wrong-bg); }
.after { color: var(--after); background: var(--after-bg); }
.legend span { padding: .1rem .4rem; border-radius: .25rem; }
.why { margin: 0 0 1rem; }
.why b { padding: .1rem .4rem; border-radius: .25rem; }
"""


def to_html(records: Sequence[Shown], title: str) -> str:
    """A page of its own: no script, nothing fetched. A token's step and advantage show while the pointer is on it."""
    legend = "".join(f'<span class="{part}">{label}</span>' for part, label in _LABELS.items())
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<style>{_STYLE}</style></head>\n<body><h1>{_escape(title)}</h1>\n<p class="legend">{legend}</p>\n'
        + "".join(_details(number, record) for number, record in enumerate(records, 1))
        + "</body></html>\n"
    )


def _escape(text: str) -> str:
    return html.escape(visible(text))


def _details(number: int, record: Shown) -> str:
    body = "".join(
        f'<span class="{piece.part}" title="{_escape(_hover(piece))}">{_escape(piece.text)}</span>'
        for piece in record.pieces()
    )
    sure = "" if record.confidence is None else f", confidence {record.confidence:.2g}"
    badge = "good" if record.first_error is None and record.confidence else "unknown"
    badge = badge if record.first_error is None else "wrong"
    why = f'<p class="why"><b class="{badge}">Why</b> {_escape(record.reason)}{sure}</p>\n' if record.reason else ""
    return (
        f'<details open><summary>{number} <span class="verdict">{_escape(record.verdict)}</span></summary>\n'
        f'<div class="problem">{_escape(record.problem.strip())}</div>\n'
        f'<div class="response">{body}</div>\n{why}</details>\n'
    )
