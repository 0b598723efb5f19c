"""Detectors by name, as commands and settings write them: "auto", "maths,prm:MODEL", "vote(maths,judge:MODEL@URL)"."""

from __future__ import annotations

import re
from importlib import import_module

from prefixloss.detect.base import Detector

_CLASSES = {
    "brackets": "brackets.Brackets",
    "code": "code.Code",
    "judge": "judge.Judge",
    "knights": "knights.Knights",
    "maths": "maths.Maths",
    "orderings": "orderings.Orderings",
    "prm": "prm.PRM",
    "rules": "rules.Rules",
    "sorting": "sorting.Sorting",
    "swaps": "swaps.Swaps",
}
# each reads its own kind of problem only; what runs code, or a model, is never chosen unasked
_AUTO = ("brackets", "swaps", "sorting", "orderings", "knights", "maths", "rules")
_COMBINED = {"first": "FirstOf", "earliest": "Earliest", "vote": "Vote"}
_GROUP = re.compile(rf"({'|'.join(_COMBINED)})\((.*)\)", re.DOTALL)

EXPECTED = (
    f"{', '.join(('auto', *_CLASSES))}, several with commas between them (each answers what those before it cannot), "
    "or earliest(...) or vote(...) of several; prm:MODEL and judge:MODEL@URL"
)


def by_name(name: str) -> Detector:
    """ValueError if there is none of that name."""
    name = name.strip()
    group = _GROUP.fullmatch(name)
    if group:
        return _combined(group[1], group[2])
    if "," in name:
        return _combined("first", name)
    if name == "auto":
        return _combined("first", ",".join(_AUTO))
    kind, _, setting = name.partition(":")
    if kind not in _CLASSES or (bool(setting) != (kind in ("prm", "judge"))):
        raise ValueError(f"detector: got {name!r}, expected {EXPECTED}")
    module, _, cls = _CLASSES[kind].partition(".")
    make = getattr(import_module(f"prefixloss.detect.{module}"), cls)
    if kind == "prm":
        return make(model=setting)
    if kind == "judge":
        model, at, url = setting.partition("@")
        if not (model and at and url):
            raise ValueError(
                f"detector: got {name!r}, expected judge:MODEL@URL, as in judge:maths-judge@http://host/v1"
            )
        return make(model=model, url=url)
    return make()


def _combined(kind: str, names: str) -> Detector:
    combine = import_module("prefixloss.detect.combine")
    return getattr(combine, _COMBINED[kind])([by_name(name) for name in _parts(names)])


def _parts(names: str) -> list[str]:
    """Cut at the commas that stand in no brackets."""
    parts, depth = [""], 0
    for character in names:
        depth += {"(": 1, ")": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts
