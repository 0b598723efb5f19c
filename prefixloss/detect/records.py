"""Responses from JSON lines: our own form and those of three published sets with human labels."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from prefixloss.steps import Segmenter, split


class Record(NamedTuple):
    """answer: the right final answer, where the file has it. label: the first wrong step from 0, -1 for none, None
    where nobody has said. source: the line as it was."""

    problem: str
    steps: list[str]
    answer: str | None
    label: int | None
    source: dict[str, Any]


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
    """The objects of a file with one a line, with the lines' numbers from 1; FormatError for anything else."""
    try:
        rows = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
    for number, row in enumerate(rows, 1):
        if not row.strip():
            continue
        try:
            item = json.loads(row)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{path}, line {number}: not JSON ({getattr(error, 'msg', 'too deep')})") from None
        if not isinstance(item, dict):
            raise FormatError(f"{path}, line {number}: expected an object")
        yield number, item


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
    """problem; steps, or response; perhaps answer, the right one."""
    if "steps" in source:
        steps = _texts(source, "steps")
    else:
        text = _get(source, "response", str, "a text, or 'steps' a list of texts")
        steps = [span.of(text) for span in split(text, by)]
    answer = source.get("answer")
    if answer is not None:
        answer = str(_get(source, "answer", (str, int, float), "a text or a number"))
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
        completions = step.get("completions") or []
        chosen = step.get("chosen_completion")
        human = step.get("human_completion")
        taken = completions[chosen] if chosen is not None else human or (completions[0] if completions else None)
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


FORMS: dict[str, Callable[[dict[str, Any], Segmenter], Record]] = {
    "plain": _plain,
    "bigbench-mistake": _bigbench_mistake,
    "processbench": _processbench,
    "prm800k": _prm800k,
}
