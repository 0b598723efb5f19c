"""Lexemes of mathematical text: what is a name, an operator, a unit or prose, and where a product has no sign.

What stands beside a token tells, so that one pass is enough.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from fractions import Fraction
from typing import NamedTuple

from prefixloss.detect.maths.expressions import Rational
from prefixloss.detect.maths.text import Token, plain, tokens, words
from prefixloss.detect.maths.units import UNITS, Unit

MAX_DIGITS = 60  # of a number
MAX_EXPONENT = 3  # digits of the exponent in 1e100
MAX_SIGNS = 4  # before a number
MAX_UNIT_WORDS = 8  # "gifts for each of her friends"

_WORD_OPERATORS = {"times": "*", "plus": "+", "minus": "-", "x": "*", "X": "*", "mod": "mod"}
_COPULAS = words("is are was were gives makes yields")
_CLAUSES = _COPULAS | words(
    "and because but else hence i if it or since so then there therefore thus we when which while you"
)
_CLOCK = words("am pm noon midnight o'clock")
_ARTICLES = words("a an all her his its the their these those")
_SHORT_WORDS = _CLAUSES | _ARTICLES | words("as at by for in of on per she he to")
_COEFFICIENT_NAMES = frozenset("abcknpqrtuvwxyz")  # 3x is a product, 3m a length; other letters have to be declared
_FUNCTIONS = words("sin cos tan sec csc cot log ln exp gcd lcm max min floor ceil abs f g h")
QUALIFIERS = words(
    "than remainder remainders rem quotient modulo mod raised"
)  # a number before one is a part of what is meant
_NO_UNIT = _CLAUSES | QUALIFIERS
_VALUE_ENDS = frozenset(("value", "name", "close", "postfix"))
_OPERANDS = frozenset(("number", "mixed", "open", "prefix", "pi"))
_DECLARED = re.compile(
    r"(?<![A-Za-z\\\d])(?<!\d )([A-Za-z](?:_\w)?|[A-Z]{2,3})(?=\s?=)|\b(?:[Ll]et|where|call)\s{1,9}\$?([A-Za-z])\b"
    r"|(?:\$|\\\()\s?([A-Za-z])\s?(?:\$|\\\))|(?<![A-Za-z\\])([xyz])\s?\^"
)
_PERIOD = re.compile(r"\..*(\d)\1\Z")  # 0.0013888... goes on as it ends
_CALLED = re.compile(r"(?<![A-Za-z\\\d)])([A-Za-z])\((?:-?\d{1,9}|[a-z])\)\s?=")  # f(x) =, S(3) =


class Lexeme(NamedTuple):
    """kind: value, name, operator, prefix, postfix, open, close, relation, word (prose), break, or opaque (maths that
    cannot be read). places: the decimals a value is written with. unit: its well-known unit. worded: whether a unit in
    words stands behind it."""

    kind: str
    item: Rational | str
    places: int = 0
    unit: Unit | None = None
    worded: bool = False


_BREAK = Lexeme("break", "")
_OPAQUE = Lexeme("opaque", "")
_TIMES = Lexeme("operator", "*")
_PLUS = Lexeme("operator", "+")
_EDGE = Token("other", "\n", True)


def declared(text: str) -> frozenset[str]:
    """The letters that a problem or response uses as names: "let x", "where A", "x = ", "$x$", "x^2"; no functions."""
    found = {name for pair in _DECLARED.findall(text) for name in pair if name}
    return frozenset(found.difference(_CALLED.findall(text)))


def lexemes(text: str, names: Collection[str]) -> list[Lexeme]:
    """names: those `declared`."""
    return _Lexer(tokens(plain(text)), names).found


class _Lexer:
    """names: those declared in this response."""

    def __init__(self, text: list[Token], names: Collection[str]) -> None:
        self.tokens = text
        self.names = names
        self.found: list[Lexeme] = []
        place = 0
        while place < len(text):
            place = self._read(place)

    def _read(self, place: int) -> int:
        """Appends the lexemes that start with the token at `place`; the place after them."""
        kind, text, gap = self.tokens[place]
        append = self.found.append
        after_value = bool(self.found) and self.found[-1].kind in _VALUE_ENDS
        if kind in ("number", "mixed"):
            if after_value:
                apart = gap and self._at(place - 1).text != "}" and self._at(place - 2).text != "^"  # \sec^2 20
                append(_BREAK if self._edge(place) or apart else _OPAQUE)
            append(self._number(place))
        elif kind == "operator":
            if after_value and text in "/-" and not gap and self._unit_follows(place):
                return self._unit(place)  # $2/car, 5-pound bags
            append(self._operator(place, after_value))
        elif kind == "word":
            return self._word_after_value(place) if after_value else self._word(place)
        elif kind in ("open", "prefix", "pi"):
            if after_value:
                if remark := self._remark(place):
                    return remark
                product = not gap or kind != "open" or self._operand(place + 1)
                append(_TIMES if product and not self._edge(place) else _BREAK)
            append(Lexeme("name" if kind == "pi" else kind, text.lstrip("\\F")))
        elif kind == "postfix":
            append(self._postfix(place, after_value))
        elif kind != "currency" or self._edge(place):
            append(self._other(place, after_value))
        return place + 1

    def _other(self, place: int, after_value: bool) -> Lexeme:
        kind, text, gap = self.tokens[place]
        if kind in ("close", "relation", "opaque"):
            return Lexeme(kind, text)
        if kind == "currency":
            return _BREAK  # one formula ends and the next begins
        if kind == "aside":
            called = after_value and not gap and text in "([{"  # f(x, y)
            return _OPAQUE if called or (text == "}" and self._at(place + 1).text == "{") else _BREAK
        if kind == "arrow":
            return Lexeme("break", "->")
        opaque = text in "|_" or text.startswith("\\") or not text.isascii() or self._within_number(place)
        return _OPAQUE if opaque else Lexeme("break", text)

    def _at(self, place: int) -> Token:
        return self.tokens[place] if 0 <= place < len(self.tokens) else _EDGE

    def _edge(self, place: int) -> bool:
        """Whether a formula or an amount of money begins or ends right before: no product without a sign there."""
        return self._at(place - 1).kind == "currency"

    # ---- numbers and operators

    def _within_number(self, place: int) -> bool:
        """Whether a comma or a point stands between what may be one number: "2,5", "0.\\dot{3}"."""
        before, _, following = (self._at(at) for at in (place - 1, place, place + 1))
        touches = before.kind == "number" and not self._at(place).gap and not following.gap
        if self._at(place).text == ":":  # a ratio
            return (self._at(place).gap or not following.gap) and self.found[-1:] != [] and self._operand(place + 1)
        return touches and self._at(place).text in ",." and (following.kind == "number" or following.text[:1] == "\\")

    def _operand(self, place: int) -> bool:
        """Whether a value starts here."""
        for token in self.tokens[place : place + MAX_SIGNS]:
            if token.kind != "currency" and token.text not in ("-", "+"):
                break
            place += 1
        return self._at(place).kind in _OPERANDS or bool(self._names(place))

    def _number(self, place: int) -> Lexeme:
        kind, text, _ = self.tokens[place]
        unit = UNITS.get(self._at(place - 1).text)  # "$"
        if len(text) > MAX_DIGITS:
            return _OPAQUE
        if kind == "mixed":
            whole, _, part = text.rpartition(" ")
            numerator, denominator = (int(n) for n in part.split("/"))
            if not denominator or (whole and numerator >= denominator):
                return _OPAQUE
            return Lexeme("value", int(whole or 0) + Fraction(numerator, denominator), 0, unit)
        text = text.replace(",", "").replace(" ", "").lower()
        digits, _, exponent = text.removesuffix("...").partition("e")
        if len(exponent.lstrip("+-")) > MAX_EXPONENT:
            return _OPAQUE
        if digits.isdigit() and not exponent:
            return Lexeme("value", int(digits), 0, unit)
        places = len(digits.partition(".")[2]) - text.endswith("...")  # 0.666... is cut off, not rounded
        number = Fraction(f"{digits}e{exponent or 0}")
        if text.endswith("...") and (period := _PERIOD.search(digits)):
            number += Fraction(int(period[1]), 9 * 10 ** len(digits.partition(".")[2]))
            places = 0
        return Lexeme("value", number, max(places, 0), unit)

    def _operator(self, place: int, after_value: bool) -> Lexeme:
        _, text, gap = self.tokens[place]
        if after_value:
            if self._operand(place + 1):
                return Lexeme("operator", "^" if text == "**" else text.strip("\\"))
            return _BREAK if text == "-" and self.found[-1].worded else _OPAQUE  # a dash, or a sum with words
        before = self.found[-1].kind if self.found else "break"
        if self._at(place - 1).kind == "aside":
            return _OPAQUE  # (1, 2) - 3
        if text not in "+-" or before == "opaque" or (before == "word" and gap and self._at(place + 1).gap):
            return _OPAQUE  # "Total - 5"
        return Lexeme("operator", "neg" if text == "-" else "pos")

    def _postfix(self, place: int, after_value: bool) -> Lexeme:
        _, text, gap = self.tokens[place]
        following = self._at(place + 1)
        if not after_value:
            return _BREAK if following.gap else _OPAQUE  # !5
        if text == "%":
            remains = following.kind == "number" and following.gap
            return Lexeme("operator", "mod") if remains else Lexeme("postfix", "%")
        factorial = following.kind in ("operator", "relation", "close", "currency")
        return Lexeme("postfix", "!") if factorial and not gap else _OPAQUE  # "5!" may be a joyful 5

    # ---- words

    def _names(self, place: int, coefficient: bool = False) -> tuple[str, ...]:
        """The names whose product a word is: declared ones, or a letter between operators, or right behind a number."""
        kind, word, _ = self._at(place)
        if kind != "word" or len(word.partition("_")[0]) > 3 or not word.isascii():
            return ()
        following = self._at(place + 1)
        beside = self._at(place - 1).kind, following.kind
        between = "operator" in beside or "relation" in beside
        between = between or (beside[0] in ("number", "close") and beside[1] == "close")  # the a of (b - c^2 a)
        if word in ("a", "A", "I") and not (between or coefficient or (following.kind == "open" and not following.gap)):
            return ()
        if word in self.names or "_" in word:
            return (word,)
        if len(word) == 1:
            called = following.kind == "open" and not following.gap
            alone = between and not called and word not in "aAI"
            return (word,) if (word in _COEFFICIENT_NAMES if coefficient else alone) else ()
        known = {*self.names, *(_COEFFICIENT_NAMES if coefficient else ())}  # 3ab
        product = word not in _SHORT_WORDS and word not in UNITS and known.issuperset(word)
        return tuple(word) if product else ()

    def _product(self, names: tuple[str, ...]) -> None:
        for n, name in enumerate(names):
            self.found += (_TIMES,) * (n > 0) + (Lexeme("name", name),)

    def _word(self, place: int) -> int:
        word = self.tokens[place].text
        called = self._at(place + 1).kind == "open" and not self._at(place + 1).gap
        if word == "sqrt":
            self.found.append(Lexeme("prefix", "sqrt"))
        elif word in _FUNCTIONS and (called or word not in self.names):
            self.found.append(_OPAQUE)
        elif names := self._names(place):
            self._product(names)
        else:
            self.found.append(_OPAQUE if called else Lexeme("word", word.lower()))
        return place + 1

    def _word_after_value(self, place: int) -> int:
        _, word, gap = self.tokens[place]
        if word.lower() in _CLOCK or (len(word) < 4 and word[1:2] == "'"):  # 9 am, 3n'
            self.found.append(_OPAQUE)
            return place + 1
        if word in _COPULAS and self._operand(place + 1) and not (word == "are" and self._listed(place + 1)):
            self.found.append(Lexeme("relation", "is"))
            return place + 1
        if word == "of" and self._share():
            after = place + 1
            while self._at(after).text in _ARTICLES:
                after += 1
            if self._operand(after):
                self.found.append(_TIMES)
                return after
        if operator := self._word_operator(place):
            self.found.append(Lexeme("operator", operator))
            return place + 1
        names = self._names(place, coefficient=not gap)
        if names and (not gap or self.found[-1].kind != "value" or names[0] in self.names):
            self.found.append(_BREAK if self._edge(place) else _TIMES)
            self._product(names)
            return place + 1
        return self._unit(place)

    def _listed(self, place: int) -> bool:
        """Whether a number stands here that is the first of several: "the digits of these are 1, 4, 9"."""
        return self._at(place).kind == "number" and self._at(place + 1).text == "," and self._at(place + 2).gap

    def _share(self) -> bool:
        """Whether a percentage or a fraction stands before: "20% of", "1/2 of"."""
        before = self.found[-3:]
        return before[-1].item == "%" or before[-1].kind == "close" or (len(before) == 3 and before[1].item == "/")

    def _word_operator(self, place: int) -> str | None:
        """The operator that a word behind a value is: "2 x 3", "2 times 3"."""
        word, following = self._at(place).text, self._at(place + 1)
        if word not in _WORD_OPERATORS or not self._operand(place + 1):
            return None
        if following.text == "+" or (following.text == "-" and (not self._at(place).gap or self._at(place + 2).gap)):
            return None  # 2x - 3
        if word == "x" and word in self.names and following.kind == "open" and not following.gap:
            return None  # 2x(x + 1)
        return _WORD_OPERATORS[word]

    # ---- units

    def _remark(self, place: int) -> int | None:
        """The place behind words in brackets, as in "93 (average) * 5 (tests)"; None for anything else."""
        end = place + 1
        while self._at(end).kind == "word" and not self._names(end) and self._at(end).text not in QUALIFIERS:
            end += 1
        if self._at(end).kind != "close" or end == place + 1 or len(self._at(place + 1).text) == 1:
            return None
        self.found[-1] = self.found[-1]._replace(worded=True)
        return end + 1

    def _smaller_follows(self, place: int, unit: Unit) -> bool:
        """Whether a number of a smaller unit stands here: the 6 inches of "5 feet 6 inches"."""
        smaller = UNITS.get(self._at(place + 1).text)
        alone = len(self.found) < 2 or self.found[-2].item not in ("*", "/", "-", "^")
        return (
            alone
            and self._at(place).kind == "number"
            and smaller is not None
            and smaller.dimension == unit.dimension
            and smaller.size < unit.size
        )

    def _unit_follows(self, place: int) -> bool:
        following = self._at(place + 1)
        return following.kind == "word" and not following.gap and not self._names(place + 1)

    def _behind_power(self, place: int) -> int:
        """The place behind the power of a unit: "cm^3"."""
        if self._at(place).text != "^":
            return place
        braces = self._at(place + 1).text == "{" and self._at(place + 3).text == "}"
        return place + (4 if braces else 2) if self._at(place + 1 + braces).text in ("2", "3") else place

    def _unit(self, place: int) -> int:
        """Takes the words behind a value for its unit, up to the next operator or relation, else for prose."""
        end, count = place, 0
        while count < MAX_UNIT_WORDS:
            token, following = self._at(end), self._at(end + 1)
            if following.kind == "word" and (token.text == "/" or (token.text == "-" and not token.gap)):
                end += 1
                token, following = following, self._at(end + 1)
            if token.kind != "word" or token.text.lower() in _NO_UNIT or self._word_operator(end):
                break
            likely = token.text in self.names or (count and following.kind == "relation")
            if likely and token.gap and self._names(end):
                break
            end += 1
            count += 1
        if not count:
            self.found.append(Lexeme("word", self.tokens[place].text.lower()))
            return place + 1
        unit = UNITS.get(self._at(place).text) if self._at(place + 1).text not in ("/", "per") else None
        self.found[-1] = self.found[-1]._replace(unit=unit or self.found[-1].unit, worded=True)
        if self._at(end).kind == "open" and (remark := self._remark(end)):
            end = remark
        end = self._behind_power(end)
        following = self._at(end)
        if count == 1 and unit and self._smaller_follows(end, unit):
            self.found.append(_PLUS)
            return end
        joined = following.kind in ("relation", "close") or self._word_operator(end)
        if not joined and not (following.kind == "operator" and self._operand(end + 1)):
            self.found += [
                Lexeme("word", token.text.lower()) for token in self.tokens[place:end] if token.kind == "word"
            ]
        return end
