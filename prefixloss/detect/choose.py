"""Detectors by name, as commands and settings write them: "auto", "maths,prm:MODEL", "vote(maths,judge:MODEL@URL)"."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields
from importlib import import_module
from typing import Any

from prefixloss import check
from prefixloss.detect.base import Detector
from prefixloss.io.address import Address

_CLASSES = {
    "brackets": "puzzles.brackets.Brackets",
    "code": "code.detector.Code",
    "knights": "puzzles.knights.Knights",
    "maths": "maths.detector.Maths",
    "orderings": "puzzles.orderings.Orderings",
    "rules": "puzzles.rules.Rules",
    "sorting": "puzzles.sorting.Sorting",
    "swaps": "puzzles.swaps.Swaps",
}
# of kind:MODEL, a model in this process, and of kind:URL or kind:MODEL@URL, one behind a server
_OF_MODELS = {"logits": "models.logits.Logits", "prm": "models.prm.PRM", "rollouts": "models.rollouts.Rollouts"}
_OF_SERVERS = {
    "judge": "models.judge.Judge",
    "prm": "models.served_prm.ServedPRM",
    "rollouts": "models.rollouts.ServedRollouts",
}
_NEED_A_NAME = ("judge", "rollouts")  # at their server
# each reads its own kind of problem only; what runs code, or a model, is never chosen unasked
_AUTO = ("brackets", "swaps", "sorting", "orderings", "knights", "maths", "rules")
_COMBINED = {"first": "FirstOf", "earliest": "Earliest", "vote": "Vote"}
_DEEPEST = 16  # brackets within brackets
_GROUP = re.compile(rf"({'|'.join(_COMBINED)})\((.*)\)", re.DOTALL)

_OPTIONS = re.compile(r"\?(?P<all>\w+=[^?/@&=]*(?:&\w+=[^?/@&=]*)*)\Z")
_NUMBERS: dict[str, Any] = {"threshold": float, "max_tokens": int}  # settings that are None unless given

EXPECTED = (
    f"{', '.join(('auto', *_CLASSES))}, several with commas between them (each answers what those before it cannot), "
    "or earliest(...) or vote(...) of several; prm:MODEL, logits:MODEL, rollouts:MODEL, and of "
    "servers prm:URL, prm:MODEL@URL, rollouts:MODEL@URL and judge:MODEL@URL, each perhaps with settings behind "
    "it, as in rollouts:MODEL?samples=32&max_tokens=256"
)


def by_name(name: str, rollouts: Detector | None = None) -> Detector:
    """ValueError if there is none of that name. rollouts: what "rollouts" alone stands for, in training the policy's
    own continuations; elsewhere nothing."""
    if not isinstance(name, str):
        raise TypeError(f"detector: got {type(name).__name__}, expected a name: {EXPECTED}")
    _check_brackets(name)
    return _by_name(name, rollouts)


def _by_name(name: str, rollouts: Detector | None) -> Detector:
    name = name.strip()
    parts = _parts(name)
    if len(parts) > 1:
        return _combined("first", parts, rollouts)
    group = _GROUP.fullmatch(name)
    if group:
        return _combined(group[1], _parts(group[2]), rollouts)
    if name == "auto":
        return _combined("first", _AUTO, rollouts)
    if name == "rollouts" and rollouts is not None:
        return rollouts
    kind, _, setting = name.partition(":")
    if setting:
        return _of_model(name, kind, setting)
    if kind not in _CLASSES:
        raise ValueError(f"detector: got {check.describe(name)}, expected {EXPECTED}")
    return _class(_CLASSES[kind])()


def _of_model(name: str, kind: str, setting: str) -> Detector:
    options = _OPTIONS.search(setting)
    setting = setting[: options.start()] if options else setting
    where = Address.of(setting)
    classes = _OF_SERVERS if where else _OF_MODELS
    if kind in _NEED_A_NAME and (kind not in classes or (where and not where.model)):
        raise ValueError(f"detector: got {name!r}, expected {kind}:MODEL@URL, as in {kind}:maths-7b@http://host/v1")
    if kind not in classes:
        raise ValueError(f"detector: got {check.describe(name)}, expected {EXPECTED}")
    found = {"url": where.url, "model": where.model or ""} if where else {"model": setting}
    cls = _class(classes[kind])
    return cls(**found, **(_options(cls, options["all"]) if options else {}))


def _options(cls: Any, text: str) -> dict[str, Any]:
    """ "samples=32&fall=0.3" as numbers; ValueError for what is no setting of the detector that is a number."""
    known: dict[str, Any] = {f.name: type(f.default) for f in fields(cls) if type(f.default) in (int, float)}
    known |= {f.name: _NUMBERS[f.name] for f in fields(cls) if f.name in _NUMBERS}
    options: dict[str, Any] = {}
    for option in text.split("&"):
        key, _, value = option.partition("=")
        if key not in known:
            raise ValueError(f"detector: got the setting {key!r}, expected one of {', '.join(sorted(known))}")
        try:
            options[key] = known[key](value)
        except ValueError:
            raise ValueError(f"detector: got {option!r}, expected a number") from None
    return options


def _class(path: str) -> Any:
    module, _, cls = path.rpartition(".")
    return getattr(import_module(f"prefixloss.detect.{module}"), cls)


def _combined(kind: str, names: Sequence[str], rollouts: Detector | None) -> Detector:
    combine = import_module("prefixloss.detect.combine")
    return getattr(combine, _COMBINED[kind])([_by_name(name, rollouts) for name in names])


def _check_brackets(name: str) -> None:
    """They pair up, and are no deeper than anybody means: after that `_by_name` comes to an end."""
    depth = 0
    for character in name:
        depth += {"(": 1, ")": -1}.get(character, 0)
        if not 0 <= depth <= _DEEPEST:
            break
    if depth != 0:
        wants = f"brackets that pair up, at most {_DEEPEST} within each other: {EXPECTED}"
        raise ValueError(f"detector: got {check.describe(name)}, expected {wants}")


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
