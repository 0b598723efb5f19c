"""Responses from JSON lines, or a JSON array: our own forms and those of published sets with labels of the steps."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from prefixloss.detect.maths.answers import right_answer
from prefixloss.steps import Segmenter, split

_MARK = "\u043a\u0438"  # Math-Shepherd's, a syllable that no solution has
_SPACE = re.compile(r"[ \t\r\n]*")
_MARKS = (  # the longer ones first: UTF-32's starts as UTF-16's does
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class Record(NamedTuple):
    """answer: the right final answer, where the file has it. label: the first wrong step from 0, -1 for none, None
    where nobody has said. source: the line as it was. chances: for each step how likely it is right, None where
    nothing is known; None in place of them all where there is a label only."""

    problem: str
    steps: list[str]
    answer: str | None
    label: int | None
    source: dict[str, Any]
    chances: list[float | None] | None = None


class FormatError(ValueError):
    """A file that is not what it should be: names the file, the line and the key."""


def read_records(path: Path, form: str, by: Segmenter = "markers") -> list[Record]:
    """form: one of `FORMS`. by: how responses that come as one text are cut into steps."""
    read = FORMS[form]
    records = []
    for number, source in json_lines(path):
        try:
            record = read(source, by)
            if record.label is not None and not -1 <= record.label < len(record.steps):
                raise FormatError(f"the label {record.label} is no step of {len(record.steps)}")
        except FormatError as error:
            raise FormatError(f"{path}, line {number}: {error}") from None
        records.append(record)
    if not records:
        raise FormatError(f"{path}: no lines")
    return records


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file, one a line or all in one array, with the lines they start in from 1; FormatError for
    anything else."""
    text = _text(path)
    items = _array if text.lstrip().startswith("[") else _lines
    try:
        for number, item in items(text):
            if not isinstance(item, dict):
                raise FormatError(f"line {number}: expected an object")
            yield number, item
    except FormatError as error:
        raise FormatError(f"{path}, {error}") from None


def _lines(text: str) -> Iterator[tuple[int, Any]]:
    for number, row in enumerate(text.split("\n"), 1):
        if row.strip():
            try:
                yield number, json.loads(row)
            except (ValueError, RecursionError) as error:
                raise _not_json(number, error) from None


def _array(text: str) -> Iterator[tuple[int, Any]]:
    """The members of the one array that a text is: each is read by itself, so that its line is known."""
    decoder, number, counted = json.JSONDecoder(), 1, 0
    place = _behind_space(text, text.index("[") + 1)
    if text.startswith("]", place):
        raise FormatError(f"line {_line_of(text, place)}: expected an object, got an empty array")
    ended = False
    while not ended:
        number, counted = number + text.count("\n", counted, place), place
        try:
            item, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            raise _not_json(getattr(error, "lineno", number), error) from None
        yield number, item
        place = _behind_space(text, end)
        ended = text.startswith("]", place)
        if not ended:
            if not text.startswith(",", place):
                raise FormatError(f"line {number}: not JSON (no comma and no ] behind the member that starts here)")
            place = _behind_space(text, place + 1)
    if _behind_space(text, place + 1) < len(text):
        raise FormatError(f"line {_line_of(text, place)}: not JSON (more behind the array's end)")


def _line_of(text: str, place: int) -> int:
    return 1 + text.count("\n", 0, place)


def _behind_space(text: str, place: int) -> int:
    space = _SPACE.match(text, place)
    return space.end() if space else place


def _not_json(number: int, error: ValueError | RecursionError) -> FormatError:
    return FormatError(f"line {number}: not JSON ({getattr(error, 'msg', 'too deep, or too long a number')})")


def _text(path: Path) -> str:
    """UTF-8, or what the byte order mark at its start says."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror}") from None
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        number = data[: error.start].count(b"\n") + 1
        announced = "" if "8" in encoding else f", and not the {encoding.upper()} that its first bytes announce"
        raise FormatError(f"cannot read {path}, line {number}: not UTF-8 text{announced}") from None


def _get(source: dict[str, Any], key: str, kind: type | tuple[type, ...], wants: str) -> Any:
    value = source.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise FormatError(f"the key {key!r} has to be {wants}")
    return value


def _texts(source: dict[str, Any], key: str) -> list[str]:
    values = _get(source, key, list, "a list of texts")
    if not all(isinstance(value, str) for value in values):
        raise FormatError(f"the key {key!r} has to be a list of texts")
    return values


def _plain(source: dict[str, Any], by: Segmenter) -> Record:
    """problem; steps, or response; perhaps answer, the right one, which may be a written solution that states it."""
    if "steps" in source:
        steps = _texts(source, "steps")
    else:
        text = _get(source, "response", str, "a text, or 'steps' a list of texts")
        steps = [span.of(text) for span in split(text, by)]
    answer = source.get("answer")
    if answer is not None:
        answer = right_answer(str(_get(source, "answer", (str, int, float), "a text or a number")))
    return Record(_get(source, "problem", str, "a text"), steps, answer, None, source)


def _bigbench_mistake(source: dict[str, Any], _: Segmenter) -> Record:
    """Tyen et al. 2023 (arXiv 2311.08516)."""
    if "mistake_index" not in source:
        raise FormatError("the key 'mistake_index' is missing")
    label = source["mistake_index"]
    label = -1 if label is None else _get(source, "mistake_index", int, "a whole number or null")
    target = source.get("target")
    answer = None if target is None else str(target)
    return Record(_get(source, "input", str, "a text"), _texts(source, "steps"), answer, label, source)


def _processbench(source: dict[str, Any], _: Segmenter) -> Record:
    """Zheng et al. 2024 (arXiv 2412.06559)."""
    label = _get(source, "label", int, "a whole number")
    return Record(_get(source, "problem", str, "a text"), _texts(source, "steps"), None, label, source)


def _prm800k(source: dict[str, Any], _: Segmenter) -> Record:
    """Lightman et al. 2023 (arXiv 2305.20050): the steps that were gone on from; the first one rated -1 is wrong."""
    question = _get(source, "question", dict, "an object")
    labelled = _get(_get(source, "label", dict, "an object"), "steps", list, "a list")
    steps, label = [], -1
    for number, step in enumerate(labelled):
        taken = _taken(step)
        if taken is None:
            break
        steps.append(_get(taken, "text", str, "a text"))
        if taken.get("rating") == -1:
            label = number
            break
    answer = question.get("ground_truth_answer")
    return Record(
        _get(question, "problem", str, "a text"), steps, None if answer is None else str(answer), label, source
    )


def _taken(step: Any) -> dict[str, Any] | None:
    """The completion that was gone on from, or else the first."""
    if not isinstance(step, dict):
        raise FormatError("the key 'steps' has to be a list of objects")
    completions = _get({"completions": step.get("completions") or []}, "completions", list, "a list")
    chosen, human = step.get("chosen_completion"), step.get("human_completion")
    if chosen is None:
        taken = human or (completions[0] if completions else None)
    elif isinstance(chosen, int) and 0 <= chosen < len(completions):
        taken = completions[chosen]
    else:
        raise FormatError(f"the key 'chosen_completion' has to be one of {len(completions)} completions or null")
    if taken is not None and not isinstance(taken, dict):
        raise FormatError("the key 'completions' has to be a list of objects")
    return taken


def _labelled(source: dict[str, Any], by: Segmenter) -> Record:
    """The plain form with first_error, the number of the first wrong step from 0, or null where there is none; perhaps
    chances, soft labels: for each step how likely it is right, or null."""
    if "first_error" not in source:
        raise FormatError("the key 'first_error' is missing")
    label = source["first_error"]
    label = -1 if label is None else _get(source, "first_error", int, "a whole number or null")
    record = _plain(source, by)
    return record._replace(label=label, chances=_chances(source, len(record.steps)))


def _chances(source: dict[str, Any], count: int) -> list[float | None] | None:
    values = source.get("chances")
    if values is None:
        return None
    wants = f"a list of {count} numbers from 0 to 1, or null for one"
    if not isinstance(values, list) or len(values) != count or not all(map(_is_chance, values)):
        raise FormatError(f"the key 'chances' has to be {wants}")
    return values


def _is_chance(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1)


def _math_shepherd(source: dict[str, Any], _: Segmenter) -> Record:
    """Wang et al. 2023 (arXiv 2312.08935): a mark behind each step of the input, "+" or "-" there in the label."""
    text, marked = _get(source, "input", str, "a text"), _get(source, "label", str, "a text")
    parts = text.split(_MARK)
    first = re.search(r"Step 1\b", parts[0])
    if len(parts) < 2 or first is None:
        raise FormatError(f"the key 'input' has to be a problem, then 'Step 1', and {_MARK!r} behind each step")
    problem, steps = parts[0][: first.start()].strip(), [parts[0][first.start() :], *parts[1:-1]]
    signs, place = [], 0
    for part in parts[:-1]:
        if not marked.startswith(part, place) or marked[place + len(part) :][:1] not in ("+", "-"):
            raise FormatError(f"the key 'label' has to be the input with + or - for each {_MARK!r}")
        place += len(part) + 1
        signs.append(marked[place - 1])
    return Record(problem, steps, None, signs.index("-") if "-" in signs else -1, source)


def _stepwise(source: dict[str, Any], _: Segmenter) -> Record:
    """The "stepwise supervision" of TRL's data sets: prompt, completions, labels (true, or false)."""
    steps, labels = _texts(source, "completions"), _get(source, "labels", list, "a list of true and false")
    if len(labels) != len(steps) or not all(isinstance(label, bool) for label in labels):
        raise FormatError(f"the key 'labels' has to be a list of {len(steps)} of true and false")
    label = labels.index(False) if False in labels else -1
    return Record(_get(source, "prompt", str, "a text"), steps, None, label, source)


FORMS: dict[str, Callable[[dict[str, Any], Segmenter], Record]] = {
    "plain": _plain,
    "labelled": _labelled,
    "bigbench-mistake": _bigbench_mistake,
    "processbench": _processbench,
    "prm800k": _prm800k,
    "math-shepherd": _math_shepherd,
    "stepwise": _stepwise,
}
LABELLED = tuple(form for form in FORMS if form != "plain")
