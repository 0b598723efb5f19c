"""An update's responses on disk, as `prefixloss show` reads them: first errors, reasons, each token's advantage."""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch import Tensor

from prefixloss import TokenAdvantages
from prefixloss.io.files import json_line, write_whole
from prefixloss.rl import task
from prefixloss.rl.policy import Policy
from prefixloss.rl.rollouts import Checked, Sampled
from prefixloss.show import read_shown, to_html
from prefixloss.steps import Segmenter, pieces, split

_ON_A_PAGE = 32  # responses: a few hundred kilobytes


def write_samples(
    path: Path,
    policy: Policy,
    problems: list[task.Problem],
    sampled: Sampled,
    checked: Checked,
    credit: Tensor | TokenAdvantages,
    by: Segmenter,
) -> None:
    """One line a response. by: how they are cut into steps."""
    lines = []
    for i, (problem, text) in enumerate(zip(problems, sampled.texts, strict=True)):
        tokens = pieces(policy.tokenizer, sampled.tokens[i][sampled.mask[i]].tolist())
        spans = split(text, by)
        line: dict[str, Any] = {"problem": problem.question, "steps": [span.of(text) for span in spans]}
        line["answer"] = problem.answer
        line |= {"correct": bool(checked.correct[i]), "first_error": None, "tokens": tokens}
        first = int(checked.first_error[i])
        if first >= 0 and spans:
            end = list(accumulate(map(len, tokens)))[first]
            line["first_error"] = max(0, bisect_left([span.start for span in spans], end) - 1)
            line["reason"] = checked.reasons[i]
        line |= _advantages(credit, i, len(tokens))
        if not line["correct"] and first < 0:
            line |= {"confidence": 0.0, "reason": "no first wrong step was found"}
        lines.append(json_line(line))
    write_whole(path, lambda file: file.write(b"".join(lines)))


def write_page(lines: Path, page: Path) -> None:
    """The first of a file's responses as a page for a browser."""
    html = to_html(read_shown(lines)[:_ON_A_PAGE], page.stem)
    page.parent.mkdir(exist_ok=True)
    write_whole(page, lambda file: file.write(html.encode()))


def _advantages(credit: Tensor | TokenAdvantages, i: int, count: int) -> dict[str, Any]:
    if not isinstance(credit, TokenAdvantages):
        return {"advantages": [round(float(credit[i]), 6)] * count}
    prefix, suffix, length = float(credit.prefix[i]), float(credit.suffix[i]), int(credit.prefix_lengths[i])
    values = [round(prefix, 6)] * length + [round(suffix, 6)] * (count - length)
    return {"advantages": values, "prefix_tokens": length}
