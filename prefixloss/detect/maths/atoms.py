r"""Formulas with functions of names, Greek letters and indices, in a spelling that the reader knows.

\sin^2 x is \Fsin(x)^2. What has no meaning that can be calculated, f(x), a_{n+1}, \alpha, becomes a name of its own:
two sides that have it alike can still be compared. Every pattern takes time linear in the text.
"""

from __future__ import annotations

import re

MAX_ATOMS = 400  # of a response
MAX_ARGUMENT = 200  # characters
MAX_DEPTH = 4  # of functions in functions
_SPACES = re.compile(r"\\(?:left|right|[bB]ig[lr]?)(?![A-Za-z])|(?<!\\)\\[,;:! ]")
_INDEX = r"(?:\s?_\s?(?:[A-Za-z\d]|\{[^{}]{1,12}\}))?"
_NAMES = tuple(
    re.compile(pattern)
    for pattern in (
        r"(?<![A-Za-z\\])[A-Za-z]\s?_\s?\{[^{}]{1,12}\}",
        r"\\(?:overline|bar)\s?\{\s?[A-Za-z]\s?\}",
        r"\\angle\s?(?:[A-Z]{1,3}|\{[A-Z]{1,3}\})",
        r"\\(?:alpha|beta|gamma|delta|(?:var)?epsilon|zeta|eta|(?:var)?theta|kappa|lambda|mu|nu|xi|rho|sigma|tau"
        r"|(?:var)?phi|chi|psi|omega|Delta|Theta|Phi|Omega|ell)(?![A-Za-z])" + _INDEX,
        r"(?<![A-Za-z\\])[A-Za-z]'{1,3}(?![A-Za-z'(])",
    )
)
_CALLED = re.compile(r"(?<![A-Za-z\\\d)])([A-Za-z])\((?:-?\d{1,9}|[a-z])\)\s?&?=")  # f(x) =, S(3) =
_USUAL = frozenset("fgh")
_CALL = re.compile(
    r"(?<![A-Za-z\\][A-Za-z])(?<!\\)(?P<name>[A-Za-z])(?:'{1,3}|\s?\^\s?(?:\{[^{}()]{1,8}\}|\d)|_(?:\w|\{\w{1,6}\}))?\("
)
_FUNCTION = re.compile(
    r"(?<![A-Za-z])\\?(?P<name>sin|cos|tan|sec|csc|cot|ln)(?![A-Za-z])\s{0,3}"
    r"(?:\^\s?(?:\{\s?(?P<braced>\d)\s?\}|(?P<power>\d)))?\s{0,3}"
)
_BARE = re.compile(
    r"(?:\d{1,6}\s?)?(?:Q_\{\d{1,3}\}|[A-Za-z](?:_\w)?)(?![A-Za-z({_])"
    r"|\\frac\s?\{[^{}]{1,40}\}\s?\{[^{}]{1,40}\}|\d{1,6}(?=\s?\^\s?\{?\s?\\circ)"
)
_DEGREES = re.compile(r"(?:(?<![\d.])(\d{1,6})\s?)?\^\s?(?:\{\s?\\circ\s?\}|\\circ(?![A-Za-z]))")
_ARGUMENT = re.compile(r"\\F[a-z]{2,3}\(([^()]{1,40})\)")
_LETTER = re.compile(r"(?<![A-Za-z\\{_])[b-zB-HJ-Z](?![A-Za-z_])")
_MEANINGS = {
    **{name: rf"\F{name}({{}})" for name in ("sin", "cos", "tan", "ln")},
    "sec": r"(1/\Fcos({}))",
    "csc": r"(1/\Fsin({}))",
    "cot": r"(1/\Ftan({}))",
}


class Atoms:
    """The names that stand for what cannot be calculated, in one response."""

    def __init__(self, response: str) -> None:
        self.functions = frozenset(_CALLED.findall(response)) | _USUAL
        self.names: dict[str, str] = {}
        self.letters: set[str] = set()  # that functions are applied to

    def spelled(self, text: str) -> str:
        text = _SPACES.sub(" ", text)
        for pattern in _NAMES:
            text = pattern.sub(lambda found: self._name(found[0]), text)
        text = _applied(self._calls(text))
        for argument in _ARGUMENT.findall(text):
            self.letters.update(_LETTER.findall(argument))
        return text

    def spelling(self, name: str | None) -> str:
        """What a name stands for; "" for any other."""
        return next((spelling for spelling, given in self.names.items() if given == name), "")

    def _name(self, spelling: str) -> str:
        key = re.sub(r"[\s{}]", "", spelling)
        if key not in self.names and len(self.names) >= MAX_ATOMS:
            return spelling
        name = self.names.setdefault(key, f"Q_{{{len(self.names)}}}")
        return f" {name}"  # "2xf(x)" is no name xQ

    def _calls(self, text: str) -> str:
        """With names for calls of functions."""
        kept, place = [], 0
        for call in _CALL.finditer(text):
            if call.start() < place or call["name"] not in self.functions:
                continue
            if end := _closing(text, call.end() - 1):
                kept += [text[place : call.start()], self._name(text[call.start() : end])]
                place = end
        return "".join((*kept, text[place:]))


def _closing(text: str, place: int) -> int | None:
    """The place behind the bracket that closes the one at `place`."""
    depth = 0
    for at in range(place, min(place + MAX_ARGUMENT, len(text))):
        depth += {"(": 1, "{": 1, "[": 1, ")": -1, "}": -1, "]": -1}.get(text[at], 0)
        if depth == 0:
            return at + 1
    return None


def _applied(text: str, depth: int = 0) -> str:
    """With trigonometric functions and natural logarithms as the reader spells them."""
    kept, place = [], 0
    for found in _FUNCTION.finditer(text):
        start = found.end()
        bracketed = text[start : start + 1] in ("(", "{")
        bare = None if bracketed else _BARE.match(text, start)
        end = _closing(text, start) if bracketed else bare and bare.end()
        if found.start() < place or not end or text[end : end + 1] == "!" or depth == MAX_DEPTH:
            continue
        degrees = _DEGREES.match(text, end)
        end_all = degrees.end() if degrees else end
        argument = text[start + bracketed : end - bracketed] + text[end:end_all]
        power = found["braced"] or found["power"]
        meaning = _MEANINGS[found["name"]].format(_radians(_applied(argument, depth + 1)))
        kept += [text[place : found.start()], " ", meaning, f"^{power}" if power else ""]
        place = end_all
    return "".join((*kept, text[place:]))


def _radians(argument: str) -> str:
    """Degrees behind a name go with the name."""
    return _DEGREES.sub(lambda found: rf"({found[1]}*\pi/180)" if found[1] else "", argument)
