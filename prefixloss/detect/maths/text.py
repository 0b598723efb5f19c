"""Tokens of mathematical text: plain text, typographic signs, LaTeX and calculator notes get one spelling first.

The length of a text is bounded, and every pattern takes time linear in it.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from prefixloss.detect.maths import bases, functions, remainders, sums

MAX_TEXT = 20_000  # characters


class UnreadableError(Exception):
    """A text beyond the reader's bounds."""


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# ---- one spelling --------------------------------------------------------------------------------------------

_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\ufe63", "-"),
        **dict.fromkeys("\u00d7\u22c5\u00b7\u2217\u2219\u2715", "*"),
        **dict.fromkeys("\u00f7\u2215\u2044", "/"),
        **dict.fromkeys("\u00a0\u2009\u202f", " "),
        **dict.fromkeys("\u2248\u2245", "~="),
        **{chr(c): chr(c - 0xFEE0) for c in range(0xFF01, 0xFF5F)},  # full width
        **{c: f"^{n}" for n, c in enumerate("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")},
        **dict(zip("\u00bd\u00bc\u00be\u2153\u2154", (" 1/2", " 1/4", " 3/4", " 1/3", " 2/3"), strict=True)),
        **dict(zip("\u2264\u2265\u2260\u21d2\u2192", ("<=", ">=", "\\ne ", "->", "->"), strict=True)),
        **{"\u3002": ".", "\u3001": ","},
        **dict(zip("\u221a\u03c0\u200b\u2019\u2026", ("\\sqrt ", "\\pi ", "", "'", "..."), strict=True)),
        **dict(zip("\u2261\u230a\u230b\u2308\u2309", ("\\equiv ", "\\floor(", ")", "\\ceil(", ")"), strict=True)),
    }
)
_COMMANDS = {
    **dict.fromkeys(("\\times", "\\cdot", "\\ast"), "*"),
    **dict.fromkeys(("\\le", "\\leq", "\\leqslant"), "<="),
    **dict.fromkeys(("\\ge", "\\geq", "\\geqslant"), ">="),
    **dict.fromkeys(("\\tfrac", "\\dfrac", "\\cfrac"), "\\frac"),
    **dict.fromkeys(("\\rightarrow", "\\Rightarrow", "\\implies", "\\to"), "->"),
    **dict.fromkeys(("\\bmod", "\\mod"), " mod "),
    **dict.fromkeys(("\\left", "\\right", "\\big", "\\Big", "\\bigl", "\\bigr", "\\Bigl", "\\Bigr"), " "),
    **dict.fromkeys(("\\displaystyle", "\\boxed", "\\fbox", "\\cancel", "\\quad", "\\qquad"), " "),
    **dict.fromkeys(("\\,", "\\;", "\\:", "\\!", "\\ "), " "),
    **dict.fromkeys(("\\(", "\\)", "\\[", "\\]"), "$"),
    **{"\\lfloor": "\\floor(", "\\rfloor": ")", "\\lceil": "\\ceil(", "\\rceil": ")"},
    **dict.fromkeys(("\\lvert", "\\rvert", "\\vert"), "|"),
    **dict.fromkeys(("\\dbinom", "\\tbinom"), "\\binom"),
    **{"\\div": "/", "\\lt": "<", "\\gt": ">", "\\approx": "~=", "\\neq": "\\ne", "\\%": "%", "\\$": "$"},
}
_COMMAND = re.compile(r"\\(?:[A-Za-z]+|[^A-Za-z\\])")
_TEXT = re.compile(r"\\(?:text|mathrm|mbox|operatorname|textbf|textit|emph|mathit)\s?\{([^{}]{0,200})\}")
_LINES = re.compile(r"\\(?:begin|end)\s?\{(?:align|aligned|equation|gather|gathered|split|eqnarray)\*?\}")
_SUBSCRIPT = re.compile(r"(\\[A-Za-z]+)\s?_\s?(?:\{[^{}]{0,60}\}|[A-Za-z0-9])")
_DEGREES = re.compile(r"\^\s?(?:\{\s?\\circ\s?\}|\\circ(?![A-Za-z]))")
_THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|\\,)(?=\d{3})")
_SHORT_FRACTION = re.compile(r"\\frac\s?(\d)\s?(\d)")
_MIXED_FRACTION = re.compile(r"(?<![\d.])(\d{1,9})\s?\\frac\s?\{(\d{1,4})\}\s?\{(\d{1,4})\}")
_ROOT = re.compile(r"\\sqrt\s?\[(\d{1,2})\]")
_REPEATING = re.compile(r"(?<![\d.,])(\d{0,9})\.(\d{0,9})\\(?:overline|bar|dot)\s?\{?(\d{1,20})\}?")
_CLOCK = re.compile(r"(?<=\d)\s?([ap])\.m\b\.?", re.IGNORECASE)
_NEXT_LINE = re.compile(r"(?:\\\\|\n)\s{0,40}&?\s?(?=(?:=|~=|\\approx)(?!>))")
_NEXT_DISPLAY = re.compile(r"\$\s{0,40}\$\s{0,9}(?=(?:=|~=)(?!>))")  # "\[ a = b \] \[ = c \]"
_FACTORED = re.compile(r"(prime factori[sz]ation of [^.,;\n]{1,40}\d\s?\$?) is:?(?=\s{0,9}\$?\s?\d)")
_REMARKED = re.compile(r"\bis (?:also|actually|exactly|just|only|simply|then|therefore|thus) (?=\$?\s?\d)")
_LINE_START = re.compile(
    r"""^[ \t]*(?:[-*+\#>\u2022]+[ \t]+)*(?:\*\*)?
    (?:step[ \t]?\d{1,3}(?:\*\*)?[ \t]?[-:.)]+(?:\*\*)?|\(?\d{1,3}[.)](?=\s))?""",
    re.MULTILINE | re.IGNORECASE | re.VERBOSE,
)
_ROW = re.compile(r"^[ \t]{0,20}\|.*\|[ \t]{0,20}$", re.MULTILINE)  # of a table
_BOLD = re.compile(r"(?<![\w)\]*])\*\*(?=[^\s*])([^*\n]{1,300})(?<!\s)\*\*(?![\w(*])")
_NOTE = re.compile(r"<<([^<>]{1,200})>>(\$?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?![\d%]|[/,.]\d))?")
_EQUALS = re.compile(r"(?<!than or )\b(?:is |are )?equals?(?: to)?\b(?! parts?)")
_HEDGE = re.compile(r"(?<![=<>~!])=\s?(?:about|approximately|roughly|around)\b")


def plain(text: str) -> str:
    """One spelling for typographic and LaTeX signs; list markers and bold marks removed.

    A calculator note <<48/2=24>>24 leaves its 24 and becomes the claim 48/2=24 = 24 on a line of its own.
    """
    if len(text) > MAX_TEXT:
        raise UnreadableError(f"more than {MAX_TEXT} characters")
    if not text.isascii():
        text = text.translate(_CHARACTERS)
    if "$$" in text:
        text = text.replace("$$", "$")
    if "{,}" in text or "\\," in text:
        text = _THOUSANDS.sub(",", text)
    text = _CLOCK.sub(r" \1m ", text)
    if "\\" in text:
        text = functions.logarithms(sums.written_out(text))
        text = _REPEATING.sub(_fraction, text)
        text = _LINES.sub("\n", _SUBSCRIPT.sub(r"\1 ", _TEXT.sub(r" \1 ", text)))
        text = _NEXT_LINE.sub(" ", _DEGREES.sub("\u00b0", text))
        text = _COMMAND.sub(lambda m: _COMMANDS.get(m[0], m[0]), text.replace("\\\\", "\n").replace("&", " "))
        text = _MIXED_FRACTION.sub(r"\1 \2/\3", _SHORT_FRACTION.sub(r"\\frac{\1}{\2}", text))
        text = _ROOT.sub(r"\\root{\1}", text)
    if "<<" in text:
        notes = [m[1] + (f" = {m[2]}" if m[2] else "") for m in _NOTE.finditer(text)]
        text = "\n".join([_NOTE.sub(lambda m: m[2] or "", text), *notes])
    if "**" in text:
        text = _BOLD.sub(r"\1", text)
    if "equal" in text:
        text = _EQUALS.sub("=", text)
    if "factori" in text:
        text = _FACTORED.sub(r"\1 = ", text)
    text = _REMARKED.sub("is ", _NEXT_DISPLAY.sub(" ", text))
    if "_" in text:
        text = bases.spelled(text)
    text = functions.spelled(remainders.spelled(text))
    if "|" in text:
        text = _ROW.sub(lambda m: m[0].replace("|", " ; "), text)
    return _LINE_START.sub("", _NEXT_LINE.sub(" ", _HEDGE.sub("~=", text)))


def _fraction(repeating: re.Match[str]) -> str:
    """0.1\\overline{6} as (15/90)."""
    whole, first, period = repeating.groups()
    before = int(f"0{whole}{first}")
    return f"({int(f'{before}{period}') - before}/{'9' * len(period)}{'0' * len(first)})"


# ---- tokens --------------------------------------------------------------------------------------------------

_TOKEN = re.compile(
    r"""(?P<space>[^\S\n]+)
    |(?P<arrow>[-=]>)
    |(?P<operator>\*\*|-(?!>)|[+*/^]|\\rem(?![A-Za-z]))
    |(?P<open>[(\[{])
    |(?P<close>[)\]}])
    |(?P<opaque>\d{1,9}:\d[\d:]*|\.\.+)  # a time, a ratio, and so on
    |(?P<mixed>(?:\d{1,9}[ ]|(?<=[ ]/[ ]))\d{1,4}/\d{1,4}(?!\d|/|\.\d))  # 3 1/2; the divisor of 3 / 1/2
    |(?P<number>(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,2}(?:,\d\d)+,\d{3}(?!\d)
        |\d{1,3}(?:[ ]\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:\.\.\.|[eE][-+]?\d+(?!\w))?)
    |(?P<word>[A-Za-z\u00c0-\u024f\u0400-\u052f\u0590-\u065f\u066e-\u06ff\u0900-\u0963\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7a3]+
        (?:'[a-z']*)?(?:_(?:[A-Za-z0-9]|\{[A-Za-z0-9]{1,8}\}))?)
    |(?P<relation>~=|<=|>=|(?<=\s)!=|\\(?:ne|equiv)(?![A-Za-z])|:=|=+(?!>)|<(?!-)|(?<![-=])>)
    |(?P<postfix>%|!)
    |(?P<prefix>\\(?:frac|sqrt|root|binom|abs|floor|ceil|F(?:log|gcd|lcm|max|min|sin|cos|tan|ln))(?![A-Za-z]))
    |(?P<pi>\\pi(?![A-Za-z]))
    |(?P<currency>[$\u20ac\u00a3\u00a5\u20b9])
    |(?P<other>\\[A-Za-z]+|.|\n)""",
    re.VERBOSE | re.DOTALL,
)
_RELATIONS = {"==": "=", ":=": "=", "!=": "\\ne"}
_BREAKS = frozenset(',;.:?!"\n\u201c\u201d')


class Token(NamedTuple):
    """kind: its group's name in the pattern. gap: whether space stands before it."""

    kind: str
    text: str
    gap: bool


def tokens(text: str) -> list[Token]:
    """The tokens of a plain text without spaces and unmatched brackets.

    Brackets around a relation or several items, "(x, y)" or "(since 3 > 2)", are of the kind "aside".
    """
    found: list[Token] = []
    opened: list[int] = []
    closed: dict[int, int] = {}  # a closing bracket's place to its opening one's
    asides: set[int] = set()  # of opening brackets
    gap = True
    for match in _TOKEN.finditer(text):
        kind, spelled = match.lastgroup or "other", match[0]
        if kind == "space":
            gap = True
            continue
        if kind == "open":
            opened.append(len(found))
        elif kind == "close" and opened:
            closed[len(found)] = opened.pop()
            if closed[len(found)] in asides:
                asides.update(opened[-1:])
        elif kind == "relation" or (kind == "other" and spelled in _BREAKS):
            spelled = _RELATIONS.get(spelled, spelled)
            asides.update(opened[-1:])
        found.append(Token(kind, spelled, gap))
        gap = False
    matched = {*closed, *closed.values()}
    kept = []
    for place, token in enumerate(found):
        if token.kind not in ("open", "close"):
            kept.append(token)
        elif place in matched:
            kept.append(token._replace(kind="aside") if closed.get(place, place) in asides else token)
    return kept
