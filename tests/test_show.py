"""`prefixloss show`: every character once, in the colour of its part, with its advantage; nothing of it is markup."""

import io
import json
import os
import re
import subprocess
import sys
import unicodedata
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table
from typer.testing import CliRunner

from prefixloss import cli
from prefixloss.detect.records import FormatError
from prefixloss.io.visible import print_table, visible
from prefixloss.show import Shown, read_shown, to_html, to_terminal

STEPS = ["Step 1: 1 + 1 = 2\n", "Step 2: 2 + 2 = 5\n", "Step 3: so 5"]
TOKENS = ["Step 1", ": 1 + 1", " = 2\nSt", "ep 2: 2 + 2 = 5\n", "Step 3: so 5"]
FULL = {
    "problem": "What is 1 + 1 + 2?",
    "steps": STEPS,
    "first_error": 1,
    "reason": "4 = 5 is false",
    "confidence": 0.95,
    "tokens": TOKENS,
    "advantages": [0.25, 0, -0.75, -0.75, -0.75],
    "prefix_tokens": 1,
}


class Page(HTMLParser):
    """text: of each element, by class, and everything that is shown; hovers: (text, title) of the response's spans."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.parts: list[tuple[str, str]] = []
        self.hovers: list[tuple[str, str]] = []
        self.open: list[tuple[str, dict[str, Any]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag != "meta":
            self.open.append((tag, dict(attrs)))
        if "title" in dict(attrs):
            self.parts.append((dict(attrs)["class"] or "", ""))
            self.hovers.append(("", dict(attrs)["title"] or ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if self.open and "title" in self.open[-1][1]:
            self.parts[-1] = (self.parts[-1][0], self.parts[-1][1] + data)
            self.hovers[-1] = (self.hovers[-1][0] + data, self.hovers[-1][1])


def shown(**changes: Any) -> Shown:
    return Shown.of({key: value for key, value in {**FULL, **changes}.items() if value is not None})


def terminal(*records: Shown) -> str:
    console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system="standard")
    to_terminal(records, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_each_token_has_the_part_of_the_step_it_ends_in_and_its_advantage() -> None:
    page = Page(to_html([shown()], "title"))
    assert page.parts == list(zip(["good", "trimmed", "wrong", "wrong", "after"], TOKENS, strict=True))
    assert [hover for _, hover in page.hovers] == [
        "step 1, advantage +0.25",
        "step 1, advantage +0",
        "step 2, advantage -0.75",
        "step 2, advantage -0.75",
        "step 3, advantage -0.75",
    ]


def test_without_tokens_words_are_shown_and_without_an_error_all_is_good() -> None:
    plain = {"tokens": None, "advantages": None, "prefix_tokens": None}
    parts = Page(to_html([shown(**plain)], "title")).parts
    assert "".join(text for _, text in parts) == "".join(STEPS)
    assert {text.strip() for part, text in parts if part == "wrong"} == {"Step", "2:", "2", "+", "=", "5"}
    assert {part for part, _ in Page(to_html([shown(first_error=None, **plain)], "t")).parts} == {"good"}
    unread = shown(first_error=None, confidence=0.0, **plain)
    assert {part for part, _ in Page(to_html([unread], "t")).parts} == {"unknown"}
    assert unread.verdict == "nothing could be said"


@given(
    steps=st.lists(st.text(max_size=20), max_size=6),
    first=st.integers(0, 5),
    cuts=st.lists(st.integers(0, 120), max_size=8),
    by_token=st.booleans(),
)
def test_the_page_holds_every_character_once(steps: list[str], first: int, cuts: list[int], by_token: bool) -> None:
    text = "".join(steps)
    places = sorted({0, *(cut % (len(text) + 1) for cut in cuts), len(text)})
    tokens = [text[a:b] for a, b in pairwise(places)]
    record = Shown("p", steps, first % len(steps) if steps else None, tokens=tokens if by_token else None)
    pieces = list(record.pieces())
    assert "".join(piece.text for piece in pieces) == text
    order = ["good", "trimmed", "wrong", "after"]
    assert [order.index(piece.part) for piece in pieces] == sorted(order.index(piece.part) for piece in pieces)


def test_text_is_never_markup_and_the_page_needs_nothing() -> None:
    bad = '<script>alert("1")</script> & <b class="x">[red]no[/red] \' \n\n  two'
    record = shown(problem=bad, steps=[bad, "ok"], reason=bad, tokens=None, advantages=None, prefix_tokens=None)
    page = to_html([record], bad)
    parsed = Page(page)
    assert "script" not in parsed.tags
    assert "".join(text for _, text in parsed.parts) == bad + "ok"
    for word in ("http", "src=", "url(", "@import", "<link"):
        assert word not in page
    assert "[red]no[/red]" in terminal(record)


def every_unsafe_character() -> str:
    turning = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI", "BN"}
    joiners = "\u200c\u200d"  # letters of some scripts, and emoji, need them
    return "".join(
        character
        for character in map(chr, range(sys.maxunicode + 1))
        if (unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in "\u200e\u200f\u061c\ufeff")
        or (unicodedata.category(character) == "Cf" and unicodedata.bidirectional(character) in turning)
        if character not in "\n\t" + joiners and not "\U00013430" <= character <= "\U0001d17a"  # hieroglyphs, music
    )


def test_no_character_of_a_response_moves_hides_or_turns_anything_round() -> None:
    unsafe = every_unsafe_character()
    assert {"\x1b", "\x9b", "\r", "\x00", "\x7f", "\u202e", "\u2066", "\ud83d", "\U000e0041"} <= set(unsafe)
    assert not set(unsafe) & set(visible(unsafe))
    assert len(visible(unsafe)) == len(unsafe)
    assert visible("\x1b[31m\r\n\tä\u6c34\U0001f600") == "\u241b[31m\n\tä\u6c34\U0001f600"
    plain = {"tokens": None, "advantages": None, "prefix_tokens": None}
    text = f"{unsafe[::7]}\x1b]0;title\x07\x9b\u202e"
    record = shown(problem=f"p{text}", steps=[f"a{text}", text], reason=text, first_error=1, **plain)
    page = to_html([record], text)
    page.encode()
    assert not set(unsafe) & set(page)
    said = re.sub(r"\x1b\[[0-9;]*m", "", terminal(record))  # rich's own colours
    said.encode()
    assert not set(unsafe) & set(said)


def test_the_command_shows_half_a_character_and_escapes_on_any_terminal(tmp_path: Path) -> None:
    path, page = tmp_path / "x.jsonl", tmp_path / "x.html"
    line = {"problem": "p\ud83d\x1b[2J", "steps": ["é\udc00 \x9b31m"], "first_error": 0, "reason": "\u202er"}
    path.write_text(json.dumps(line))
    assert CliRunner().invoke(cli.app, ["show", str(path), "--html", str(page)]).exit_code == 0
    assert "p\ufffd\u241b[2J" in page.read_text(encoding="utf-8")
    assert "é\ufffd \ufffd31m" in CliRunner().invoke(cli.app, ["show", str(path)]).output
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "prefixloss", "show", str(path)]
    done = subprocess.run(command, capture_output=True, env=environment, check=False, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert "\\xe9\\ufffd \\ufffd31m" in done.stdout.decode("ascii")


def test_the_terminal_shows_colours_reasons_and_each_step_s_advantages() -> None:
    said = terminal(shown(), shown(first_error=None, confidence=0.9))
    for words in ("step 2 is the first wrong one", "why: 4 = 5 is false", "no error found", "[+0 to +0.25]", "[-0.75]"):
        assert words in said
    assert "\x1b[32mStep 1" in said  # green
    assert "\x1b[1;31m" in said  # bold red


def test_a_long_response_is_shown() -> None:
    record = Shown("p", [f"Step {k}\n" for k in range(1000)], 999)
    assert [part for part, _ in Page(to_html([record], "t")).parts][-1] == "wrong"
    assert "\x1b[1;31m999" in terminal(record)
    assert Page(to_html([Shown("p", [], None)], "t")).parts == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"problem": None}, "line 1: the key 'problem' has to be a text"),
        ({"steps": ["a", 1]}, "'steps' has to be a list of texts"),
        ({"first_error": 3}, "first_error is 3, of 3 steps"),
        ({"first_error": True}, "'first_error' has to be a whole number"),
        ({"tokens": ["a"]}, "do not join"),
        ({"advantages": [1.0]}, "1 advantages for 5 tokens"),
        ({"advantages": ["1"] * 5}, "'advantages' has to be a list of numbers"),
        ({"confidence": 10**400}, "'confidence' has to be a number"),
        ({"advantages": [1.0, 0, 0, 0, float("inf")]}, "'advantages' has to be a list of numbers"),
        ({"prefix_tokens": 6}, "prefix_tokens is 6, of 5 tokens"),
        ({"tokens": None}, "need the key 'tokens'"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    path = tmp_path / "x.jsonl"
    line = {key: value for key, value in {**FULL, **changes}.items() if value is not None}
    path.write_text(json.dumps(line))
    with pytest.raises(FormatError, match=says):
        read_shown(path)


def test_the_command_shows_and_writes(tmp_path: Path) -> None:
    path, page = tmp_path / "x.jsonl", tmp_path / "x.html"
    path.write_text(json.dumps(FULL) + "\n" + json.dumps(FULL))
    invoke = CliRunner().invoke
    assert "2. step 2 is the first wrong one" in invoke(cli.app, ["show", str(path)]).output
    result = invoke(cli.app, ["show", str(path), "--html", str(page), "--most", "1"])
    assert result.output.startswith("1 responses")
    assert page.read_text() == to_html([shown()], "x.jsonl")
    failed = invoke(cli.app, ["show", str(tmp_path / "none")])
    assert failed.exit_code == 2
    assert "cannot read" in failed.output


def test_a_table_wider_than_the_terminal_is_not_cut() -> None:
    table, console = Table("a heading of its own", *[f"heading{k}" for k in range(9)]), Console(width=60)
    table.add_row(*["1234567890"] * 10)
    console.file = io.StringIO()
    print_table(console, table)
    said = console.file.getvalue()
    assert all(word in said for word in ("a heading of its own", *(f"heading{k}" for k in range(9))))
    assert (said.count("1234567890"), console.width) == (10, 60)
