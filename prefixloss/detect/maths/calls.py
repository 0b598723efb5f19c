"""What functions are said to be, f(x) = x^2 + a, and what their values are then: f(-x), f(b)."""

from __future__ import annotations

import re

from prefixloss.detect.maths.expressions import Expression, names

_CALL = re.compile(r"(?P<function>[A-Za-z])\((?P<sign>-?)(?:(?P<number>\d{1,4})|(?P<letter>[a-z]))\)")


class Functions:
    """A function with two definitions, case by case or one after the other, has none."""

    def __init__(self) -> None:
        self.defined: dict[str, tuple[str, Expression] | None] = {}

    def define(self, spelling: str, right: Expression) -> None:
        """Takes note of "f(x) = right"; of nothing else."""
        call = _CALL.fullmatch(spelling)
        if call and call["letter"] and not call["sign"] and call["letter"] in names(right):
            function, definition = call["function"], (call["letter"], right)
            self.defined[function] = definition if self.defined.get(function, definition) == definition else None

    def value(self, spelling: str) -> Expression | None:
        """What f(-x) is by the definition of f; None where that is not known, or is the definition itself."""
        call = _CALL.fullmatch(spelling)
        definition = self.defined.get(call["function"]) if call else None
        if not call or not definition or spelling == f"{call['function']}({definition[0]})":
            return None
        argument = (int(call["number"]) if call["number"] else call["letter"], *(("neg",) if call["sign"] else ()))
        return tuple(part for item in definition[1] for part in (argument if item == definition[0] else (item,)))
