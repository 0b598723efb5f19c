r"""Functions of numbers in one spelling: \sin^2 30^\circ is \Fsin((30)*\pi/180)^2, C(9, 7) is \binom{9}{7}.

The F says that a function can be read. What is applied to names, or to more than can be seen at a glance, keeps its
spelling, and is not read. Every pattern takes time linear in the text.
"""

from __future__ import annotations

import re

_NUMBER = r"\d{1,12}(?:\.\d{1,12})?"
_SHORT = r"[^(){}=<>,;|$\n]{1,40}"  # an argument in brackets
_ARGUMENT = (
    rf"(?:\(\s?(?P<bracket>(?:{_SHORT}|\\frac\s?\{{{_SHORT}\}}\s?\{{{_SHORT}\}})+)\)|\{{(?P<brace>{_SHORT})\}}"
    rf"|(?P<frac>\\frac\s?\{{{_SHORT}\}}\s?\{{{_SHORT}\}})"
    rf"|(?P<bare>-?(?:\d{{0,4}}\\pi(?:\s?/\s?\d{{1,4}})?(?![\w/])|{_NUMBER}(?:\u00b0)?(?!\w|\.\d))))"
)
_TRIGONOMETRIC = re.compile(
    rf"(?<![A-Za-z])\\?(?P<name>sin|cos|tan)\s?(?:\^\s?(?:\{{(?P<braced>[2-4])\}}|(?P<power>[2-4])))?\s?{_ARGUMENT}"
)
_NUMERIC = re.compile(r"[\d\s.+\-*/^(){}\u00b0]|\\(?:pi|frac|sqrt)(?![A-Za-z])")
_LOGARITHM = re.compile(
    rf"\\?log\s?_\s?(?:\{{({_NUMBER})\}}|(\d))\s?(?:\(\s?({_NUMBER})\s?\)|\{{\s?({_NUMBER})\s?\}}|({_NUMBER})(?!\w|\.\d|\^))"
)
_NATURAL = re.compile(rf"\\ln\s?(?:\(\s?({_NUMBER})\s?\)|\{{\s?({_NUMBER})\s?\}}|({_NUMBER})(?!\w|\.\d|\^))")
_COMBINATIONS = (
    re.compile(r"(?<![\w\\])(?:\\?[dt]?binom|C)\s?\(\s?(\d{1,4})\s?,\s?(\d{1,4})\s?\)"),
    re.compile(r"(?:\{\})?[_^]\s?\{?(\d{1,4})\}?\s?C\s?_\s?\{?(\d{1,4})\}?"),
    re.compile(r"(?<![\w.,])(\d{1,4})\s?choose\s?(\d{1,4})(?![\w.,]\d)"),
    re.compile(r"\{\s?(\d{1,4})\s?\\choose\s?(\d{1,4})\s?\}"),
)
_OVER = re.compile(r"\{([^{}\\]{1,60})\\over\s?([^{}\\]{1,60})\}")
_OF_INTEGERS = re.compile(
    r"(?<![A-Za-z])\\?(?P<name>gcd|lcm|max|min)\s?(?:\\?[({])\s?(?P<list>\d{1,12}(?:\s?,\s?\d{1,12}){1,5})\s?\\?[)}]",
    re.IGNORECASE,
)
_NAMED = re.compile(r"gcd|lcm|max|min|GCD|LCM")
_DIVISOR_OF = re.compile(
    r"\b(?:(?P<gcd>gcd|gcf|hcf|greatest common (?:divisor|factor))|(?:lcm|least common multiple)) "
    r"(?:of|between) \$?(\d{1,12})\$? and \$?(\d{1,12})(?![\d.^!*/+-])",
    re.IGNORECASE,
)
_HALVES = {"half": "1/2", "third": "1/3", "quarter": "1/4", "two": "2/3", "three": "3/4"}
_SHARE = re.compile(
    r"\b(?:(?P<half>half)|(?:a|one)[ -](?P<part>third|quarter)|(?P<two>two)[ -]thirds|(?P<three>three)[ -]quarters)"
    r" of (?=\$?\d[\d,.]*(?: [a-z]+)? (?:=|is |are |was |were ))",
    re.IGNORECASE,
)
_BARS = re.compile(r"(?<![\w)}|])\|\s?([^|\n]{1,60})\|(?![\w|])")


def logarithms(text: str) -> str:
    """text: with its subscripts."""
    if "log" not in text:
        return text
    return _LOGARITHM.sub(lambda m: rf"\Flog{{{m[1] or m[2]}}}{{{m[3] or m[4] or m[5]}}}", text)


def spelled(text: str) -> str:
    """text: with LaTeX commands for brackets and spaces, but for degrees, already gone."""
    if "\\ln" in text:
        text = _NATURAL.sub(lambda m: rf"\Fln({m[1] or m[2] or m[3]})", text)
    if "sin" in text or "cos" in text or "tan" in text:
        text = _TRIGONOMETRIC.sub(_of_an_angle, text)
    if "C" in text or "choose" in text or "binom" in text:
        for pattern in _COMBINATIONS:
            text = pattern.sub(r"\\binom{\1}{\2}", text)
    if "\\over" in text:
        text = _OVER.sub(r"\\frac{\1}{\2}", text)
    if "|" in text:
        text = _BARS.sub(lambda m: rf"\abs({m[1]})" if _is_numeric(m[1]) else m[0], text)
    if " of " in text:
        text = _SHARE.sub(lambda m: f"{_HALVES[(m['part'] or m.lastgroup or '').lower()]} of ", text)
        text = _DIVISOR_OF.sub(lambda m: rf"\F{'gcd' if m['gcd'] else 'lcm'}{{{m[2]}}}{{{m[3]}}}", text)
    if _NAMED.search(text):
        text = _OF_INTEGERS.sub(_of_integers, text)
    return text.replace("\u00b0", "")


def _is_numeric(text: str) -> bool:
    return any(map(str.isdigit, text)) and not _NUMERIC.sub("", text)


def _of_an_angle(found: re.Match[str]) -> str:
    """In radians: an angle has a degree sign, or a multiple of pi. Any other may be either, and is not read."""
    angle = found["bracket"] or found["brace"] or found["frac"] or found["bare"]
    degrees, radians = "\u00b0" in angle, "\\pi" in angle
    if degrees == radians or _NUMERIC.sub("", angle):
        return found[0]
    power = found["braced"] or found["power"]
    angle = rf"({angle})*\pi/180" if degrees else angle
    return rf"\F{found['name']}({angle})" + (f"^{power}" if power else "")


def _of_integers(found: re.Match[str]) -> str:
    """The function of two numbers, again and again."""
    first, *rest = found["list"].split(",")
    for number in rest:
        first = rf"\F{found['name'].lower()}{{{first.strip()}}}{{{number.strip()}}}"
    return first
