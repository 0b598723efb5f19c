r"""Quotients with remainders and congruences in one spelling: "17 / 5 = 3 remainder 2" is 17 / 5 = 3 \rem 2."""

from __future__ import annotations

import re

_REMAINDER = re.compile(
    r"(?<![\d.,])(?P<quotient>\d{1,15})[\s$]{0,3}(?:[a-z]{2,12} ){0,3}?,? ?(?:(?:with|and|leaving) )?(?:(?:a|the) )?"
    r"\(?(?:remainder|rem\.?|R|r|\u4f59|reste|resto|Rest)\s{0,3}(?:of |is |=|:)?[\s$]{0,3}"
    r"(?P<rest>\d{1,15})\)?(?![\d.,]*\d)"
)
_REMAINING = re.compile(
    r"(?<![\d.,])(?P<quotient>\d{1,15})[\s$]{0,3}(?:[a-z]{2,12} ){0,3}with\s{1,3}\$?(?P<rest>\d{1,15})\$?\s{1,3}"
    r"(?:[a-z]{2,12}\s{1,3}){0,2}(?:remaining|left over|leftover|left)\b"
)
_SAID = re.compile(r"[Rr]em|\bR\b|\br\b|[Rr]est|\u4f59")
_MODULUS = re.compile(
    r"\\pmod\s?\{\s?(\d{1,15})\s?\}|\\pmod\s?(\d{1,15})(?![\d^])|\(\s{0,3}\\?mod(?:ulo)?\s{0,3}(\d{1,15})\s{0,3}\)"
)
_MODULO = re.compile(r"(?<=[\d\u00b0)}$])\s{0,3}\$?\s{0,3}modulo\s{0,3}\$?\s{0,3}(\d{1,15})(?![\d.^])")
_DIVIDED = re.compile(r"(?<=\d) divided by (?=\d)")


def spelled(text: str) -> str:
    if "mod" in text:
        text = _MODULUS.sub(lambda m: f" mod {m[1] or m[2] or m[3]} ", text)
        text = _MODULO.sub(r" mod \1", text)
    if "divided by" in text:
        text = _DIVIDED.sub(" / ", text)
    if _SAID.search(text):
        text = _REMAINDER.sub(_written, text)
    return _REMAINING.sub(_written, text) if "remaining" in text or "left" in text else text


def _written(found: re.Match[str]) -> str:
    return rf"{found['quotient']} \rem {found['rest']}"
